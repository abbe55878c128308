"""A short run that ends well, or in which one rank fails: `torchrun ... ending_worker.py DATA RUN_DIR [FAILING_RANK]`."""

import os
import sys
from pathlib import Path

from rec.config import compose
from rec.data import Reader
from rec.distributed import run_entry
from rec.train import run
from tests.conftest import toy_overrides

if len(sys.argv) > 3 and os.environ["RANK"] == sys.argv[3]:
    make = Reader._batch

    def fail(reader: Reader, step: int, *rest: object) -> object:
        if step == 3:
            raise RuntimeError("the disk is on fire")
        return make(reader, step, *rest)

    Reader._batch = fail

changes = [f"run_dir={sys.argv[2]}", "trainer.num_epochs=50", "checkpoint.resume=auto"]
if len(sys.argv) == 3:
    changes += ["trainer.max_steps=4", "trainer.eval_steps=1"]
run_entry(lambda: run(compose(toy_overrides(Path(sys.argv[1]), *changes), config_dir="tests/conf")))

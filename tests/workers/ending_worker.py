"""A short run that ends well, or in which one rank fails: `torchrun ... ending_worker.py DATA RUN_DIR [FAILING_RANK]`."""

import os
import sys
from pathlib import Path

from rec.config import compose
from rec.data import Reader
from rec.distributed import run_entry
from rec.train import run
from tests.conftest import toy_overrides


def fail_at_step_3() -> None:
    make = Reader._batch

    def fail(reader: Reader, step: int, *rest: object) -> object:
        if step == 3:
            raise RuntimeError("the disk is on fire")
        return make(reader, step, *rest)

    Reader._batch = fail


def main() -> None:
    data, run_dir, *failing = sys.argv[1:]
    if failing == [os.environ["RANK"]]:
        fail_at_step_3()
    changes = ["trainer.num_epochs=50"] if failing else ["trainer.max_steps=4", "trainer.eval_steps=1"]
    run(compose(toy_overrides(Path(data), f"run_dir={run_dir}", *changes), config_dir="tests/conf"))


if __name__ == "__main__":
    run_entry(main)

"""A long run on a tiny model: memory of every rank stays flat, checkpoints and evaluations included.

REC_SOAK_S is how long, in seconds; 2 minutes by default.
"""

import os
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.test_kill import start, wait_for
from tests.test_train import events

SECONDS = float(os.environ.get("REC_SOAK_S", "120"))
GROWTH_MIB = 32  # allowed between the first fifth of the time and its end


def write_tiny(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, rows in (("train", 2_000_000), ("valid", 50_000)):
        (folder / split).mkdir(parents=True)
        item, price = rng.integers(0, 1000, rows), rng.random(rows, np.float32)
        click = rng.random(rows) < 0.1 + 0.3 * price * (item % 2)
        table = pa.table({"item": item, "price": price, "click": click})
        pq.write_table(table, folder / split / "part-0.parquet", row_group_size=100_000)
    return folder


def resident_mib(pid: str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    overrides = [
        *("data=tiny", f"data.path={write_tiny(tmp_path / 'data')}", "reader.global_batch_size=65536"),
        *("experts=shared_bottom", "interaction=none", "model.experts.layer_sizes=[8]", "model.towers.layer_sizes=[]"),
        *("trainer.num_epochs=1000000", "trainer.log_every_steps=50", "checkpoint.every_steps=100"),
        "trainer.eval_every_steps=150",
    ]
    log = tmp_path / "log.txt"
    process = start({"ranks": 2, "folder": str(tmp_path), "overrides": overrides}, log=log)
    files = [tmp_path / "pids" / f"0-{rank}" for rank in range(2)]
    assert wait_for(files, process)
    pids = [file.read_text() for file in files]
    began, sizes = time.monotonic(), []
    while time.monotonic() < began + SECONDS:
        assert process.poll() is None, log.read_text()[-3000:]
        sizes.append([resident_mib(pid) for pid in pids])
        time.sleep(SECONDS / 200)
    process.terminate()
    process.wait(60)
    early, late = np.array(sizes[20:40]).max(axis=0), np.array(sizes[-20:]).max(axis=0)
    last = events(tmp_path / "run", "train")[-1]
    print(
        f"\n{last['rows']:,} rows in {last['step']:,} steps; MiB of each rank early {early.round()}, at the end {late.round()}"
    )
    assert (late - early < GROWTH_MIB).all()
    assert last["step"] > SECONDS
    assert len(events(tmp_path / "run", "checkpoint")) > 1 and len(events(tmp_path / "run", "eval")) > 0

"""A long run on a tiny model: memory of every rank stays flat, checkpoints and evaluations included.

REC_SOAK_S is how long, in seconds; 2 minutes by default, after a while in which buffers grow to their size. An evaluation's rows are
made in a thread of its own; glibc gives each new thread one of many arenas by chance, and every arena keeps what was freed in it, so
that resident memory would go up in steps for as long as there are arenas without any. With one it is flat, or something leaks.
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
WARM_UP = 10  # evaluations
GROWTH_MIB = 16  # allowed between the first quarter of the time and the last; half a MiB an evaluation would make more


def write_tiny(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, rows in (("train", 2_000_000), ("valid", 50_000)):
        (folder / split).mkdir(parents=True)
        item, price = rng.integers(0, 1000, rows), rng.random(rows, np.float32)
        click = rng.random(rows) < 0.1 + 0.3 * price * (item % 2)
        table = pa.table({"item": item, "price": price, "click": click})
        pq.write_table(table, folder / split / "part-0.parquet", row_group_size=100_000)
    return folder


def count(folder: Path, event: str) -> int:
    """Events so far; the last line may be half written."""
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count(f'"event": "{event}"') if path.exists() else 0


def resident_mib(pid: str) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    overrides = [
        *("data=tiny", f"data.path={write_tiny(tmp_path / 'data')}", "reader.global_batch_size=65536"),
        *("experts=shared_bottom", "interaction=none", "model.experts.layer_sizes=[8]", "model.towers.layer_sizes=[]"),
        *("trainer.num_epochs=1000000", "trainer.log_every_steps=50", "checkpoint.every_steps=20"),
        "trainer.eval_every_steps=20",
    ]
    log = tmp_path / "log.txt"
    process = start({"ranks": 2, "folder": str(tmp_path), "overrides": overrides}, log=log)
    files = [tmp_path / "pids" / f"0-{rank}" for rank in range(2)]
    assert wait_for(files, process)
    pids = [file.read_text() for file in files]
    warm_up = time.monotonic() + 600
    while count(tmp_path, "eval") < WARM_UP:
        assert process.poll() is None and time.monotonic() < warm_up, log.read_text()[-3000:]
        time.sleep(1)
    began, sizes = time.monotonic(), []
    while time.monotonic() < began + SECONDS:
        assert process.poll() is None, log.read_text()[-3000:]
        sizes.append([resident_mib(pid) for pid in pids])
        time.sleep(SECONDS / 400)
    process.terminate()
    process.wait(60)
    quarter = len(sizes) // 4
    early, late = np.median(sizes[:quarter], axis=0), np.median(sizes[-quarter:], axis=0)
    kept, evaluated = (count(tmp_path, name) for name in ("checkpoint", "eval"))
    last = events(tmp_path / "run", "train")[-1]
    print(
        f"\n{last['rows']:,} rows in {last['step']:,} steps, {kept} checkpoints, {evaluated} evaluations; "
        f"MiB of each rank early {early.round()}, at the end {late.round()}"
    )
    assert (late - early < GROWTH_MIB).all()
    assert last["step"] > 20 * WARM_UP + SECONDS and kept > WARM_UP / 2 and evaluated > WARM_UP + SECONDS / 20

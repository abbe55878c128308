"""Ranks die at any moment, and the finished run is the one that was never disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, toy_overrides, write_toy
from tests.test_train import events, weights

WORKER = "tests/workers/elastic_worker.py"
ROWS, STEPS_PER_EPOCH = 1004, 21  # of the toy data in batches of 50


def start(*jobs: dict, log: Path) -> subprocess.Popen:
    command = [sys.executable, WORKER, json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as file:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, log: Path, *, timeout: float) -> None:
    try:
        code = process.wait(timeout)
    finally:
        process.kill()
    assert code == 0, log.read_text()[-5000:]


def wait_for(paths: list[Path], process: subprocess.Popen, *, timeout: float = 60) -> bool:
    """Whether all of them come to exist while the process runs."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and process.poll() is None:
        if all(path.exists() and path.read_text() for path in paths):
            return True
        time.sleep(0.01)
    return False


def wait_for_writing(folder: Path, process: subprocess.Popen, *, timeout: float = 10) -> bool:
    """Whether a checkpoint is begun before the time is up; what earlier lives left behind does not count."""
    end, remains = time.monotonic() + timeout, set(folder.glob(".writing_step_*"))
    while time.monotonic() < end and process.poll() is None:
        begun = set(folder.glob(".writing_step_*"))
        if begun - remains:
            return True
        remains &= begun
        time.sleep(0.001)
    return False


def kill_at_random(job: dict, process: subprocess.Popen, *, kills: int, rng: random.Random) -> Counter:
    """Kill a rank `kills` times: half of them at any time from its start on, half while a checkpoint is being written."""
    folder, when = Path(job["folder"]), Counter()
    for attempt in range(kills):
        pids = [folder / "pids" / f"{attempt}-{rank}" for rank in range(job["ranks"])]
        if not wait_for(pids, process):
            break
        if attempt % 2:
            time.sleep(rng.uniform(0, 2.5))
            when["any time"] += 1
        elif wait_for_writing(folder / "run" / "checkpoints", process):
            time.sleep(rng.uniform(0, 0.06))
            when["writing"] += 1
        os.kill(int(rng.choice(pids).read_text()), signal.SIGKILL)
    return when


def rows_of_steps(folder: Path, ranks: int) -> dict[int, list[int]]:
    """Step -> the rows that all ranks learned from in it, in the life of the run that counts: the last that came by."""
    learned: dict[int, list[int]] = {}
    for rank in range(ranks):
        own = {}
        for line in (folder / f"rows-{rank}.txt").read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else the rank died while writing it
                step, *rows = map(int, line.split())
                assert own.setdefault(step, rows) == rows  # a life that was cut short saw the same ones
        for step, rows in own.items():
            learned.setdefault(step, []).extend(rows)
    return learned


def assert_every_row_once_an_epoch(learned: dict[int, list[int]], num_steps: int) -> None:
    assert sorted(learned) == list(range(num_steps))
    for epoch in range(num_steps // STEPS_PER_EPOCH):
        rows = [row for step in range(STEPS_PER_EPOCH) for row in learned[epoch * STEPS_PER_EPOCH + step]]
        assert sorted(rows) == list(range(ROWS))


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> its loss; the last line of a step counts."""
    return {event["step"]: event["loss"] for event in events(run_dir, "train")}


def assert_same_end(got: Path, expected: Path) -> None:
    a, b = weights(got, rng=True), weights(expected, rng=True)
    assert a.keys() == b.keys() and any(key.endswith(".torch") for key in a)
    for key, value in b.items():
        assert torch.equal(a[key], value), key
    assert losses(got) == pytest.approx(losses(expected), rel=1e-12)


def kill_and_compare(tmp_path: Path, *, sharding: str, kills: int, epochs: int) -> Counter:
    data = write_toy(tmp_path / "data")
    fixed = [f"sharding.default={sharding}", f"trainer.num_epochs={epochs}", "trainer.log_every_steps=7"]
    overrides = toy_overrides(
        data, *fixed, "checkpoint.every_steps=5", "optim.schedule.decay=cosine", "trainer.eval_steps=2"
    )
    undisturbed = {"ranks": 2, "folder": str(tmp_path / "undisturbed"), "overrides": overrides}
    disturbed = {"ranks": 2, "folder": str(tmp_path / "disturbed"), "overrides": overrides, "restarts": kills}
    process = start(disturbed, undisturbed, log=tmp_path / "log.txt")
    when = kill_at_random(disturbed, process, kills=kills, rng=random.Random(0))
    finish(process, tmp_path / "log.txt", timeout=60 + epochs * 10)
    assert sum(when.values()) == kills == len(list((tmp_path / "disturbed" / "pids").iterdir())) // 2 - 1
    assert_every_row_once_an_epoch(rows_of_steps(tmp_path / "disturbed", 2), epochs * STEPS_PER_EPOCH)
    assert_same_end(tmp_path / "disturbed" / "run", tmp_path / "undisturbed" / "run")
    assert not list((tmp_path / "disturbed" / "run" / "checkpoints").glob(".*"))
    return when


def test_killed_three_times_and_gone_on(tmp_path: Path) -> None:
    kill_and_compare(tmp_path, sharding="row_wise", kills=3, epochs=10)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["row_wise", "column_wise"])
def test_killed_at_fifty_random_moments(tmp_path: Path, sharding: str) -> None:
    when = kill_and_compare(tmp_path, sharding=sharding, kills=50, epochs=80)
    assert when["writing"] >= 20

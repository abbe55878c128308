import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rec.interrupts import STOPPED, StopSignal, forget_stop, tell_launcher
from tests.conftest import CONF, ROOT, toy_overrides
from tests.test_kill import assert_every_row_once_an_epoch, assert_same_end, finish, losses, rows_of_steps, start
from tests.test_train import events

FIXED = [
    "trainer.num_epochs=4",
    "trainer.eval_every_steps=20",
    "trainer.log_every_steps=7",
    "checkpoint.every_steps=40",
]


def test_notes_every_signal_and_leaves_as_it_was() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_tells_the_launcher_once_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_launcher(7)  # nobody asked
    monkeypatch.setenv("REC_STOPPED_FILE", str(tmp_path / "stopped"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    tell_launcher(7)
    assert not (tmp_path / "stopped").exists()
    monkeypatch.setenv("LOCAL_RANK", "0")
    tell_launcher(7)
    assert (tmp_path / "stopped").read_text() == "7\n"
    forget_stop()
    assert (tmp_path / "stopped").read_text() == ""


@pytest.fixture(scope="module")
def stopped(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, one of which gets SIGTERM: in a step, in an evaluation, in the last step. And one that is left in peace."""
    folder = tmp_path_factory.mktemp("stopped")
    hooks = {
        "fail": [0, "train_step", 50, "fail"],
        "peace": None,
        "step": [1, "train_step", 33, "terminate"],
        "eval": [0, "_heed_signal", 30, "terminate"],
        "last": [1, "train_step", 84, "terminate"],
    }
    jobs = [
        {"ranks": 2, "restarts": 1, "folder": f"{folder}/{name}", "overrides": toy_overrides(toy, *FIXED), "hook": hook}
        for name, hook in hooks.items()
    ]
    finish(start(*jobs, log=folder / "log.txt"), folder / "log.txt", timeout=240)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "step"), [("step", 33), ("eval", 40), ("last", 84)])
class TestStopped:
    def test_saves_where_it_stands_and_goes_on_from_there(self, stopped: Path, name: str, step: int) -> None:
        first, last = events(stopped / name / "run", "end")
        assert (first["step"], first["reason"]) == (step, "told to stop")
        assert (last["step"], last["reason"]) == (84, "all steps done")
        assert events(stopped / name / "run", "start")[1]["step"] == step

    def test_ends_as_if_left_in_peace(self, stopped: Path, name: str, step: int) -> None:
        assert_same_end(stopped / name / "run", stopped / "peace" / "run")
        assert_every_row_once_an_epoch(rows_of_steps(stopped / name, 2), 84)

    def test_every_evaluation_took_place_once(self, stopped: Path, name: str, step: int) -> None:
        got, expected = (
            [(e["step"], e["metrics"]) for e in events(stopped / of / "run", "eval")] for of in (name, "peace")
        )
        assert [at for at, _ in got] == [20, 40, 60, 80, 84]
        assert got == expected


@pytest.mark.slow
def test_an_exception_in_a_rank_is_gone_over_too(stopped: Path) -> None:
    assert [event["step"] for event in events(stopped / "fail" / "run", "start")] == [0, 40]  # the newest checkpoint
    assert_same_end(stopped / "fail" / "run", stopped / "peace" / "run")
    assert_every_row_once_an_epoch(rows_of_steps(stopped / "fail", 2), 84)


@pytest.mark.slow
def test_every_rank_ends_with_the_code_that_says_so(stopped: Path) -> None:
    said = (stopped / "log.txt").read_text()
    assert said.count(f"exitcode: {STOPPED}") >= 3
    assert "told to stop; saved at step 33" in said


def test_sigterm_to_torchrun(toy: Path, tmp_path: Path) -> None:
    """The command of the README, told to stop and started again; how long it takes to stop is bounded."""
    run = [
        "-m",
        "rec.train",
        "--config-dir",
        str(CONF),
        *toy_overrides(toy, f"run_dir={tmp_path}/run", "trainer.num_epochs=400"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *run]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "REC_STOPPED_FILE": str(tmp_path / "stopped"),
    }
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and '"train"' in metrics.read_text()):
            assert process.poll() is None, (tmp_path / "log.txt").read_text()
            time.sleep(0.1)
        process.terminate()
        began = time.monotonic()
        assert process.wait(timeout=60) != 0
        assert time.monotonic() - began < 30
    finally:
        process.kill()
    step = int((tmp_path / "stopped").read_text())
    assert events(tmp_path / "run", "end")[-1]["step"] == step
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == f"step_{step:09d}"


@pytest.mark.slow
def test_any_number_of_ranks_goes_on_after_any_other(tmp_path: Path, toy: Path) -> None:
    """1 to 4 ranks stop in the middle of an epoch, 1 to 4 go on: the loss curve is the undisturbed one's."""
    kind = ["optim.sparse.eps=1e-3", "optim.dense.eps=1e-3", "trainer.log_every_steps=1", "trainer.eval_split=null"]
    overrides = toy_overrides(toy, *kind, "trainer.num_epochs=2", "sharding.default=row_wise")
    log, ranks = tmp_path / "log.txt", (1, 2, 3, 4)
    whole = {"ranks": 1, "folder": f"{tmp_path}/whole", "overrides": overrides}
    halves = [
        {"ranks": n, "folder": f"{tmp_path}/half-{n}", "overrides": [*overrides, "trainer.max_steps=17"]} for n in ranks
    ]
    finish(start(whole, *halves, log=log), log, timeout=400)
    for before in ranks:
        for after in ranks:
            shutil.copytree(tmp_path / f"half-{before}" / "run", tmp_path / f"{before}-{after}" / "run")
    rest = [{"ranks": m, "folder": f"{tmp_path}/{n}-{m}", "overrides": overrides} for n in ranks for m in ranks]
    finish(start(*rest, log=log), log, timeout=600)
    expected = losses(tmp_path / "whole" / "run")
    assert len(expected) == 42
    for before in ranks:
        for after in ranks:
            got = losses(tmp_path / f"{before}-{after}" / "run")
            np.testing.assert_allclose(
                [got[s] for s in expected], list(expected.values()), rtol=1e-6, err_msg=f"{before}-{after}"
            )

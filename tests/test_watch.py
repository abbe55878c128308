import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rec import watch
from rec.distributed import process_group
from tests.conftest import toy_overrides
from tests.test_checkpoint import one_process
from tests.test_kill import finish, start
from tests.test_train import events

STALL_S = 2  # of 9 seconds that a rank stands still


@pytest.fixture(scope="module")
def watched(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks: rank 1 stands still before or within a step, rank 1 or 0 is stopped, rank 1 cannot run Python."""
    folder = tmp_path_factory.mktemp("watched")
    hooks = {
        "still": [1, "train_step", 10, "stand_still"],
        "slow": [1, "_total", 10, "stand_still"],  # between forward and backward
        "frozen": [1, "train_step", 10, "freeze"],
        "frozen_main": [0, "train_step", 10, "freeze"],
        "blocked": [1, "train_step", 10, "block"],
    }
    fixed = [
        "trainer.max_steps=20",
        "trainer.log_every_steps=1",
        "trainer.eval_split=null",
    ]
    running = {}
    for name, hook in {**hooks, "moving": None}.items():  # side by side: they mostly wait
        job = {
            "ranks": 2,
            "folder": f"{folder}/{name}",
            "overrides": toy_overrides(toy, *fixed, f"trainer.stall_s={STALL_S if hook else 30}"),
            "hook": hook,
        }
        running[name] = start(job, log=folder / f"{name}.txt")
    for name, process in running.items():
        finish(process, folder / f"{name}.txt", timeout=120)
    return folder


def warnings(run: Path) -> list[str]:
    return [event["message"] for event in events(run / "run", "warning")]


@pytest.mark.slow
def test_a_rank_that_stands_still_is_named_before_the_others_and_its_stacks_are_shown(watched: Path) -> None:
    first, *_ = warnings(watched / "still")
    assert re.match(r"rank 1 \(\S+, process \d+\) has not moved for \d s, in waiting for data of step 9; stacks", first)
    said = (watched / "still.txt").read_text()
    assert "stand_still" in said and "elastic_worker.py" in said
    assert "MainThread (" in said and "watch (" in said  # the stack of every thread
    assert "stand_still" in (watched / "still" / "run" / "stacks" / "rank_1.txt").read_text()


@pytest.mark.slow
def test_a_rank_that_does_not_come_out_of_a_step_is_named(watched: Path) -> None:
    first, *_ = warnings(watched / "slow")
    assert re.match(r"rank 1 \(\S+, process \d+\) has not moved for \d s, in computing of step 9; stacks", first)


@pytest.mark.slow
def test_a_frozen_process_is_named(watched: Path) -> None:
    first, *_ = warnings(watched / "frozen")
    assert re.match(r"rank 1 \(\S+, process \d+\) has given no sign of life for \d s: its process is stopped$", first)


@pytest.mark.slow
def test_a_process_that_cannot_run_python_shows_its_stacks(watched: Path) -> None:
    first, *_ = warnings(watched / "blocked")
    assert re.match(
        r"rank 1 \(\S+, process \d+\) has given no sign of life for \d s: its interpreter is blocked;", first
    )
    assert re.search(r"elastic_worker.py\", line \d+ in block", (watched / "blocked.txt").read_text())


@pytest.mark.slow
def test_rank_1_says_so_of_rank_0(watched: Path) -> None:
    assert re.search(
        r"rank 0 \(\S+, process \d+\) has given no sign of life for \d s", (watched / "frozen_main.txt").read_text()
    )


@pytest.mark.slow
def test_all_go_on_once_the_rank_does(watched: Path) -> None:
    for name in ("still", "slow", "frozen", "frozen_main", "blocked"):
        assert events(watched / name / "run", "end")[-1]["reason"] == "all steps done"


def test_a_process_of_another_host_is_not_asked(tmp_path: Path) -> None:
    with one_process(), process_group() as rank:
        one = watch.Watch(rank, tmp_path, stall_s=20, report=print)
        own = one._own
        assert "its interpreter is blocked (py-spy dump" in one._ask(replace(own, host="another"))
        assert "its interpreter is blocked (py-spy dump" in one._ask(replace(own, born="1"))  # another container's
        assert one._ask(replace(own, pid=2**22 + 1)) == "its process is gone"


def test_a_rank_that_was_told_to_stop_and_cannot_come_to_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    monkeypatch.setattr(watch, "_PATIENCE_S", 0.2)
    monkeypatch.setattr("os._exit", codes.append)
    with one_process(), process_group() as rank:
        with watch.Watch(rank, tmp_path, stall_s=20, report=print, told=lambda: False) as left_alone:
            left_alone.moving("computing", step=3)
            time.sleep(0.5)
        assert codes == []
        with watch.Watch(rank, tmp_path, stall_s=0.4, report=print, told=lambda: True) as told:
            told.moving("saving", step=3)
            time.sleep(0.6)
            assert codes == []  # a checkpoint is worth waiting for
            told.moving("computing", step=3)
            time.sleep(0.8)
        assert 1 in codes


@pytest.mark.slow
@pytest.mark.parametrize("run", ["still", "slow"])
def test_the_log_says_who_waited_for_whom(watched: Path, run: str) -> None:
    line = events(watched / run / "run", "train")[9]  # the step in which rank 1 stood still
    assert line["step"] == 10
    spent = line["seconds_per_step"]
    assert spent["peers"]["rank"] == 0 and spent["peers"]["max"] > 6  # rank 0 waited for rank 1
    assert spent["rest"]["rank"] == 1 and spent["rest"]["max"] > 6  # which did something else
    assert set(spent) == {"data", "peers", "rest"}


@pytest.mark.slow
def test_nothing_is_reported_of_a_run_that_moves(watched: Path) -> None:
    assert not (watched / "moving" / "run" / "stacks").exists()
    assert warnings(watched / "moving") == []

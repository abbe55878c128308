import time
from collections.abc import Iterator

import pytest
import torch

from rec.distributed import process_group
from rec.losses import Losses
from rec.window import Window
from tests.test_checkpoint import one_process


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_process(), process_group():
        yield


def losses(*by_task: float) -> Losses:
    return Losses(torch.tensor(sum(by_task)), torch.tensor(by_task), torch.tensor(by_task))


def test_means_over_the_steps_since_the_last_close() -> None:
    window = Window(2, torch.device("cpu"))
    window.restart(1000)
    window.add(losses(1.0, 3.0))
    window.add(losses(2.0, 5.0))
    time.sleep(0.1)
    stretch = window.close(1300)
    assert (stretch.loss, stretch.by_task) == (5.5, [1.5, 4.0])
    assert 0 < stretch.rows_per_second < 300 / 0.1
    assert stretch.memory_mib > 50
    assert window.close(1300).loss == 0.0  # nothing since


def test_where_the_time_went() -> None:
    def slow() -> Iterator[int]:
        for item in (1, 2):
            time.sleep(0.05)
            yield item

    window, started = Window(1, torch.device("cpu")), time.monotonic()
    for _ in window.waiting_for_data(slow()):
        with window.spending("peers"):
            time.sleep(0.1)
        time.sleep(0.02)
        window.add(losses(1.0))
    seconds = window.close(0).seconds  # of a step
    assert seconds["data"]["max"] >= 0.05 and seconds["peers"]["max"] >= 0.1 and seconds["rest"]["max"] >= 0.02
    assert sum(of["max"] for of in seconds.values()) <= (time.monotonic() - started) / 2  # nothing is counted twice
    assert all(of["rank"] == 0 and of["mean"] == of["max"] for of in seconds.values())


def test_state_goes_on() -> None:
    window, other = Window(2, torch.device("cpu")), Window(2, torch.device("cpu"))
    window.add(losses(1.0, 3.0))
    other.load(window.state())
    for one in (window, other):
        one.add(losses(2.0, 2.0))
    a, b = window.close(0), other.close(0)
    assert (a.loss, a.by_task) == (b.loss, b.by_task) == (4.0, [1.5, 2.5])

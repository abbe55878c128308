import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rec.distributed import process_group
from rec.guard import Guard, GuardConfig, Trouble
from rec.schema import ConfigError
from tests.conftest import start_ranks
from tests.test_checkpoint import one_process
from tests.test_train import events

TASKS = ["click", "buy"]


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    with one_process(), process_group():
        yield


def judge(guard: Guard, loss: float, *, by_task: tuple[float, float] = (0.1, 0.1), told: bool = False):
    return guard.judge(torch.tensor(loss), torch.tensor(by_task), told=told)


class TestJudge:
    def test_a_usual_step_is_learned_from(self) -> None:
        assert judge(Guard(GuardConfig(), TASKS), 0.7).trouble is None

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("action", list(Trouble))
    def test_a_loss_that_is_no_number(self, bad: float, action: Trouble) -> None:
        guard = Guard(GuardConfig(not_finite=action), TASKS)
        verdict = judge(guard, bad, by_task=(0.1, bad))
        assert verdict.trouble is action and verdict.why == f"the loss is {bad}, that of buy"
        assert guard.skipped == (action is Trouble.skip)

    def test_a_task_that_weighs_nothing_is_looked_at_too(self) -> None:
        verdict = judge(Guard(GuardConfig(), TASKS), 0.7, by_task=(math.nan, 0.1))
        assert verdict.trouble is Trouble.stop and "that of click" in verdict.why

    def test_told_to_stop(self) -> None:
        guard = Guard(GuardConfig(), TASKS)
        assert judge(guard, 0.7, told=True).told and not judge(guard, 0.7).told

    def test_a_gradient_that_was_no_number_stops_the_next_step(self) -> None:
        guard = Guard(GuardConfig(not_finite=Trouble.skip), TASKS)
        assert guard.healthy
        guard.note_gradient(torch.tensor(math.inf))
        assert not guard.healthy
        verdict = judge(guard, 0.7)
        assert verdict.trouble is Trouble.stop and "the norm inf" in verdict.why

    def test_spikes_are_measured_against_the_median_and_not_counted_into_it(self) -> None:
        guard = Guard(GuardConfig(spike_factor=3, spike_window=10), TASKS)
        for loss in (9.0, 1.0, 1.0, 1.0):
            assert judge(guard, loss).trouble is None  # too few to tell
        assert judge(guard, 1.1).trouble is None
        for _ in range(20):
            assert judge(guard, 3.1).trouble is Trouble.skip
        assert judge(guard, 2.9).trouble is None
        assert guard.skipped == 20

    def test_no_spikes_by_default(self) -> None:
        guard = Guard(GuardConfig(), TASKS)
        assert all(judge(guard, loss).trouble is None for loss in [1.0] * 100 + [1e9])

    def test_too_many_skipped_steps_stop(self) -> None:
        guard = Guard(GuardConfig(not_finite=Trouble.skip, max_skipped=2), TASKS)
        actions = [judge(guard, math.nan).trouble for _ in range(3)]
        assert actions == [Trouble.skip, Trouble.skip, Trouble.stop]

    def test_state_goes_on(self) -> None:
        guard, other = (Guard(GuardConfig(spike_factor=3, spike_window=10), TASKS) for _ in range(2))
        for loss in (1.0, 2.0, 3.0, 4.0, 5.0):
            judge(guard, loss)
        judge(guard, 99.0)
        other.load(guard.state())
        assert other.skipped == 1 and torch.equal(other.state(), guard.state())
        assert judge(other, 9.1).trouble is Trouble.skip and judge(other, 8.9).trouble is None

    @pytest.mark.parametrize("setting", ["spike_factor=0.5", "spike_window=3", "max_skipped=0"])
    def test_out_of_range(self, setting: str) -> None:
        name, _, value = setting.partition("=")
        with pytest.raises(ConfigError, match=rf"trainer\.guard\.{name} is {value}(\.0)?, expected"):
            GuardConfig(**{name: float(value)})


@pytest.fixture(scope="module")
def said(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    """Runs on two ranks with something wrong in the middle: their folder, and what each rank says of them."""
    folder = tmp_path_factory.mktemp("trouble")
    printed = start_ranks("tests/workers/trouble_worker.py", str(toy), str(folder))
    return folder, json.loads(re.search(r"^SAID (.*)$", printed, re.M)[1])


class TestOnTwoRanks:
    def test_all_ranks_stop_in_the_same_step_and_say_the_same(self, said: tuple[Path, list[dict[str, str]]]) -> None:
        folder, (one, two) = said
        assert one["stop"] == two["stop"]
        assert one["stop"].startswith("TroubleError: step 5 (epoch 0, its step 4): the loss is ")
        assert re.search(r"rows: \S+part-\d\.parquet, row group \d, row \d+", one["stop"])
        assert "columns: price (up to 3e+38)" in one["stop"] and "click" in one["stop"] and "tables:" not in one["stop"]
        assert [event["step"] for event in events(folder / "stop", "train")] == [1, 2, 3, 4]
        assert not list((folder / "stop" / "checkpoints").glob("step_*"))  # nothing that was learned from it is kept

    def test_a_skipped_step_is_counted_and_nothing_is_learned_from_it(
        self, said: tuple[Path, list[dict[str, str]]]
    ) -> None:
        folder, every = said
        assert [of["skip"] for of in every] == ["trained"] * 2
        lines = events(folder / "skip", "train")
        assert [line["skipped_steps"] for line in lines] == [0] * 4 + [1] * 5
        assert all(math.isfinite(line["loss"]) for line in lines)
        (warning,) = events(folder / "skip", "warning")
        assert "skipped, 1 so far" in warning["message"] and "price" in warning["message"]

    def test_a_spike_is_left_out(self, said: tuple[Path, list[dict[str, str]]]) -> None:
        folder, (one, _) = said
        assert one["spike"] == one["no_spike"] == "trained"
        losses = {name: [line["loss"] for line in events(folder / name, "train")] for name in ("spike", "no_spike")}
        assert losses["spike"][:7] == losses["no_spike"][:7]
        assert losses["no_spike"][7] > 100 * losses["no_spike"][6]
        assert losses["spike"][8] < 2 * losses["spike"][6]
        assert "median" in events(folder / "spike", "warning")[0]["message"]

    def test_the_table_at_fault_is_named(self, said: tuple[Path, list[dict[str, str]]]) -> None:
        _, (one, two) = said
        assert one["table"] == two["table"]
        assert one["table"].startswith("TroubleError: step 4 ") and re.search(
            r"tables: item \(\d+ rows\)", one["table"]
        )

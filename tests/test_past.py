import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest

from rec.past import NEVER_HOURS, Past, Rates, codes, rate_columns

NUM_ROWS = 300
HOUR = 3_600_000


@pytest.fixture(scope="module", params=[0, 1])
def log(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """Rows in no order, of which many share a moment, also within a group; some groups have no events."""
    rng = np.random.default_rng(request.param)
    group = rng.integers(0, 12, NUM_ROWS)
    return {
        "group": group,
        "time": 1_650_812_400_000 + rng.integers(0, 60, NUM_ROWS) * (HOUR // 6),
        "event": (rng.random(NUM_ROWS) < 0.4) & (group != 3),
        "value": rng.random((NUM_ROWS, 2)),
    }


def past_rows(log: dict[str, np.ndarray], row: int, *, events: bool) -> list[int]:
    """Rows of the group at earlier times, oldest first, by a scan of all."""
    found = [
        other
        for other in range(NUM_ROWS)
        if log["group"][other] == log["group"][row]
        and log["time"][other] < log["time"][row]
        and (log["event"][other] or not events)
    ]
    return sorted(found, key=lambda other: log["time"][other])  # stable: rows of a moment keep their order


@pytest.mark.parametrize("events", [False, True])
def test_past_equals_a_scan_of_all_rows(log: dict[str, np.ndarray], events: bool) -> None:
    past = Past(log["group"], log["time"], events=log["event"] if events else None)
    sums, lists = past.sums(log["value"]), past.lists(np.arange(NUM_ROWS), max_length=4).to_pylist()
    counts, recent, hours = past.count(), past.count(window_ms=HOUR), past.hours_since()
    newest, third = past.row(), past.row(3)
    seen = [past_rows(log, row, events=events) for row in range(NUM_ROWS)]
    assert min(map(len, seen)) == 0
    assert max(map(len, seen)) > 4
    for row, mine in enumerate(seen):
        ages = [(log["time"][row] - log["time"][other]) / HOUR for other in mine]
        assert counts[row] == len(mine)
        assert recent[row] == sum(age <= 1 for age in ages)
        np.testing.assert_allclose(sums[row], log["value"][mine].sum(axis=0), atol=1e-9)
        assert lists[row] == mine[-4:]
        assert newest[row] == (mine[-1] if mine else -1)
        assert third[row] == (mine[-3] if len(mine) > 2 else -1)
        assert hours[row] == pytest.approx(ages[-1] if mine else NEVER_HOURS)


@pytest.mark.parametrize("events", [False, True])
def test_a_session_ends_with_a_pause_of_more_than_half_an_hour(log: dict[str, np.ndarray], events: bool) -> None:
    found = Past(log["group"], log["time"], events=log["event"] if events else None).session_position()
    longest = 0
    for row in range(NUM_ROWS):
        position, time = 0, log["time"][row]
        for other in reversed(past_rows(log, row, events=events)):
            if time - log["time"][other] > HOUR // 2:
                break
            position, time = position + 1, log["time"][other]
        assert found[row] == position
        longest = max(longest, position)
    assert longest > 3


@pytest.mark.parametrize("num_rows", [0, 5])
def test_without_events_nothing_is_known(num_rows: int) -> None:
    group, time = np.zeros(num_rows, np.int64), np.arange(num_rows) + 10
    past = Past(group, time, events=np.zeros(num_rows, bool))
    assert past.count().tolist() == past.session_position().tolist() == [0] * num_rows
    assert past.row().tolist() == [-1] * num_rows
    assert past.hours_since().tolist() == [NEVER_HOURS] * num_rows
    assert past.lists(group, max_length=3).to_pylist() == [[]] * num_rows
    assert past.sums(np.ones((num_rows, 2))).tolist() == [[0, 0]] * num_rows


def test_codes_tell_tuples_apart() -> None:
    rng = np.random.default_rng(0)
    columns = [rng.integers(-4, 4, 200) * scale for scale in (1, 2**50, 3)]
    tuples = list(zip(*(column.tolist() for column in columns), strict=True))
    found = codes(*columns).tolist()
    assert len(set(found)) == len(set(tuples)) == len(set(zip(tuples, found, strict=True)))
    assert sorted(set(found)) == list(range(len(set(found))))


def loop_rates(past: list[int], outcomes: np.ndarray, *, prior: np.ndarray, strength: float) -> np.ndarray:
    return (sum((outcomes[other] for other in past), np.zeros(outcomes.shape[1])) + strength * prior) / (
        len(past) + strength
    )


def vector(count: int, rate: np.ndarray, base: np.ndarray) -> Sequence[float]:
    return [math.log10(1 + count), *(np.log(rate / (1 - rate)) - np.log(base / (1 - base)))]


def test_rates_lean_on_their_parent_and_lists_pool(log: dict[str, np.ndarray]) -> None:
    rng = np.random.default_rng(2)
    user, tags = log["group"], [rng.choice(4, n, replace=False).tolist() for n in rng.integers(0, 3, NUM_ROWS)]
    outcomes = (rng.random((NUM_ROWS, 2)) < [0.5, 0.1]).astype(float)
    keys = {"user": user, "tags": pa.array(tags, pa.list_(pa.int64()))}
    rates = {"users": Rates(("user",), 10), "user_tags": Rates(("user", "tags"), 5, "users")}
    found = rate_columns(rates, keys, time=log["time"], outcomes=outcomes)
    for row in range(NUM_ROWS):
        earlier = np.flatnonzero(log["time"] < log["time"][row]).tolist()
        mine = [other for other in earlier if user[other] == user[row]]
        pooled = [other for other in mine for tag in tags[row] if tag in tags[other]]  # once a tag in common
        base = loop_rates(earlier, outcomes, prior=np.full(2, 0.05), strength=20)
        of_user = loop_rates(mine, outcomes, prior=base, strength=10)
        of_tags = loop_rates(pooled, outcomes, prior=of_user, strength=5)
        np.testing.assert_allclose(found["users"][row], vector(len(mine), of_user, base), atol=1e-9)
        np.testing.assert_allclose(found["user_tags"][row], vector(len(pooled), of_tags, base), atol=1e-9)

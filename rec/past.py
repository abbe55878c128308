"""What was known strictly before each row: counts, sums, rates, newest rows and histories, point in time.

Rows of the same millisecond (one page of items) do not see each other's outcomes. An outcome counts as known from the next
millisecond on; a live system learns it some seconds or minutes later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
SESSION_GAP_MS = HOUR_MS // 2
NEVER_HOURS = 1000.0  # stands for "hours since" where it has not happened yet: longer than a month


def codes(*columns: np.ndarray) -> np.ndarray:
    """Dense codes [N] int64 of the distinct tuples of `columns`, each [N] of integers.

    >>> codes(np.array([5, 5, 9, 5]), np.array([0, 1, 0, 0])).tolist()
    [0, 1, 2, 0]
    """
    code = np.unique(columns[0], return_inverse=True)[1]
    for column in columns[1:]:
        other = np.unique(column, return_inverse=True)[1]
        code = np.unique(code * (other.max(initial=0) + 1) + other, return_inverse=True)[1]
    return code


class Past:
    """For each row, the events of its group at a strictly earlier time.

    Events lie in one array sorted by (group, time), so a row's past is the slice `start[i]:stop[i]` of it, and a sum over
    the past is a difference of two cumulative sums. Rows may come in any order; events of one moment keep theirs.

    Args:
        group: [N] dense codes, as `codes` gives them.
        time: [N] int64, milliseconds.
        events: [N] bool, rows that count as events; default: all.

    >>> past = Past(np.zeros(4, int), np.array([10, 20, 20, 30]))
    >>> past.count().tolist()  # the two of time 20 do not see each other
    [0, 1, 1, 3]
    """

    def __init__(self, group: np.ndarray, time: np.ndarray, *, events: np.ndarray | None = None) -> None:
        first = time.min(initial=np.iinfo(np.int64).max)
        span = int(time.max(initial=0)) - int(first) + 1
        self._time, self._floor = time, group.astype(np.int64) * span
        self._key = self._floor + (time - first)
        chosen = np.arange(len(time)) if events is None else np.flatnonzero(events)
        self.order = chosen[np.argsort(self._key[chosen], kind="stable")]  # [E] rows of the events
        self._sorted = self._key[self.order]
        self.start = np.searchsorted(self._sorted, self._floor)
        self.stop = np.searchsorted(self._sorted, self._key)

    def _starts(self, window_ms: int | None) -> np.ndarray:
        if window_ms is None:
            return self.start
        return np.searchsorted(self._sorted, np.maximum(self._floor, self._key - window_ms))

    def count(self, *, window_ms: int | None = None) -> np.ndarray:
        """Number of past events [N] int64, all or those at most `window_ms` old."""
        return self.stop - self._starts(window_ms)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sums [N, K] float64 over the past of `values` [N, K]."""
        total = np.zeros((len(self.order) + 1, values.shape[1]))
        np.cumsum(values[self.order], axis=0, out=total[1:])
        return total[self.stop] - total[self.start]

    def row(self, back: int = 1) -> np.ndarray:
        """Row [N] of the `back`-th newest past event; -1 where there is none."""
        at = self.stop - back
        known = at >= self.start
        return np.where(known, self.order[np.where(known, at, 0)], -1) if len(self.order) else np.full(len(at), -1)

    def hours_since(self) -> np.ndarray:
        """Hours [N] since the newest past event, `NEVER_HOURS` where there is none."""
        row = self.row()
        return np.where(row >= 0, (self._time - self._time[row]) / HOUR_MS, NEVER_HOURS)

    def lists(self, ids: np.ndarray, *, max_length: int) -> pa.ListArray:
        """`ids` [N] of the newest `max_length` past events, newest last, as a list column of N rows."""
        start = np.maximum(self.start, self.stop - max_length)
        offsets, position = slices(start, self.stop - start)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(ids[self.order][position]))

    def session_position(self) -> np.ndarray:
        """Past events [N] of the running session, which ends with a pause of more than `SESSION_GAP_MS`."""
        time, floor = self._time[self.order], self._floor[self.order]
        begins = np.diff(time, prepend=0) > SESSION_GAP_MS
        begins |= np.diff(floor, prepend=-1) != 0
        begin = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        running = np.flatnonzero(self.hours_since() * HOUR_MS <= SESSION_GAP_MS)
        position = np.zeros(len(self.stop), np.int64)
        position[running] = self.stop[running] - begin[self.stop[running] - 1]
        return position


def slices(start: np.ndarray, length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [N + 1] of N slices laid end to end, and the position of each of their items in the source.

    >>> [part.tolist() for part in slices(np.array([7, 0]), np.array([2, 1]))]
    [[0, 2, 3], [7, 8, 0]]
    """
    offsets = np.concatenate([[0], np.cumsum(length)])
    return offsets, np.arange(offsets[-1]) + np.repeat(start - offsets[:-1], length)


@dataclass(frozen=True)
class Rates:
    """Counters of one grouping. `parent` is the grouping whose rate a thin group leans on; default: all rows so far."""

    keys: tuple[str, ...]
    strength: float  # weight of the parent's rate, in rows
    parent: str | None = None


def rate_columns(
    rates: Mapping[str, Rates],
    keys: Mapping[str, np.ndarray | pa.ListArray],
    *,
    time: np.ndarray,
    outcomes: np.ndarray,
) -> dict[str, np.ndarray]:
    """Of each grouping a vector [N, 1 + K] float64: log10(1 + count), then logit(rate) - logit(rate of all rows).

    Args:
        rates: groupings, a parent before its children.
        keys: columns that `rates` names, [N] of integers; the last one of a grouping may be a list column (then a row pools
            the groups in its list).
        time: [N] int64, milliseconds.
        outcomes: [N, K], 0 to 1.
    """
    base = base_rates(time, outcomes)
    found: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for name, spec in rates.items():
        count, positives = totals([keys[key] for key in spec.keys], time=time, outcomes=outcomes)
        prior = base if spec.parent is None else found[spec.parent]
        found[name] = smoothed(count, positives, prior=prior, strength=spec.strength)
        columns[name] = np.column_stack([np.log10(1 + count), logit(found[name]) - logit(base)])
    return columns


def base_rates(time: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Rate [N, K] of each outcome over all rows so far; 1 in 20 before the first, so never 0 or 1."""
    past = Past(np.zeros(len(time), np.int64), time)
    return smoothed(past.count(), past.sums(outcomes), prior=np.full(outcomes.shape, 0.05), strength=20)


def smoothed(count: np.ndarray, positives: np.ndarray, *, prior: np.ndarray, strength: float) -> np.ndarray:
    """(positives + strength * prior) / (count + strength), [N, K] for `count` [N], `positives` and `prior` [N, K]."""
    return (positives + strength * prior) / (count[:, None] + strength)


def totals(
    keys: Sequence[np.ndarray | pa.ListArray], *, time: np.ndarray, outcomes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Past events [N] of each row's group, and the sums [N, K] of their outcomes; the last key may be a list column."""
    if not isinstance(keys[-1], pa.ListArray):
        past = Past(codes(*keys), time)
        return past.count(), past.sums(outcomes)
    row = np.asarray(pc.list_parent_indices(keys[-1]))
    flat = [*(np.asarray(key)[row] for key in keys[:-1]), np.asarray(keys[-1].flatten())]
    past = Past(codes(*flat), time[row])
    sums = past.sums(outcomes[row])
    pooled = [np.bincount(row, weights, len(time)) for weights in (past.count(), *sums.T)]
    return pooled[0], np.column_stack(pooled[1:])


def logit(rate: np.ndarray) -> np.ndarray:
    """log(p / (1 - p)), with p kept from 1e-5 to 1 - 1e-5."""
    rate = np.clip(rate, 1e-5, 1 - 1e-5)
    return np.log(rate) - np.log1p(-rate)


def log10p(*columns: np.ndarray) -> np.ndarray:
    """log10(1 + x) of columns [N], side by side [N, len(columns)]."""
    return np.log10(1 + np.column_stack(columns))

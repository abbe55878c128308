"""A public data set's raw files become Parquet impressions that know only what came before them.

`python -m rec.prepare kuairand --raw DIR --out DIR` reads the official files of KuaiRand-Pure (Gao et al., "KuaiRand: An
Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos", CIKM 2022, doi.org/10.1145/3511808.3557624).

Every history and counter of an impression is taken from rows whose `time_ms` is strictly smaller: rows of the same
millisecond (one page of videos) do not see each other's outcomes. An outcome counts as known from the next millisecond
on; a live system learns it some seconds or minutes later. The file `video_features_statistic_pure.csv` is left out: it
sums up the whole period, the test days too, so it leaks. The user file is a snapshot whose date is not published.
"""

import argparse
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from rec.schema import ConfigError, nearest

log = logging.getLogger(__name__)

ROW_GROUP = 16_384  # rows
VERSION = 1  # of the columns and their meaning: a change here makes earlier output stale
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
BEIJING_MS = 8 * HOUR_MS  # the data set's dates and hours are in UTC+8, without summer time
SESSION_GAP_MS = HOUR_MS // 2
HISTORY_LENGTH = 20
NUM_TABS = 15
NEVER_HOURS = 1000.0  # stands for "hours since" where it has not happened yet: longer than the month of the log

TASK_LABELS = ("is_click", "long_view", "is_like", "is_profile_enter", "is_follow", "is_comment", "is_forward")
LABELS = (*TASK_LABELS, "is_hate")
RATED = (*TASK_LABELS, "watched_share")  # what a vector of rates holds after the count, in this order
OUTCOMES = ("is_click", "long_view", "is_like", "is_profile_enter", "watched_share")
LAST = 3  # impressions whose outcomes are columns

# File columns that are read, and whether an empty cell is allowed there. All others are ignored.
LOG_COLUMNS = dict.fromkeys(
    ("user_id", "video_id", "date", "time_ms", "play_time_ms", "duration_ms", "tab", *LABELS), False
)
COUNTS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
# Anonymised user categories: number of values in the official file. Empty cells become code 0, value v code v + 1.
ONEHOTS = {0: 2, 1: 7, 2: 50, 3: 1471, 4: 15, 5: 34, 6: 3, 7: 118, 8: 454, 9: 7, 10: 5, 11: 5}
FLAGS = tuple(f"onehot_feat{i}" for i in range(12, 18))  # 0, 1 or empty
USER_COLUMNS = {
    "user_id": False,
    "user_active_degree": True,
    "is_live_streamer": True,
    "is_video_author": True,
    **dict.fromkeys(COUNTS, True),
    **{f"onehot_feat{i}": True for i in ONEHOTS},
    **dict.fromkeys(FLAGS, True),
}
VIDEO_COLUMNS = {
    "video_id": False,
    "author_id": False,
    "video_type": True,
    "upload_dt": False,
    "upload_type": True,
    "server_width": True,
    "server_height": True,
    "music_id": True,
    "music_type": True,
    "tag": True,
}
TEXT = ("user_active_degree", "video_type", "upload_dt", "upload_type", "music_type", "tag")

# Written-out vocabularies: a value's code is its place, from 1; 0 is empty, UNKNOWN or new. Append, never reorder.
VOCABULARIES = {
    "user_active_degree": (
        "full_active",
        "high_active",
        "middle_active",
        "low_active",
        "single_low_active",
        "2_14_day_new",
        "30day_retention",
        "day_new",
    ),
    "video_type": ("NORMAL", "AD"),
    "upload_type": (
        "LongImport",
        "Web",
        "ShortImport",
        "Kmovie",
        "LongPicture",
        "PictureSet",
        "LongCamera",
        "ShortCamera",
        "ShareFromOtherApp",
        "FollowShoot",
        "AiCutVideo",
        "PhotoCopy",
        "LipsSync",
    ),
    "music_type": ("4.0", "7.0", "8.0", "9.0", "11.0"),
}
DURATION_EDGES = (1e-9, 7.0, 12.0, 18.0, 30.0, 60.0, 120.0, 240.0)  # seconds; 18 is long_view's threshold


class RawDataError(ValueError):
    """Raw files that cannot be read as they are: the message names file, column, value and remedy."""


# ------------------------------------------------------------------------------------------------ what came before


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
    the past is a difference of two cumulative sums.

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
        """Number of past events [N] int64, all or those of the last `window_ms`."""
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
        running = self.hours_since() * HOUR_MS <= SESSION_GAP_MS
        return np.where(running, self.stop - begin[np.maximum(self.stop - 1, 0)], 0)


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
    strength: float  # weight of the parent's rate, in impressions
    parent: str | None = None


RATES = {
    "tab_rates": Rates(("tab",), 20),
    "user_rates": Rates(("user_id",), 10),
    "video_rates": Rates(("video_id",), 20),
    "author_rates": Rates(("author_id",), 20),
    "video_tab_rates": Rates(("video_id", "tab"), 10, "video_rates"),
    "user_tab_rates": Rates(("user_id", "tab"), 5, "user_rates"),
    "user_duration_rates": Rates(("user_id", "duration_band"), 5, "user_rates"),
    "user_tag_rates": Rates(("user_id", "tags"), 5, "user_rates"),
    "user_author_rates": Rates(("user_id", "author_id"), 3, "user_rates"),
}


def smoothed(count: np.ndarray, positives: np.ndarray, *, prior: np.ndarray, strength: float) -> np.ndarray:
    """(positives + strength * prior) / (count + strength), [N, K] for `count` [N], `positives` and `prior` [N, K]."""
    return (positives + strength * prior) / (count[:, None] + strength)


def base_rates(time: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """Rate [N, K] of each outcome over all rows so far; 1 in 20 before the first, so never 0 or 1."""
    past = Past(np.zeros(len(time), np.int64), time)
    return smoothed(past.count(), past.sums(outcomes), prior=np.full(outcomes.shape, 0.05), strength=20)


def rate_columns(
    keys: Mapping[str, np.ndarray | pa.ListArray], *, time: np.ndarray, outcomes: np.ndarray
) -> dict[str, np.ndarray]:
    """The vectors of `RATES`, each [N, 1 + K] float64: log10(1 + count), then logit(rate) - logit(rate of all rows).

    Args:
        keys: columns that `RATES` names, [N] of integers, or a list column (then a row pools the groups in its list).
        time: [N] int64, milliseconds.
        outcomes: [N, K], 0 to 1, in the order of `RATED`.

    """
    base = base_rates(time, outcomes)
    rates: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for name, spec in RATES.items():
        count, positives = totals([keys[key] for key in spec.keys], time=time, outcomes=outcomes)
        prior = base if spec.parent is None else rates[spec.parent]
        rates[name] = smoothed(count, positives, prior=prior, strength=spec.strength)
        columns[name] = np.column_stack([np.log10(1 + count), logit(rates[name]) - logit(base)])
    return columns


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


def recency_columns(
    user: np.ndarray, video: np.ndarray, *, time: np.ndarray, outcomes: np.ndarray
) -> dict[str, np.ndarray]:
    """What lately happened to the user and the video, as vectors in log10(1 + x), and the user's last outcomes.

    `user_recency` [N, 8]: hours since the user's last impression, click, long view and like; impressions so far in the
    session; impressions in 5 minutes, an hour and a day. `video_recency` [N, 3]: hours since the video's last impression,
    impressions in an hour and a day. `last_outcomes` [N, 18]: for each of the `LAST` newest impressions of the user,
    1 if there is one, then `OUTCOMES`.
    """
    users, videos = Past(user, time), Past(video, time)
    hours = [Past(user, time, events=outcomes[:, RATED.index(o)] > 0).hours_since() for o in OUTCOMES[:3]]
    counts = [users.count(window_ms=w) for w in (HOUR_MS // 12, HOUR_MS, DAY_MS)]
    last = outcomes[:, [RATED.index(o) for o in OUTCOMES]]
    rows = [users.row(back) for back in range(1, LAST + 1)]
    return {
        "user_recency": log10p(users.hours_since(), *hours, users.session_position(), *counts),
        "video_recency": log10p(videos.hours_since(), *(videos.count(window_ms=w) for w in (HOUR_MS, DAY_MS))),
        "last_outcomes": np.column_stack([part for r in rows for part in (r >= 0, last[r] * (r >= 0)[:, None])]),
    }


def log10p(*columns: np.ndarray) -> np.ndarray:
    """log10(1 + x) of columns [N], side by side [N, len(columns)]."""
    return np.log10(1 + np.column_stack(columns))


# ------------------------------------------------------------------------------------------------------- raw files


@dataclass
class Summary:
    """Counts for the printed summary."""

    rows: dict[str, int] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)  # what was empty or unknown, and what it became -> cells

    def note(self, file: Path, column: str, count: int, becomes: str) -> None:
        """Count `count` cells of a file's column that were empty or unknown."""
        if count:
            self.missing[f"{file.name}: {column} {becomes}"] += int(count)


def read_columns(file: Path, columns: Mapping[str, bool]) -> dict[str, np.ndarray]:
    """Columns [N] of a CSV file: text for those in `TEXT`, else float64 with NaN for an empty cell.

    Raises:
        RawDataError: no such file or column, a value that is no number, an empty cell where none is allowed.

    """
    if not file.is_file():
        raise RawDataError(f"{file} is missing: --raw needs the official layout, DIR or DIR/data with this file in it")
    try:
        header = pa.csv.open_csv(file).schema.names
        absent = [name for name in columns if name not in header]
        if absent:
            raise RawDataError(
                f"{file}: no column '{absent[0]}'; {nearest(absent[0], header)}; download the file again"
            )
        convert = pa.csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()))
        table = pa.csv.read_csv(file, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise RawDataError(f"{file}: {error}; the file is damaged or cut short: download it again") from error
    if not table.num_rows:
        raise RawDataError(f"{file}: no rows; download the file again")
    return {name: _column(file, name, table[name].combine_chunks(), empty) for name, empty in columns.items()}


def _column(file: Path, name: str, text: pa.Array, empty_allowed: bool) -> np.ndarray:
    empty = np.asarray(pc.equal(text, ""))
    if empty.any() and not empty_allowed:
        _refuse(file, name, "", row=int(np.argmax(empty)), expected="a value")
    if name in TEXT:
        return text.to_numpy(zero_copy_only=False)
    numbers = pc.if_else(pa.array(empty), None, text)
    try:
        values = numbers.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        bad = pc.invert(pc.match_substring_regex(numbers, r"^-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"))
        row = int(np.argmax(np.asarray(pc.fill_null(bad, False))))
        _refuse(file, name, text[row].as_py(), row=row, expected="a number")
    wild = ~np.isfinite(values) & ~empty
    if wild.any():
        _refuse(file, name, text[int(np.argmax(wild))].as_py(), row=int(np.argmax(wild)), expected="a finite number")
    return values


def _refuse(file: Path, column: str, value: object, *, row: int, expected: str) -> None:
    raise RawDataError(
        f"{file}: column '{column}' holds {value!r} in line {row + 2}, expected {expected}; "
        "mend or remove the line, or download the file again"
    )


def check_values(file: Path, column: str, values: np.ndarray, *, low: float, high: float, expected: str) -> np.ndarray:
    """`values` as int64, all whole and from `low` to `high`, else `RawDataError`."""
    bad = ~((values >= low) & (values <= high) & (values == np.floor(values)))
    if bad.any():
        row = int(np.argmax(bad))
        _refuse(file, column, f"{values[row]:.15g}", row=row, expected=expected)
    return values.astype(np.int64)


@dataclass(frozen=True)
class RawFiles:
    """Where the raw files lie."""

    logs: list[Path]
    users: Path
    videos: Path

    @property
    def all(self) -> list[Path]:
        """Every file that is read."""
        return [*self.logs, self.users, self.videos]


def find_files(raw: Path, *, random_log: bool) -> RawFiles:
    """The files below `raw` or `raw/data`; `RawDataError` where there is no log."""
    folder = raw / "data" if (raw / "data").is_dir() else raw
    logs = sorted(folder.glob("log_standard_*_pure.csv"))
    if not logs:
        raise RawDataError(
            f"{folder}: no log_standard_*_pure.csv; --raw names the unpacked KuaiRand-Pure folder (see kuairand.com)"
        )
    if random_log:
        logs += sorted(folder.glob("log_random_*_pure.csv")) or [folder / "log_random_4_22_to_5_08_pure.csv"]
    return RawFiles(logs, folder / "user_features_pure.csv", folder / "video_features_basic_pure.csv")


def read_log(file: Path, *, num_users: int, num_videos: int) -> dict[str, np.ndarray]:
    """Columns [N] int64 of a log, checked."""
    raw = read_columns(file, LOG_COLUMNS)
    bounds: dict[str, tuple[float, str]] = {
        "user_id": (num_users - 1, f"a user of user_features_pure.csv, 0 to {num_users - 1}"),
        "video_id": (num_videos - 1, f"a video of video_features_basic_pure.csv, 0 to {num_videos - 1}"),
        "tab": (NUM_TABS - 1, f"a tab from 0 to {NUM_TABS - 1}"),
        **dict.fromkeys(LABELS, (1, "0 or 1")),
    }
    default = (2.0**53, "a whole number, 0 or more")
    checked = {}
    for name, values in raw.items():
        high, expected = bounds.get(name, default)
        checked[name] = check_values(file, name, values, low=0, high=high, expected=expected)
    return checked


def read_logs(files: Sequence[Path], *, num_users: int, num_videos: int) -> dict[str, np.ndarray]:
    """All logs as one, in time order."""
    parts = [read_log(file, num_users=num_users, num_videos=num_videos) for file in files]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined["time_ms"], kind="stable")
    return {name: values[order] for name, values in joined.items()}


def order_by_id(file: Path, column: str, values: np.ndarray) -> np.ndarray:
    """The order [N] of rows that puts ids 0 to N - 1 in their places, so that a join is an index."""
    ids = check_values(file, column, values, low=0, high=2**31, expected="a whole number")
    order = np.argsort(ids, kind="stable")
    wrong = np.flatnonzero(ids[order] != np.arange(len(ids)))
    if len(wrong):
        row = int(order[wrong[0]])
        _refuse(file, column, str(ids[row]), row=row, expected=f"each id from 0 to {len(ids) - 1} once")
    return order


# -------------------------------------------------------------------------------------------------------- features


def vocabulary_codes(file: Path, column: str, values: np.ndarray, summary: Summary) -> np.ndarray:
    """Codes [N] int64 of strings in the column's vocabulary: its place from 1, or 0, counted in `summary`."""
    found = pc.index_in(pa.array(values, pa.string()), pa.array(VOCABULARIES[column]))
    summary.note(file, column, found.null_count, "empty or not in the vocabulary, read as code 0")
    return np.asarray(pc.fill_null(found, -1)).astype(np.int64) + 1


def onehot_codes(file: Path, column: str, values: np.ndarray, size: int, summary: Summary) -> np.ndarray:
    """Codes [N] int64: value + 1 for 0 to size - 1, or 0, counted in `summary`."""
    good = (values >= 0) & (values < size) & (values == np.floor(values))
    summary.note(file, column, (~good).sum(), "empty or out of range, read as code 0")
    return np.where(good, values + 1, 0).astype(np.int64)


def user_columns(file: Path, summary: Summary) -> dict[str, np.ndarray]:
    """One row a user: categories as codes, counts as float32, flags [U, 9]."""
    raw = read_columns(file, USER_COLUMNS)
    order = order_by_id(file, "user_id", raw["user_id"])
    columns = {"user_active_degree": vocabulary_codes(file, "user_active_degree", raw["user_active_degree"], summary)}
    for i, size in ONEHOTS.items():
        columns[f"onehot_feat{i}"] = onehot_codes(file, f"onehot_feat{i}", raw[f"onehot_feat{i}"], size, summary)
    for name in COUNTS:
        known = raw[name] >= 0
        summary.note(file, name, (~known).sum(), "empty or negative, read as 0")
        columns[name] = np.where(known, raw[name], 0).astype(np.float32)
    unknown = np.isnan(raw[FLAGS[0]])
    for name in FLAGS:
        summary.note(file, name, np.isnan(raw[name]).sum(), "empty, read as 0")
    # is_live_streamer holds -124 for users of whom it is not known
    flags = [raw[name] == 1 for name in ("is_live_streamer", "is_video_author", *FLAGS)]
    columns["user_flags"] = np.column_stack([*flags, unknown]).astype(np.float32)
    return {name: values[order] for name, values in columns.items()}


@dataclass(frozen=True)
class Videos:
    """One row a video: columns of the output, and what only features are made of."""

    columns: dict[str, np.ndarray]
    tags: pa.ListArray
    upload_ms: np.ndarray  # [V] int64, midnight in Beijing


def video_columns(file: Path, summary: Summary) -> Videos:
    """What the video file says about each video."""
    raw = read_columns(file, VIDEO_COLUMNS)
    order = order_by_id(file, "video_id", raw["video_id"])
    columns = {
        name: vocabulary_codes(file, name, raw[name], summary) for name in ("video_type", "upload_type", "music_type")
    }
    for name in ("author_id", "music_id"):
        summary.note(file, name, np.isnan(raw[name]).sum(), "empty, read as 0")
        columns[name] = np.nan_to_num(raw[name]).astype(np.int64)
    shaped = (raw["server_width"] > 0) & (raw["server_height"] > 0)
    summary.note(file, "server_width, server_height", (~shaped).sum(), "empty, read as a square")
    shape = np.where(shaped, raw["server_height"], 1) / np.where(shaped, raw["server_width"], 1)
    columns["video_shape"] = np.log(shape).astype(np.float32)  # log(height / width)
    tags, upload_ms = _tags(file, raw["tag"], summary), _upload_ms(file, raw["upload_dt"])
    return Videos(
        {name: values[order] for name, values in columns.items()}, tags.take(pa.array(order)), upload_ms[order]
    )


def _tags(file: Path, values: np.ndarray, summary: Summary) -> pa.ListArray:
    text = pa.array(values, pa.string())
    summary.note(file, "tag", pc.sum(pc.equal(text, "")).as_py(), "empty, read as no tags")
    bad = np.asarray(pc.invert(pc.match_substring_regex(text, r"^([0-9]{1,3}(,[0-9]{1,3})*)?$")))
    if bad.any():
        row = int(np.argmax(bad))
        _refuse(file, "tag", values[row], row=row, expected="tags below 1,000 between commas")
    parts = pc.split_pattern(text, ",")
    flat = parts.flatten()
    # an empty cell splits into one empty string, which is no tag
    kept = np.asarray(pc.not_equal(flat, ""))
    lengths = np.bincount(np.asarray(pc.list_parent_indices(parts))[kept], minlength=len(text))
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, flat.filter(pa.array(kept)).cast(pa.int64()))


def _upload_ms(file: Path, values: np.ndarray) -> np.ndarray:
    text = pa.array(values, pa.string())
    bad = np.asarray(pc.invert(pc.match_substring_regex(text, r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$")))
    try:
        days = None if bad.any() else np.asarray(text.cast(pa.date32()).cast(pa.int32()))
    except pa.ArrowInvalid as error:
        raise RawDataError(f"{file}: column 'upload_dt': {error}; expected dates as 2022-04-09") from error
    if days is None:
        row = int(np.argmax(bad))
        _refuse(file, "upload_dt", values[row], row=row, expected="a date as 2022-04-09")
    return np.asarray(days, np.int64) * DAY_MS - BEIJING_MS


def build_table(raw: RawFiles, summary: Summary) -> pa.Table:
    """All impressions in time order, with every column of conf/data/kuairand.yaml, and `date` (yyyymmdd)."""
    users, videos = user_columns(raw.users, summary), video_columns(raw.videos, summary)
    rows = read_logs(raw.logs, num_users=len(users["user_flags"]), num_videos=len(videos.upload_ms))
    user, video, time = rows["user_id"], rows["video_id"], rows["time_ms"]
    seconds = rows["duration_ms"] / 1000
    summary.missing["logs: duration_ms 0, read as unknown (video_seconds 0)"] += int((seconds == 0).sum())
    outcomes = outcome_matrix(rows)
    about_video = {name: values[video] for name, values in videos.columns.items()}
    tags = videos.tags.take(pa.array(video))
    keys = {**rows, **about_video, "duration_band": np.digitize(seconds, DURATION_EDGES), "tags": tags}
    columns: dict[str, np.ndarray | pa.Array] = {
        **{name: rows[name] for name in ("user_id", "video_id", "tab", "time_ms", "date")},
        **{name: values[user] for name, values in users.items()},
        **about_video,
        "tags": tags,
        "hour": (time + BEIJING_MS) // HOUR_MS % 24,
        "video_seconds": seconds.astype(np.float32),
        "video_age": ((time - videos.upload_ms[video]) / (10 * DAY_MS)).astype(np.float32),  # tens of days
        **histories(user, video, about_video["author_id"], time=time, rows=rows),
        **rate_columns(keys, time=time, outcomes=outcomes),
        **recency_columns(codes(user), codes(video), time=time, outcomes=outcomes),
        **{label: rows[label].astype(np.int8) for label in LABELS},
        "play_seconds": (rows["play_time_ms"] / 1000).astype(np.float32),
    }
    return pa.table({name: _arrow(values) for name, values in columns.items()})


def outcome_matrix(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """[N, K] float64 in the order of `RATED`: labels, and the share of the video that was watched, 0 to 1.

    Where the length is not known, the share is that of 18 seconds, which make a long view.
    """
    length = np.where(rows["duration_ms"] > 0, rows["duration_ms"], 18_000)
    share = np.minimum(rows["play_time_ms"] / length, 1)
    return np.column_stack([*(rows[label] for label in TASK_LABELS), share]).astype(np.float64)


def histories(
    user: np.ndarray, video: np.ndarray, author: np.ndarray, *, time: np.ndarray, rows: Mapping[str, np.ndarray]
) -> dict[str, pa.ListArray]:
    """The user's last watched and liked videos and watched authors before each row, newest last."""
    group = codes(user)
    watched = Past(group, time, events=rows["long_view"] > 0)
    liked = Past(group, time, events=(rows["is_like"] > 0) | (rows["is_follow"] > 0))
    return {
        "watched": watched.lists(video, max_length=HISTORY_LENGTH),
        "watched_authors": watched.lists(author, max_length=HISTORY_LENGTH),
        "liked": liked.lists(video, max_length=HISTORY_LENGTH),
    }


def _arrow(values: np.ndarray | pa.Array) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])
    return pa.array(values) if isinstance(values, np.ndarray) else values


# ---------------------------------------------------------------------------------------------------------- output


@dataclass(frozen=True)
class Split:
    """Days of one split, both included, as the data set's `date` column counts them."""

    name: str
    first: date
    last: date

    def mask(self, days: np.ndarray) -> np.ndarray:
        """Rows [N] bool whose day (yyyymmdd) is in the split."""
        return (days >= _number(self.first)) & (days <= _number(self.last))


def _number(day: date) -> int:
    return day.year * 10_000 + day.month * 100 + day.day


def make_splits(train_from: date, test_from: date, *, valid_days: int) -> list[Split]:
    """Train until the day before `test_from`, of which `valid_days` are cut off as valid, and test from then on.

    >>> [f"{s.name} {s.first:%m-%d} {s.last:%m-%d}" for s in make_splits(date(2022, 4, 25), date(2022, 5, 1), valid_days=1)[:2]]
    ['train 04-25 04-29', 'valid 04-30 04-30']
    """
    one = timedelta(days=1)
    valid_from = test_from - valid_days * one
    if valid_days < 0 or valid_from <= train_from:
        raise ConfigError(
            f"--valid-days {valid_days} leaves no day to train on between --train-from {train_from} and --test-from "
            f"{test_from}; expected 0 to {max((test_from - train_from).days - 1, 0)}"
        )
    valid = [Split("valid", valid_from, test_from - one)] if valid_days else []
    return [Split("train", train_from, valid_from - one), *valid, Split("test", test_from, date.max)]


def write_splits(table: pa.Table, splits: Sequence[Split], folder: Path, summary: Summary) -> None:
    """Write `folder`/<split>/part-00000.parquet; `RawDataError` where a split has no rows."""
    days = table["date"].to_numpy()
    for split in splits:
        rows = table.filter(pa.array(split.mask(days))).drop_columns(["date"])
        if not rows.num_rows:
            raise RawDataError(
                f"no rows from {split.first} to {split.last} for split '{split.name}': the log has {days.min()} to "
                f"{days.max()}; choose other days with --train-from and --test-from"
            )
        (folder / split.name).mkdir()
        pq.write_table(rows, folder / split.name / "part-00000.parquet", row_group_size=ROW_GROUP, compression="zstd")
        summary.rows[split.name] = rows.num_rows


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is removed when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as holder:
        fresh = Path(holder) / "new"
        fresh.mkdir()
        yield fresh
        old = Path(holder) / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(fresh, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise


def fingerprint(raw: RawFiles, splits: Sequence[Split]) -> dict[str, object]:
    """What the output depends on: arguments, raw files by name, size and time of change, version of the columns."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in raw.all if file.is_file()}
    return {"version": VERSION, "files": files, "splits": [{k: str(v) for k, v in asdict(s).items()} for s in splits]}


def prepare_kuairand(
    raw: Path, out: Path, *, splits: Sequence[Split], random_log: bool, overwrite: bool
) -> Summary | None:
    """Write the splits of KuaiRand-Pure to `out`; None where they are there already.

    Raises:
        RawDataError: raw files that cannot be read; `out` is then as it was.
        ConfigError: `out` holds something else and `overwrite` is False.

    """
    out = out.resolve()
    files = find_files(raw, random_log=random_log)
    stamp, record = fingerprint(files, splits), out / "prepared.json"
    same = record.is_file() and json.loads(record.read_text())["made_from"] == stamp
    if same and not overwrite:
        return None
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(
            f"--out {out} holds files made from other arguments or raw files: add --overwrite, or choose another"
        )
    summary = Summary()
    with whole_folder(out) as folder:
        write_splits(build_table(files, summary), splits, folder, summary)
        made = {"made_from": stamp, "rows": summary.rows, "missing": summary.missing}
        (folder / record.name).write_text(json.dumps(made, indent=2))
    return summary


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="python -m rec.prepare", description="Turn a public data set's raw files into Parquet impressions."
    )
    kuairand = main_parser.add_subparsers(dest="dataset", required=True, metavar="DATASET").add_parser(
        "kuairand",
        help="KuaiRand-Pure: short videos of Kuaishou, 15 tabs, clicks, long views, likes and rarer labels",
        description="Reads log_standard_*_pure.csv, user_features_pure.csv and video_features_basic_pure.csv of "
        "KuaiRand-Pure (kuairand.com, CC BY-SA 4.0) and writes train/ and test/, described by conf/data/kuairand.yaml. "
        "Histories and counters know only rows of a strictly earlier time_ms. video_features_statistic_pure.csv is not "
        "read: it sums up the whole period, so it leaks.",
        epilog="example: python -m rec.prepare kuairand --raw KuaiRand-Pure --out data/kuairand",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kuairand.add_argument("--raw", type=Path, required=True, help="the unpacked download, or its folder data/")
    kuairand.add_argument("--out", type=Path, required=True, help="folder to write; whole or not there")
    days = {
        "--train-from": (date(2022, 4, 25), "first day of train; earlier days only feed histories and counters"),
        "--test-from": (date(2022, 5, 1), "first day of test; train ends the day before"),
    }
    for name, (default, words) in days.items():
        kuairand.add_argument(name, type=date.fromisoformat, metavar="YYYY-MM-DD", default=default, help=words)
    kuairand.add_argument(
        "--valid-days", type=int, default=0, help="last days of train to write as valid/ instead, for tuning"
    )
    kuairand.add_argument(
        "--random-log", action="store_true", help="read log_random_*_pure.csv too (randomly shown videos)"
    )
    kuairand.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser().parse_args(argv)
    try:
        splits = make_splits(args.train_from, args.test_from, valid_days=args.valid_days)
        summary = prepare_kuairand(
            args.raw, args.out, splits=splits, random_log=args.random_log, overwrite=args.overwrite
        )
    except (RawDataError, ConfigError) as error:
        raise SystemExit(f"error: {error}") from error
    if summary is None:
        log.info(
            "%s is complete and made from the same files and arguments: nothing to do (--overwrite makes it anew)",
            args.out,
        )
        return
    for name, rows in summary.rows.items():
        log.info("%-8s %9d rows  %s", name, rows, args.out / name)
    for what, cells in sorted(summary.missing.items()):
        log.info("%17d cells  %s", cells, what)


if __name__ == "__main__":
    main()

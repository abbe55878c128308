"""KuaiRand-Pure: its raw files, its vocabularies, and one table of impressions that know only what came before them.

Reads the official files (Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed
Videos", CIKM 2022, doi.org/10.1145/3511808.3557624).

Every history and counter of an impression is taken from rows whose `time_ms` is strictly smaller, see `rec.past`. The file
`video_features_statistic_pure.csv` is left out: it sums up the whole period, the test days too, so it leaks. The user file
is a snapshot whose date is not published. `conf/data/kuairand.yaml` describes the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec.past import DAY_MS, HOUR_MS, Past, Rates, codes, log10p, rate_columns
from rec.raw import RawDataError, Summary, check_values, order_by_id, read_columns, refuse

VERSION = 1  # of the columns and their meaning: a change here makes earlier output stale
BEIJING_MS = 8 * HOUR_MS  # the data set's dates and hours are in UTC+8, without summer time
HISTORY_LENGTH = 20
NUM_TABS = 15

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
# Each is a vector: log10(1 + past impressions), then logit(rate) - logit(rate of all rows) of every outcome in RATED.
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


# ---- raw files


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


# ---- features of users and videos


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
    raw = read_columns(file, USER_COLUMNS, text=TEXT)
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
    raw = read_columns(file, VIDEO_COLUMNS, text=TEXT)
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
        refuse(file, "tag", values[row], row=row, expected="tags below 1,000 between commas")
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
        refuse(file, "upload_dt", values[row], row=row, expected="a date as 2022-04-09")
    return np.asarray(days, np.int64) * DAY_MS - BEIJING_MS


# ---- impressions


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
        **rate_columns(RATES, keys, time=time, outcomes=outcomes),
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


def _arrow(values: np.ndarray | pa.Array) -> pa.Array:
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = np.ascontiguousarray(values, dtype=np.float32).reshape(-1)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])
    return pa.array(values) if isinstance(values, np.ndarray) else values

import csv
import math
from collections import defaultdict
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest

from rec import kuairand as adapter
from rec.baseline import load_data_config
from rec.features import Encoder
from rec.past import NEVER_HOURS
from rec.raw import RawDataError, Summary
from rec.schema import FeatureKind

YAML = Path(__file__).resolve().parents[1] / "conf" / "data" / "kuairand.yaml"
LOG = "log_standard_4_22_to_5_08_pure.csv"
NUM_USERS, NUM_VIDEOS, NUM_ROWS = 6, 8, 240
START = 1_650_812_400_000  # 2022-04-24 23:00 in Beijing
HOUR, DAY = 3_600_000, 86_400_000
LOG_NAMES = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"),
    *("is_profile_enter", "is_rand", "tab"),
)
Row = dict[str, Any]


def log_rows(num_rows: int = NUM_ROWS) -> list[Row]:
    """Impressions in time order; few moments in three hours a day, so that rows tie, also within a user, and sessions run."""
    rng = np.random.default_rng(0)
    slots = rng.choice(10 * 36, num_rows // 2, replace=False)
    moments = START + slots // 36 * DAY + slots % 36 * (HOUR // 12)
    rows = []
    for time in np.sort(np.concatenate([moments, rng.choice(moments, num_rows - len(moments))])).tolist():
        row: Row = {name: int(rng.random() < 0.3) for name in LOG_NAMES}
        video = int(rng.integers(NUM_VIDEOS))
        day = date(2022, 4, 25) + timedelta(days=(time - START) // DAY)
        row |= {
            "user_id": int(rng.integers(NUM_USERS)),
            "video_id": video,
            "tab": int(rng.integers(3)),
            "time_ms": time,
        }
        row |= {"duration_ms": 7000 * video, "play_time_ms": int(rng.integers(40_000)), "date": day.strftime("%Y%m%d")}
        rows.append(row)
    return rows


def user_rows() -> list[Row]:
    flags = {f"onehot_feat{i}": "" if i >= 12 else i % 2 for i in range(18)}
    ranges = {f"{name}_range": "x" for name in adapter.COUNTS}
    row = flags | ranges | dict.fromkeys(adapter.COUNTS, 3) | {"is_lowactive_period": 0}
    row |= {"is_live_streamer": -124, "is_video_author": 1}
    degrees = ["full_active", "UNKNOWN", "day_new"] * 2
    return [{"user_id": user, "user_active_degree": degrees[user], **row} for user in range(NUM_USERS)]


def video_rows() -> list[Row]:
    rows = []
    for video in reversed(range(NUM_VIDEOS)):  # the order of the file must not matter
        row: Row = {"video_id": video, "author_id": 7_000_000 + video // 3, "video_type": "NORMAL", "music_type": ""}
        row |= {"upload_dt": "2022-04-10", "upload_type": "Web", "visible_status": 0.0, "video_duration": 7e3 * video}
        row |= {"server_width": 720.0, "server_height": 1440.0, "music_id": 9_155_697_141}
        rows.append(row | {"tag": ["", "3", "3,5", "5,9"][video % 4]})
    return rows


def write_csv(file: Path, rows: list[Row]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_raw(folder: Path, rows: list[Row]) -> Path:
    (folder / "data").mkdir(parents=True)
    write_csv(folder / "data" / LOG, rows)
    write_csv(folder / "data" / "user_features_pure.csv", user_rows())
    write_csv(folder / "data" / "video_features_basic_pure.csv", video_rows())
    return folder


def build(raw: Path, *, random_log: bool = False) -> pa.Table:
    return adapter.build_table(adapter.find_files(raw, random_log=random_log), Summary())


def table_of(folder: Path, rows: list[Row]) -> pa.Table:
    return build(write_raw(folder, rows))


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return log_rows()


@pytest.fixture(scope="module")
def table(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    return table_of(tmp_path_factory.mktemp("raw") / "kuairand", rows)


def outcome(row: Row) -> np.ndarray:
    share = min(row["play_time_ms"] / (row["duration_ms"] or 18_000), 1)
    return np.array([*(row[label] for label in adapter.TASK_LABELS), share], float)


def groups(name: str, row: Row, videos: dict[int, Row]) -> list[tuple]:
    """The groups that a row counts in, for one entry of `RATES`, written without it."""
    video = videos[row["video_id"]]
    seconds = row["duration_ms"] / 1000
    band = sum(seconds >= edge for edge in (1e-9, 7, 12, 18, 30, 60, 120, 240))
    user = row["user_id"]
    return {
        "tab_rates": [(row["tab"],)],
        "user_rates": [(user,)],
        "video_rates": [(row["video_id"],)],
        "author_rates": [(video["author_id"],)],
        "video_tab_rates": [(row["video_id"], row["tab"])],
        "user_tab_rates": [(user, row["tab"])],
        "user_duration_rates": [(user, band)],
        "user_tag_rates": [(user, tag) for tag in video["tag"].split(",") if tag],
        "user_author_rates": [(user, video["author_id"])],
    }[name]


def earlier(rows: list[Row]) -> Iterator[tuple[Row, list[Row]]]:
    """Each row with all rows before it in time."""
    for row in rows:
        yield row, [other for other in rows if other["time_ms"] < row["time_ms"]]


def loop_rates(rows: list[Row]) -> dict[str, list[np.ndarray]]:
    videos = {video["video_id"]: video for video in video_rows()}
    strengths = dict(zip(adapter.RATES, (20, 10, 20, 20, 10, 5, 5, 5, 3), strict=True))
    parents = defaultdict(lambda: "user_rates", video_tab_rates="video_rates")
    logit = lambda p: np.log(np.clip(p, 1e-5, 1 - 1e-5) / (1 - np.clip(p, 1e-5, 1 - 1e-5)))  # noqa: E731
    columns = defaultdict(list)
    for row, past in earlier(rows):
        base = (sum(map(outcome, past), np.zeros(8)) + 20 * 0.05) / (len(past) + 20)
        rates = {}
        for name, strength in strengths.items():
            mine = groups(name, row, videos)
            hits = [outcome(other) for other in past for group in groups(name, other, videos) if group in mine]
            prior = base if name in ("tab_rates", "user_rates", "video_rates", "author_rates") else rates[parents[name]]
            rates[name] = (sum(hits, np.zeros(8)) + strength * prior) / (len(hits) + strength)
            columns[name].append([math.log10(1 + len(hits)), *(logit(rates[name]) - logit(base))])
    return columns


def matrix(table: pa.Table, name: str) -> np.ndarray:
    return np.array(table[name].to_pylist(), float)


def test_rates_equal_a_loop_over_earlier_rows(rows: list[Row], table: pa.Table) -> None:
    times = [row["time_ms"] for row in rows]
    assert len(set(times)) < len(times)  # or ties are not tested
    expected = loop_rates(rows)
    assert set(expected) == set(adapter.RATES)
    for name, values in expected.items():
        np.testing.assert_allclose(matrix(table, name), values, atol=2e-6, err_msg=name)


def test_histories_equal_a_loop_over_earlier_rows(
    rows: list[Row], table: pa.Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(adapter, "HISTORY_LENGTH", 5)
    table = table_of(tmp_path / "raw", rows)
    authors = {video["video_id"]: video["author_id"] for video in video_rows()}
    longest = 0
    for i, (row, past) in enumerate(earlier(rows)):
        mine = [other for other in past if other["user_id"] == row["user_id"]]
        watched = [other["video_id"] for other in mine if other["long_view"]]
        liked = [other["video_id"] for other in mine if other["is_like"] or other["is_follow"]]
        assert table["watched"][i].as_py() == watched[-5:]
        assert table["watched_authors"][i].as_py() == [authors[video] for video in watched[-5:]]
        assert table["liked"][i].as_py() == liked[-5:]
        longest = max(longest, len(watched))
    assert longest > 5


def hours_since(now: int, past: list[Row]) -> float:
    return (now - past[-1]["time_ms"]) / HOUR if past else NEVER_HOURS


def session_position(now: int, past: list[Row]) -> int:
    position, time = 0, now
    for row in reversed(past):
        if time - row["time_ms"] > HOUR // 2:
            break
        position, time = position + 1, row["time_ms"]
    return position


def within(now: int, past: list[Row], hours: float) -> int:
    return sum(now - row["time_ms"] <= hours * HOUR for row in past)


def test_recency_equals_a_loop_over_earlier_rows(rows: list[Row], table: pa.Table) -> None:
    users, videos, last = [], [], []
    for row, past in earlier(rows):
        now = row["time_ms"]
        mine = [other for other in past if other["user_id"] == row["user_id"]]
        its = [other for other in past if other["video_id"] == row["video_id"]]
        hours = [hours_since(now, [o for o in mine if o[label]]) for label in ("is_click", "long_view", "is_like")]
        counts = [within(now, mine, 1 / 12), within(now, mine, 1), within(now, mine, 24)]
        users.append([hours_since(now, mine), *hours, session_position(now, mine), *counts])
        videos.append([hours_since(now, its), within(now, its, 1), within(now, its, 24)])
        newest = [[1, *outcome(other)[[0, 1, 2, 3, 7]]] for other in reversed(mine[-3:])]
        last.append([x for part in newest + [[0] * 6] * (3 - len(newest)) for x in part])
    assert max(user[4] for user in users) > 2
    np.testing.assert_allclose(matrix(table, "user_recency"), np.log10(1 + np.array(users)), atol=1e-6)
    np.testing.assert_allclose(matrix(table, "video_recency"), np.log10(1 + np.array(videos)), atol=1e-6)
    np.testing.assert_allclose(matrix(table, "last_outcomes"), last, atol=1e-6)


def features_until(table: pa.Table, time: int) -> pa.Table:
    config = load_data_config(YAML)
    columns = [config.column_of(name) for name in config.features]
    return table.select(columns).filter(pa.array(table["time_ms"].to_numpy() <= time))


def changed(row: Row) -> Row:
    return row | {label: 1 - row[label] for label in adapter.LABELS} | {"play_time_ms": row["play_time_ms"] + 9000}


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_nothing_at_or_after_a_moment_changes_features_until_it(
    rows: list[Row], table: pa.Table, tmp_path: Path, share: float
) -> None:
    times = [row["time_ms"] for row in rows]
    moment = next(t for t in times[int(share * len(times)) :] if times.count(t) > 1)
    before = features_until(table, moment)
    relabelled = table_of(tmp_path / "a", [row if row["time_ms"] < moment else changed(row) for row in rows])
    assert features_until(relabelled, moment).equals(before)
    # one row of the moment stays, everything else from then on goes
    kept = times.index(moment) + 1
    assert features_until(table_of(tmp_path / "b", rows[:kept]), moment).equals(before.slice(0, kept))
    # and the test can fail: what came before does matter
    altered = table_of(tmp_path / "c", [changed(row) if row["time_ms"] < moment else row for row in rows])
    assert not features_until(altered, moment).equals(before)


def test_joins_codes_and_labels(rows: list[Row], table: pa.Table) -> None:
    assert table["user_active_degree"].to_pylist() == [[1, 0, 8][row["user_id"] % 3] for row in rows]
    assert set(table["onehot_feat4"].to_pylist()) == {1}
    assert table["author_id"].to_pylist() == [7_000_000 + row["video_id"] // 3 for row in rows]
    assert table["tags"].to_pylist() == [[[], [3], [3, 5], [5, 9]][row["video_id"] % 4] for row in rows]
    np.testing.assert_allclose(table["video_shape"].to_numpy(), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(table["play_seconds"].to_numpy(), [row["play_time_ms"] / 1000 for row in rows])
    np.testing.assert_array_equal(matrix(table, "user_flags"), [[0, 1, 0, 0, 0, 0, 0, 0, 1]] * len(rows))
    assert table["hour"][0].as_py() == (rows[0]["time_ms"] // HOUR + 8) % 24
    for label in adapter.LABELS:
        assert table[label].to_pylist() == [row[label] for row in rows]


def test_logs_are_joined_and_the_random_one_only_if_asked(rows: list[Row], tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", rows[150:])
    write_csv(raw / "data" / "log_standard_4_08_to_4_21_pure.csv", rows[:150])
    write_csv(raw / "data" / "log_random_4_22_to_5_08_pure.csv", rows[:10])
    assert build(raw)["time_ms"].to_pylist() == [row["time_ms"] for row in rows]
    assert build(raw, random_log=True).num_rows == len(rows) + 10


@pytest.mark.parametrize(
    ("file", "column", "value", "says"),
    [
        (LOG, "tab", "15", "'tab' holds '15' in line 7, expected a tab from 0 to 14"),
        (LOG, "is_like", "2", "'is_like' holds '2' in line 7, expected 0 or 1"),
        (LOG, "is_like", "", "'is_like' holds '' in line 7, expected a value"),
        (LOG, "time_ms", "12:30", "'time_ms' holds '12:30' in line 7, expected a number"),
        (LOG, "play_time_ms", "-5", "'play_time_ms' holds '-5' in line 7"),
        (LOG, "play_time_ms", "nan", "'play_time_ms' holds 'nan' in line 7, expected a finite number"),
        (LOG, "user_id", "99", "'user_id' holds '99' in line 7, expected a user of user_features_pure.csv"),
        ("user_features_pure.csv", "register_days", "old", "'register_days' holds 'old' in line 7"),
        ("video_features_basic_pure.csv", "tag", "3;5", "'tag' holds '3;5' in line 7"),
        ("video_features_basic_pure.csv", "upload_dt", "10.4.2022", "'upload_dt' holds '10.4.2022' in line 7"),
        (
            "video_features_basic_pure.csv",
            "video_id",
            "0",
            "'video_id' holds '0' in line 9, expected each id from 0 to 7 once",
        ),
    ],
)
def test_a_bad_value_is_named(rows: list[Row], tmp_path: Path, file: str, column: str, value: str, says: str) -> None:
    raw = write_raw(tmp_path / "raw", rows[:20])
    with (raw / "data" / file).open() as stream:
        lines = list(csv.DictReader(stream))
    lines[5][column] = value
    write_csv(raw / "data" / file, lines)
    with pytest.raises(RawDataError) as caught:
        build(raw)
    message = str(caught.value)
    assert file in message
    assert says in message
    assert "download" in message


def test_a_truncated_file_is_named(rows: list[Row], tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", rows)
    text = (raw / "data" / LOG).read_text()
    (raw / "data" / LOG).write_text(text[: len(text) // 2].rsplit(",", 3)[0])
    with pytest.raises(RawDataError, match=rf"{LOG}.*download it again"):
        build(raw)


def test_missing_files_and_columns_are_named(rows: list[Row], tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", rows)
    write_csv(raw / "data" / LOG, [{k: v for k, v in row.items() if k != "tab"} for row in rows])
    with pytest.raises(RawDataError, match=f"{LOG}: no column 'tab'"):
        build(raw)
    with pytest.raises(RawDataError, match=r"log_random_4_22_to_5_08_pure\.csv is missing"):
        build(write_raw(tmp_path / "no_random_log", rows), random_log=True)
    (raw / "data" / "user_features_pure.csv").unlink()
    with pytest.raises(RawDataError, match=r"user_features_pure\.csv is missing"):
        build(raw)
    with pytest.raises(RawDataError, match="no log_standard_"):
        build(tmp_path)


def test_the_yaml_describes_the_output(table: pa.Table) -> None:
    config = load_data_config(YAML)
    types = {FeatureKind.id: pa.types.is_int64, FeatureKind.dense: pa.types.is_float32}
    for name, feature in config.features.items():
        kind = table.schema.field(config.column_of(name)).type
        if feature.kind in types:
            assert types[feature.kind](kind), name
        elif feature.kind is FeatureKind.vector:
            assert kind == pa.list_(pa.float32(), feature.size), name
        else:
            assert kind == pa.list_(pa.int64()), name
    assert {task.label for task in config.tasks.values()} <= set(table.column_names)
    for name, words in adapter.VOCABULARIES.items():
        assert config.tables[name].num_embeddings == len(words) + 1
    for i, size in adapter.ONEHOTS.items():
        assert config.tables[f"onehot_feat{i}"].num_embeddings == size + 1


def test_the_real_slice(kuairand: Path) -> None:
    table = build(kuairand)
    assert table.num_rows == 166_932
    config = load_data_config(YAML)
    for name in config.dense_features:
        for chunk in table[name].chunks:
            values = chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk
            assert np.isfinite(np.asarray(values)).all(), name
    encoder = Encoder(config)
    encoder.encode(table, where="the slice")
    assert not encoder.repairs
    log = {name: column.to_numpy() for name, column in zip(LOG_NAMES, raw_log(kuairand), strict=True)}
    for place in np.random.default_rng(0).integers(table.num_rows, size=50).tolist():
        row = table.slice(place, 1).to_pylist()[0]
        past = (log["user_id"] == row["user_id"]) & (log["time_ms"] < row["time_ms"])
        assert row["user_rates"][0] == pytest.approx(math.log10(1 + past.sum()), abs=1e-6)
        watched = np.flatnonzero(past & (log["long_view"] == 1))
        newest = watched[np.argsort(log["time_ms"][watched], kind="stable")][-20:]
        assert row["watched"] == log["video_id"][newest].tolist()


def raw_log(kuairand: Path) -> list[pa.ChunkedArray]:
    table = pa.csv.read_csv(kuairand / "data" / LOG)
    return [table[name] for name in LOG_NAMES]

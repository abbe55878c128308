"""The order, the completeness and the errors of the reader, with the ranks of one step read one after another."""

import itertools
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from rec.config import compose
from rec.data import Reader, ReaderConfig, Split, _prefetch
from rec.features import Batch, DataError
from rec.schema import ConfigError, DataConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig
from tests.conftest import CONF, toy_overrides

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # its caches, else a folder in the tree
WORLDS = (1, 2, 3, 4, 7)
# uneven files of uneven row groups, some of them empty
LAYOUT = [[0, 40, 13], [7], [0], [90, 1, 1, 0, 30], [25, 25, 25]]
NUM_ROWS = 257


def rows_table(start: int, num_rows: int) -> pa.Table:
    """Rows whose id says which row of the data set it is."""
    row = np.arange(start, start + num_rows)
    return pa.table({"row": row, "user": row % 50, "item": row % 50, "price": row * 0.5, "click": row % 3 == 0})


def write_layout(folder: Path, layout: Sequence[Sequence[int]]) -> Path:
    """One file a list, one row group a number."""
    start = 0
    folder.mkdir(parents=True, exist_ok=True)
    for number, sizes in enumerate(layout):
        with pq.ParquetWriter(folder / f"part-{number:02}.parquet", rows_table(0, 0).schema) as writer:
            for size in sizes:
                writer.write_table(rows_table(start, size), row_group_size=max(size, 1))
                start += size
    return folder


def rows_config(path: Path | str, **changes: Any) -> DataConfig:
    half = FeatureConfig(kind=FeatureKind.id, dropout=0.5)
    parts: dict[str, Any] = {
        "splits": {"train": ""},
        "features": {
            "row": FeatureConfig(kind=FeatureKind.id),
            "user": half,
            "item": replace(half, table="user"),
            "price": FeatureConfig(kind=FeatureKind.dense),
        },
        "tables": {"row": TableConfig(num_embeddings=100_000), "user": TableConfig(num_embeddings=50)},
        "tasks": {"click": TaskConfig(label="click")},
        "group": "row",
    }
    return DataConfig(name="rows", path=str(path), **{**parts, **changes})


def make_reader(path: Path | str | DataConfig, *, size: int = 20, shuffle_rows: int = 60, **more: Any) -> Reader:
    data = path if isinstance(path, DataConfig) else rows_config(path)
    settings = {name: more.pop(name) for name in ("shuffle", "prefetch_batches") if name in more}
    config = ReaderConfig(global_batch_size=size, shuffle_rows=shuffle_rows, **{"prefetch_batches": 0, **settings})
    return Reader(data, config, **{"split": "train", **more})


def values_of(batch: Batch, key: str) -> list[int]:
    return batch.sparse_features[key].values().tolist()


def rows_of(batch: Batch) -> list[int]:
    return batch.group_id[: batch.num_rows].tolist()


def users_kept(batch: Batch) -> list[bool]:
    """Whether each row kept the id of its user."""
    lengths = batch.sparse_features.lengths().view(3, -1)  # row, user, item
    return lengths[1, : batch.num_rows].bool().tolist()


Step = list[tuple[int, bool]]


def steps(
    path: Path | DataConfig, start: int = 0, stop: int | None = None, *, world: int = 1, **more: Any
) -> list[Step]:
    """The rows of each step over all ranks in the order of the ranks, each with whether it kept its user."""
    readers = [make_reader(path, rank=rank, world_size=world, **more) for rank in range(world)]
    return [
        [pair for batch in ranks for pair in zip(rows_of(batch), users_kept(batch), strict=True)]
        for ranks in zip(*(reader.batches(start, stop) for reader in readers), strict=True)
    ]


def row_ids(found: list[Step]) -> list[list[int]]:
    return [[row for row, _ in step] for step in found]


def flat(found: list[Step]) -> list[int]:
    return [row for step in row_ids(found) for row in step]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(tmp_path_factory.mktemp("rows"), LAYOUT)


# --- order ---


@pytest.mark.parametrize("mode", [{}, {"shuffle": False}, {"training": False}], ids=str)
@pytest.mark.parametrize("size", [1, 20, 64, 1000])
def test_the_order_is_the_same_for_any_number_of_ranks(rows: Path, mode: dict, size: int):
    stop = 9 if size == 1 else -(-NUM_ROWS // size) * 2
    alone = steps(rows, 0, stop, size=size, **mode)
    for world in WORLDS[1:]:
        assert steps(rows, 0, stop, size=size, world=world, **mode) == alone


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("mode", [{}, {"shuffle": False}, {"training": False}], ids=str)
def test_each_row_once_an_epoch_in_full_steps(rows: Path, mode: dict, world: int):
    epoch = steps(rows, world=world, **mode)
    assert [len(step) for step in epoch] == [20] * 12 + [17]
    assert sorted(flat(epoch)) == list(range(NUM_ROWS))


# of one row group, only the three rows of each lane change places: a third of them fall on where they were
@pytest.mark.parametrize(("layout", "same"), [(LAYOUT, 0.1), ([[NUM_ROWS]], 0.5)], ids=["many", "one"])
def test_another_epoch_or_seed_is_another_order(tmp_path: Path, layout: list, same: float):
    path = write_layout(tmp_path, layout)
    first, second = steps(path, 0, 13), steps(path, 13, 26)
    assert first == steps(path, 0, 13)
    orders = [flat(first), flat(second), flat(steps(path, seed=1)), list(range(NUM_ROWS))]
    assert all(sorted(order) == list(range(NUM_ROWS)) for order in orders)
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(np.array(one) == np.array(other)) < same
    assert steps(path, 13, 26, training=False) == steps(path, training=False)


@pytest.mark.parametrize("world", WORLDS)
def test_without_shuffling_the_order_is_that_of_the_files(rows: Path, world: int):
    for size in (9, 20, 300):
        assert flat(steps(rows, size=size, shuffle=False, world=world)) == list(range(NUM_ROWS))


def loop_dealt(num_rows: int, *, size: int, shuffle_rows: int) -> list[list[int]]:
    """Each block cut into `size` lanes of neighbours; every step takes the next row of each lane that has one."""
    block_rows, out = max(1, round(shuffle_rows / size)) * size, []
    for start in range(0, num_rows, block_rows):
        block = list(range(start, min(start + block_rows, num_rows)))
        edges = [lane * len(block) // size for lane in range(size + 1)]
        lanes = [block[low:high] for low, high in itertools.pairwise(edges)]
        out += [[lane[turn] for lane in lanes if turn < len(lane)] for turn in range(max(map(len, lanes)))]
    return out


@pytest.mark.parametrize(("size", "shuffle_rows"), [(1, 60), (20, 60), (20, 5), (7, 64), (64, 10_000), (1000, 1)])
def test_evaluation_deals_each_block_to_lanes(rows: Path, size: int, shuffle_rows: int):
    expected = loop_dealt(NUM_ROWS, size=size, shuffle_rows=shuffle_rows)
    assert row_ids(steps(rows, size=size, shuffle_rows=shuffle_rows, training=False)) == expected


@pytest.mark.parametrize("layout", [[[1000]], [[10] * 100], [[3, 500, 497]]], ids=["large", "small", "mixed"])
def test_a_shuffled_step_is_one_row_of_each_lane_of_its_block(tmp_path: Path, layout: list):
    path = write_layout(tmp_path, layout)
    groups = np.split(np.arange(1000), np.cumsum(layout[0])[:-1])
    found = row_ids(steps(path, size=25, shuffle_rows=100))
    stream = [row for group in sorted(groups, key=lambda g: flat_position(found, g)) for row in group]
    for block in range(10):
        lanes = np.array(stream[block * 100 : block * 100 + 100]).reshape(25, 4)
        dealt = np.array(found[block * 4 : block * 4 + 4]).T
        assert np.array_equal(np.sort(dealt, axis=1), np.sort(lanes, axis=1))
        assert not np.array_equal(dealt, lanes)


def flat_position(found: list[list[int]], group: np.ndarray) -> float:
    """Where in the epoch a row group's rows come on average: by this the row groups of a stream are in order."""
    blocks = {row: 1000 * (step // 4) + lane for step, rows in enumerate(found) for lane, row in enumerate(rows)}
    return float(np.mean([blocks[int(row)] for row in group]))


def test_training_shuffles_row_groups_too(tmp_path: Path):
    path = write_layout(tmp_path, [[10] * 10] * 10)
    early = {row // 10 for step in row_ids(steps(path, 0, 5, size=20, shuffle_rows=100)) for row in step}
    assert len(early) == 10
    assert max(early) - min(early) > 30  # ten of a hundred row groups, from all over


# --- resume and dropout ---


@pytest.mark.parametrize("mode", [{}, {"shuffle": False}, {"training": False}], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_resuming_at_any_step_equals_the_tail(rows: Path, mode: dict, world: int):
    whole = steps(rows, 0, 26, **mode)
    for start in range(26):
        assert steps(rows, start, min(start + 5, 26), world=world, **mode) == whole[start : start + 5]
    assert steps(rows, 7, 26, world=world, **mode) == whole[7:]
    assert steps(rows, 5, **mode) == whole[5:13]  # by default to the end of the epoch
    assert steps(rows, 13, **mode) == whole[13:]
    assert steps(rows, 4, 4, **mode) == []


def test_dropped_ids(tmp_path: Path):
    path = write_layout(tmp_path, [[4000]])
    reader = make_reader(path, size=100, shuffle_rows=1000)
    lengths = {name: [] for name in ("row", "user", "item")}
    fate: dict[int, list[bool]] = {}
    for batch in reader.batches(0, 80):
        for name, counts in lengths.items():
            counts += batch.sparse_features[name].lengths().tolist()
        for row, kept in zip(rows_of(batch), users_kept(batch), strict=True):
            fate.setdefault(row, []).append(kept)
        users = [row % 50 for row, kept in zip(rows_of(batch), users_kept(batch), strict=True) if kept]
        assert values_of(batch, "user") == users
    share = {name: np.array(counts) for name, counts in lengths.items()}
    assert share["row"].all()
    sigma = 0.5 / np.sqrt(8000)
    assert abs(share["user"].mean() - 0.5) < 4 * sigma
    assert abs((share["user"] == share["item"]).mean() - 0.5) < 4 * sigma  # features are dropped independently
    assert abs(np.mean([first == second for first, second in fate.values()]) - 0.5) < 6 * sigma  # and anew every epoch
    for batch in make_reader(path, training=False).batches():
        assert len(values_of(batch, "user")) == batch.num_rows


# --- shapes ---


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("size", [1, 20, 300])
def test_every_rank_has_as_many_rows_padding_among_them(rows: Path, size: int, world: int):
    readers = [make_reader(rows, size=size, rank=rank, world_size=world) for rank in range(world)]
    assert {reader.local_batch_size for reader in readers} == {-(-size // world)}
    assert {reader.steps_per_epoch for reader in readers} == {-(-NUM_ROWS // size)}
    counts = []
    for reader in readers:
        found = list(reader.batches(0, 3))
        assert len(found) == 3
        for batch in found:
            assert_padded(batch, -(-size // world))
        counts.append([batch.num_rows for batch in found])
    if size == 20:  # the ranks' shares of a step differ by one row at most
        assert np.ptp(counts, axis=0).max() <= 1


def assert_padded(batch: Batch, size: int) -> None:
    used = batch.num_rows
    assert 0 <= used <= size
    assert batch.dense.shape == batch.labels.shape == batch.weights.shape == (size, 1)
    assert batch.domain_id.shape == batch.group_id.shape == (size,)
    assert batch.weights[:, 0].tolist() == [1.0] * used + [0.0] * (size - used)
    assert values_of(batch, "row") == rows_of(batch)
    assert batch.dense[:used, 0].tolist() == [row * 0.5 for row in values_of(batch, "row")]
    assert batch.labels[:used, 0].tolist() == [float(row % 3 == 0) for row in values_of(batch, "row")]
    assert not batch.dense[used:].any()
    for name in ("row", "user", "item"):
        jagged = batch.sparse_features[name]
        assert len(jagged.lengths()) == size
        assert not jagged.lengths()[used:].any()


def test_a_rank_without_rows_in_a_data_set_that_starts_empty(tmp_path: Path):
    path = write_layout(tmp_path, [[0], [0, 2]])
    for world in WORLDS:
        assert sorted(flat(steps(path, size=1, world=world))) == [0, 1]
        assert sorted(flat(steps(path, size=50, world=world))) == [0, 1]


def test_row_groups_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_layout(tmp_path, [[64, 36, 50], [128, 22]])
    read: Counter[str] = Counter()
    original = Split.read

    def counted(split: Split, group: Any, columns: list[str]) -> pa.Table:
        read[str(group)] += 1
        return original(split, group, columns)

    monkeypatch.setattr(Split, "read", counted)
    for mode in ({}, {"shuffle": False}, {"training": False}):
        read.clear()
        steps(path, size=10, shuffle_rows=40, **mode)
        assert sorted(read.values()) == [1] * 5


@hypothesis.settings(max_examples=25, deadline=None, database=None, derandomize=True)
@hypothesis.given(
    layout=st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=3),
    world=st.integers(1, 7),
    size=st.integers(1, 40),
    shuffle_rows=st.integers(1, 120),
    seed=st.integers(0, 2**40),
    shuffle=st.booleans(),
    training=st.booleans(),
    data=st.data(),
)
def test_any_layout_is_read_whole_and_alike(
    tmp_path_factory: pytest.TempPathFactory, layout: list[list[int]], world: int, size: int, data: Any, **how: Any
):
    num_rows = sum(map(sum, layout))
    hypothesis.assume(num_rows)
    path = write_layout(tmp_path_factory.mktemp("layout"), layout)
    alone = steps(path, size=size, **how)
    assert sorted(flat(alone)) == list(range(num_rows))
    assert [len(step) for step in alone[:-1]] == [size] * (len(alone) - 1)
    assert len(alone) == -(-num_rows // size)
    assert steps(path, size=size, world=world, **how) == alone
    start = data.draw(st.integers(0, len(alone) - 1))
    assert steps(path, start, size=size, world=world, **how) == alone[start:]
    if how["training"] and not how["shuffle"]:
        assert flat(alone) == list(range(num_rows))


# --- the thread ---


def readers_running() -> int:
    return sum(thread.name == "reader" for thread in threading.enumerate())


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    sparse = batch.sparse_features
    parts = [
        sparse.values(),
        sparse.lengths(),
        batch.dense,
        batch.labels,
        batch.weights,
        batch.domain_id,
        batch.group_id,
    ]
    return [*parts, torch.tensor(batch.num_rows)]


@pytest.mark.parametrize("depth", [1, 4, 100])
def test_prefetching_changes_nothing(rows: Path, depth: int):
    plain = list(make_reader(rows).batches(0, 20))
    ahead = list(make_reader(rows, prefetch_batches=depth).batches(0, 20))
    assert len(plain) == len(ahead) == 20
    for one, other in zip(plain, ahead, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))
    assert readers_running() == 0


def failing(error: BaseException, *, after: int) -> Iterator[Any]:
    yield from range(after)
    raise error


@pytest.mark.parametrize("error", [DataError("bad row"), KeyError("boom"), KeyboardInterrupt("stop")], ids=repr)
def test_an_exception_of_the_thread_is_raised_to_the_consumer(error: BaseException):
    got = []
    with pytest.raises(type(error)) as caught:
        got.extend(_prefetch(failing(error, after=3), 2))
    assert caught.value is error
    assert readers_running() == 0


def test_what_was_read_before_an_exception_is_delivered():
    batches = _prefetch(failing(KeyError("boom"), after=3), 2)
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="boom"):
        next(batches)


@pytest.mark.parametrize("prefetch", [0, 4])
def test_bad_rows_are_named_with_file_and_row_group(rows: Path, tmp_path: Path, prefetch: int):
    path = write_layout(tmp_path, [[30], [10, 20]])
    table = pq.read_table(path / "part-01.parquet")
    price = table["price"].to_numpy().copy()
    price[17] = np.inf
    bad = table.set_column(table.schema.get_field_index("price"), "price", pa.array(price))
    pq.write_table(bad, path / "part-01.parquet", row_group_size=10)
    with pytest.raises(DataError) as caught:
        list(make_reader(path, shuffle=False, prefetch_batches=prefetch).batches())
    assert f"{path}/part-01.parquet, row group 1: column 'price' holds inf at position 7" in str(caught.value)


def test_an_abandoned_iterator_leaves_no_thread(rows: Path):
    reader = make_reader(rows, prefetch_batches=2)
    batches = reader.batches(0, 1000)
    next(batches)
    assert readers_running() == 1
    batches.close()
    assert readers_running() == 0
    for batch in reader.batches(0, 1000):
        assert batch.num_rows == 20
        break
    batches = reader.batches(0, 1000)
    next(batches)
    del batches
    assert readers_running() == 0
    reader.batches()  # never started
    assert readers_running() == 0


# --- files ---


def file_names(path: Path | str, pattern: str) -> list[str]:
    return [Path(file).name for file in Split(rows_config(path, splits={"train": pattern}), "train").files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Data, and what else lies beside data."""
    root = tmp_path / "set [1]"  # brackets and blanks in the path are no pattern
    folders = ("day=1", "day=2/hour=3", "_temporary/day=1", ".hidden", "day=1/_staging")
    for number, folder in enumerate(folders):
        (root / folder).mkdir(parents=True, exist_ok=True)
        pq.write_table(rows_table(number, 1), root / folder / f"part-{number}.parquet")
    for name in ("_SUCCESS", "_metadata", ".part-0.parquet.crc", ".part-0.parquet", "_part-0.parquet", "notes.txt"):
        (root / "day=1" / name).write_text("not Parquet")
    return root


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("", ["part-0.parquet", "part-1.parquet"]),
        ("day=1", ["part-0.parquet"]),
        ("day=1/", ["part-0.parquet"]),
        ("day=2", ["part-1.parquet"]),
        ("day=2/hour=3/part-1.parquet", ["part-1.parquet"]),
        ("day=*/*.parquet", ["part-0.parquet", "part-1.parquet"]),
        ("day=[2-9]/*.parquet", ["part-1.parquet"]),
        ("day=1/part-?.parquet", ["part-0.parquet"]),
        ("*/part-1.*", ["part-1.parquet"]),
    ],
)
@pytest.mark.parametrize("form", ["folder", "slash", "uri"])
def test_a_split_is_a_file_a_folder_or_a_glob(tree: Path, pattern: str, names: list[str], form: str):
    path = {"folder": str(tree), "slash": f"{tree}/", "uri": tree.as_uri()}[form]
    assert file_names(path, pattern) == names


def test_a_relative_path_and_a_file_as_path(tree: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tree.parent)
    assert file_names(tree.name, "day=1") == ["part-0.parquet"]
    assert file_names(tree / "day=1" / "part-0.parquet", "") == ["part-0.parquet"]


def test_a_uri_is_read_like_a_folder(rows: Path):
    assert steps(rows_config(rows.as_uri())) == steps(rows)


def test_files_are_read_in_the_order_of_their_names(tmp_path: Path):
    for name, start in (("b/part-1", 10), ("a/part-2", 5), ("part-0", 15), ("a/part-1", 0)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(rows_table(start, 5), tmp_path / f"{name}.parquet")
    assert flat(steps(tmp_path, size=20, shuffle=False)) == list(range(20))


# --- errors ---


def test_ids_that_another_split_has_as_texts(tmp_path: Path):
    def rows_of(split: str, values: pa.Array) -> Reader:
        (tmp_path / split).mkdir()
        table = rows_table(0, 10).set_column(1, "user", values)
        pq.write_table(table, tmp_path / split / "part.parquet")
        user = FeatureConfig(kind=FeatureKind.id, hashed=True)
        return make_reader(
            rows_config(tmp_path / split, features={"user": user}, tables={"user": TableConfig(num_embeddings=50)})
        )

    one, other = rows_of("train", pa.array(range(10), pa.int64())), rows_of("valid", pa.array(["x"] * 10))
    one.check_like(one)
    with pytest.raises(DataError, match="valid/part.parquet: column 'user' holds string, but .*int64: the same id"):
        one.check_like(other)


def test_a_folder_that_does_not_exist(tmp_path: Path):
    for path in (tmp_path / "nowhere", (tmp_path / "nowhere").as_uri()):
        with pytest.raises(DataError, match="no Parquet files in split 'train'.*nowhere; make the data set first"):
            make_reader(path)


def test_a_path_that_arrow_cannot_open():
    with pytest.raises(ConfigError, match="data.path is ftp://host/rows, which Arrow cannot open.*expected a folder"):
        make_reader("ftp://host/rows")


def test_an_unknown_split_is_sent_to_the_nearest(rows: Path):
    with pytest.raises(ConfigError, match="data set 'rows' has no split 'trian': did you mean 'train'?"):
        make_reader(rows, split="trian")


def test_all_findings_over_all_files_come_at_once(tmp_path: Path):
    path = write_layout(tmp_path, [[5], [5], [5]])
    table = rows_table(0, 5)
    pq.write_table(table.rename_columns({"price": "prise", "user": "usr"}), path / "part-00.parquet")
    text = pa.array(["x"] * 5)
    pq.write_table(table.drop_columns("click").append_column("click", text), path / "part-02.parquet")
    with pytest.raises(DataError) as caught:
        make_reader(path)
    first, *findings = str(caught.value).split("\n  ")
    assert first == "the files do not fit the configuration:"
    assert [finding.split(";")[0] for finding in findings] == [
        f"{path}/part-00.parquet: column 'user' is missing",
        f"{path}/part-00.parquet: column 'price' is missing",
        f"{path}/part-02.parquet: column 'click' of task 'click' is string, expected numbers",
    ]
    assert "did you mean 'prise'" in findings[1]


def test_repairs_are_counted_by_the_reader(tmp_path: Path):
    table = rows_table(0, 40)
    user = pa.array([None if i % 4 == 0 else i for i in range(40)], pa.int64())
    table = table.set_column(table.schema.get_field_index("user"), "user", user)
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=8)
    with pytest.raises(DataError, match="column 'user' has 2 nulls.*set data.features.user.allow_null=true"):
        list(make_reader(tmp_path).batches())
    data = rows_config(tmp_path)
    data.features["user"] = replace(data.features["user"], allow_null=True)
    reader = make_reader(data, training=False)
    assert sum(len(values_of(batch, "user")) for batch in reader.batches()) == 30
    assert reader.encoder.repairs == {"user: null read as no id": 10}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"global_batch_size": 0}, "reader.global_batch_size is 0, expected a value from 1"),
        ({"shuffle_rows": 0}, "reader.shuffle_rows is 0, expected a value from 1"),
        ({"prefetch_batches": -1}, "reader.prefetch_batches is -1, expected a value from 0"),
    ],
)
def test_reader_settings_out_of_range(setting: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        ReaderConfig(**setting)


def test_the_toy_data_set_with_everything_in_it(toy: Path):
    """Uneven files, an empty one among them, whose text column has no type there."""
    config = compose(toy_overrides(toy), config_dir=str(CONF))
    files = [pq.read_table(file, columns=["user", "item"]) for file in (toy / "train").glob("*.parquet")]
    expected = sorted((row["user"], row["item"]) for file in files for row in file.to_pylist())
    readers = [
        Reader(config.data, config.reader, split="train", training=False, rank=r, world_size=3) for r in range(3)
    ]
    found = [
        pair
        for reader in readers
        for batch in reader.batches()
        for pair in zip(values_of(batch, "user"), values_of(batch, "item"), strict=True)
    ]
    assert sorted(found) == expected


@pytest.mark.parametrize("size", [20, 7])
@pytest.mark.parametrize("training", [True, False])
def test_rows_know_their_place_and_their_draws_whoever_serves_them(rows: Path, size: int, training: bool):
    """The place is that of the row in the files, and the random bits are one row's in one step, for any number of ranks."""
    seen: dict[int, dict[tuple[int, int], tuple[int, int]]] = {}
    for world in (1, 3):
        seen[world] = {}
        for rank in range(world):
            reader = make_reader(rows, rank=rank, world_size=world, size=size, training=training)
            for step, batch in enumerate(reader.batches(0, 2 * reader.steps_per_epoch)):
                places, draws = batch.row_id[: batch.num_rows].tolist(), batch.draws[: batch.num_rows].tolist()
                assert places == rows_of(batch)  # the files count their rows
                assert (batch.row_id[batch.num_rows :] == -1).all()
                seen[world] |= {(step, row): tuple(draw) for row, draw in zip(places, draws, strict=True)}
    assert seen[1] == seen[3]
    of_rows, of_steps = zip(*seen[1].values(), strict=True)
    assert len(set(of_rows)) == len(of_rows) and len(set(of_steps)) == 2 * reader.steps_per_epoch
    other = next(iter(make_reader(rows, size=size, training=training, seed=5).batches()))
    assert not set(other.draws[:, 0].tolist()) & set(of_rows)


def test_labels_need_not_be_there_to_predict(tmp_path: Path):
    folder = write_layout(tmp_path / "served", [[30]])
    (file,) = folder.glob("*.parquet")
    pq.write_table(pq.read_table(file).drop_columns("click"), file)
    with pytest.raises(DataError, match="column 'click' is missing"):
        make_reader(folder)
    (first, *_) = make_reader(folder, labels=False, training=False).batches()
    assert not first.labels.any() and (first.weights[: first.num_rows] == 1).all()

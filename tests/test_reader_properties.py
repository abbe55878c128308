"""Over random files, ranks, batches and places to go on: every row once an epoch, the same rows in a step for any ranks.

Also the same rows as different writers leave them: whoever wrote the files, the batches are the same.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

from rec.data import Reader, ReaderConfig
from rec.features import Batch
from rec.schema import DataConfig, DomainConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")  # its caches, else a folder in the tree


# --- any layout ---


def write_layout(folder: Path, layout: list[list[int]]) -> int:
    """One file a list, one row group a number; the number of rows in all."""
    schema, start = pa.schema({"row": pa.int64(), "tags": pa.list_(pa.int64()), "click": pa.bool_()}), 0
    for number, sizes in enumerate(layout):
        with pq.ParquetWriter(folder / f"part-{number:02}.parquet", schema) as writer:
            for size in sizes:
                row = list(range(start, start + size))
                columns = {"row": row, "tags": [[i % 7] * (i % 3) for i in row], "click": [i % 5 == 0 for i in row]}
                writer.write_table(pa.table(columns, schema), row_group_size=max(size, 1))
                start += size
    return start


@dataclass(frozen=True)
class Plan:
    """How a split is read."""

    size: int
    shuffle_rows: int
    shuffle: bool
    training: bool
    seed: int
    prefetch: int = 0

    def reader(self, folder: Path, *, rank: int = 0, world: int = 1) -> Reader:
        features = {
            "row": FeatureConfig(kind=FeatureKind.id, dropout=0.3),
            "tags": FeatureConfig(kind=FeatureKind.bag),
        }
        data = DataConfig(
            name="layout",
            path=str(folder),
            splits={"train": ""},
            features=features,
            tables={"row": TableConfig(num_embeddings=1000), "tags": TableConfig(num_embeddings=7)},
            tasks={"click": TaskConfig(label="click")},
            group="row",
        )
        config = ReaderConfig(self.size, self.shuffle_rows, self.shuffle, self.prefetch)
        place = {"rank": rank, "world_size": world}
        return Reader(data, config, split="train", seed=self.seed, training=self.training, **place)


Row = tuple[int, tuple[int, ...], tuple[int, ...], float, tuple[int, ...]]


def rows_of(batch: Batch) -> list[Row]:
    """Each row with everything that depends on it: place, ids that were not dropped, tags, label, random bits."""
    ids = [
        torch.split(batch.sparse_features[key].values(), batch.sparse_features[key].lengths().tolist())
        for key in ("row", "tags")
    ]
    return [
        (
            int(batch.group_id[b]),
            tuple(ids[0][b].tolist()),
            tuple(ids[1][b].tolist()),
            float(batch.labels[b, 0]),
            tuple(batch.draws[b].tolist()),
        )
        for b in range(batch.num_rows)
    ]


def steps(plan: Plan, folder: Path, start: int, stop: int, *, world: int = 1) -> list[list[Row]]:
    """The rows of each step over all ranks, in the order of the ranks."""
    readers = [plan.reader(folder, rank=rank, world=world) for rank in range(world)]
    ranks = [list(reader.batches(start, stop)) for reader in readers]
    assert {len(batches) for batches in ranks} == {stop - start}  # no rank waits for another that has ended
    return [[row for batch in step for row in rows_of(batch)] for step in zip(*ranks, strict=True)]


LAYOUTS = st.lists(st.lists(st.integers(0, 25), max_size=4), min_size=1, max_size=4).filter(lambda x: sum(map(sum, x)))
PLANS = st.builds(
    Plan,
    size=st.integers(1, 40),
    shuffle_rows=st.integers(1, 120),
    shuffle=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**31),
    prefetch=st.sampled_from([0, 0, 3]),
)


@hypothesis.settings(max_examples=30, deadline=None, database=None, derandomize=True)
@hypothesis.given(layout=LAYOUTS, plan=PLANS, world=st.integers(1, 5), data=st.data())
def test_any_layout_is_read_whole_alike_and_from_any_step(
    layout: list[list[int]], plan: Plan, world: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        num_rows = write_layout(folder, layout)
        epoch = -(-num_rows // plan.size)
        alone = steps(plan, folder, 0, 2 * epoch)
        for first in (0, epoch):  # every row once an epoch, in full steps
            rows = alone[first : first + epoch]
            assert sorted(row[0] for step in rows for row in step) == list(range(num_rows))
            assert [len(step) for step in rows[:-1]] == [plan.size] * (epoch - 1)
        for row, kept, tags, label, _ in (row for step in alone for row in step):
            assert kept in ((row,), ()) if plan.training else kept == (row,)
            assert tags == (row % 7,) * (row % 3) and label == (row % 5 == 0)
        if not (plan.shuffle and plan.training):  # every epoch is dealt alike, but for what is drawn anew each step
            assert [[row[0] for row in step] for step in alone[:epoch]] == [[r[0] for r in s] for s in alone[epoch:]]
        assert steps(plan, folder, 0, 2 * epoch, world=world) == alone
        start = data.draw(st.integers(0, 2 * epoch - 1), label="start")
        stop = data.draw(st.integers(start, 2 * epoch), label="stop")
        resumed_with = data.draw(st.integers(1, 5), label="ranks that go on")
        assert steps(plan, folder, start, stop, world=resumed_with) == alone[start:stop]


# --- any writer ---

NUM_ROWS = 61
WORDS = ["home", "suche ü", ""]


def plain_rows() -> dict[str, list]:
    """One data set as Python values."""
    rows = range(NUM_ROWS)
    return {
        "user": [i % 50 for i in rows],
        "query": [None if i % 9 == 4 else f"query {'ä' * (i % 4)} {i % 5}" for i in rows],
        "tags": [None if i % 8 == 3 else [(i + k) % 20 for k in range(i % 4)] for i in rows],
        "words": [[WORDS[(i + k) % 3] for k in range(i % 3)] for i in rows],
        "price": [None if i % 7 == 2 else i * 0.25 for i in rows],
        "text": [[i * 0.5, -1.0] for i in rows],
        "click": [i % 3 == 0 for i in rows],
        "tab": [WORDS[i % 2] for i in rows],
        "session": [f"s{i // 4}" for i in rows],
        "shown": [datetime(2024, 1, 1, i % 24) for i in rows],  # not read
    }


def writers_config(path: Path) -> DataConfig:
    kind = FeatureKind
    return DataConfig(
        name="writers",
        path=str(path),
        splits={"train": ""},
        features={
            "user": FeatureConfig(kind=kind.id),
            "query": FeatureConfig(kind=kind.id, hashed=True, allow_null=True),
            "tags": FeatureConfig(kind=kind.bag, allow_null=True),
            "words": FeatureConfig(kind=kind.sequence, hashed=True, table="query", max_length=2),
            "price": FeatureConfig(kind=kind.dense, allow_null=True),
            "text": FeatureConfig(kind=kind.vector, size=2),
        },
        tables={n: TableConfig(num_embeddings=k) for n, k in (("user", 50), ("query", 101), ("tags", 20))},
        tasks={"click": TaskConfig(label="click")},
        domain=DomainConfig(column="tab", names=WORDS[:2]),
        group="session",
    )


def arrow_table(**kinds: pa.DataType) -> pa.Table:
    table = pa.table(plain_rows())
    for name, kind in kinds.items():
        values = table[name].combine_chunks()
        array = values.dictionary_encode() if kind == "dictionary" else values.cast(kind)
        table = table.set_column(table.schema.get_field_index(name), name, array)
    return table


def with_arrow(*, kinds: dict[str, Any] | None = None, **how: Any) -> Callable[[Path], None]:
    return lambda file: pq.write_table(arrow_table(**(kinds or {})), file, **how)


def with_polars(**how: Any) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        frame = pl.DataFrame(plain_rows()).with_columns(
            pl.col("user").cast(pl.UInt32),
            pl.col("tab").cast(pl.Categorical),
            pl.col("text").cast(pl.Array(pl.Float32, 2)),
            pl.col("session").cast(pl.Enum(sorted(set(plain_rows()["session"])))),
        )
        frame.write_parquet(file, **how)

    return write


def like_spark(file: Path) -> None:
    """Snappy, v1 pages, several row groups, INT96 times, small pages, decimals, int32 ids, and no Arrow schema in the footer."""
    kinds = {"user": pa.int32(), "tags": pa.list_(pa.int32()), "price": pa.decimal128(18, 4), "click": pa.int32()}
    how: dict[str, Any] = {"compression": "snappy", "data_page_version": "1.0", "data_page_size": 64}
    pq.write_table(
        arrow_table(**kinds),
        file,
        row_group_size=17,
        use_deprecated_int96_timestamps=True,
        store_schema=False,
        use_compliant_nested_type=False,
        **how,
    )


BINARY = {"query": pa.binary(), "tab": pa.large_binary(), "session": pa.binary(), "words": pa.list_(pa.binary())}
LARGE = {"query": pa.large_string(), "tags": pa.large_list(pa.int64()), "words": pa.large_list(pa.large_string())}
NARROW = {"user": pa.int8(), "tags": pa.list_(pa.uint8()), "price": pa.float32(), "text": pa.list_(pa.float32(), 2)}
WORDY: dict[str, Any] = dict.fromkeys(("query", "tab", "session", "user", "price"), "dictionary")
DECIMAL = {"price": pa.decimal128(10, 2)}
WRITERS = {
    "uncompressed": with_arrow(compression="none", use_dictionary=False),
    "zstd, v2 pages": with_arrow(compression="zstd", data_page_version="2.0", row_group_size=13),
    "small dictionaries": with_arrow(compression="gzip", dictionary_pagesize_limit=16, data_page_size=32),
    "checksums": with_arrow(write_page_checksum=True, row_group_size=1),
    "other encodings": with_arrow(
        use_dictionary=False,
        column_encoding={"user": "DELTA_BINARY_PACKED", "price": "BYTE_STREAM_SPLIT", "query": "DELTA_BYTE_ARRAY"},
    ),
    "binary": with_arrow(kinds=BINARY),
    "large": with_arrow(kinds=LARGE, row_group_size=20),
    "narrow": with_arrow(kinds=NARROW),
    "dictionary": with_arrow(kinds=WORDY, row_group_size=30),
    "decimal": with_arrow(kinds=DECIMAL),
    "polars": with_polars(row_group_size=19),
    "polars, uncompressed": with_polars(compression="uncompressed", data_page_size=64),
    "like Spark": like_spark,
}


def all_batches(folder: Path) -> tuple[list[Batch], dict[str, int]]:
    config = ReaderConfig(global_batch_size=10, shuffle=False, prefetch_batches=0)
    reader = Reader(writers_config(folder), config, split="train")
    return list(reader.batches()), dict(reader.encoder.repairs)


def assert_same(one: Batch, other: Batch) -> None:
    assert one.sparse_features.keys() == other.sparse_features.keys()
    assert torch.equal(one.sparse_features.values(), other.sparse_features.values())
    assert torch.equal(one.sparse_features.lengths(), other.sparse_features.lengths())
    for name in ("dense", "labels", "weights", "domain_id", "group_id", "row_id"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    pq.write_table(pa.table(plain_rows()), folder / "part-0.parquet")
    return folder


@pytest.mark.parametrize("writer", WRITERS)
def test_whoever_wrote_the_rows_the_batches_are_the_same(reference: Path, tmp_path: Path, writer: str) -> None:
    WRITERS[writer](tmp_path / "part-0.parquet")
    expected, found = all_batches(reference), all_batches(tmp_path)
    assert found[1] == expected[1] and len(found[0]) == len(expected[0]) == 7
    for one, other in zip(expected[0], found[0], strict=True):
        assert_same(one, other)


def test_the_reference_is_what_was_written(reference: Path) -> None:
    """So that two wrongs that agree are seen."""
    rows, (batches, repairs) = plain_rows(), all_batches(reference)
    assert repairs == {
        "query: null read as no id": rows["query"].count(None),
        "tags: null read as no ids": rows["tags"].count(None),
        "price: null read as 0": rows["price"].count(None),
    }
    tags = [x for batch in batches for x in batch.sparse_features["tags"].values().tolist()]
    assert tags == [x for listed in rows["tags"] for x in listed or []]
    dense = np.concatenate([batch.dense[: batch.num_rows].numpy() for batch in batches])
    assert dense.tolist() == [[price or 0.0, *text] for price, text in zip(rows["price"], rows["text"], strict=True)]
    assert Decimal(str(dense[3, 0])) == Decimal("0.75")

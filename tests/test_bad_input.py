"""Contract 5: bad input is an error that names file, row group, column, value and remedy, or a counted repair. Never silence.

A small data set with everything in it is written as three files; one of them is spoilt, in one way a case.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rec.data import Reader, ReaderConfig
from rec.features import Batch, DataError
from rec.schema import (
    ConfigError,
    DataConfig,
    DomainConfig,
    FeatureConfig,
    FeatureKind,
    TableConfig,
    TaskConfig,
    TaskKind,
)
from tests.conftest import CONF, torchrun, toy_overrides, write_toy

NUM_ROWS, GROUP = 20, 10  # rows a file, rows a row group
SPOILT = "part-1.parquet"
TIMEOUT_S = 20
I64, TEXT = pa.int64(), pa.string()


@contextlib.contextmanager
def bounded(seconds: float = TIMEOUT_S) -> Iterator[None]:
    """What hangs is a failure."""

    def expire(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_table(number: int = 1, num_rows: int = NUM_ROWS) -> pa.Table:
    """Rows of one file."""
    row = np.arange(NUM_ROWS * number, NUM_ROWS * number + num_rows)
    return pa.table(
        {
            "user": row % 100,
            "query": pa.array([f"query {i % 7}" for i in row], TEXT),
            "item": row % 30,
            "tags": pa.array([[i % 30, (i + 1) % 30] for i in row.tolist()], pa.list_(I64)),
            "history": pa.array([[i % 30] * (i % 4) for i in row.tolist()], pa.list_(I64)),
            "price": row * 0.5,
            "text": pa.array([[i * 0.25, 1.0] for i in row.tolist()], pa.list_(pa.float32())),
            "click": (row % 3 == 0).astype(np.int8),
            "dwell": row * 0.125,
            "trust": np.full(len(row), 0.5),
            "weight": np.full(len(row), 2.0),
            "tab": pa.array(np.where(row % 2 == 0, "home", "search").tolist(), TEXT),
            "session": row // 4,
        }
    )


def make_config(path: Path, **changes: Any) -> DataConfig:
    kind = FeatureKind
    parts: dict[str, Any] = {
        "splits": {"train": "train"},
        "features": {
            "user": FeatureConfig(kind=kind.id),
            "query": FeatureConfig(kind=kind.id, hashed=True),
            "item": FeatureConfig(kind=kind.id),
            "tags": FeatureConfig(kind=kind.bag, table="item"),
            "history": FeatureConfig(kind=kind.sequence, table="item", max_length=2),
            "price": FeatureConfig(kind=kind.dense),
            "text": FeatureConfig(kind=kind.vector, size=2),
        },
        "tables": {name: TableConfig(num_embeddings=n) for name, n in (("user", 100), ("query", 50), ("item", 30))},
        "tasks": {
            "click": TaskConfig(label="click"),
            "dwell": TaskConfig(label="dwell", kind=TaskKind.regression, weight="trust"),
        },
        "domain": DomainConfig(column="tab", names=["home", "search"]),
        "group": "session",
        "weight": "weight",
    }
    return DataConfig(name="bad", path=str(path), **{**parts, **changes})


def write_files(folder: Path, change: Callable[[pa.Table], pa.Table] | None = None, **how: Any) -> Path:
    """Three files of two row groups each; `change` spoils the second of them."""
    (folder / "train").mkdir(parents=True)
    for number in range(3):
        table = change(make_table(number)) if change and number == 1 else make_table(number)
        pq.write_table(table, folder / "train" / f"part-{number}.parquet", row_group_size=GROUP, **how)
    return folder


def read(data: DataConfig, *, prefetch: int = 2, size: int = 8) -> tuple[list[Batch], dict[str, int]]:
    """All batches in the order of the files, and what was repaired."""
    config = ReaderConfig(global_batch_size=size, shuffle=False, prefetch_batches=prefetch)
    with bounded():
        reader = Reader(data, config, split="train")
        return list(reader.batches()), dict(reader.encoder.repairs)


def rows_of(batches: list[Batch]) -> list[tuple]:
    """Each row with everything that a model sees of it."""
    found: list[tuple] = []
    for batch in batches:
        jagged = [batch.sparse_features[key] for key in batch.sparse_features.keys()]  # noqa: SIM118 - not a dict
        ids = [[t.tolist() for t in torch.split(j.values(), j.lengths().tolist())] for j in jagged]
        for b in range(batch.num_rows):
            parts = (batch.dense, batch.labels, batch.weights, batch.domain_id, batch.group_id)
            found.append((*(part[b] for part in ids), *(part[b].tolist() for part in parts)))
    return found


# --- how a table is spoilt ---

Change = Callable[[pa.Table], pa.Table]


def column(name: str, values: Any, kind: pa.DataType | None = None) -> Change:
    """Another column in place of `name`; a single value is there in every row."""

    def change(table: pa.Table) -> pa.Table:
        found = values if isinstance(values, pa.Array | list) else [values] * table.num_rows
        array = found if isinstance(found, pa.Array) else pa.array(found, kind)
        return table.set_column(table.schema.get_field_index(name), name, array)

    return change


def value(name: str, value: Any, *, row: int = 13) -> Change:
    """Another value in one row: by default the fourth of the second row group."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        kind = pa.float64() if isinstance(value, float) else table.schema.field(name).type
        return column(name, values, kind)(table)

    return change


def bad_text(name: str) -> Change:
    """Text that says it is UTF-8 and is not."""
    texts = pa.array([b"home"] * 13 + [b"\xff\xfe"] + [b"home"] * 6, pa.binary())
    return column(name, pa.Array.from_buffers(TEXT, NUM_ROWS, texts.buffers()))


def twice(name: str) -> Change:
    return lambda table: table.append_column(name, table[name])


@dataclass
class Case:
    """A way to spoil the second file, and the words of the error that must come of it."""

    name: str
    spoil: Change | Callable[[Path], None]
    words: list[str]
    config: dict[str, Any] = field(default_factory=dict)


PLACE = f"{SPOILT}, row group 1: column"
TYPES = "write it as such, or name another column"
NULLS = "allow_null=true, which reads them as"
INVALID = "allow_invalid=true, which reads it as"
DRIFT = "the same id would be another; write all files with one type"
VALUES = [
    Case("null id", value("user", None), [f"{PLACE} 'user' has 1 nulls", "position 3", "fill", f"user.{NULLS} no id"]),
    Case("null hashed id", value("query", None), [f"{PLACE} 'query' has 1 nulls", f"query.{NULLS} no id"]),
    Case("null list", value("tags", None), [f"{PLACE} 'tags' has 1 nulls", f"tags.{NULLS} no ids"]),
    Case("null in a list", value("tags", [1, None]), [f"{PLACE} 'tags' has 1 nulls", f"tags.{NULLS} no id"]),
    Case("null dense", value("price", None), [f"{PLACE} 'price' has 1 nulls", f"price.{NULLS} 0"]),
    Case("null vector", value("text", None), [f"{PLACE} 'text' has 1 nulls", f"text.{NULLS} zeros"]),
    Case("null in a vector", value("text", [None, 1.0]), [f"{PLACE} 'text' has 1 nulls", f"text.{NULLS} 0"]),
    Case("null label", value("click", None), [f"{PLACE} 'click' has 1 nulls", f"tasks.click.{NULLS} rows that do not"]),
    Case("null group", value("session", None), [f"{PLACE} 'session' has 1 nulls", "expected a group", "fill"]),
    Case("null weight", value("weight", None), [f"{PLACE} 'weight' has 1 nulls", "expected a number", "fill"]),
    Case("null domain", value("tab", None), [f"{PLACE} 'tab' holds domain None", "allow_unknown=true"]),
    Case("unknown domain", value("tab", "serch"), [f"{PLACE} 'tab' holds domain 'serch'", "did you mean 'search'"]),
    Case(
        "id out of range", value("user", 100), [f"{PLACE} 'user'", "id 100 at position 3", "0 to 99", f"user.{INVALID}"]
    ),
    Case("negative id", value("user", -1), [f"{PLACE} 'user'", "id -1 at position 3", "0 to 99", "hashed=true"]),
    Case("id of a list", value("tags", [1, 30]), [f"{PLACE} 'tags'", "id 30", "0 to 29", "data.tables.item.num_emb"]),
    Case("id of a cut part", value("history", [99, 1, 2]), [f"{PLACE} 'history'", "id 99", "expected 0 to 29"]),
    Case(
        "uint64 id",
        column("user", 2**63 + 5, pa.uint64()),
        [f"{SPOILT}, row group 0: column 'user'", "id 9223372036854775813", "0 to 99"],
    ),
    Case("NaN", value("price", math.nan), [f"{PLACE} 'price' holds nan at position 3", "finite", f"price.{INVALID} 0"]),
    Case("infinity", value("price", -math.inf), [f"{PLACE} 'price' holds -inf at position 3", f"price.{INVALID} 0"]),
    Case("too large for float32", value("price", 1e39), [f"{PLACE} 'price' holds 1e+39", "finite float32"]),
    Case("NaN in a vector", value("text", [1.0, math.nan]), [f"{PLACE} 'text' holds nan", f"text.{INVALID} 0"]),
    Case(
        "decimal overflow",
        column("price", Decimal("1" * 60), pa.decimal256(70, 0)),
        ["'price' holds 1111111111", "at position 0", "finite float32"],
    ),
    Case("label above 1", value("click", 2), [f"{PLACE} 'click' holds label 2", "'click', expected 0 to 1", "mend"]),
    Case("negative label", value("click", -1), [f"{PLACE} 'click' holds label -1", "kind=regression"]),
    Case("NaN label", value("click", math.nan), [f"{PLACE} 'click' holds nan at position 3", "a null, not NaN"]),
    Case("infinite label", value("dwell", math.inf), [f"{PLACE} 'dwell' holds inf at position 3", "finite"]),
    Case("negative weight", value("weight", -0.5), [f"{PLACE} 'weight' holds weight -0.5", "0 or more", "mend"]),
    Case("NaN weight", value("trust", math.nan), [f"{PLACE} 'trust' holds nan at position 3", "finite"]),
    Case("short vector", value("text", [1.0]), [f"{PLACE} 'text' holds a vector of 1 floats, expected 2", "text.size"]),
    Case("empty vector", value("text", []), [f"{PLACE} 'text' holds a vector of 0 floats, expected 2", "text.size"]),
    Case("invalid UTF-8 id", bad_text("query"), [f"{PLACE} 'query' holds bytes that are no string", "write", "binary"]),
    Case("invalid UTF-8 domain", bad_text("tab"), [f"{PLACE} 'tab' holds bytes that are no string", "mend"]),
]
COLUMNS = [
    Case("missing column", lambda t: t.drop_columns("price"), [SPOILT, "'price' is missing; valid: click"]),
    Case("other case", lambda t: t.rename_columns({"price": "PRICE"}), [SPOILT, "'price' is missing", "PRICE"]),
    Case("duplicate column", twice("price"), [SPOILT, "'price' is there 2 times, expected once", "rename"]),
    Case("float id", column("user", 1.0), [SPOILT, "'user' of feature 'user' is double, expected integers", TYPES]),
    Case("bool id", column("user", True), [SPOILT, "'user' of feature 'user' is bool, expected integers", TYPES]),
    Case("decimal id", column("user", Decimal(1)), [SPOILT, "'user' of feature 'user' is decimal128(1, 0)", TYPES]),
    Case(
        "timestamp id", column("user", datetime(2020, 1, 1)), [SPOILT, "'user' of feature 'user' is timestamp", TYPES]
    ),
    Case("struct id", column("user", {"a": 1}), [SPOILT, "'user' of feature 'user' is struct<a: int64>", TYPES]),
    Case("unhashed text", column("user", "u"), [SPOILT, "'user' of feature 'user' is string", "need hashed=true"]),
    Case(
        "nested list", column("tags", [[[1]]] * 20), [SPOILT, "'tags' of feature 'tags' is list", "expected integers"]
    ),
    Case("list of floats", column("tags", [[1.0]] * 20), [SPOILT, "list<element: double>, expected integers"]),
    Case("no list", column("tags", 1), [SPOILT, "'tags' of feature 'tags' is int64, expected a list of ids", TYPES]),
    Case("timestamp", column("price", datetime(2020, 1, 1)), [SPOILT, "'price' is timestamp", "expected numbers"]),
    Case("date", column("price", date(2020, 1, 1)), [SPOILT, "is date32[day], expected numbers", TYPES]),
    Case("text for number", column("price", "1.5"), [SPOILT, "'price' of feature 'price' is string, expected numbers"]),
    Case("text label", column("click", "1"), [SPOILT, "'click' of task 'click' is string, expected numbers", TYPES]),
    Case("text weight", column("weight", "1"), [SPOILT, "'weight' of data.weight is string, expected numbers", TYPES]),
    Case("float domain", column("tab", 0.0), [SPOILT, "'tab' of data.domain is double, expected integers", TYPES]),
    Case(
        "float group", column("session", 0.5), [SPOILT, "'session' of data.group is double, expected integers", TYPES]
    ),
    Case(
        "hashed id drifts",
        column("query", 7),
        [f"{SPOILT}: column 'query' holds int64", "part-0.parquet string", DRIFT],
    ),
    Case(
        "list of ids drifts",
        column("tags", [["a"]] * 20),
        [f"{SPOILT}: column 'tags' holds string", "part-0.parquet int64", DRIFT],
        {"hashed": "tags"},
    ),
    Case("group drifts", column("session", "s"), [f"{SPOILT}: column 'session' holds string", "int64", DRIFT]),
    Case("domain drifts", column("tab", 0), [f"{SPOILT}: column 'tab' holds int64", "part-0.parquet string", DRIFT]),
]


# --- how a file is spoilt ---


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 20)


def scribble(file: Path) -> None:
    """Damage data pages and leave the footer whole."""
    content = bytearray(file.read_bytes())
    content[4:400] = b"\xff" * 396
    file.write_bytes(content)


def scribble_footer(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-300:-200] = b"\xa5" * 100
    file.write_bytes(content)


def encrypted(file: Path) -> None:
    """The magic number of a file with an encrypted footer."""
    content = file.read_bytes()
    file.write_bytes(b"PARE" + content[4:-4] + b"PARE")


def unreadable(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "gone")


def no_rows_at_all(file: Path) -> None:
    for other in file.parent.iterdir():
        other.unlink()
    pq.write_table(make_table(num_rows=0), file)


def no_row_groups(file: Path) -> None:
    for other in file.parent.iterdir():
        other.unlink()
    pq.ParquetWriter(file, make_table().schema).close()


def no_files(file: Path) -> None:
    shutil.rmtree(file.parent)


BROKEN = [f"{SPOILT}: not a readable Parquet file", "write it again or remove it"]
FILES = [
    Case("truncated file", truncate, BROKEN),
    Case("zero bytes", lambda file: file.write_bytes(b""), BROKEN),
    Case("no Parquet", lambda file: file.write_text("user,price\n1,2\n"), BROKEN),
    Case("damaged footer", scribble_footer, [SPOILT]),
    Case("encrypted", encrypted, BROKEN),
    Case(
        "corrupt pages",
        scribble,
        [f"{SPOILT}, row group 0: cannot be decoded", "damaged or truncated", "write it again"],
    ),
    Case(
        "no rows in the split",
        no_rows_at_all,
        ["split 'train'", "data.path=", "1 files and no rows", "data.splits.train"],
    ),
    Case(
        "no row groups in the split",
        no_row_groups,
        ["split 'train'", "data.path=", "1 files and no rows", "data.splits.train"],
    ),
    Case(
        "no files in the split",
        no_files,
        ["no Parquet files in split 'train'", "data.path=", "conf/data/bad.yaml", "set data.path"],
    ),
]


def with_changes(path: Path, changes: dict[str, Any]) -> DataConfig:
    """The configuration with one feature hashed, or with parts that a case asks for."""
    data = make_config(path)
    if (name := changes.get("hashed")) is not None:
        data.features[name] = replace(data.features[name], hashed=True)
    return data


def expect(data: DataConfig, words: list[str]) -> None:
    for prefetch in (0, 2):
        with pytest.raises(DataError) as caught:
            read(data, prefetch=prefetch)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("case", [*VALUES, *COLUMNS], ids=lambda case: case.name)
def test_bad_columns_and_values_are_named(tmp_path: Path, case: Case) -> None:
    data = with_changes(write_files(tmp_path, case.spoil), case.config)  # type: ignore[arg-type]
    expect(data, case.words)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_bad_files_are_named(tmp_path: Path, case: Case) -> None:
    case.spoil(write_files(tmp_path) / "train" / SPOILT)  # type: ignore[arg-type]
    expect(make_config(tmp_path), case.words)


@pytest.mark.parametrize("case", COLUMNS, ids=lambda case: case.name)
def test_a_schema_is_refused_before_any_row_is_decoded(tmp_path: Path, case: Case) -> None:
    data = with_changes(write_files(tmp_path, case.spoil), case.config)  # type: ignore[arg-type]
    with bounded(), pytest.raises(DataError, match="the files do not fit the configuration"):
        Reader(data, ReaderConfig(), split="train")


def test_a_glob_without_matches_is_named(tmp_path: Path) -> None:
    write_files(tmp_path)
    expect(make_config(tmp_path, splits={"train": "train/2020-*/*.parquet"}), ["(train/2020-*/*.parquet)", "data.path"])


# --- what is repaired, as the configuration asks for it ---


@dataclass
class Repair:
    """A way to spoil the second file, what is configured, and what must be counted."""

    name: str
    spoil: Change
    feature: dict[str, dict[str, Any]]
    counted: dict[str, int]
    becomes: dict[str, Any]  # column -> the value that reads the same


INV, NUL = {"allow_invalid": True}, {"allow_null": True}
REPAIRS = [
    Repair("null id", value("user", None), {"user": NUL}, {"user: null read as no id": 1}, {}),
    Repair("null list", value("tags", None), {"tags": NUL}, {"tags: null read as no ids": 1}, {"tags": []}),
    Repair("null in a list", value("tags", [1, None]), {"tags": NUL}, {"tags: null read as no id": 1}, {"tags": [1]}),
    Repair("null dense", value("price", None), {"price": NUL}, {"price: null read as 0": 1}, {"price": 0.0}),
    Repair("null vector", value("text", None), {"text": NUL}, {"text: null read as zeros": 1}, {"text": [0.0, 0.0]}),
    Repair("id outside", value("user", 100), {"user": INV}, {"user: id outside table 'user' read as no id": 1}, {}),
    Repair("negative id", value("user", -7), {"user": INV}, {"user: id outside table 'user' read as no id": 1}, {}),
    Repair(
        "uint64 id",
        column("user", [*range(13), 2**64 - 1, *range(14, 20)], pa.uint64()),
        {"user": INV},
        {"user: id outside table 'user' read as no id": 1},
        {},
    ),
    Repair(
        "ids outside in a list",
        value("tags", [30, 4, -1]),
        {"tags": INV},
        {"tags: id outside table 'item' read as no id": 2},
        {"tags": [4]},
    ),
    Repair(
        "id outside in a sequence that is cut",
        value("history", [5, 6, 77]),
        {"history": INV},
        {"history: id outside table 'item' read as no id": 1},
        {"history": [5, 6]},
    ),
    Repair("NaN", value("price", math.nan), {"price": INV}, {"price: NaN or infinity read as 0": 1}, {"price": 0.0}),
    Repair(
        "infinity", value("price", math.inf), {"price": INV}, {"price: NaN or infinity read as 0": 1}, {"price": 0.0}
    ),
    Repair(
        "NaN in a vector",
        value("text", [math.nan, 3.0]),
        {"text": INV},
        {"text: NaN or infinity read as 0": 1},
        {"text": [0.0, 3.0]},
    ),
]


def configured(path: Path, settings: dict[str, dict[str, Any]]) -> DataConfig:
    data = make_config(path)
    for name, setting in settings.items():
        data.features[name] = replace(data.features[name], **setting)
    return data


@pytest.mark.parametrize("repair", REPAIRS, ids=lambda repair: repair.name)
def test_repairs_are_counted_and_touch_nothing_else(tmp_path: Path, repair: Repair) -> None:
    spoilt = write_files(tmp_path / "spoilt", repair.spoil)
    clean = write_files(tmp_path / "clean", lambda t: _all_of(repair.becomes, t))
    expected = rows_of(read(make_config(clean))[0])
    if not repair.becomes:  # an id that is none
        expected[33] = ([], *expected[33][1:])
        if repair.name == "uint64 id":
            expected[20:40] = [([i] if i != 13 else [], *row[1:]) for i, row in enumerate(expected[20:40])]
    batches, counted = read(configured(spoilt, repair.feature))
    assert counted == repair.counted
    assert rows_of(batches) == expected
    with pytest.raises(DataError):  # without the setting it is an error
        read(make_config(spoilt))


def _all_of(becomes: dict[str, Any], table: pa.Table) -> pa.Table:
    for name, good in becomes.items():
        table = value(name, good)(table)
    return table


def test_null_labels_and_unknown_domains_are_counted(tmp_path: Path) -> None:
    write_files(tmp_path, lambda t: value("click", None)(value("tab", "feed")(t)))
    data = make_config(tmp_path, domain=DomainConfig(column="tab", names=["home", "search"], allow_unknown=True))
    data.tasks["click"] = replace(data.tasks["click"], allow_null=True)
    batches, counted = read(data)
    assert counted == {
        "click: null read as rows that do not count": 1,
        "tab: unknown domain read as -1": 1,
    }
    good = rows_of(read(make_config(write_files(tmp_path / "good")))[0])
    found = rows_of(batches)
    assert found[:33] + found[34:] == good[:33] + good[34:]
    (*_, labels, weights, domain, _) = found[33]
    assert (labels[0], weights[0], weights[1], domain) == (0.0, 0.0, 1.0, -1)


def test_a_hash_cannot_be_outside_its_table() -> None:
    with pytest.raises(ConfigError, match="hashed and allow_invalid.*remove allow_invalid"):
        FeatureConfig(kind=FeatureKind.id, hashed=True, allow_invalid=True)


# --- what is no fault ---


def others_beside(file: Path) -> None:
    """What writers leave behind, and a folder that has the name of a file."""
    (file.parent / "_temporary").mkdir()
    shutil.copy(file, file.parent / "_temporary" / "part-9.parquet")
    for name in ("_SUCCESS", ".part-1.parquet.crc", "_metadata", "._part-1.parquet"):
        (file.parent / name).write_bytes(b"no Parquet")
    (file.parent / "part-7.parquet").mkdir()


def as_a_folder(file: Path) -> None:
    """A folder with the name of a file and the file within, as Spark writes it."""
    file.rename(file.with_name("moved"))
    file.mkdir()
    file.with_name("moved").rename(file / "part-00000.snappy.parquet")


def empty_file_beside(file: Path) -> None:
    pq.write_table(make_table(num_rows=0), file.with_name("part-1b.parquet"))


def empty_row_groups(file: Path) -> None:
    table = pq.read_table(file)
    with pq.ParquetWriter(file, table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 10), table.slice(0, 0), table.slice(10), table.slice(0, 0)):
            writer.write_table(part)


def rewritten(change: Change) -> Callable[[Path], None]:
    return lambda file: pq.write_table(change(pq.read_table(file)), file, row_group_size=GROUP)


def encoded_as_dictionary(table: pa.Table) -> pa.Table:
    for name in ("query", "user", "tab", "price"):
        table = column(name, table[name].combine_chunks().dictionary_encode())(table)
    return table


def as_other_types(table: pa.Table) -> pa.Table:
    kinds = {"user": pa.int32(), "item": pa.uint8(), "tags": pa.large_list(pa.int16()), "query": pa.large_binary()}
    kinds |= {"price": pa.float32(), "text": pa.list_(pa.float64(), 2), "click": pa.bool_(), "session": pa.uint64()}
    for name, kind in kinds.items():
        table = column(name, table[name].combine_chunks().cast(kind))(table)
    return table


def more_columns(table: pa.Table) -> pa.Table:
    table = table.append_column("unread", pa.nulls(table.num_rows))
    return twice("unread")(table).select([*reversed(range(table.num_columns + 1))])


@pytest.mark.parametrize(
    "harmless",
    [
        others_beside,
        as_a_folder,
        empty_file_beside,
        empty_row_groups,
        rewritten(encoded_as_dictionary),
        rewritten(as_other_types),
        rewritten(more_columns),
    ],
    ids=["others", "folder", "empty file", "empty row groups", "dictionary", "types", "more columns"],
)
def test_what_is_no_fault_gives_the_same_batches(tmp_path: Path, harmless: Callable[[Path], None]) -> None:
    good = rows_of(read(make_config(write_files(tmp_path / "good")))[0])
    harmless(write_files(tmp_path / "other") / "train" / SPOILT)
    batches, repairs = read(make_config(tmp_path / "other"))
    assert rows_of(batches) == good and not repairs


def test_very_long_lists_are_read_whole(tmp_path: Path) -> None:
    write_files(tmp_path, value("tags", [*range(30)] * 20_000))
    batches, _ = read(make_config(tmp_path))
    assert max(len(ids) for _, _, _, ids, *_ in rows_of(batches)) == 600_000


def test_rows_before_a_bad_one_are_served_as_ever(tmp_path: Path) -> None:
    good = rows_of(read(make_config(write_files(tmp_path / "good")))[0])
    data = make_config(write_files(tmp_path / "bad", value("price", math.nan)))
    batches = Reader(data, ReaderConfig(global_batch_size=5, shuffle=False), split="train").batches()
    served = []
    with bounded(), pytest.raises(DataError, match="'price' holds nan"):
        served.extend(batches)
    assert rows_of(served) == good[:30]  # to the end of the row group before


# --- with two ranks ---


def test_bad_rows_of_one_rank_end_the_job_with_one_message(tmp_path: Path) -> None:
    write_toy(tmp_path, [400], row_group_size=25)
    file = tmp_path / "train" / "part-0.parquet"
    table = pq.read_table(file)
    user = table["user"].to_numpy().copy()
    user[399] = 99_999  # in order, the last 25 rows of a step, and their row group, are the last rank's
    pq.write_table(column("user", pa.array(user))(table), file, row_group_size=25)
    run_dir = tmp_path / "run"
    settings = [f"run_dir={run_dir}", "reader.shuffle=false", "trainer.max_steps=20", "trainer.eval_split=null"]
    job = ["-m", "rec.train", "--config-dir", str(CONF), *toy_overrides(tmp_path, *settings)]
    done = torchrun(*job, ranks=2, timeout=150, check=False)
    assert time.time() - (run_dir / "metrics.jsonl").stat().st_mtime < 30  # since the run last said something
    said = done.stdout + done.stderr
    assert done.returncode not in (0, 75)
    assert said.count("DataError: ") == 1, said
    assert (
        f"{file}, row group 15: column 'user' of feature 'user' holds id 99999 at position 24, expected 0 to 996"
        in said
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert not any(json.loads(line)["event"] == "end" for line in lines)

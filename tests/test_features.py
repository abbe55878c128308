"""The encoder against Python loops over rows, one value at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from rec.features import Batch, DataError, Encoder
from rec.schema import (
    DataConfig,
    DomainConfig,
    FeatureConfig,
    FeatureKind,
    TableConfig,
    TaskConfig,
    TaskKind,
    Transform,
)
from tests.test_hashing import TEXTS, loop_hash

WHERE = "part-0.parquet, row group 3"


# --- every kind of column, against loops ---


def a_feature(kind: str, **more: Any) -> FeatureConfig:
    return FeatureConfig(kind=FeatureKind[kind], **more)


def ids(values: int = 50) -> Callable[[np.random.Generator], int]:
    return lambda rng: int(rng.integers(0, values))


def text(rng: np.random.Generator) -> str:
    return TEXTS[rng.integers(0, len(TEXTS))]


def number(rng: np.random.Generator) -> float:
    return float(rng.normal() * 10)


def big(rng: np.random.Generator) -> int:
    return int(rng.integers(0, 2**64, dtype=np.uint64))


def listed(draw: Callable, low: int, high: int) -> Callable[[np.random.Generator], list]:
    return lambda rng: [draw(rng) for _ in range(rng.integers(low, high))]


def holey(draw: Callable) -> Callable[[np.random.Generator], Any]:
    return lambda rng: None if rng.random() < 0.3 else draw(rng)


I64, F32, TEXT = pa.int64(), pa.float32(), pa.string()
WORD = pa.dictionary(pa.int32(), TEXT)
NULLS: dict[str, Any] = {"allow_null": True}
HASHED: dict[str, Any] = {"hashed": True, "table": "hashed"}
# name -> what the configuration says, the column's type, and how one value is drawn
FEATURES: dict[str, tuple[FeatureConfig, pa.DataType, Callable]] = {
    "id": (a_feature("id"), I64, ids()),
    "id_int32": (a_feature("id", table="id"), pa.int32(), ids()),
    "id_uint64": (a_feature("id", table="id"), pa.uint64(), ids()),
    "id_null": (a_feature("id", table="id", **NULLS), I64, holey(ids())),
    "id_untyped": (a_feature("id", table="id", **NULLS), pa.null(), lambda rng: None),
    "hashed_negative": (a_feature("id", **HASHED), I64, lambda rng: -int(rng.integers(0, 2**62))),
    "hashed_uint64": (a_feature("id", **HASHED), pa.uint64(), big),
    "hashed_text": (a_feature("id", **HASHED), TEXT, text),
    "hashed_large_text": (a_feature("id", **HASHED, **NULLS), pa.large_string(), holey(text)),
    "hashed_binary": (a_feature("id", **HASHED), pa.binary(), lambda rng: text(rng).encode()),
    "hashed_word": (a_feature("id", **HASHED, **NULLS), WORD, holey(text)),
    "hashed_null": (a_feature("id", **HASHED, **NULLS), I64, holey(ids(2**40))),
    "bag": (a_feature("bag", table="id"), pa.list_(I64), listed(ids(), 0, 6)),
    "bag_cut": (a_feature("bag", table="id", max_length=2), pa.list_(pa.int16()), listed(ids(), 0, 6)),
    "bag_fixed": (a_feature("bag", table="id", **NULLS), pa.list_(I64, 2), holey(listed(ids(), 2, 3))),
    "bag_text": (a_feature("bag", **HASHED), pa.list_(TEXT), listed(text, 0, 4)),
    "bag_words": (a_feature("bag", **HASHED), pa.list_(WORD), listed(text, 0, 4)),
    "bag_untyped": (a_feature("bag", table="id"), pa.list_(pa.null()), lambda rng: []),
    "sequence": (a_feature("sequence", table="id", max_length=3), pa.large_list(I64), listed(ids(), 0, 9)),
    "sequence_null": (
        a_feature("sequence", table="id", max_length=3, **NULLS),
        pa.list_(I64),
        holey(listed(holey(ids()), 0, 9)),
    ),
    "dense": (a_feature("dense"), pa.float64(), number),
    "dense_log": (a_feature("dense", transform=Transform.log1p), F32, number),
    "dense_null": (a_feature("dense", transform=Transform.log1p, **NULLS), pa.float16(), holey(number)),
    "dense_integer": (a_feature("dense"), I64, lambda rng: int(rng.integers(0, 2**60))),
    "dense_bool": (a_feature("dense"), pa.bool_(), lambda rng: bool(rng.random() < 0.5)),
    "dense_decimal": (
        a_feature("dense", **NULLS),
        pa.decimal128(10, 2),
        holey(lambda rng: int(rng.integers(-99, 99))),
    ),
    "dense_dictionary": (a_feature("dense"), pa.dictionary(pa.int8(), F32), ids(3)),
    "vector": (a_feature("vector", size=3), pa.list_(pa.float64()), listed(number, 3, 4)),
    "vector_fixed": (a_feature("vector", size=2, **NULLS), pa.list_(F32, 2), holey(listed(holey(number), 2, 3))),
    "vector_log": (
        a_feature("vector", size=2, transform=Transform.log1p, **NULLS),
        pa.large_list(F32),
        holey(listed(number, 2, 3)),
    ),
}
TASKS = {
    "click": TaskConfig(label="clicked", truth="true_click"),
    "soft": TaskConfig(label="paid", condition="click"),
    "purchase": TaskConfig(label="bought", condition="click", weight="trust", allow_null=True, truth="true_purchase"),
    "review": TaskConfig(label="reviewed", condition="purchase"),
    "dwell": TaskConfig(label="seconds", kind=TaskKind.regression, label_transform=Transform.log1p),
}
OTHERS: dict[str, tuple[pa.DataType, Callable]] = {
    "clicked": (pa.bool_(), lambda rng: bool(rng.random() < 0.5)),
    "paid": (pa.decimal128(3, 2), lambda rng: int(rng.integers(0, 2))),
    "bought": (pa.int8(), holey(ids(2))),
    "reviewed": (pa.dictionary(pa.int8(), pa.float64()), ids(2)),
    "seconds": (pa.float64(), number),
    "true_click": (pa.float64(), lambda rng: float(rng.random())),
    "true_purchase": (F32, lambda rng: float(rng.random())),
    "trust": (pa.float64(), lambda rng: float(rng.random())),
    "weight": (pa.int32(), ids(4)),
    "tab": (TEXT, lambda rng: ["home", "suche ü", "feed"][rng.integers(0, 3)]),
    "query": (TEXT, text),
}


def rich_config(**changes: Any) -> DataConfig:
    parts: dict[str, Any] = {
        "features": {name: feature for name, (feature, _, _) in FEATURES.items()},
        "tables": {"id": TableConfig(num_embeddings=50), "hashed": TableConfig(num_embeddings=1009)},
        "tasks": TASKS,
        "domain": DomainConfig(column="tab", names=["home", "suche ü", "feed"]),
        "group": "query",
        "weight": "weight",
    }
    return DataConfig(name="rich", path=".", **{**parts, **changes})


def rich_table(num_rows: int, *, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    kinds = {name: (kind, draw) for name, (_, kind, draw) in FEATURES.items()} | OTHERS
    drawn = {name: (kind, [draw(rng) for _ in range(num_rows)]) for name, (kind, draw) in kinds.items()}
    return pa.table({name: pa.array(values, kind) for name, (kind, values) in drawn.items()})


def loop_log(transform: Transform, value: float) -> float:
    return math.copysign(math.log1p(abs(value)), value) if transform is Transform.log1p else value


def loop_ids(data: DataConfig, name: str, row: dict) -> list[int]:
    feature, value = data.features[name], row[data.column_of(name)]
    found = [value] if feature.kind is FeatureKind.id else value or []
    found = [x for x in found if x is not None]
    if feature.max_length is not None:
        found = found[max(0, len(found) - feature.max_length) :]
    num_embeddings = data.tables[data.table_of(name)].num_embeddings
    return [loop_hash(x) % num_embeddings if feature.hashed else x for x in found]


def loop_dense(data: DataConfig, row: dict) -> list[float]:
    out = []
    for name, feature in data.dense_features.items():
        value = row[data.column_of(name)]
        floats = (value or [0.0] * feature.size) if feature.kind is FeatureKind.vector else [value]
        out += [loop_log(feature.transform, float(x or 0)) for x in floats]
    return out


def loop_label(task: TaskConfig, row: dict) -> float:
    return loop_log(task.label_transform, float(row[task.label] or 0))


def loop_weight(data: DataConfig, task: TaskConfig, row: dict) -> float:
    if row[task.label] is None:
        return 0.0
    if task.condition and not (row[data.tasks[task.condition].label] or 0) > 0:
        return 0.0
    return (row[data.weight] if data.weight else 1.0) * (row[task.weight] if task.weight else 1.0)


def loop_group(data: DataConfig, row: dict) -> int:
    if data.group is None:
        return 0
    value = row[data.group]
    unsigned = value % 2**64 if isinstance(value, int) else loop_hash(value)
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


def loop_domain(data: DataConfig, row: dict) -> int:
    if data.domain is None:
        return 0
    value = row[data.domain.column]
    return value if isinstance(value, int) else data.domain.names.index(value)


def ids_of(batch: Batch, name: str) -> list[list[int]]:
    jagged = batch.sparse_features[name]
    return [part.tolist() for part in torch.split(jagged.values(), jagged.lengths().tolist())]


def assert_equals_loops(batch: Batch, rows: list[dict], data: DataConfig, *, size: int) -> None:
    padding = size - len(rows)
    assert batch.num_rows == len(rows)
    assert batch.sparse_features.keys() == list(data.sparse_features)
    for name in data.sparse_features:
        assert ids_of(batch, name) == [loop_ids(data, name, row) for row in rows] + [[]] * padding, name
    expected = {
        "dense": [loop_dense(data, row) for row in rows] + [[0.0] * data.num_dense] * padding,
        "labels": [[loop_label(task, row) for task in data.tasks.values()] for row in rows],
        "weights": [[loop_weight(data, task, row) for task in data.tasks.values()] for row in rows],
    }
    for name, values in expected.items():
        padded = np.zeros((size, len(values[0]) if values else len(data.tasks)))
        padded[: len(values)] = values or padded[:0]
        found = getattr(batch, name)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), padded, rtol=2e-6, err_msg=name)
    assert batch.domain_id.tolist() == [loop_domain(data, row) for row in rows] + [0] * padding
    assert batch.group_id.tolist() == [loop_group(data, row) for row in rows] + [0] * padding
    assert batch.domain_id.dtype == batch.group_id.dtype == torch.int64


@pytest.fixture(scope="module")
def rich() -> pa.Table:
    return rich_table(200)


@pytest.mark.parametrize(("low", "high", "padding"), [(0, 200, 0), (0, 200, 3), (17, 60, 5), (199, 200, 0), (7, 7, 4)])
def test_a_batch_equals_loops_over_its_rows(rich: pa.Table, low: int, high: int, padding: int):
    encoder, size = Encoder(rich_config()), high - low + padding
    assert encoder.check_schema(rich.schema, WHERE) == []
    batch = encoder.collate(encoder.encode(rich, WHERE).slice(low, high - low), size)
    assert_equals_loops(batch, rich.to_pylist()[low:high], rich_config(), size=size)


def test_slices_and_chunks_of_columns_do_not_matter(rich: pa.Table):
    pieces = pa.concat_tables([rich.slice(40, 13), rich.slice(3, 20), rich.slice(0, 0), rich.slice(170)])
    assert pieces["bag"].num_chunks > 1
    encoder = Encoder(rich_config())
    for table in (rich.slice(11, 50), pieces):
        batch = encoder.collate(encoder.encode(table, WHERE), table.num_rows)
        assert_equals_loops(batch, table.to_pylist(), rich_config(), size=table.num_rows)


def test_encoded_row_groups_can_be_joined_and_gathered(rich: pa.Table):
    encoder = Encoder(rich_config(), truth=True)
    joined = pa.concat_tables([encoder.encode(rich.slice(low, 50), WHERE) for low in (0, 50, 100, 150)])
    order = np.random.default_rng(0).permutation(200)[:90]
    batch = encoder.collate(joined.take(pa.array(order)), 90)
    rows = rich.to_pylist()
    assert_equals_loops(batch, [rows[i] for i in order], rich_config(), size=90)


def test_rows_without_lists_weights_domain_or_group(rich: pa.Table):
    data = rich_config(domain=None, group=None, weight=None)
    encoder = Encoder(data)
    assert {"tab", "query", "weight"}.isdisjoint(encoder.columns)
    assert_equals_loops(encoder.collate(encoder.encode(rich, WHERE), 210), rich.to_pylist(), data, size=210)


def test_dense_alone_and_sparse_alone(rich: pa.Table):
    tables = {"id": TableConfig(num_embeddings=50)}
    for name, of in (("dense", {}), ("id", tables)):
        data = rich_config(features={name: FEATURES[name][0]}, tables=of)
        batch = Encoder(data).collate(Encoder(data).encode(rich, WHERE), 205)
        assert_equals_loops(batch, rich.to_pylist(), data, size=205)


@pytest.mark.parametrize(
    ("column", "kind", "draw"),
    [
        ("tab", pa.int64(), ids(3)),
        ("tab", pa.uint8(), ids(3)),
        ("tab", WORD, lambda rng: "feed"),
        ("tab", pa.large_string(), lambda rng: "suche ü"),
        ("query", pa.int32(), ids()),
        ("query", pa.uint64(), big),
        ("query", WORD, text),
    ],
    ids=lambda value: str(value) if isinstance(value, str | pa.DataType) else "",
)
def test_domains_and_groups_of_other_types(rich: pa.Table, column: str, kind: pa.DataType, draw: Callable):
    data = rich_config()
    rng = np.random.default_rng(0)
    values = pa.array([draw(rng) for _ in range(rich.num_rows)], kind)
    table = rich.set_column(rich.schema.get_field_index(column), column, values)
    encoder = Encoder(data)
    assert encoder.check_schema(table.schema, WHERE) == []
    assert_equals_loops(encoder.collate(encoder.encode(table, WHERE), 200), table.to_pylist(), data, size=200)


def test_binary_domains_are_compared_as_bytes(rich: pa.Table):
    table = change(rich, "tab", [b"home", "suche ü".encode()] * 100, pa.binary())
    encoder = Encoder(rich_config())
    assert encoder.collate(encoder.encode(table, WHERE), 200).domain_id.tolist() == [0, 1] * 100
    with pytest.raises(DataError, match=r"holds domain b'\\xff', unknown to data.domain.names"):
        encoder.encode(change(rich, "tab", [b"\xff"] * 200, pa.binary()), WHERE)


def test_truth_is_nan_for_tasks_without_it(rich: pa.Table):
    encoder = Encoder(rich_config(), truth=True)
    batch = encoder.collate(encoder.encode(rich, WHERE), 201)
    assert batch.truth is not None
    expected = np.zeros((201, 5))
    for i, row in enumerate(rich.to_pylist()):
        expected[i] = row["true_click"], math.nan, row["true_purchase"], math.nan, math.nan
    np.testing.assert_allclose(batch.truth.numpy(), expected, rtol=1e-6)
    assert "true_click" not in Encoder(rich_config()).columns
    assert Encoder(rich_config()).collate(Encoder(rich_config()).encode(rich, WHERE), 200).truth is None


def test_each_column_is_read_once():
    data = rich_config()
    assert sorted(Encoder(data, truth=True).columns) == sorted([*FEATURES, *OTHERS])
    shared = rich_config(group="id", domain=DomainConfig(column="id", names=["a"]))
    assert Encoder(shared).columns.count("id") == 1


def test_dropped_rows_lose_the_ids_of_that_feature_alone(rich: pa.Table):
    encoder, rng = Encoder(rich_config()), np.random.default_rng(0)
    rows = encoder.encode(rich, WHERE)
    dropped = {name: rng.random(200) < 0.5 for name in ("id", "id_null", "sequence", "bag_fixed")}
    whole, part = encoder.collate(rows, 210), encoder.collate(rows, 210, dropped)
    for name in encoder.keys:
        gone = dropped.get(name, np.zeros(200, bool)).tolist() + [False] * 10
        assert ids_of(part, name) == [[] if out else i for i, out in zip(ids_of(whole, name), gone, strict=True)]
    assert torch.equal(part.dense, whole.dense)
    assert torch.equal(part.weights, whole.weights)


def test_no_rows(rich: pa.Table):
    encoder = Encoder(rich_config(), truth=True)
    empty = encoder.encode(rich.slice(0, 0), WHERE)
    assert empty.schema == encoder.encode(rich, WHERE).schema
    for rows in (
        empty,
        pa.table({name: pa.chunked_array([], empty.schema.field(name).type) for name in empty.schema.names}),
    ):
        assert_equals_loops(encoder.collate(rows, 3), [], rich_config(), size=3)
    both = pa.concat_tables([empty, encoder.encode(rich, WHERE)])
    assert_equals_loops(encoder.collate(both, 200), rich.to_pylist(), rich_config(), size=200)


def test_columns_without_a_type(rich: pa.Table):
    """As they come from writers that infer types from rows, where there are none or nulls alone."""
    encoder = Encoder(rich_config(), truth=True)
    untyped = pa.table({name: pa.nulls(0) for name in rich.schema.names})
    assert encoder.check_schema(untyped.schema, WHERE) == []
    assert encoder.encode(untyped, WHERE).schema == encoder.encode(rich, WHERE).schema
    nulls = rich
    for name, (feature, _, _) in FEATURES.items():
        if feature.allow_null:
            nulls = change(nulls, name, [None] * 200, pa.null())
    batch = encoder.collate(encoder.encode(nulls, WHERE), 200)
    assert_equals_loops(batch, nulls.to_pylist(), rich_config(), size=200)
    for name in ("id", "bag", "sequence", "dense", "vector", "clicked", "trust", "weight", "query"):
        with pytest.raises(DataError, match=f"column '{name}' has 200 nulls, the first at position 0"):
            encoder.encode(change(rich, name, [None] * 200, pa.null()), WHERE)
    with pytest.raises(DataError, match="column 'tab' holds domain None"):
        encoder.encode(change(rich, "tab", [None] * 200, pa.null()), WHERE)


def test_moving_a_batch_keeps_everything(rich: pa.Table):
    encoder = Encoder(rich_config(), truth=True)
    batch = encoder.collate(encoder.encode(rich, WHERE), 203)
    moved = batch.to(torch.device("meta"))
    assert moved.num_rows == 200
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.sparse_features.values().device.type == "meta"
    same = batch.to(torch.device("cpu"), non_blocking=True)
    assert_equals_loops(same, rich.to_pylist(), rich_config(), size=203)
    assert torch.equal(same.truth.nan_to_num(9), batch.truth.nan_to_num(9))
    without = Encoder(rich_config())
    assert without.collate(without.encode(rich, WHERE), 200).to(torch.device("cpu")).truth is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_pinned_batch_reaches_the_gpu_whole(rich: pa.Table):
    encoder = Encoder(rich_config())
    pinned = encoder.collate(encoder.encode(rich, WHERE), 203).pin_memory()
    assert pinned.dense.is_pinned()
    assert pinned.sparse_features.values().is_pinned()
    moved = pinned.to(torch.device("cuda"), non_blocking=True)
    moved.record_stream(torch.cuda.current_stream())
    assert_equals_loops(moved.to(torch.device("cpu")), rich.to_pylist(), rich_config(), size=203)


# --- what is repaired, and what is refused ---


def test_repairs_are_counted(rich: pa.Table):
    encoder, rows = Encoder(rich_config()), rich.to_pylist()
    encoder.encode(rich.slice(0, 120), WHERE)
    encoder.encode(rich.slice(120), WHERE)

    def nulls(column: str) -> int:
        return sum(row[column] is None for row in rows)

    def nulls_inside(column: str) -> int:
        return sum(x is None for row in rows for x in row[column] or [])

    words = {"id": "no id", "bag": "no ids", "sequence": "no ids", "dense": "0", "vector": "zeros"}
    allowed = {name: feature for name, (feature, _, _) in FEATURES.items() if feature.allow_null}
    expected = {f"{name}: null read as {words[f.kind.name]}": nulls(name) for name, f in allowed.items()}
    expected["sequence_null: null read as no id"] = nulls_inside("sequence_null")
    expected["vector_fixed: null read as 0"] = nulls_inside("vector_fixed")
    expected["bought: null read as rows that do not count"] = nulls("bought")
    assert min(expected.values()) > 0
    assert encoder.repairs == expected


def change(table: pa.Table, column: str, values: list, kind: pa.DataType | None = None) -> pa.Table:
    return table.set_column(table.schema.get_field_index(column), column, pa.array(values, kind))


def with_value(column: str, value: Any, *, position: int = 5) -> Callable[[pa.Table], pa.Table]:
    """The table with `value` in one row, in a type that can hold it."""

    def put(table: pa.Table) -> pa.Table:
        kind, values = table.schema.field(column).type, table[column].to_pylist()
        values[position] = value
        return change(table, column, values, pa.float64() if isinstance(value, float) else kind)

    return put


ALLOW = "set data.{}.allow_null=true"


@pytest.mark.parametrize(
    ("feed", "words"),
    [
        (with_value("id", None), ["'id' has 1 nulls, the first at position 5", ALLOW.format("features.id"), "no id"]),
        (with_value("hashed_text", None), ["'hashed_text' has 1 nulls", ALLOW.format("features.hashed_text")]),
        (with_value("bag", None), ["'bag' has 1 nulls", ALLOW.format("features.bag"), "no ids"]),
        (with_value("bag", [1, None]), ["'bag' has 1 nulls", ALLOW.format("features.bag"), "no id"]),
        (with_value("dense", None), ["'dense' has 1 nulls", ALLOW.format("features.dense"), "reads them as 0"]),
        (with_value("vector", None), ["'vector' has 1 nulls", ALLOW.format("features.vector"), "zeros"]),
        (with_value("vector", [1.0, None, 2.0]), ["'vector' has 1 nulls", ALLOW.format("features.vector")]),
        (with_value("clicked", None), ["'clicked' has 1 nulls", ALLOW.format("tasks.click"), "do not count"]),
        (with_value("trust", None), ["'trust' has 1 nulls", "position 5", "expected a number", "fill"]),
        (with_value("weight", None), ["'weight' has 1 nulls", "position 5", "expected a number", "fill"]),
        (with_value("true_click", None), ["'true_click' has 1 nulls", "expected a number", "fill"]),
        (with_value("query", None), ["'query' has 1 nulls", "position 5", "expected a group", "fill"]),
        (with_value("tab", None), ["'tab' holds domain None", "data.domain.names", "valid: feed, home, suche"]),
        (
            with_value("tab", "hom"),
            ["'tab' holds domain 'hom'", "data.domain.names", "did you mean 'home'", "data.domain.allow_unknown=true"],
        ),
        (lambda t: change(t, "tab", [0, 3] * 100), ["'tab' holds domain 3", "data.domain.names"]),
        (lambda t: change(t, "tab", [0, -1] * 100), ["'tab' holds domain -1", "data.domain.names"]),
        (
            lambda t: change(t, "tab", [0, 2**64 - 1] * 100, pa.uint64()),
            ["'tab' holds domain 18446744073709551615", "data.domain.names"],
        ),
        (with_value("dense", math.nan), ["'dense' holds nan at position 5", "finite", "mend"]),
        (with_value("dense", -math.inf), ["'dense' holds -inf at position 5", "finite", "mend"]),
        (with_value("dense", 1e300), ["'dense' holds 1e+300 at position 5", "finite float32", "mend"]),
        (with_value("dense_null", math.nan), ["'dense_null' holds nan", "finite", "what is missing is a null"]),
        (with_value("vector", [1.0, math.nan, 2.0]), ["'vector' holds nan", "position 16", "finite"]),
        (with_value("seconds", math.inf), ["'seconds' holds inf", "finite"]),
        (with_value("trust", math.nan), ["'trust' holds nan", "finite"]),
        (with_value("true_purchase", math.nan), ["'true_purchase' holds nan", "finite"]),
        (
            with_value("id", 50),
            [
                "'id' of feature 'id' holds id 50 at position 5, expected 0 to 49",
                "data.tables.id.num_embeddings",
                "id.hashed=true",
            ],
        ),
        (with_value("id", -1), ["'id' of feature 'id' holds id -1 at position 5, expected 0 to 49"]),
        (with_value("id_uint64", 2**64 - 1), ["holds id 18446744073709551615 at position 5, expected 0 to 49"]),
        (with_value("id_null", 50), ["'id_null'", "holds id 50", "data.tables.id.num_embeddings"]),
        (with_value("bag_cut", [99, 1, 2]), ["'bag_cut'", "holds id 99", "expected 0 to 49"]),
        (with_value("sequence", [1, -7]), ["'sequence'", "holds id -7", "expected 0 to 49"]),
        (with_value("bought", 2), ["'bought' holds label 2 of binary task 'purchase'", "0 to 1", "kind=regression"]),
        (with_value("bought", -1), ["'bought' holds label -1 of binary task 'purchase'", "0 to 1"]),
        (with_value("trust", -0.5), ["'trust' holds weight -0.5, expected 0 or more", "mend"]),
        (with_value("weight", -2), ["'weight' holds weight -2, expected 0 or more", "mend"]),
        (with_value("vector", [1.0, 2.0]), ["'vector' holds a vector of 2 floats, expected 3", "features.vector.size"]),
        (with_value("vector", []), ["'vector' holds a vector of 0 floats, expected 3"]),
        (with_value("vector_log", [1.0]), ["'vector_log' holds a vector of 1 floats, expected 2"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_values_are_named(rich: pa.Table, feed: Callable[[pa.Table], pa.Table], words: list[str]):
    with pytest.raises(DataError) as caught:
        Encoder(rich_config(), truth=True).encode(feed(rich), WHERE)
    for word in [WHERE, "column", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("column", "kind", "words"),
    [
        ("id", pa.float64(), "'id' of feature 'id' is double, expected integers or strings"),
        ("id", TEXT, "'id' of feature 'id' is string, expected integers (strings need hashed=true)"),
        ("id", WORD, "'id' of feature 'id' is string, expected integers (strings need hashed=true)"),
        ("id", pa.list_(I64), "'id' of feature 'id' is list<item: int64>, expected integers or strings"),
        ("hashed_text", pa.bool_(), "'hashed_text' of feature 'hashed_text' is bool, expected integers or strings"),
        ("bag", I64, "'bag' of feature 'bag' is int64, expected a list of ids"),
        ("bag", pa.list_(F32), "'bag' of feature 'bag' is list<item: float>, expected integers or strings"),
        ("sequence", TEXT, "'sequence' of feature 'sequence' is string, expected a list of ids"),
        ("dense", TEXT, "'dense' of feature 'dense' is string, expected numbers"),
        ("dense", pa.timestamp("s"), "'dense' of feature 'dense' is timestamp[s], expected numbers"),
        ("vector", F32, "'vector' of feature 'vector' is float, expected a list of floats"),
        ("vector", pa.list_(TEXT), "'vector' of feature 'vector' is list<item: string>, expected numbers"),
        ("clicked", TEXT, "'clicked' of task 'click' is string, expected numbers"),
        ("trust", TEXT, "'trust' of task 'purchase' is string, expected numbers"),
        ("true_click", TEXT, "'true_click' of task 'click' is string, expected numbers"),
        ("weight", pa.list_(F32), "'weight' of data.weight is list<item: float>, expected numbers"),
        ("tab", F32, "'tab' of data.domain is float, expected integers or strings"),
        ("query", pa.float64(), "'query' of data.group is double, expected integers or strings"),
    ],
)
def test_wrong_types_are_found_in_the_schema(rich: pa.Table, column: str, kind: pa.DataType, words: str):
    table = change(rich, column, [None] * 200, kind)
    findings = Encoder(rich_config(), truth=True).check_schema(table.schema, "part-7.parquet")
    remedy = "write it as such, or name another column in the configuration"
    assert findings == [f"part-7.parquet: column {words}; {remedy}"]


def test_all_findings_of_a_schema_come_at_once(rich: pa.Table):
    schema = change(rich, "dense", ["x"] * 200).rename_columns({"clicked": "clickd"}).drop_columns(["bag_text"]).schema
    first, second, third = Encoder(rich_config()).check_schema(schema, "f")
    assert first.startswith("f: column 'bag_text' is missing; did you mean 'bag_cut'?")
    assert second.startswith("f: column 'clicked' is missing; did you mean 'clickd'? valid: ")
    assert third.startswith("f: column 'dense' of feature 'dense' is string, expected numbers; write it as such")


# --- products along a funnel ---


def test_a_product_s_label_is_that_of_all_steps_and_its_truth_too() -> None:
    rng = np.random.default_rng(3)
    labels = {name: rng.integers(0, 2, 40) for name in ("clicked", "carted", "bought")}
    truths = {f"true_{name}": rng.random(40).astype(np.float32) for name in labels}
    table = pa.table({"price": rng.random(40), **labels, **truths})
    tasks = {
        "bought": TaskConfig(label="bought", product="carted", truth="true_bought"),  # before what it depends on
        "carted": TaskConfig(label="carted", product="clicked", truth="true_carted"),
        "clicked": TaskConfig(label="clicked", truth="true_clicked"),
        "wish": TaskConfig(label="bought", condition="carted"),
    }
    data = DataConfig(name="f", path="x", features={"price": FeatureConfig(kind=FeatureKind.dense)}, tasks=tasks)
    encoder = Encoder(data, truth=True)
    batch = encoder.collate(encoder.encode(table, WHERE), 40)
    for b in range(40):
        click, cart, buy = (int(labels[name][b]) for name in labels)
        assert batch.labels[b].tolist() == [click * cart * buy, click * cart, click, buy]
        assert batch.weights[b].tolist() == [1, 1, 1, click * cart]
        p, q, r = (float(truths[f"true_{name}"][b]) for name in labels)
        assert batch.truth[b, :3].tolist() == pytest.approx([p * q * r, p * q, p])


def test_a_null_label_on_the_way_takes_the_row_out_of_the_product() -> None:
    table = pa.table({"price": [1.0, 2.0], "clicked": pa.array([None, 1]), "bought": [1, 1]})
    tasks = {
        "clicked": TaskConfig(label="clicked", allow_null=True),
        "bought": TaskConfig(label="bought", product="clicked"),
    }
    data = DataConfig(name="f", path="x", features={"price": FeatureConfig(kind=FeatureKind.dense)}, tasks=tasks)
    batch = Encoder(data).collate(Encoder(data).encode(table, WHERE), 2)
    assert batch.weights.tolist() == [[0, 0], [1, 1]]


def test_a_truth_may_be_a_product_of_columns(rich: pa.Table) -> None:
    tasks = {**TASKS, "bought": TaskConfig(label="clicked", truth="true_click * true_purchase")}
    encoder = Encoder(rich_config(tasks=tasks), truth=True)
    assert {"true_click", "true_purchase"} <= set(encoder.columns)
    batch = encoder.collate(encoder.encode(rich, WHERE), len(rich))
    assert batch.truth is not None
    expected = [row["true_click"] * row["true_purchase"] for row in rich.to_pylist()]
    assert batch.truth[:, -1].tolist() == pytest.approx(expected, rel=1e-6)
    (finding,) = encoder.check_schema(rich.drop_columns(["true_purchase"]).schema, "f")
    assert "column 'true_purchase' is missing" in finding


# --- domains ---


def small_config(domain: DomainConfig, **tasks: TaskConfig) -> DataConfig:
    return DataConfig(
        name="d", path="x", features={"x": FeatureConfig(kind=FeatureKind.dense)}, tasks=tasks, domain=domain
    )


def test_a_task_counts_in_its_domains_alone_whatever_the_columns_hold_elsewhere() -> None:
    rng = np.random.default_rng(5)
    names = ["home", "search", "feed"]
    rows = [{"tab": rng.choice(names), "click": bool(rng.integers(2)), "x": 1.0} for _ in range(60)]
    for row in rows:  # garbage of every kind where the task does not exist
        search = row["tab"] == "search"
        garbage = rng.choice(np.array([None, math.nan, 7.0], object))
        row["bought"] = float(rng.integers(2)) if search else garbage
        row["trust"], row["p"] = (float(rng.random()) if search else None for _ in range(2))
        row["paid"] = float(rng.integers(2)) if row["tab"] != "feed" else None
    tasks = {
        "click": TaskConfig(label="click"),
        "buy": TaskConfig(label="bought", weight="trust", truth="p", domains=["search"]),
        "pay": TaskConfig(label="paid", condition="click", domains=["home", "search"]),
        "refund": TaskConfig(label="click", product="buy"),  # exists where what it is a product with does
        "review": TaskConfig(label="click", condition="buy"),
    }
    encoder = Encoder(small_config(DomainConfig(column="tab", names=names), **tasks), truth=True)
    batch = encoder.collate(encoder.encode(pa.Table.from_pylist(rows), WHERE), 60)
    assert batch.truth is not None and not encoder.repairs
    for b, row in enumerate(rows):
        search, buy = row["tab"] == "search", row["bought"] if row["tab"] == "search" else 0.0
        trust = row["trust"] if search else 0.0
        expected = [1.0, trust, float(row["click"] and row["tab"] != "feed"), float(search), float(buy > 0)]
        assert batch.weights[b].tolist() == pytest.approx(expected)
        labels = [row["click"], buy, row["paid"] or 0.0, buy * row["click"], row["click"]]
        assert batch.labels[b].tolist() == [float(y) for y in labels]
        assert batch.truth[b, 1].item() == (pytest.approx(row["p"]) if search else pytest.approx(math.nan, nan_ok=True))


def test_bad_labels_in_a_task_s_own_domains_are_named_at_their_place() -> None:
    config = small_config(DomainConfig(column="tab", names=["a", "b"]), buy=TaskConfig(label="buy", domains=["b"]))
    table = {"tab": ["a", "a", "b", "b"], "x": [0.0] * 4}
    with pytest.raises(DataError, match="'buy' has 1 nulls, the first at position 3"):
        Encoder(config).encode(pa.table({**table, "buy": [None, None, 1, None]}), WHERE)
    with pytest.raises(DataError, match="'buy' holds label 2"):
        Encoder(config).encode(pa.table({**table, "buy": [None, 3, 1, 2]}), WHERE)
    config.tasks["buy"].allow_null = True
    encoder = Encoder(config)
    batch = encoder.collate(encoder.encode(pa.table({**table, "buy": [None, None, 1, None]}), WHERE), 4)
    assert batch.weights[:, 0].tolist() == [0, 0, 1, 0]
    assert encoder.repairs == {"buy: null read as rows that do not count": 1}


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["b", "x", None, "a"], TEXT, [1, -1, -1, 0]),
        (["b", "x", None, "a"], WORD, [1, -1, -1, 0]),
        ([b"b", b"\xff", None, b"a"], pa.binary(), [1, -1, -1, 0]),
        ([1, -1, None, 2], I64, [1, -1, -1, -1]),
        ([1, 2**64 - 1, 2, 0], pa.uint64(), [1, -1, -1, 0]),
        ([None] * 4, pa.null(), [-1] * 4),
    ],
)
def test_unknown_domains_may_be_allowed_and_are_counted(values: list, kind: pa.DataType, expected: list[int]) -> None:
    domain = DomainConfig(column="tab", names=["a", "b"], allow_unknown=True)
    tasks = {"click": TaskConfig(label="y"), "buy": TaskConfig(label="y", domains=["b"])}
    encoder = Encoder(small_config(domain, **tasks))
    table = pa.table({"tab": pa.array(values, kind), "x": [0.0] * 4, "y": [1, 0, 1, 0]})
    batch = encoder.collate(encoder.encode(table, WHERE), 5)
    assert batch.domain_id.tolist() == [*expected, 0]
    assert encoder.repairs == {"tab: unknown domain read as -1": expected.count(-1)}
    assert batch.weights[:4].tolist() == [[1.0, float(d == 1)] for d in expected]

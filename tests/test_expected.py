"""What the configuration expects of the schemas of files."""

import pyarrow as pa
import pytest

from rec.expected import check_drift, expectations, expected_of_feature
from rec.schema import DataConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig


@pytest.mark.parametrize(
    ("kind", "hashed", "column", "expected"),
    [
        ("id", False, pa.int32(), None),
        ("id", False, pa.string(), "integers (strings need hashed=true)"),
        ("id", True, pa.dictionary(pa.int8(), pa.string()).value_type, None),
        ("id", True, pa.float32(), "integers or strings"),
        ("bag", False, pa.int64(), "a list of ids"),
        ("bag", False, pa.large_list(pa.int64()), None),
        ("sequence", True, pa.list_(pa.dictionary(pa.int8(), pa.binary())), None),
        ("dense", False, pa.decimal128(9, 2), None),
        ("dense", False, pa.string(), "numbers"),
        ("vector", False, pa.float32(), "a list of floats"),
        ("vector", False, pa.list_(pa.string()), "numbers"),
        ("vector", False, pa.list_(pa.float64(), 3), None),
    ],
)
def test_what_a_feature_expects_of_a_column(kind: str, hashed: bool, column: pa.DataType, expected: str | None) -> None:
    feature = FeatureConfig(kind=FeatureKind[kind], hashed=hashed)
    assert expected_of_feature(feature, column) == expected


def drift(**columns: list[pa.DataType]) -> list[str]:
    """What is said of files a, b, ... whose columns are of these types; `item` and `history` are of one table."""
    item, history = (FeatureConfig(kind=FeatureKind[kind], table="item", hashed=True) for kind in ("id", "sequence"))
    data = DataConfig(
        name="drift",
        path="",
        splits={},
        features={"item": item, "history": history, "user": FeatureConfig(kind=FeatureKind.id, hashed=True)},
        tables={"item": TableConfig(num_embeddings=10), "user": TableConfig(num_embeddings=10)},
        tasks={"click": TaskConfig(label="click")},
        group="user",
    )
    files = zip(*columns.values(), strict=True)
    schemas = {"abc"[n]: pa.schema(list(zip(columns, kinds, strict=True))) for n, kinds in enumerate(files)}
    return check_drift(schemas, list(expectations(data, truth=False, labels=True)))


INT, TEXT, NOTHING = pa.int64(), pa.string(), pa.null()


def test_ids_of_one_kind_do_not_drift() -> None:
    assert drift(item=[INT, pa.int32(), NOTHING], history=[pa.list_(INT)] * 3, user=[TEXT, pa.binary(), TEXT]) == []


def test_a_column_that_drifts_is_told_once() -> None:
    (found,) = drift(user=[TEXT, TEXT, INT], item=[INT] * 3)  # a feature and the group
    assert (
        found
        == "c: column 'user' holds int64, but a string: the same id would be another; write all files with one type"
    )
    (found,) = drift(history=[pa.list_(INT), pa.list_(TEXT)], item=[INT] * 2)
    assert found.startswith("b: column 'history' holds string, but a int64: the same id")


def test_columns_of_one_table_are_of_one_kind() -> None:
    (found,) = drift(item=[INT, INT], history=[pa.list_(TEXT), NOTHING], user=[INT, INT])
    assert found == (
        "a: column 'history' holds string, but a: column 'item' int64, and both are ids of table 'item': "
        "the same id would be another; write them with one type, or give each a table"
    )

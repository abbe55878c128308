"""What the configuration expects of the schemas of files."""

import pyarrow as pa
import pytest

from rec.expected import expected_of_feature
from rec.schema import FeatureConfig, FeatureKind


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

"""Arrow columns against Python lists."""

import math
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from rec import columns
from rec.columns import DataError, Place
from rec.schema import Transform

LISTS = [[3, 1, 2], [], None, [7], [5, 5, 5, 5]]
PLACE = Place("part-0.parquet, row group 3", "price", "data.features.price")


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int64())])
def test_lists_become_offsets_and_values_also_from_a_slice(kind: pa.DataType) -> None:
    offsets, values = columns.list_parts(pa.array([[9, 9], *LISTS], kind).slice(1))
    assert offsets.tolist() == [0, 3, 3, 3, 4, 8] and values.to_pylist() == [3, 1, 2, 7, 5, 5, 5, 5]


@pytest.mark.parametrize("max_length", [1, 2, 3, 9])
def test_the_newest_are_the_last(max_length: int) -> None:
    offsets, values = columns.newest(*columns.list_parts(pa.array(LISTS)), max_length)
    found = [values.to_pylist()[a:b] for a, b in pairwise(offsets)]
    assert found == [(row or [])[-max_length:] for row in LISTS]


def test_ragged_columns_of_ids_and_of_lists() -> None:
    ids, counts = columns.ragged(pa.chunked_array([pa.array([4, None]), pa.array([6])]))
    assert (ids.tolist(), counts.tolist()) == ([4, 6], [1, 0, 1])
    ids, counts = columns.ragged(pa.chunked_array([pa.array([[1, 2], []], pa.large_list(pa.int64()))]))
    assert (ids.tolist(), counts.tolist()) == ([1, 2], [2, 0])


def test_stacked_columns_come_back_as_a_padded_matrix() -> None:
    stacked = columns.stacked([np.array([1.0, 2.0]), np.array([[3.0, 4.0], [5.0, 6.0]])], 2)
    assert stacked.to_pylist() == [[1, 3, 4], [2, 5, 6]]
    assert columns.matrix(pa.chunked_array([stacked]), 3, 3).tolist() == [[1, 3, 4], [2, 5, 6], [0, 0, 0]]
    assert columns.matrix(pa.chunked_array([columns.stacked([], 2)]), 3, 0).shape == (3, 0)
    assert columns.vector(pa.chunked_array([pa.array([8, 9])]), 4, padding=-1).tolist() == [8, 9, -1, -1]


def test_dictionaries_and_columns_without_a_type_are_read() -> None:
    table = pa.table({"word": pa.array(["b", "a", "b"]).dictionary_encode(), "nothing": pa.nulls(3)})
    assert columns.single(table, "word", pa.int64()).to_pylist() == ["b", "a", "b"]
    assert columns.single(table, "nothing", pa.int64()).type == pa.int64()


def test_log1p_keeps_the_sign() -> None:
    found = columns.apply_transform(Transform.log1p, np.array([-3.0, 0.0, 3.0]))
    assert found.tolist() == pytest.approx([-math.log(4), 0, math.log(4)])
    assert columns.apply_transform(Transform.none, found) is found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_what_is_not_finite_is_named_with_its_place(value: float) -> None:
    with pytest.raises(DataError) as caught:
        columns.finite_floats(pa.array([0.5, None, value]), PLACE)
    assert str(caught.value).startswith(
        f"part-0.parquet, row group 3: column 'price' holds {value} at position 2, expected"
    )
    assert columns.finite_floats(pa.array([0.5, None]), PLACE).tolist() == [0.5, 0.0]


def test_weights_are_ones_unless_configured_and_never_negative_or_null() -> None:
    table = pa.table({"good": [0.0, 2.5], "low": [1.0, -0.5], "holey": [None, 1.0]})
    assert columns.weights_of(table, None, "f").tolist() == [1, 1]
    assert columns.weights_of(table, "good", "f").tolist() == [0, 2.5]
    with pytest.raises(DataError, match="f: column 'low' holds weight -0.5, expected 0 or more"):
        columns.weights_of(table, "low", "f")
    with pytest.raises(DataError, match="column 'holey' has 1 nulls, the first at position 0"):
        columns.weights_of(table, "holey", "f")

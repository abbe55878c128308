"""Arrow columns: what their types are, what is wrong with their values, and how they become arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from rec.hashing import hash_ints, hash_strings
from rec.schema import Transform


class DataError(ValueError):
    """Input that cannot be used: the message names file, row group, column, value and remedy."""


LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)


def is_any(kind: pa.DataType, tests: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    """Whether a type passes one of `tests`."""
    return any(test(kind) for test in tests)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values, whether or not they are written as a dictionary."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def apply_transform(transform: Transform, values: np.ndarray) -> np.ndarray:
    """`values` as the network sees them."""
    return np.sign(values) * np.log1p(np.abs(values)) if transform is Transform.log1p else values


@dataclass(frozen=True)
class Place:
    """Where values were read, and the key of the configuration that asked for them."""

    where: str
    column: str
    key: str = ""

    def error(self, problem: str) -> DataError:
        """What to raise for a `problem` in this column."""
        return DataError(f"{self.where}: column '{self.column}' {problem}")


def check_arrays(table: pa.Table, where: str) -> None:
    """Refuse columns whose bytes are not what their types promise: text that is no UTF-8, offsets that point elsewhere."""
    for column in table.column_names:
        try:
            table[column].validate(full=True)
        except pa.ArrowInvalid as error:
            raise Place(where, column).error(
                f"holds bytes that are no {table[column].type} ({error}); mend it, or write text that is not UTF-8 as binary"
            ) from error


def count_nulls(array: pa.Array) -> str:
    """How many nulls there are, and where, in words."""
    first = int(np.flatnonzero(np.asarray(array.is_null()))[0])
    return f"{array.null_count} nulls, the first at position {first}"


def floats(array: pa.Array) -> np.ndarray:
    """Float32 values, nulls (which were looked at before) as 0."""
    # safe=False: Arrow would refuse integers above 2**24, which round as any float does
    return array.cast(pa.float32(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False)


def finite_floats(array: pa.Array, place: Place, *, remedy: str = "") -> np.ndarray:
    """Float32 values, nulls (which were looked at before) as 0; NaN, infinity and what float32 cannot hold are errors."""
    values = floats(array)
    finite = np.isfinite(values)
    if not finite.all():
        position = int(np.flatnonzero(~finite)[0])
        raise place.error(
            f"holds {array[position]} at position {position}, expected finite float32 values; mend the column "
            f"(what is missing is a null, not NaN){remedy}"
        )
    return values


def hash_ids(array: pa.Array) -> np.ndarray:
    """Ids, integers or texts, as uint64 [n]; what a null becomes has no meaning."""
    if is_any(array.type, TEXTS):
        return hash_strings(array)
    return hash_ints(array.fill_null(0).to_numpy(zero_copy_only=False))


def floats_of(table: pa.Table, column: str, where: str) -> np.ndarray:
    """A column of floats [n] float32 in which nulls are errors."""
    array, place = single(table, column, pa.float32()), Place(where, column)
    if array.null_count:
        raise place.error(f"has {count_nulls(array)}, expected a number; fill them")
    return finite_floats(array, place)


def weights_of(table: pa.Table, column: str | None, where: str) -> np.ndarray:
    """A column of weights [n] float32, 0 or more; ones where none is configured."""
    if column is None:
        return np.ones(table.num_rows, np.float32)
    values = floats_of(table, column, where)
    if len(values) and values.min() < 0:
        raise Place(where, column).error(f"holds weight {values.min():g}, expected 0 or more; mend the column")
    return values


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def single(table: pa.Table, column: str, untyped: pa.DataType) -> pa.Array:
    """A column in one piece; nulls of no type become those of type `untyped`."""
    array = decoded(one_chunk(table[column]))
    return array.cast(untyped) if pa.types.is_null(array.type) else array


def decoded(array: pa.Array) -> pa.Array:
    """An array without a dictionary."""
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def list_parts(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Offsets [n + 1] int64, starting at 0, and the flat values of a list array; a null list is empty."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), decoded(array.flatten())


def newest(offsets: np.ndarray, values: pa.Array, max_length: int) -> tuple[np.ndarray, pa.Array]:
    """Lists cut to their last `max_length` values."""
    lengths = np.diff(offsets)
    if not len(lengths) or lengths.max() <= max_length:
        return offsets, values
    kept = np.minimum(lengths, max_length)
    position = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    keep = position >= np.repeat(lengths - kept, lengths)
    return np.concatenate([[0], np.cumsum(kept)]), values.filter(pa.array(keep))


def stacked(parts: Sequence[np.ndarray], num_rows: int) -> pa.Array:
    """Columns [n] or [n, k] side by side as one fixed-size list a row, which slices and gathers without copies of copies."""
    matrix = np.column_stack(parts).astype(np.float32, copy=False) if parts else np.zeros((num_rows, 0), np.float32)
    if matrix.shape[1] == 0:
        return pa.nulls(num_rows)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids int64 and the number of ids a row."""
    array = one_chunk(column)
    if pa.types.is_large_list(array.type):
        offsets, values = list_parts(array)
        return values.to_numpy(), np.diff(offsets)
    counts = np.asarray(array.is_valid()).astype(np.int64) if array.null_count else np.ones(len(array), np.int64)
    return array.drop_null().to_numpy(), counts


def matrix(column: pa.ChunkedArray, size: int, width: int) -> Tensor:
    """[size, width] float32, zeros below the rows of `column`."""
    out = np.zeros((size, width), np.float32)
    if width:
        out[: column.length()] = one_chunk(column).flatten().to_numpy().reshape(-1, width)
    return torch.from_numpy(out)


def vector(column: pa.ChunkedArray, size: int, *, padding: int = 0) -> Tensor:
    """[size] int64, `padding` below the rows of `column`."""
    out = np.full(size, padding, np.int64)
    out[: column.length()] = one_chunk(column).to_numpy()
    return torch.from_numpy(out)

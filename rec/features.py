"""Columns of impressions become tensors.

Two steps, so that each value is looked at once: `Encoder.encode` turns one decoded row group into canonical columns (ids
hashed and checked, floats transformed, labels and weights stacked), and `Encoder.collate` turns any slice of canonical
rows into a `Batch`. Errors are raised by `encode`, which still knows the file and the row group.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rec.hashing import hash_ints, hash_strings
from rec.schema import DataConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind, Transform, nearest


class DataError(ValueError):
    """Input that cannot be used: the message names file, row group, column, value and remedy."""


@dataclass
class Batch(Pipelineable):
    """B rows of one rank, the last of which may be padding: rows without ids that weigh nothing.

    Attributes:
        sparse_features: ids of every sparse feature, keys in the order of the configuration, int64 values.
        dense: [B, F] float32, dense columns and vectors side by side.
        labels: [B, T] float32.
        weights: [B, T] float32, >= 0; 0 where a row does not count for a task.
        domain_id: [B] int64, 0 to D - 1.
        group_id: [B] int64.
        truth: [B, T] float32, true probabilities where a simulator knows them, else NaN; None if no task has them.
        num_rows: rows that are not padding, 0 to B.
    """

    sparse_features: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    domain_id: Tensor
    group_id: Tensor
    truth: Tensor | None
    num_rows: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        return self._each(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep this batch's memory until the work queued on `stream` is done."""
        for part in vars(self).values():
            if isinstance(part, Tensor | KeyedJaggedTensor):
                part.record_stream(stream)

    def _each(self, change: Callable) -> "Batch":
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(**{n: change(p) if isinstance(p, Tensor | KeyedJaggedTensor) else p for n, p in parts.items()})


_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
_NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)


def _is(kind: pa.DataType, tests: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(test(kind) for test in tests)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _apply(transform: Transform, values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values)) if transform is Transform.log1p else values


@dataclass(frozen=True)
class _Place:
    """Where values were read, and the key of the configuration that asked for them."""

    where: str
    column: str
    key: str = ""

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.where}: column '{self.column}' {problem}")


class Encoder:
    """Turns the columns of one data set into batches.

    Args:
        data: description of the data set.
        truth: also read the tasks' true probabilities.
    """

    def __init__(self, data: DataConfig, *, truth: bool = False) -> None:
        self.data = data
        self.truth = truth and any(task.truth for task in data.tasks.values())
        self.keys = list(data.sparse_features)
        self.dropout = {n: f.dropout for n, f in data.sparse_features.items() if f.dropout > 0}
        self.repairs: Counter[str] = Counter()  # what the configuration asked to repair, counted by column

    @property
    def columns(self) -> list[str]:
        """Columns that have to be read from the files."""
        return list(dict.fromkeys(column for column, _, _ in self._expectations()))

    def check_schema(self, schema: pa.Schema, where: str) -> list[str]:
        """What is wrong with the columns of one file, one sentence a finding; empty when it can be read."""
        missing = [name for name in self.columns if name not in schema.names]
        findings = [f"{where}: column '{name}' is missing; {nearest(name, schema.names)}" for name in missing]
        for column, reader, expected_for in self._expectations():
            # a file without rows, or with nulls alone, may be written without a type; `encode` looks at its nulls
            kind = _plain(schema.field(column).type) if column in schema.names else pa.null()
            expected = None if pa.types.is_null(kind) else expected_for(kind)
            if expected:
                findings.append(f"{where}: column '{column}' of {reader} is {kind}, expected {expected}")
        return findings

    def _expectations(self) -> Iterator[tuple[str, str, Callable[[pa.DataType], str | None]]]:
        """Each column, what of the configuration reads it, and what is to be expected of it instead of a type."""
        data = self.data
        for name, feature in data.features.items():
            yield data.column_of(name), f"feature '{name}'", partial(_expected, feature)
        for name, task in data.tasks.items():
            for column in (task.label, task.weight, task.truth if self.truth else None):
                if column:
                    yield column, f"task '{name}'", _expected_number
        if data.weight:
            yield data.weight, "data.weight", _expected_number
        if data.domain:
            yield data.domain.column, "data.domain", _expected_key
        if data.group:
            yield data.group, "data.group", _expected_key

    def encode(self, table: pa.Table, where: str) -> pa.Table:
        """Canonical columns of one row group: an int64 or list<int64> a sparse feature, and stacked floats.

        Raises:
            DataError: naming `where`, the column, the value and the remedy.
        """
        data, num_rows = self.data, table.num_rows
        columns = {name: self._sparse(table, name, feature, where) for name, feature in data.sparse_features.items()}
        columns["/dense"] = _stack(self._dense(table, where), num_rows)
        labels, weights = self._labels(table, where)
        columns["/labels"], columns["/weights"] = _stack(labels, num_rows), _stack(weights, num_rows)
        columns["/domain"], columns["/group"] = self._domain(table, where), self._group(table, where)
        if self.truth:
            none, names = np.full(num_rows, np.nan, np.float32), [task.truth for task in data.tasks.values()]
            columns["/truth"] = _stack([_floats(table, n, where) if n else none for n in names], num_rows)
        return pa.table(columns)

    def collate(self, rows: pa.Table, size: int, dropped: dict[str, np.ndarray] | None = None) -> Batch:
        """A batch of `size` rows, the canonical `rows` first and padding after them.

        Args:
            rows: canonical rows, at most `size`.
            size: B.
            dropped: feature -> [len(rows)] bool, rows that lose their ids of that feature.
        """
        lengths = np.zeros((len(self.keys), size), np.int32)
        values = []
        for i, name in enumerate(self.keys):
            ids, counts = _ragged(rows[name])
            if dropped and name in dropped:
                keep = ~dropped[name]
                ids, counts = ids[np.repeat(keep, counts)], counts * keep
            lengths[i, : len(counts)] = counts
            values.append(ids)
        sparse = KeyedJaggedTensor(
            keys=self.keys,
            values=torch.from_numpy(np.concatenate(values) if values else np.zeros(0, np.int64)),
            lengths=torch.from_numpy(lengths.reshape(-1)),
            stride=size,
        )
        num_tasks = len(self.data.tasks)
        return Batch(
            sparse_features=sparse,
            dense=_matrix(rows["/dense"], size, self.data.num_dense),
            labels=_matrix(rows["/labels"], size, num_tasks),
            weights=_matrix(rows["/weights"], size, num_tasks),
            domain_id=_vector(rows["/domain"], size),
            group_id=_vector(rows["/group"], size),
            truth=_matrix(rows["/truth"], size, num_tasks) if self.truth else None,
            num_rows=rows.num_rows,
        )

    def _sparse(self, table: pa.Table, name: str, feature: FeatureConfig, where: str) -> pa.Array:
        place = _Place(where, self.data.column_of(name), f"data.features.{name}")
        if feature.kind is FeatureKind.id:
            return self._ids(_single(table, place.column, pa.int64()), name, feature, place)
        array = _single(table, place.column, pa.list_(pa.int64()))
        self._nulls(array, place, feature.allow_null, becomes="no ids")
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        offsets, ids = _list_parts(array)
        ids = self._ids(ids, name, feature, place)
        if ids.null_count:
            keep = np.asarray(pc.is_valid(ids))
            offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
            ids = ids.drop_null()
        if feature.max_length is not None:
            offsets, ids = _newest(offsets, ids, feature.max_length)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)

    def _ids(self, array: pa.Array, name: str, feature: FeatureConfig, place: _Place) -> pa.Array:
        table = self.data.table_of(name)
        num_embeddings = self.data.tables[table].num_embeddings
        self._nulls(array, place, feature.allow_null, becomes="no id")
        if pa.types.is_null(array.type):  # of empty lists alone
            array = array.cast(pa.int64())
        if feature.hashed:
            text = _is(array.type, _TEXTS)
            hashes = hash_strings(array) if text else hash_ints(array.fill_null(0).to_numpy(zero_copy_only=False))
            mask = np.asarray(array.is_null()) if array.null_count else None
            return pa.array((hashes % np.uint64(num_embeddings)).astype(np.int64), mask=mask)
        if len(array) > array.null_count:
            low, high = (pc.min_max(array)[k].as_py() for k in ("min", "max"))
            if low < 0 or high >= num_embeddings:
                raise place.error(
                    f"of feature '{name}' holds id {low if low < 0 else high}, expected 0 to {num_embeddings - 1}; "
                    f"raise data.tables.{table}.num_embeddings or set {place.key}.hashed=true"
                )
        return array.cast(pa.int64())

    def _dense(self, table: pa.Table, where: str) -> list[np.ndarray]:
        parts = []
        for name, feature in self.data.dense_features.items():
            place = _Place(where, self.data.column_of(name), f"data.features.{name}")
            if feature.kind is FeatureKind.vector:
                array, width = self._vectors(table, feature, place), feature.size
            else:
                array, width = _single(table, place.column, pa.float32()), 1
            self._nulls(array, place, feature.allow_null, becomes="0")
            parts.append(_apply(feature.transform, _finite(array, place)).reshape(-1, width))
        return parts

    def _vectors(self, table: pa.Table, feature: FeatureConfig, place: _Place) -> pa.Array:
        array = _single(table, place.column, pa.list_(pa.float32()))
        self._nulls(array, place, feature.allow_null, becomes="zeros")
        if array.null_count:
            array = array.fill_null(pa.scalar([0] * feature.size, array.type))
        lengths = np.asarray(pc.list_value_length(array))
        if (lengths != feature.size).any():
            wrong = lengths[lengths != feature.size][0]
            raise place.error(
                f"holds a vector of {wrong} floats, expected {feature.size}; mend the column or set {place.key}.size"
            )
        return array.flatten()

    def _labels(self, table: pa.Table, where: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        tasks, base = self.data.tasks, _weight(table, self.data.weight, where)
        labels, weights, positive = [], [], {}
        for name, task in tasks.items():
            label, valid = self._label(table, name, task, where)
            labels.append(label)
            weights.append(base * _weight(table, task.weight, where) * valid)
            positive[name] = label > 0  # a null label is 0 here
        conditions = [task.condition for task in tasks.values()]
        return labels, [w * positive[c] if c else w for w, c in zip(weights, conditions, strict=True)]

    def _label(self, table: pa.Table, name: str, task: TaskConfig, where: str) -> tuple[np.ndarray, np.ndarray]:
        place = _Place(where, task.label, f"data.tasks.{name}")
        array = _single(table, place.column, pa.float32())
        self._nulls(array, place, task.allow_null, becomes="rows that do not count")
        values = _finite(array, place)
        if task.kind is TaskKind.binary and len(values) and (values.min() < 0 or values.max() > 1):
            wrong = values.min() if values.min() < 0 else values.max()
            raise place.error(
                f"holds label {wrong:g} of binary task '{name}', expected 0 to 1; mend the column or set {place.key}.kind=regression"
            )
        return _apply(task.label_transform, values), np.asarray(array.is_valid())

    def _domain(self, table: pa.Table, where: str) -> pa.Array:
        domain = self.data.domain
        if domain is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array, names = _single(table, domain.column, pa.int64()), domain.names
        if _is(array.type, _TEXTS):  # as bytes: binary need not be UTF-8
            known = pa.array([name.encode() for name in names], pa.large_binary())
            ids = pc.index_in(array.cast(pa.large_binary()), known).cast(pa.int64())
        else:
            ids = array.cast(pa.int64(), safe=False)
        bad = pc.fill_null(pc.or_(pc.less(ids, 0), pc.greater_equal(ids, len(names))), True)
        if pc.any(bad).as_py():
            value = array.filter(bad)[0].as_py()
            raise _Place(where, domain.column).error(
                f"holds domain {value!r}, unknown to data.domain.names; {nearest(str(value), names)}"
            )
        return ids

    def _group(self, table: pa.Table, where: str) -> pa.Array:
        if self.data.group is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array = _single(table, self.data.group, pa.int64())
        if array.null_count:
            raise _Place(where, self.data.group).error(f"has {_count_nulls(array)}, expected a group; fill them")
        if _is(array.type, _TEXTS):
            return pa.array(hash_strings(array).view(np.int64))
        return array.cast(pa.int64(), safe=False)  # uint64 wraps: groups are only told apart

    def _nulls(self, array: pa.Array, place: _Place, allowed: bool, *, becomes: str) -> None:
        """Count the nulls, or refuse them unless the configuration has `allowed` them."""
        if array.null_count and not allowed:
            raise place.error(
                f"has {_count_nulls(array)}; fill them, or set {place.key}.allow_null=true, which reads them as {becomes}"
            )
        if array.null_count:
            self.repairs[f"{place.column}: null read as {becomes}"] += array.null_count


def _count_nulls(array: pa.Array) -> str:
    first = int(np.flatnonzero(np.asarray(array.is_null()))[0])
    return f"{array.null_count} nulls, the first at position {first}"


def _finite(array: pa.Array, place: _Place) -> np.ndarray:
    """Float32 values, nulls (which were looked at before) as 0."""
    # safe=False: Arrow would refuse integers above 2**24, which round as any float does
    values = array.cast(pa.float32(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False)
    finite = np.isfinite(values)
    if not finite.all():
        position = int(np.flatnonzero(~finite)[0])
        raise place.error(
            f"holds {array[position]} at position {position}, expected finite float32 values; mend the column "
            "(what is missing is a null, not NaN)"
        )
    return values


def _floats(table: pa.Table, column: str, where: str) -> np.ndarray:
    array, place = _single(table, column, pa.float32()), _Place(where, column)
    if array.null_count:
        raise place.error(f"has {_count_nulls(array)}, expected a number; fill them")
    return _finite(array, place)


def _weight(table: pa.Table, column: str | None, where: str) -> np.ndarray:
    if column is None:
        return np.ones(table.num_rows, np.float32)
    values = _floats(table, column, where)
    if len(values) and values.min() < 0:
        raise _Place(where, column).error(f"holds weight {values.min():g}, expected 0 or more; mend the column")
    return values


def _expected(feature: FeatureConfig, kind: pa.DataType) -> str | None:
    """What the column of a feature should be, or None if `kind` will do."""
    if feature.kind in (FeatureKind.bag, FeatureKind.sequence, FeatureKind.vector):
        if not _is(kind, _LISTS):
            return "a list of floats" if feature.kind is FeatureKind.vector else "a list of ids"
        kind = _plain(kind.value_type)
    if feature.kind in (FeatureKind.dense, FeatureKind.vector):
        return _expected_number(kind)
    if _is(kind, _TEXTS):
        return None if feature.hashed else "integers (strings need hashed=true)"
    return None if pa.types.is_integer(kind) or pa.types.is_null(kind) else "integers or strings"


def _expected_number(kind: pa.DataType) -> str | None:
    return None if _is(kind, _NUMBERS) else "numbers"


def _expected_key(kind: pa.DataType) -> str | None:
    return None if pa.types.is_integer(kind) or _is(kind, _TEXTS) else "integers or strings"


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _single(table: pa.Table, column: str, untyped: pa.DataType) -> pa.Array:
    """A column in one piece; nulls of no type become those of type `untyped`."""
    array = _decoded(_chunk(table[column]))
    return array.cast(untyped) if pa.types.is_null(array.type) else array


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _list_parts(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Offsets [n + 1] int64, starting at 0, and the flat values of a list array; a null list is empty."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), _decoded(array.flatten())


def _newest(offsets: np.ndarray, values: pa.Array, max_length: int) -> tuple[np.ndarray, pa.Array]:
    """Lists cut to their last `max_length` values."""
    lengths = np.diff(offsets)
    if not len(lengths) or lengths.max() <= max_length:
        return offsets, values
    kept = np.minimum(lengths, max_length)
    position = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    keep = position >= np.repeat(lengths - kept, lengths)
    return np.concatenate([[0], np.cumsum(kept)]), values.filter(pa.array(keep))


def _stack(parts: Sequence[np.ndarray], num_rows: int) -> pa.Array:
    """Columns [n] or [n, k] side by side as one fixed-size list a row, which slices and gathers without copies of copies."""
    matrix = np.column_stack(parts).astype(np.float32, copy=False) if parts else np.zeros((num_rows, 0), np.float32)
    if matrix.shape[1] == 0:
        return pa.nulls(num_rows)
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(matrix).reshape(-1)), matrix.shape[1])


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids int64 and the number of ids a row."""
    array = _chunk(column)
    if pa.types.is_large_list(array.type):
        offsets, values = _list_parts(array)
        return values.to_numpy(), np.diff(offsets)
    counts = np.asarray(array.is_valid()).astype(np.int64) if array.null_count else np.ones(len(array), np.int64)
    return array.drop_null().to_numpy(), counts


def _matrix(column: pa.ChunkedArray, size: int, width: int) -> Tensor:
    """[size, width] float32, zeros below the rows of `column`."""
    out = np.zeros((size, width), np.float32)
    if width:
        out[: column.length()] = _chunk(column).flatten().to_numpy().reshape(-1, width)
    return torch.from_numpy(out)


def _vector(column: pa.ChunkedArray, size: int) -> Tensor:
    out = np.zeros(size, np.int64)
    out[: column.length()] = _chunk(column).to_numpy()
    return torch.from_numpy(out)

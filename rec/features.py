"""Columns of impressions become tensors.

Two steps, so that each value is looked at once: `Encoder.encode` turns one decoded row group into canonical columns (ids
hashed and checked, floats transformed, labels and weights stacked), and `Encoder.collate` turns any slice of canonical
rows into a `Batch`. Errors are raised by `encode`, which still knows the file and the row group.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rec.schema import DataConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind, Transform, nearest

_PRIME = np.uint64(0x100000001B3)  # odd, so it has an inverse modulo 2**64
_PRIME_INVERSE = np.uint64(pow(0x100000001B3, -1, 2**64))


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
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            movable = isinstance(value, Tensor | KeyedJaggedTensor)
            moved[field.name] = value.to(device=device, non_blocking=non_blocking) if movable else value
        return Batch(**moved)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep this batch's memory until the work queued on `stream` is done."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor | KeyedJaggedTensor):
                value.record_stream(stream)

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        pinned: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            pinned[field.name] = value.pin_memory() if isinstance(value, Tensor | KeyedJaggedTensor) else value
        return Batch(**pinned)


def hash_ints(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 over int64 or uint64 values, as uint64 (Steele, Lea and Flood, OOPSLA 2014).

    >>> hash_ints(np.array([1, 2, 3])) % np.uint64(1000)
    array([465, 110,  53], dtype=uint64)
    """
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_strings(values: pa.Array) -> np.ndarray:
    """Hash of each string's (or binary's) bytes b_0 .. b_{n-1}: hash_ints(n + sum_i (b_i + 1) * P**i mod 2**64), P = 1099511628211.

    All strings at once: prefix sums over the whole buffer, differences at the offsets, and the powers of P of what came
    before divided out by multiplying with P's inverse. Nulls hash as empty strings.

    >>> hash_strings(pa.array(["query", "listing", "query"])) % np.uint64(1000)
    array([153, 761, 153], dtype=uint64)
    """
    values = values.cast(pa.large_binary())
    num_values = len(values)
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int64)[values.offset : values.offset + num_values + 1]
    start, stop = (int(offsets[0]), int(offsets[-1])) if num_values else (0, 0)
    data = np.frombuffer(values.buffers()[2] or b"", dtype=np.uint8)[start:stop].astype(np.uint64)
    with np.errstate(over="ignore"):
        powers = np.multiply.accumulate(np.full(len(data) + 1, _PRIME, np.uint64)) * _PRIME_INVERSE
        inverses = np.multiply.accumulate(np.full(len(data) + 1, _PRIME_INVERSE, np.uint64)) * _PRIME
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((data + np.uint64(1)) * powers[:-1], dtype=np.uint64)])
        first, last = offsets[:-1] - start, offsets[1:] - start
        return hash_ints((sums[last] - sums[first]) * inverses[first] + (last - first).astype(np.uint64))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(kind) for test in tests)


def _is_number(kind: pa.DataType) -> bool:
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _apply(transform: Transform, values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values)) if transform is Transform.log1p else values


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
        data, tasks = self.data, self.data.tasks.values()
        names = [data.column_of(name) for name in data.features] + [task.label for task in tasks]
        names += [task.weight for task in tasks if task.weight]
        names += [task.truth for task in tasks if self.truth and task.truth]
        names += [name for name in (data.weight, data.group) if name]
        names += [data.domain.column] if data.domain else []
        return list(dict.fromkeys(names))

    def check_schema(self, schema: pa.Schema, where: str) -> list[str]:
        """What is wrong with the columns of one file, one sentence a finding; empty when it can be read."""
        missing = [name for name in self.columns if name not in schema.names]
        findings = [f"{where}: column '{name}' is missing; {nearest(name, schema.names)}" for name in missing]
        for name, feature in self.data.features.items():
            column = self.data.column_of(name)
            if column in schema.names:
                kind = _plain(schema.field(column).type)
                expected = _expected(feature, kind)
                if expected:
                    findings.append(f"{where}: column '{column}' of feature '{name}' is {kind}, expected {expected}")
        numeric = [task.label for task in self.data.tasks.values()] + ([self.data.weight] if self.data.weight else [])
        for column in dict.fromkeys(numeric):
            if column in schema.names and not _is_number(schema.field(column).type):
                findings.append(f"{where}: column '{column}' is {schema.field(column).type}, expected numbers")
        return findings

    def encode(self, table: pa.Table, where: str) -> pa.Table:
        """Canonical columns of one row group: an int64 or list<int64> a sparse feature, and stacked floats.

        Raises:
            DataError: naming `where`, the column, the value and the remedy.

        """
        table = table.combine_chunks()
        columns = {
            name: self._sparse(table, name, feature, where) for name, feature in self.data.sparse_features.items()
        }
        columns["/dense"] = _stack(self._dense(table, where), table.num_rows)
        labels, weights = self._labels(table, where)
        columns["/labels"], columns["/weights"] = _stack(labels, table.num_rows), _stack(weights, table.num_rows)
        columns["/domain"] = self._domain(table, where)
        columns["/group"] = self._group(table)
        if self.truth:
            none = np.full(table.num_rows, np.nan, np.float32)
            truths = [
                self._floats(table, task.truth, where) if task.truth else none for task in self.data.tasks.values()
            ]
            columns["/truth"] = _stack(truths, table.num_rows)
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
        column = self.data.column_of(name)
        array = _single(table, column)
        if feature.kind is FeatureKind.id:
            return self._ids(array, name, column, where)
        if array.null_count:
            self._null(array, column, where, f"data.features.{name}", "no ids")
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        offsets, ids = _list_parts(array)
        ids = self._ids(ids, name, column, where)
        if ids.null_count:
            keep = np.asarray(pc.is_valid(ids))
            offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
            ids = ids.drop_null()
        if feature.max_length is not None:
            offsets, ids = _newest(offsets, ids, feature.max_length)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)

    def _ids(self, array: pa.Array, name: str, column: str, where: str) -> pa.Array:
        feature, table_name = self.data.features[name], self.data.table_of(name)
        num_embeddings = self.data.tables[table_name].num_embeddings
        if array.null_count:
            self._null(array, column, where, f"data.features.{name}", "no id")
        if pa.types.is_null(array.type):
            array = array.cast(pa.int64())
        mask = np.asarray(array.is_null()) if array.null_count else None
        if feature.hashed:
            text = _is_text(array.type)
            hashes = hash_strings(array) if text else hash_ints(array.fill_null(0).to_numpy(zero_copy_only=False))
            return pa.array((hashes % np.uint64(num_embeddings)).astype(np.int64), mask=mask)
        ids = array.cast(pa.int64())
        if len(ids) > ids.null_count:
            low, high = (pc.min_max(ids)[k].as_py() for k in ("min", "max"))
            if low < 0 or high >= num_embeddings:
                raise DataError(
                    f"{where}: column '{column}' of feature '{name}' holds id {low if low < 0 else high}, expected 0 to "
                    f"{num_embeddings - 1}; raise data.tables.{table_name}.num_embeddings or set data.features.{name}.hashed=true"
                )
        return ids

    def _dense(self, table: pa.Table, where: str) -> list[np.ndarray]:
        parts = []
        for name, feature in self.data.dense_features.items():
            column = self.data.column_of(name)
            array = _single(table, column)
            if feature.kind is FeatureKind.vector:
                array = self._vectors(array, name, column, where)
            if array.null_count:
                self._null(array, column, where, f"data.features.{name}", "0")
                array = array.cast(pa.float32()).fill_null(0.0)
            values = _apply(feature.transform, self._finite(array, column, where))
            parts.append(values.reshape(table.num_rows, -1))
        return parts

    def _vectors(self, array: pa.Array, name: str, column: str, where: str) -> pa.Array:
        size = self.data.features[name].size
        if array.null_count:
            self._null(array, column, where, f"data.features.{name}", "zeros")
            zeros = pa.array([[0.0] * size], array.type)
            array = array.fill_null(zeros[0])
        lengths = np.unique(np.asarray(pc.list_value_length(array)))
        if lengths.size and lengths.tolist() != [size]:
            wrong = next(n for n in lengths.tolist() if n != size)
            raise DataError(
                f"{where}: column '{column}' holds a vector of {wrong} floats, expected {size} (data.features.{name}.size)"
            )
        return array.flatten()

    def _labels(self, table: pa.Table, where: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
        names = list(self.data.tasks)
        base = self._weight(table, self.data.weight, where)
        labels, valid = {}, {}
        for name, task in self.data.tasks.items():
            labels[name], valid[name] = self._label(table, name, task, where)
        weights = []
        for name, task in self.data.tasks.items():
            weight = base * self._weight(table, task.weight, where) * valid[name]
            weights.append(weight * (valid[task.condition] * labels[task.condition] > 0) if task.condition else weight)
        return [labels[name] for name in names], weights

    def _label(self, table: pa.Table, name: str, task: TaskConfig, where: str) -> tuple[np.ndarray, np.ndarray]:
        array = _single(table, task.label)
        valid = np.asarray(array.is_valid())
        if array.null_count:
            self._null(array, task.label, where, f"data.tasks.{name}", "rows that do not count")
            array = array.cast(pa.float32()).fill_null(0.0)
        values = self._finite(array, task.label, where)
        if task.kind is TaskKind.binary and len(values) and (values.min() < 0 or values.max() > 1):
            wrong = values.min() if values.min() < 0 else values.max()
            raise DataError(
                f"{where}: column '{task.label}' holds label {wrong:g} of binary task '{name}', expected 0 to 1; "
                f"mend the column or set data.tasks.{name}.kind=regression"
            )
        return _apply(task.label_transform, values), valid

    def _weight(self, table: pa.Table, column: str | None, where: str) -> np.ndarray:
        if column is None:
            return np.ones(table.num_rows, np.float32)
        values = self._floats(table, column, where)
        if len(values) and values.min() < 0:
            raise DataError(f"{where}: column '{column}' holds weight {values.min():g}, expected 0 or more")
        return values

    def _floats(self, table: pa.Table, column: str, where: str) -> np.ndarray:
        array = _single(table, column)
        if array.null_count:
            row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
            raise DataError(f"{where}: column '{column}' is null in row {row}, expected a number")
        return self._finite(array, column, where)

    def _finite(self, array: pa.Array, column: str, where: str) -> np.ndarray:
        values = array.cast(pa.float32()).to_numpy(zero_copy_only=False)
        finite = np.isfinite(values)
        if not finite.all():
            row = int(np.flatnonzero(~finite)[0])
            raise DataError(
                f"{where}: column '{column}' holds {values[row]} at position {row}, expected finite float32 values"
            )
        return values

    def _domain(self, table: pa.Table, where: str) -> pa.Array:
        domain = self.data.domain
        if domain is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array, names = _single(table, domain.column), domain.names
        ids = pc.index_in(array.cast(pa.string()), pa.array(names)) if _is_text(array.type) else array.cast(pa.int64())
        bad = pc.fill_null(pc.or_(pc.less(ids, 0), pc.greater_equal(ids, len(names))), True)
        if pc.any(bad).as_py():
            value = array.filter(bad)[0].as_py()
            raise DataError(
                f"{where}: column '{domain.column}' holds domain {value!r}, unknown to data.domain.names; {nearest(str(value), names)}"
            )
        return ids.cast(pa.int64())

    def _group(self, table: pa.Table) -> pa.Array:
        if self.data.group is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array = _single(table, self.data.group)
        if _is_text(array.type):
            return pa.array(hash_strings(array).view(np.int64))
        return array.cast(pa.int64()).fill_null(0)

    def _null(self, array: pa.Array, column: str, where: str, key: str, becomes: str) -> None:
        section, name = key.rsplit(".", 1)
        allowed = self.data.tasks[name] if section == "data.tasks" else self.data.features[name]
        if not allowed.allow_null:
            row = int(np.flatnonzero(np.asarray(array.is_null()))[0])
            raise DataError(
                f"{where}: column '{column}' has {array.null_count} nulls, the first at position {row}; fill them, or set "
                f"{key}.allow_null=true, which reads them as {becomes}"
            )
        self.repairs[f"{column}: null read as {becomes}"] += array.null_count


def _expected(feature: FeatureConfig, kind: pa.DataType) -> str | None:
    """What the column should be, or None if `kind` will do."""
    if feature.kind in (FeatureKind.bag, FeatureKind.sequence, FeatureKind.vector):
        if not _is_list(kind):
            return "a list of floats" if feature.kind is FeatureKind.vector else "a list of ids"
        kind = _plain(kind.value_type)
    if feature.kind in (FeatureKind.dense, FeatureKind.vector):
        return None if _is_number(kind) else "numbers"
    if _is_text(kind):
        return None if feature.hashed else "integers (strings need hashed=true)"
    # a column of empty lists or nulls alone may be written without a type; `encode` looks at its nulls
    return None if pa.types.is_integer(kind) or pa.types.is_null(kind) else "integers or strings"


def _single(table: pa.Table, column: str) -> pa.Array:
    array = table[column].combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array


def _list_parts(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Offsets [n + 1] int64, starting at 0, and the flat values of a list array; a null list is empty."""
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), array.flatten()


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


def _chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _ragged(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Flat ids int64 and the number of ids a row."""
    if column.length() == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    array = _chunk(column)
    if pa.types.is_large_list(array.type):
        offsets, values = _list_parts(array)
        return values.to_numpy(), np.diff(offsets)
    counts = np.asarray(array.is_valid()).astype(np.int64) if array.null_count else np.ones(len(array), np.int64)
    return array.drop_null().to_numpy(), counts


def _matrix(column: pa.ChunkedArray, size: int, width: int) -> Tensor:
    """[size, width] float32, zeros below the rows of `column`."""
    out = np.zeros((size, width), np.float32)
    if width and column.length():
        out[: column.length()] = _chunk(column).flatten().to_numpy().reshape(-1, width)
    return torch.from_numpy(out)


def _vector(column: pa.ChunkedArray, size: int) -> Tensor:
    out = np.zeros(size, np.int64)
    if column.length():
        out[: column.length()] = _chunk(column).to_numpy()
    return torch.from_numpy(out)

"""Columns of impressions become tensors.

Two steps, so that each value is looked at once: `Encoder.encode` turns one decoded row group into canonical columns (ids
hashed and checked, floats transformed, labels and weights stacked), and `Encoder.collate` turns any slice of canonical
rows into a `Batch`. Errors are raised by `encode`, which still knows the file and the row group.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from rec.columns import (
    TEXTS,
    DataError,
    Place,
    apply_transform,
    check_arrays,
    count_nulls,
    finite_floats,
    floats,
    floats_of,
    hash_ids,
    is_any,
    list_parts,
    matrix,
    newest,
    ragged,
    single,
    stacked,
    vector,
    weights_of,
)
from rec.expected import check_drift, check_schema, expectations
from rec.schema import DataConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind, nearest

__all__ = ["Batch", "DataError", "Encoder"]


@dataclass
class Batch(Pipelineable):
    """B rows of one rank, the last of which may be padding: rows without ids that weigh nothing.

    Attributes:
        sparse_features: ids of every sparse feature, keys in the order of the configuration, int64 values.
        dense: [B, F] float32, dense columns and vectors side by side.
        labels: [B, T] float32.
        weights: [B, T] float32, >= 0; 0 where a row does not count for a task.
        domain_id: [B] int64, 0 to D - 1; -1 for a domain that the configuration does not know.
        group_id: [B] int64.
        truth: [B, T] float32, true probabilities where a simulator knows them, else NaN; None if no task has them.
        num_rows: rows that are not padding, 0 to B.
        row_id: [B] int64, the row's place in the files of its split, in their order; -1 for padding.
        draws: [B, 2] int64, random bits of the row in this step, and of the step, the same whatever rank serves the row.
    """

    sparse_features: KeyedJaggedTensor
    dense: Tensor
    labels: Tensor
    weights: Tensor
    domain_id: Tensor
    group_id: Tensor
    truth: Tensor | None
    num_rows: int
    row_id: Tensor
    draws: Tensor

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


class Encoder:
    """Turns the columns of one data set into batches.

    Args:
        data: description of the data set.
        truth: also read the tasks' true probabilities.
        labels: read labels and weights; without, labels are 0 and weights 1.
    """

    def __init__(self, data: DataConfig, *, truth: bool = False, labels: bool = True) -> None:
        self.data = data
        self.labels = labels
        self.truth = truth and labels and any(task.truth for task in data.tasks.values())
        self.expected = list(expectations(data, truth=self.truth, labels=labels))
        self.keys = list(data.sparse_features)
        self.dropout = {n: f.dropout for n, f in data.sparse_features.items() if f.dropout > 0}
        self.repairs: Counter[str] = Counter()  # what the configuration asked to repair, counted by column

    @property
    def columns(self) -> list[str]:
        """Columns that have to be read from the files."""
        return list(dict.fromkeys(expected.column for expected in self.expected))

    def check_schema(self, schema: pa.Schema, where: str) -> list[str]:
        """What is wrong with the columns of one file, one sentence a finding; empty when it can be read."""
        return check_schema(schema, self.expected, where)

    def check_schemas(self, schemas: Mapping[str, pa.Schema]) -> list[str]:
        """What is wrong with the columns of files (name -> schema), each by itself and with one another."""
        findings = [f for file, schema in schemas.items() for f in self.check_schema(schema, file)]
        return findings + self.check_drift(schemas)

    def check_drift(self, schemas: Mapping[str, pa.Schema]) -> list[str]:
        """Ids, domains and groups that are integers in some files (name -> schema) and texts in others."""
        return check_drift(schemas, self.expected)

    def encode(self, table: pa.Table, where: str, *, first_row: int = 0) -> pa.Table:
        """Canonical columns of one row group: an int64 or list<int64> a sparse feature, and stacked floats.

        Args:
            table: the row group's `columns`.
            where: its file and number, for errors.
            first_row: its first row's place in the split.

        Raises:
            DataError: naming `where`, the column, the value and the remedy.
        """
        check_arrays(table, where)
        data, num_rows = self.data, table.num_rows
        columns = {name: self._sparse(table, name, feature, where) for name, feature in data.sparse_features.items()}
        columns["/dense"] = stacked(self._dense(table, where), num_rows)
        columns["/row"] = pa.array(np.arange(first_row, first_row + num_rows))
        columns["/domain"], columns["/group"] = self._domain(table, where), self._group(table, where)
        exists = self._existence(columns["/domain"])
        labels, weights = self._labels(table, where, exists) if self.labels else self._unlabelled(num_rows)
        columns["/labels"], columns["/weights"] = stacked(labels, num_rows), stacked(weights, num_rows)
        if self.truth:
            columns["/truth"] = stacked(self._truths(table, where, exists), num_rows)
        return pa.table(columns)

    def collate(
        self,
        rows: pa.Table,
        size: int,
        dropped: dict[str, np.ndarray] | None = None,
        *,
        draws: Tensor | None = None,
    ) -> Batch:
        """A batch of `size` rows, the canonical `rows` first and padding after them.

        Args:
            rows: canonical rows, at most `size`.
            size: B.
            dropped: feature -> [len(rows)] bool, rows that lose their ids of that feature.
            draws: [len(rows), 2] int64, see `Batch`; zeros by default.
        """
        lengths = np.zeros((len(self.keys), size), np.int32)
        values = []
        for i, name in enumerate(self.keys):
            ids, counts = ragged(rows[name])
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
            dense=matrix(rows["/dense"], size, self.data.num_dense),
            labels=matrix(rows["/labels"], size, num_tasks),
            weights=matrix(rows["/weights"], size, num_tasks),
            domain_id=vector(rows["/domain"], size),
            group_id=vector(rows["/group"], size),
            truth=matrix(rows["/truth"], size, num_tasks) if self.truth else None,
            num_rows=rows.num_rows,
            row_id=vector(rows["/row"], size, padding=-1),
            draws=torch.zeros(size, 2, dtype=torch.int64)
            if draws is None
            else F.pad(draws, (0, 0, 0, size - len(draws))),
        )

    def _sparse(self, table: pa.Table, name: str, feature: FeatureConfig, where: str) -> pa.Array:
        place = Place(where, self.data.column_of(name), f"data.features.{name}")
        if feature.kind is FeatureKind.id:
            return self._ids(single(table, place.column, pa.int64()), name, feature, place)
        array = single(table, place.column, pa.list_(pa.int64()))
        self._nulls(array, place, feature.allow_null, becomes="no ids")
        if pa.types.is_fixed_size_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        offsets, ids = list_parts(array)
        ids = self._ids(ids, name, feature, place)
        if ids.null_count:
            keep = np.asarray(pc.is_valid(ids))
            offsets = np.concatenate([[0], np.cumsum(keep)])[offsets]
            ids = ids.drop_null()
        if feature.max_length is not None:
            offsets, ids = newest(offsets, ids, feature.max_length)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), ids)

    def _ids(self, array: pa.Array, name: str, feature: FeatureConfig, place: Place) -> pa.Array:
        table = self.data.table_of(name)
        num_embeddings = self.data.tables[table].num_embeddings
        self._nulls(array, place, feature.allow_null, becomes="no id")
        if pa.types.is_null(array.type):  # of empty lists alone
            array = array.cast(pa.int64())
        if feature.hashed:
            mask = np.asarray(array.is_null()) if array.null_count else None
            return pa.array((hash_ids(array) % np.uint64(num_embeddings)).astype(np.int64), mask=mask)
        return self._rows(array, name, feature, place)

    def _rows(self, array: pa.Array, name: str, feature: FeatureConfig, place: Place) -> pa.Array:
        """Ids as rows of their table; what is outside is no id, or an error."""
        table = self.data.table_of(name)
        num_embeddings = self.data.tables[table].num_embeddings
        ids = array.cast(pa.int64(), safe=False)  # above 2**63 it wraps to what is negative, and outside as well
        low, high = (pc.min_max(ids)[k].as_py() for k in ("min", "max"))
        if low is None or (low >= 0 and high < num_embeddings):
            return ids
        outside = pc.or_(pc.less(ids, 0), pc.greater_equal(ids, num_embeddings))
        if not feature.allow_invalid:
            position = pc.index(outside, True).as_py()
            raise place.error(
                f"of feature '{name}' holds id {array[position]} at position {position}, expected 0 to {num_embeddings - 1}; "
                f"raise data.tables.{table}.num_embeddings, set {place.key}.hashed=true, or {place.key}.allow_invalid=true, "
                "which reads it as no id"
            )
        self.repairs[f"{place.column}: id outside table '{table}' read as no id"] += pc.sum(outside).as_py()
        return pc.if_else(outside, None, ids)

    def _dense(self, table: pa.Table, where: str) -> list[np.ndarray]:
        parts = []
        for name, feature in self.data.dense_features.items():
            place = Place(where, self.data.column_of(name), f"data.features.{name}")
            if feature.kind is FeatureKind.vector:
                array, width = self._vectors(table, feature, place), feature.size
            else:
                array, width = single(table, place.column, pa.float32()), 1
            self._nulls(array, place, feature.allow_null, becomes="0")
            parts.append(apply_transform(feature.transform, self._floats(array, feature, place)).reshape(-1, width))
        return parts

    def _floats(self, array: pa.Array, feature: FeatureConfig, place: Place) -> np.ndarray:
        """Float32 values; NaN and infinity are 0, or an error."""
        if not feature.allow_invalid:
            return finite_floats(array, place, remedy=f", or set {place.key}.allow_invalid=true, which reads it as 0")
        values = floats(array)
        finite = np.isfinite(values)
        if not finite.all():
            self.repairs[f"{place.column}: NaN or infinity read as 0"] += int((~finite).sum())
        return np.where(finite, values, np.float32(0))

    def _vectors(self, table: pa.Table, feature: FeatureConfig, place: Place) -> pa.Array:
        array = single(table, place.column, pa.list_(pa.float32()))
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

    def _existence(self, domain: pa.Array) -> dict[str, np.ndarray]:
        """Task -> [n] bool, the rows in whose domain it exists; only tasks that do not exist everywhere have an entry."""
        limited = {name: task.domains for name, task in self.data.tasks.items() if task.domains is not None}
        ids = np.asarray(domain)
        return {name: np.isin(ids, [self.data.domains.index(d) for d in among]) for name, among in limited.items()}

    def _labels(
        self, table: pa.Table, where: str, exists: dict[str, np.ndarray]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        tasks, base = self.data.tasks, weights_of(table, self.data.weight, where)
        labels, own, valid = {}, {}, {}
        for name, task in tasks.items():
            there = _zero_elsewhere(table, [task.label, task.weight], exists.get(name))
            labels[name], known = self._label(there, name, task, where)  # a null label is 0
            valid[name] = known & exists.get(name, True)
            own[name] = weights_of(there, task.weight, where)
        joint = {name: self._along_product(name, labels) for name in tasks}
        weights = {name: base * own[name] * self._along_product(name, valid) for name in tasks}
        for name, task in tasks.items():
            if task.condition:
                weights[name] = weights[name] * (joint[task.condition] > 0)
        return list(joint.values()), list(weights.values())

    def _along_product(self, name: str, values: dict[str, np.ndarray]) -> np.ndarray:
        """The values of a task times those of the tasks that its probability is a product with."""
        before = self.data.tasks[name].product
        return values[name] * self._along_product(before, values) if before else values[name]

    def _truths(self, table: pa.Table, where: str, exists: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = {}
        for name, task in self.data.tasks.items():
            columns, rows = task.truth_columns, exists.get(name)
            there = _zero_elsewhere(table, columns, rows)
            parts = [floats_of(there, column, where) for column in columns]
            truth = np.prod(parts, axis=0) if parts else np.full(table.num_rows, np.nan, np.float32)
            values[name] = truth if rows is None else np.where(rows, truth, np.float32(np.nan))
        return [self._along_product(name, values) for name in values]

    def _unlabelled(self, num_rows: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        zeros, ones = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
        return [zeros] * len(self.data.tasks), [ones] * len(self.data.tasks)

    def _label(self, table: pa.Table, name: str, task: TaskConfig, where: str) -> tuple[np.ndarray, np.ndarray]:
        place = Place(where, task.label, f"data.tasks.{name}")
        array = single(table, place.column, pa.float32())
        self._nulls(array, place, task.allow_null, becomes="rows that do not count")
        values = finite_floats(array, place)
        if task.kind is TaskKind.binary and len(values) and (values.min() < 0 or values.max() > 1):
            wrong = values.min() if values.min() < 0 else values.max()
            raise place.error(
                f"holds label {wrong:g} of binary task '{name}', expected 0 to 1; mend the column or set {place.key}.kind=regression"
            )
        return apply_transform(task.label_transform, values), np.asarray(array.is_valid())

    def _domain(self, table: pa.Table, where: str) -> pa.Array:
        domain = self.data.domain
        if domain is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array, names = single(table, domain.column, pa.int64()), domain.names
        if is_any(array.type, TEXTS):  # as bytes: binary need not be UTF-8
            known = pa.array([name.encode() for name in names], pa.large_binary())
            ids = pc.index_in(array.cast(pa.large_binary()), known).cast(pa.int64())
        else:
            ids = array.cast(pa.int64(), safe=False)
        bad = pc.fill_null(pc.or_(pc.less(ids, 0), pc.greater_equal(ids, len(names))), True)
        if pc.any(bad).as_py():
            if not domain.allow_unknown:
                value = array.filter(bad)[0].as_py()
                raise Place(where, domain.column).error(
                    f"holds domain {value!r}, unknown to data.domain.names; {nearest(str(value), names)}; "
                    "or set data.domain.allow_unknown=true"
                )
            self.repairs[f"{domain.column}: unknown domain read as -1"] += pc.sum(bad).as_py()
            ids = pc.if_else(bad, -1, ids)
        return ids

    def _group(self, table: pa.Table, where: str) -> pa.Array:
        if self.data.group is None:
            return pa.array(np.zeros(table.num_rows, np.int64))
        array = single(table, self.data.group, pa.int64())
        if array.null_count:
            raise Place(where, self.data.group).error(f"has {count_nulls(array)}, expected a group; fill them")
        if is_any(array.type, TEXTS):
            return pa.array(hash_ids(array).view(np.int64))
        return array.cast(pa.int64(), safe=False)  # uint64 wraps: groups are only told apart

    def _nulls(self, array: pa.Array, place: Place, allowed: bool, *, becomes: str) -> None:
        """Count the nulls, or refuse them unless the configuration has `allowed` them."""
        if array.null_count and not allowed:
            raise place.error(
                f"has {count_nulls(array)}; fill them, or set {place.key}.allow_null=true, which reads them as {becomes}"
            )
        if array.null_count:
            self.repairs[f"{place.column}: null read as {becomes}"] += array.null_count


def _zero_elsewhere(table: pa.Table, columns: Sequence[str | None], rows: np.ndarray | None) -> pa.Table:
    """Numbers, with 0 in place of what they hold outside `rows` [n] bool; `rows` None: the table as it is."""
    if rows is None:
        return table
    floats = {c: single(table, c, pa.float32()).cast(pa.float32(), safe=False) for c in columns if c is not None}
    zero = pa.scalar(0, pa.float32())
    named = {column: pc.if_else(pa.array(rows), array, zero) for column, array in floats.items()}
    return pa.table(named) if named else table

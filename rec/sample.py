"""A bounded look at a split: some of its row groups, decoded, with everything that is wrong with their values.

A reader stops at the first bad value. Here each feature and each task is encoded by itself, so that one does not hide another.
"""

from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec.columns import LISTS, DataError, check_arrays, hash_ids, is_any, list_parts, single
from rec.data import RowGroup, Split
from rec.features import Encoder
from rec.schema import DataConfig

MAX_ROW_GROUPS, MAX_ROWS = 64, 200_000  # of a split, about; at least one row group, however large


@dataclass
class Sample:
    """Row groups of one split, from all over it.

    Attributes:
        num_rows: rows that were looked at.
        share: they are this share of the split's rows.
        nbytes: memory that these rows take as canonical columns.
        problems: what is wrong with values, one sentence a column.
        nulls: column -> nulls, those within lists too.
        repairs: what the configuration asked to repair, and how often.
        ids: feature -> hashes of all its ids, uint64.
        highest: feature -> its highest id, of features that are not hashed.
        labels: [n, T] float32.
        weights: [n, T] float32.
    """

    num_rows: int = 0
    share: float = 1.0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)
    nulls: Counter[str] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    ids: dict[str, list[np.ndarray]] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    labels: list[np.ndarray] = field(default_factory=list)
    weights: list[np.ndarray] = field(default_factory=list)


def take_sample(split: Split, data: DataConfig, *, truth: bool = False) -> Sample:
    """Decode some row groups of `split`, with the tasks' true probabilities or without; its schema must be known to fit."""
    encoder, alone = Encoder(data, truth=truth), list(each_alone(data, truth=truth))
    sample, spoilt = Sample(), Counter[int]()
    for group in chosen(split.row_groups):
        try:
            table = split.read(group, encoder.columns)
        except DataError as error:
            sample.problems.append(str(error))
            continue
        sample.num_rows += table.num_rows
        try:
            check_arrays(table, str(group))  # before anything else touches them
            _count(sample, table, data)
            _keep(sample, encoder.encode(table, str(group)), len(data.tasks))
        except DataError:
            _find(sample, spoilt, table, alone, str(group))
    sample.repairs, sample.share = encoder.repairs, sample.num_rows / max(1, split.num_rows)
    return sample


def chosen(groups: list[RowGroup]) -> list[RowGroup]:
    """Row groups with rows, evenly spaced, about as many as the bounds allow."""
    filled = [group for group in groups if group.num_rows]
    num_rows = sum(group.num_rows for group in filled)
    fit = len(filled) if num_rows <= MAX_ROWS else max(1, MAX_ROWS * len(filled) // num_rows)
    places = np.linspace(0, len(filled) - 1, min(fit, MAX_ROW_GROUPS, len(filled)))
    return [filled[i] for i in np.unique(places.astype(int))]


def each_alone(data: DataConfig, *, truth: bool) -> Iterator[Encoder]:
    """The data set cut into its features, its tasks, its group and its domain, an encoder each."""
    for name, feature in data.features.items():
        yield Encoder(_part(data, features={name: feature}, domain=None, group=None, tasks={}), labels=False)
    yield Encoder(_part(data, features={}, group=None, tasks={}), labels=False)
    yield Encoder(_part(data, features={}, domain=None, tasks={}), labels=False)
    for name, task in data.tasks.items():
        task = copy(task)  # not `replace`, which would refuse what is left of some tasks
        task.product = task.condition = None
        if task.weight and not task.domains:  # with domains it counts in them alone, so it stays with its label
            yield _weight(data, task.weight)
            task.weight = None
        domain = data.domain and task.domains and replace(data.domain, allow_unknown=True)
        yield Encoder(_part(data, features={}, group=None, domain=domain, weight=None, tasks={name: task}), truth=truth)
    if data.weight:
        yield _weight(data, data.weight)


def _weight(data: DataConfig, column: str) -> Encoder:
    return Encoder(_part(data, features={}, group=None, domain=None, tasks={}, weight=column))


def _part(data: DataConfig, **changes: object) -> DataConfig:
    part = copy(data)  # not `replace`, which would refuse a data set without features
    vars(part).update(changes)
    return part


def _find(sample: Sample, spoilt: Counter[int], table: pa.Table, alone: list[Encoder], where: str) -> None:
    """Add what is wrong with one row group, for every part that was sound in those before."""
    for i, encoder in enumerate(alone):
        try:
            encoder.encode(table.select(encoder.columns), where)
        except DataError as error:
            spoilt[i] += 1
            if spoilt[i] == 1:
                sample.problems.append(str(error))


def _keep(sample: Sample, rows: pa.Table, num_tasks: int) -> None:
    sample.nbytes += rows.nbytes
    for found, name in ((sample.labels, "/labels"), (sample.weights, "/weights")):
        found.append(rows[name].combine_chunks().flatten().to_numpy().reshape(-1, num_tasks))


def _count(sample: Sample, table: pa.Table, data: DataConfig) -> None:
    """Add the nulls of all columns and the ids of all features."""
    for column in table.column_names:
        array = single(table, column, pa.int64())
        values = list_parts(array)[1] if is_any(array.type, LISTS) else array
        sample.nulls[column] += array.null_count + (values.null_count if values is not array else 0)
        for name in (n for n in data.sparse_features if data.column_of(n) == column):
            if len(values) > values.null_count:
                sample.ids.setdefault(name, []).append(hash_ids(values.drop_null()))
                if not data.features[name].hashed:
                    sample.highest[name] = max(sample.highest.get(name, 0), pc.max(values).as_py())

"""What the configuration expects of files, told from their schemas, before any row is decoded."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import pyarrow as pa

from rec.columns import LISTS, NUMBERS, TEXTS, is_any, plain_type
from rec.schema import DataConfig, FeatureConfig, FeatureKind, nearest


@dataclass(frozen=True)
class Expectation:
    """One column that is read.

    Attributes:
        column: its name in the files.
        reader: what of the configuration reads it, in words.
        refuse: a type -> what the column should be instead, or None if the type will do.
        ids: what its values are ids of, or None: ids are told apart, not counted with, so 1 and "1" are two.
    """

    column: str
    reader: str
    refuse: Callable[[pa.DataType], str | None]
    ids: str | None = None


def expectations(data: DataConfig, *, truth: bool, labels: bool) -> Iterator[Expectation]:
    """The columns that are read, one an entry of the configuration, so that a column may come twice."""
    for name, feature in data.features.items():
        refuse = partial(expected_of_feature, feature)
        ids = f"table '{data.table_of(name)}'" if name in data.sparse_features else None
        yield Expectation(data.column_of(name), f"feature '{name}'", refuse, ids)
    for name, task in data.tasks.items() if labels else ():
        for column in (task.label, task.weight, *(task.truth_columns if truth else [])):
            if column:
                yield Expectation(column, f"task '{name}'", expected_number)
    if data.weight and labels:
        yield Expectation(data.weight, "data.weight", expected_number)
    if data.domain:
        yield Expectation(data.domain.column, "data.domain", expected_key, "data.domain")
    if data.group:
        yield Expectation(data.group, "data.group", expected_key, "data.group")


def expected_of_feature(feature: FeatureConfig, kind: pa.DataType) -> str | None:
    """What the column of a feature should be, or None if `kind` will do."""
    if feature.kind in (FeatureKind.bag, FeatureKind.sequence, FeatureKind.vector):
        if not is_any(kind, LISTS):
            return "a list of floats" if feature.kind is FeatureKind.vector else "a list of ids"
        kind = plain_type(kind.value_type)
    if feature.kind in (FeatureKind.dense, FeatureKind.vector):
        return expected_number(kind)
    if is_any(kind, TEXTS):
        return None if feature.hashed else "integers (strings need hashed=true)"
    return None if pa.types.is_integer(kind) or pa.types.is_null(kind) else "integers or strings"


def expected_number(kind: pa.DataType) -> str | None:
    """What a column of numbers should be, or None if `kind` will do."""
    return None if is_any(kind, NUMBERS) else "numbers"


def expected_key(kind: pa.DataType) -> str | None:
    """What a column of groups or domains should be, or None if `kind` will do."""
    return None if pa.types.is_integer(kind) or is_any(kind, TEXTS) else "integers or strings"


def check_schema(schema: pa.Schema, expected: list[Expectation], where: str) -> list[str]:
    """What is wrong with the columns of one file, one sentence a finding; empty when it can be read."""
    findings = []
    for column in dict.fromkeys(e.column for e in expected):
        if column not in schema.names:
            findings.append(f"{where}: column '{column}' is missing; {nearest(column, schema.names)}")
        elif (times := schema.names.count(column)) > 1:
            findings.append(f"{where}: column '{column}' is there {times} times, expected once; rename the others")
    for e in expected:
        # a file without rows, or with nulls alone, may be written without a type; the encoder looks at its nulls
        kind = _type_of(schema, e.column)
        wanted = None if pa.types.is_null(kind) else e.refuse(kind)
        if wanted:
            remedy = "write it as such, or name another column in the configuration"
            findings.append(f"{where}: column '{e.column}' of {e.reader} is {kind}, expected {wanted}; {remedy}")
    return findings


def check_drift(schemas: Mapping[str, pa.Schema], expected: list[Expectation]) -> list[str]:
    """Ids that are integers in some columns or files and texts in others: 1 and "1" would silently be two ids.

    Args:
        schemas: file -> its schema.
        expected: the columns that are read.
    """
    findings, drifting = [], set()
    for column in dict.fromkeys(e.column for e in expected if e.ids):
        if pair := _unlike((file, column, schema) for file, schema in schemas.items()):
            drifting.add(column)
            findings.append(f"{pair}: the same id would be another; write all files with one type")
    for ids in dict.fromkeys(e.ids for e in expected if e.ids):
        columns = dict.fromkeys(e.column for e in expected if e.ids == ids and e.column not in drifting)
        if pair := _unlike((file, column, schema) for column in columns for file, schema in schemas.items()):
            findings.append(
                f"{pair}, and both are ids of {ids}: the same id would be another; write them with one type, or give each a table"
            )
    return findings


def _unlike(places: Iterable[tuple[str, str, pa.Schema]]) -> str | None:
    """Two of the files and columns, the first whose ids are integers and the first whose ids are texts, in words; None without both."""
    first: dict[bool, tuple[str, str, pa.DataType]] = {}
    for file, column, schema in places:
        kind = _id_type(schema, column)
        if kind is not None:
            first.setdefault(is_any(kind, TEXTS), (file, column, kind))
    if len(first) < 2:
        return None
    (file, column, kind), (other_file, other, other_kind) = first.values()
    where = file if column == other else f"{file}: column '{column}'"
    return f"{other_file}: column '{other}' holds {other_kind}, but {where} {kind}"


def _type_of(schema: pa.Schema, column: str) -> pa.DataType:
    """Type of a column's values; null where there is no such column, or two."""
    index = schema.get_field_index(column)  # -1 also for a name that is there twice
    return pa.null() if index < 0 else plain_type(schema.field(index).type)


def _id_type(schema: pa.Schema, column: str) -> pa.DataType | None:
    """Type of a column's ids, those in lists too; None where they have none."""
    kind = _type_of(schema, column)
    kind = plain_type(kind.value_type) if is_any(kind, LISTS) else kind
    return kind if pa.types.is_integer(kind) or is_any(kind, TEXTS) else None

"""Raw CSV files become checked columns: what is wrong is named by file, column, line, value and remedy.

Nothing here knows a particular data set; an adapter (`rec.kuairand`) says which columns it reads and what they may hold.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rec.schema import nearest


class RawDataError(ValueError):
    """Raw files that cannot be read as they are: the message names file, column, value and remedy."""


@dataclass
class Summary:
    """Counts for the printed summary."""

    rows: dict[str, int] = field(default_factory=dict)
    missing: Counter[str] = field(default_factory=Counter)  # what was empty or unknown, and what it became -> cells

    def note(self, file: Path, column: str, count: int, becomes: str) -> None:
        """Count `count` cells of a file's column that were empty or unknown."""
        if count:
            self.missing[f"{file.name}: {column} {becomes}"] += int(count)


def read_columns(file: Path, columns: Mapping[str, bool], *, text: Collection[str] = ()) -> dict[str, np.ndarray]:
    """Columns [N] of a CSV file: strings for those in `text`, else float64 with NaN for an empty cell.

    Args:
        file: a CSV file with a line of names.
        columns: name of a column -> whether an empty cell is allowed there. All others are ignored.
        text: columns that stay strings.

    Raises:
        RawDataError: no such file or column, a value that is no number, an empty cell where none is allowed.
    """
    if not file.is_file():
        raise RawDataError(f"{file} is missing: --raw needs the official layout, DIR or DIR/data with this file in it")
    try:
        header = pa.csv.open_csv(file).schema.names
        absent = [name for name in columns if name not in header]
        if absent:
            raise RawDataError(
                f"{file}: no column '{absent[0]}'; {nearest(absent[0], header)}; download the file again"
            )
        convert = pa.csv.ConvertOptions(include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string()))
        table = pa.csv.read_csv(file, convert_options=convert)
    except pa.ArrowInvalid as error:
        raise RawDataError(f"{file}: {error}; the file is damaged or cut short: download it again") from error
    if not table.num_rows:
        raise RawDataError(f"{file}: no rows; download the file again")
    read = {name: table[name].combine_chunks() for name in columns}
    for name, values in read.items():
        _check_empty(file, name, values, allowed=columns[name])
    return {name: _strings(values) if name in text else _numbers(file, name, values) for name, values in read.items()}


def _check_empty(file: Path, name: str, text: pa.Array, *, allowed: bool) -> None:
    empty = np.asarray(pc.equal(text, ""))
    if empty.any() and not allowed:
        refuse(file, name, "", row=int(np.argmax(empty)), expected="a value")


def _strings(text: pa.Array) -> np.ndarray:
    return text.to_numpy(zero_copy_only=False)


def _numbers(file: Path, name: str, text: pa.Array) -> np.ndarray:
    empty = np.asarray(pc.equal(text, ""))
    numbers = pc.if_else(pa.array(empty), None, text)
    try:
        values = numbers.cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        bad = pc.invert(pc.match_substring_regex(numbers, r"^-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"))
        row = int(np.argmax(np.asarray(pc.fill_null(bad, False))))
        refuse(file, name, text[row].as_py(), row=row, expected="a number")
    wild = ~np.isfinite(values) & ~empty
    if wild.any():
        row = int(np.argmax(wild))
        refuse(file, name, text[row].as_py(), row=row, expected="a finite number")
    return values


def refuse(file: Path, column: str, value: object, *, row: int, expected: str) -> NoReturn:
    """Raise `RawDataError` about the value in `row`, counted from 0 after the line of names."""
    raise RawDataError(
        f"{file}: column '{column}' holds {value!r} in line {row + 2}, expected {expected}; "
        "mend or remove the line, or download the file again"
    )


def check_values(file: Path, column: str, values: np.ndarray, *, low: float, high: float, expected: str) -> np.ndarray:
    """`values` as int64, all whole and from `low` to `high`, else `RawDataError`."""
    bad = ~((values >= low) & (values <= high) & (values == np.floor(values)))
    if bad.any():
        row = int(np.argmax(bad))
        refuse(file, column, f"{values[row]:.15g}", row=row, expected=expected)
    return values.astype(np.int64)


def order_by_id(file: Path, column: str, values: np.ndarray) -> np.ndarray:
    """The order [N] of rows that puts ids 0 to N - 1 in their places, so that a join is an index."""
    ids = check_values(file, column, values, low=0, high=2**31, expected="a whole number")
    order = np.argsort(ids, kind="stable")
    wrong = np.flatnonzero(ids[order] != np.arange(len(ids)))
    if len(wrong):
        row = int(order[wrong[0]])
        refuse(file, column, str(ids[row]), row=row, expected=f"each id from 0 to {len(ids) - 1} once")
    return order

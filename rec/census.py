"""Census-Income (KDD) and Adult: a description of each one's columns, one reader, labels of income, marriage, education.

Reads the official files of the UCI repository: Census-Income (KDD), 299,285 people of US population surveys of 1994 and
1995 (doi.org/10.24432/C5N30T), and its small sibling Adult, 48,842 people of 1994 (doi.org/10.24432/C5XW20). Ma et al.,
"Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018
(doi.org/10.1145/3219819.3220007), learn two pairs of tasks on the first: income with marriage, and education with marriage.

Labels, 0 or 1:
    income_50k: more than 50,000 dollars a year.
    never_married: never married.
    education_college: a bachelor's degree or above.
    education_some_college: some college, with a degree or without.

The paper's task is "at least college", which may be either of the last two: its exact cut is not known. `label_correlations`
helps to tell: the paper's label has a |Pearson| of .2373 with never_married (and income of .1768).

No feature in either pair: education and marital status, of which labels are made, as in the paper; Adult's education-num,
which is education once more; and the weight of a row in the survey, which says nothing about the person. What gives
marriage away stays in, as in the paper, where marriage has an AUC of .99: the tax filer status and the household columns of
the one, `relationship` (husband, wife) of the other.

`conf/data/census.yaml` and `conf/data/adult.yaml` describe the tables.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rec.raw import RawDataError, Summary, refuse
from rec.schema import nearest

log = logging.getLogger(__name__)

VERSION = 1  # of the columns and their meaning: a change here makes earlier output stale
UNKNOWN = "?"


# ---- what a column of the files holds, and what is written of it


@dataclass(frozen=True)
class Category:
    """Strings. Written as codes int64: the place, from 1, among both files' values in sorted order; 0 is "?"."""

    num_values: int  # in the official files, "?" not counted


@dataclass(frozen=True)
class Whole:
    """Whole numbers from `low` to `high`: codes of categories, or amounts. Written as int64, less `low`."""

    low: int
    high: int


@dataclass(frozen=True)
class Number:
    """Numbers from `low` to `high`. Written as (number - centre) / scale, float32, or only checked."""

    low: float
    high: float
    centre: float = 0.0
    scale: float = 1.0
    written: bool = True


@dataclass(frozen=True)
class Choice:
    """Strings among `values`, of which labels are made. Not written themselves."""

    values: tuple[str, ...]


@dataclass(frozen=True)
class Label:
    """Written as int8: 1 where `column`, a `Choice`, holds one of `positives`."""

    column: str
    positives: tuple[str, ...]


@dataclass(frozen=True)
class CensusData:
    """Two files of one layout: values between commas, blanks after these, no line of names."""

    title: str
    page: str  # where the files are to be had
    num_rows: dict[str, int]  # the official file to train on and the one to test on, and their rows
    columns: dict[str, Category | Whole | Number | Choice]  # all that the files have, in their order
    labels: dict[str, Label]


def _labels(income: tuple[str, ...], single: str, education: tuple[str, ...]) -> dict[str, Label]:
    """Labels from the values that are positive, and from all of education in rising order, which ends alike in both sets."""
    return {
        "income_50k": Label("income", income),
        "never_married": Label("marital_status", (single,)),
        "education_college": Label("education", education[-4:]),
        "education_some_college": Label("education", education[-7:]),
    }


_MONEY = Whole(0, 99_999)  # dollars
_SMALL_MONEY = Whole(0, 9_999)
_COUNTRY = Category(42)
_SINGLE = "Never married"
_EDUCATION = (
    *("Children", "Less than 1st grade", "1st 2nd 3rd or 4th grade", "5th or 6th grade", "7th and 8th grade"),
    *("9th grade", "10th grade", "11th grade", "12th grade no diploma", "High school graduate"),
    *("Some college but no degree", "Associates degree-occup /vocational", "Associates degree-academic program"),
    *("Bachelors degree(BA AB BS)", "Masters degree(MA MS MEng MEd MSW MBA)"),
    *("Prof school degree (MD DDS DVM LLB JD)", "Doctorate degree(PhD EdD)"),
)
_MARRIED = ("Married-civilian spouse present", "Married-spouse absent", "Married-A F spouse present")
_ONCE = ("Separated", "Divorced", "Widowed")

CENSUS = CensusData(
    title="Census-Income (KDD)",
    page="archive.ics.uci.edu/dataset/117",
    num_rows={"census-income.data": 199_523, "census-income.test": 99_762},
    columns={
        "age": Number(0, 130, centre=40, scale=20),  # years
        "class_of_worker": Category(9),
        "detailed_industry": Whole(0, 51),
        "detailed_occupation": Whole(0, 46),
        "education": Choice(_EDUCATION),
        "wage_per_hour": _SMALL_MONEY,  # cents
        "enrolled_last_week": Category(3),
        "marital_status": Choice((_SINGLE, *_MARRIED, *_ONCE)),
        "major_industry": Category(24),
        "major_occupation": Category(15),
        "race": Category(5),
        "hispanic_origin": Category(10),
        "sex": Category(2),
        "labor_union": Category(3),
        "unemployment_reason": Category(6),
        "employment_status": Category(8),
        "capital_gains": _MONEY,
        "capital_losses": _SMALL_MONEY,
        "dividends": _MONEY,
        "tax_filer_status": Category(6),
        "previous_region": Category(6),
        "previous_state": Category(50),
        "household_status": Category(38),
        "household_summary": Category(8),
        "instance_weight": Number(0, 1e9, written=False),
        "migration_msa": Category(9),
        "migration_region": Category(8),
        "migration_within_region": Category(9),
        "same_house_last_year": Category(3),
        "migration_sunbelt": Category(3),
        "employer_size": Number(0, 6, centre=2, scale=2),  # "num persons worked for employer", a class
        "family_under_18": Category(5),
        "country_of_father": _COUNTRY,
        "country_of_mother": _COUNTRY,
        "country_of_birth": _COUNTRY,
        "citizenship": Category(5),
        "own_business": Whole(0, 2),
        "veteran_questionnaire": Category(3),
        "veterans_benefits": Whole(0, 2),
        "weeks_worked": Number(0, 52, centre=25, scale=25),  # in the year
        "year": Whole(94, 95),
        "income": Choice(("- 50000.", "50000+.")),
    },
    labels=_labels(("50000+.",), _SINGLE, _EDUCATION),
)

_ADULT_EDUCATION = (
    *("Preschool", "1st-4th", "5th-6th", "7th-8th", "9th", "10th", "11th", "12th", "HS-grad"),
    *("Some-college", "Assoc-voc", "Assoc-acdm", "Bachelors", "Masters", "Prof-school", "Doctorate"),
)
_ADULT_MARRIED = ("Married-civ-spouse", "Married-spouse-absent", "Married-AF-spouse")

ADULT = CensusData(
    title="Adult",
    page="archive.ics.uci.edu/dataset/2",
    num_rows={"adult.data": 32_561, "adult.test": 16_281},
    columns={
        "age": Number(0, 130, centre=40, scale=15),  # years
        "class_of_worker": Category(8),
        "fnlwgt": Number(0, 1e9, written=False),
        "education": Choice(_ADULT_EDUCATION),
        "education_num": Number(1, 16, written=False),
        "marital_status": Choice(("Never-married", *_ADULT_MARRIED, *_ONCE)),
        "occupation": Category(14),
        "relationship": Category(6),
        "race": Category(5),
        "sex": Category(2),
        "capital_gains": _MONEY,
        "capital_losses": _SMALL_MONEY,
        "hours_per_week": Number(0, 168, centre=40, scale=12),
        "country_of_birth": Category(41),
        "income": Choice(("<=50K", ">50K", "<=50K.", ">50K.")),  # the test file ends its lines in a full stop
    },
    labels=_labels((">50K", ">50K."), "Never-married", _ADULT_EDUCATION),
)


# ---- raw files


@dataclass(frozen=True)
class RawRows:
    """A file's cells as strings [N] without blanks around them, by column."""

    file: Path
    cells: dict[str, pa.Array]
    first_line: int  # of the file, from 1, that holds a row

    def refuse(self, column: str, row: int, *, expected: str) -> NoReturn:
        """Raise `RawDataError` about the cell in `row`, counted from 0."""
        # rec.raw counts lines from a line of names on, which these files lack
        row_of_line = row + self.first_line - 2
        refuse(self.file, column, self.cells[column][row].as_py(), row=row_of_line, expected=expected)

    def __len__(self) -> int:
        return len(next(iter(self.cells.values())))

    def check(self, column: str, good: np.ndarray, *, expected: str) -> None:
        """`RawDataError` about the first cell that is not `good` [N] bool."""
        if not good.all():
            self.refuse(column, int(np.argmin(good)), expected=expected)


def find_files(data: CensusData, raw: Path) -> list[Path]:
    """The official files in `raw`, packed (.gz) or not; `RawDataError` where one is missing."""
    files = []
    for name in data.num_rows:
        found = [file for file in (raw / name, raw / f"{name}.gz") if file.is_file()]
        if not found:
            raise RawDataError(
                f"{raw}: neither {name} nor {name}.gz; --raw names the folder with the unpacked files of {data.title}, "
                f"which are to be had at {data.page}"
            )
        files.append(found[0])
    return files


def read_rows(file: Path, names: Sequence[str]) -> RawRows:
    """All cells of a file with the columns `names`, unpacked if its name ends in .gz.

    Raises:
        RawDataError: a file that is damaged or empty, a line with more or fewer values than there are columns.
    """
    text = _read_text(file)
    commented = int(text.startswith(b"|"))  # as the first line of adult.test
    short: list[pa.csv.InvalidRow] = []

    def stop(line: pa.csv.InvalidRow) -> str:
        short.append(line)
        return "error"

    try:
        table = pa.csv.read_csv(
            pa.BufferReader(text),
            # in one thread, for else pyarrow does not tell the line
            read_options=pa.csv.ReadOptions(column_names=list(names), skip_rows=commented, use_threads=False),
            parse_options=pa.csv.ParseOptions(
                quote_char=False,
                ignore_empty_lines=False,  # they would shift the numbers of the lines after them
                invalid_row_handler=stop,
            ),
            convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
        )
    except pa.ArrowInvalid as error:
        if not short:
            raise RawDataError(f"{file}: {error}; {_AGAIN}") from error
        raise RawDataError(
            f"{file}: line {short[0].number} has {short[0].actual_columns} values between commas, expected {len(names)}: "
            f"{short[0].text[:80]!r}; mend or remove the line, or download the file again"
        ) from error
    cells = {name: pc.utf8_trim_whitespace(table[name].combine_chunks()) for name in names}
    return RawRows(file, cells, first_line=1 + commented)


_AGAIN = "the file is damaged or cut short: download it again"


def _read_text(file: Path) -> bytes:
    """The file, unpacked, without the blank lines at its end."""
    try:
        with pa.input_stream(str(file)) as stream:
            return stream.read().rstrip()
    except (OSError, pa.ArrowInvalid) as error:
        raise RawDataError(f"{file}: {error}; {_AGAIN}") from error


# ---- columns of the output


@dataclass(frozen=True)
class CensusTable:
    """All rows, those of the training file first, with every column of conf/data."""

    table: pa.Table
    num_train: int  # rows of the training file
    vocabularies: dict[str, list[str]]  # of each `Category`: the value with code k stands at k - 1


def build_table(data: CensusData, files: Sequence[Path], summary: Summary) -> CensusTable:
    """The rows of both files, as `conf/data` describes them.

    Raises:
        RawDataError: a file that cannot be read, or a value that its column cannot hold, named with file and line.
    """
    parts = [read_rows(file, list(data.columns)) for file in files]
    for rows, expected in zip(parts, data.num_rows.values(), strict=True):
        if len(rows) != expected:
            log.warning(
                "%s has %d rows, the official file has %d: was it cut short, or sampled?",
                rows.file,
                len(rows),
                expected,
            )
    categories = {name: column for name, column in data.columns.items() if isinstance(column, Category)}
    vocabularies = {name: vocabulary(name, column, parts) for name, column in categories.items()}
    tables = [encode(data, rows, vocabularies, summary) for rows in parts]
    return CensusTable(pa.concat_tables(tables), len(parts[0]), vocabularies)


def vocabulary(name: str, column: Category, parts: Sequence[RawRows]) -> list[str]:
    """The column's values in both files, sorted, without "?"; `RawDataError` where they are more than in the official files."""
    both = pa.chunked_array([rows.cells[name] for rows in parts])
    counts = {entry["values"].as_py(): entry["counts"].as_py() for entry in pc.value_counts(both)}
    counts.pop(UNKNOWN, None)
    if len(counts) > column.num_values:
        rarest = min(counts, key=lambda value: (counts[value], value))
        rows = next(rows for rows in parts if pc.any(pc.equal(rows.cells[name], rarest)).as_py())
        expected = f"one of {column.num_values} values, but there are {len(counts)}, and this is the rarest"
        rows.check(name, np.asarray(pc.not_equal(rows.cells[name], rarest)), expected=expected)
    return sorted(counts)


def encode(data: CensusData, rows: RawRows, vocabularies: Mapping[str, list[str]], summary: Summary) -> pa.Table:
    """The columns of one file that are written, and its labels."""
    columns: dict[str, np.ndarray] = {}
    for name, column in data.columns.items():
        match column:
            case Category():
                columns[name] = category_codes(rows, name, vocabularies[name], summary)
            case Whole():
                columns[name] = numbers(rows, name, column).astype(np.int64) - column.low
            case Number():
                values = numbers(rows, name, column)
                if column.written:
                    columns[name] = ((values - column.centre) / column.scale).astype(np.float32)
            case Choice():
                check_choices(rows, name, column)
    for name, label in data.labels.items():
        columns[name] = np.asarray(pc.is_in(rows.cells[label.column], pa.array(label.positives))).astype(np.int8)
    return pa.table(columns)


def category_codes(rows: RawRows, name: str, values: Sequence[str], summary: Summary) -> np.ndarray:
    """Codes [N] int64: the cell's place in `values` from 1, or 0 for "?", counted in `summary`."""
    cells = rows.cells[name]
    rows.check(name, np.asarray(pc.not_equal(cells, "")), expected="a value")
    found = pc.index_in(cells, pa.array(values, pa.string()))
    summary.note(rows.file, name, found.null_count, f"'{UNKNOWN}', read as code 0")
    return np.asarray(pc.fill_null(found, -1)).astype(np.int64) + 1


def numbers(rows: RawRows, name: str, column: Whole | Number) -> np.ndarray:
    """The cells [N] as float64, from `column.low` to `column.high`, and whole where they must be."""
    whole = isinstance(column, Whole)
    expected = f"a {'whole ' * whole}number from {column.low:g} to {column.high:g}"
    pattern = r"^[0-9]+$" if whole else r"^[0-9]+(\.[0-9]*)?$"
    rows.check(name, np.asarray(pc.match_substring_regex(rows.cells[name], pattern)), expected=expected)
    values = np.asarray(rows.cells[name].cast(pa.float64()))
    rows.check(name, (values >= column.low) & (values <= column.high), expected=expected)
    return values


def check_choices(rows: RawRows, name: str, column: Choice) -> None:
    """`RawDataError` about the first cell that is none of the column's values."""
    cells = rows.cells[name]
    good = np.asarray(pc.is_in(cells, pa.array(column.values)))
    if not good.all():
        row = int(np.argmin(good))
        rows.refuse(name, row, expected=f"a known value; {nearest(cells[row].as_py(), column.values)}")


def label_correlations(table: pa.Table, labels: Sequence[str]) -> dict[str, float]:
    """Pearson correlation over all rows of each pair of the labels that vary, by "one, other"."""
    columns = {label: table[label].to_numpy() for label in labels}
    varying = {label: values for label, values in columns.items() if values.min() < values.max()}
    return {
        f"{one}, {other}": float(np.corrcoef(varying[one], varying[other])[0, 1])
        for one, other in combinations(varying, 2)
    }

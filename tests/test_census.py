import gzip
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import pearsonr

from rec import census as adapter
from rec.baseline import load_data_config
from rec.census import ADULT, CENSUS, CensusData
from rec.config import CONF, compose
from rec.features import Encoder
from rec.raw import RawDataError, Summary
from rec.schema import FeatureKind

# One row of each published layout: numbers without a blank before them in the one, with one in the other.
CENSUS_ROW = (
    "40, Private,33,29, High school graduate,0, Not in universe, Never married, Retail trade, Sales, White, NA, Female, No,"
    " Not in universe, Full-time schedules,0,0,0, Single, Not in universe, Not in universe, Nonfamily householder,"
    " Householder,1000.25, ?, ?, ?, Not in universe under 1 year old, ?,2, Not in universe, United-States, United-States,"
    " United-States, Native- Born in the United States,0, Not in universe,2,52,95, - 50000."
)
ADULT_ROW = "40, Private, 77516, HS-grad, 9, Never-married, Sales, Unmarried, White, Male, 0, 0, 40, Cuba, <=50K"
# Places in the published rows, from 0
AGE, WORKER, INDUSTRY, EDUCATION, WAGE, MARITAL, GAINS, STATE, WEIGHT, WEEKS, YEAR, INCOME = (
    *(0, 1, 2, 4, 5, 7, 16, 21),
    *(24, 39, 40, 41),
)
CENSUS_DEGREES = {  # of those in use, education_college, education_some_college
    "Children": (0, 0),
    "High school graduate": (0, 0),
    "12th grade no diploma": (0, 0),
    "Some college but no degree": (0, 1),
    "Associates degree-occup /vocational": (0, 1),
    "Associates degree-academic program": (0, 1),
    "Bachelors degree(BA AB BS)": (1, 1),
    "Masters degree(MA MS MEng MEd MSW MBA)": (1, 1),
    "Prof school degree (MD DDS DVM LLB JD)": (1, 1),
    "Doctorate degree(PhD EdD)": (1, 1),
}
ADULT_DEGREES = {9: "HS-grad", 10: "Some-college", 11: "Assoc-voc", 12: "Assoc-acdm", 13: "Bachelors", 14: "Masters"}
ADULT_DEGREES |= {15: "Prof-school", 16: "Doctorate", 1: "Preschool"}
Row = list[str]


def with_values(row: str, values: dict[int, object]) -> Row:
    cells = [cell.strip() for cell in row.split(",")]
    for place, value in values.items():
        cells[place] = str(value)
    return cells


def census_rows(num_rows: int, *, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        values: dict[int, object] = {AGE: rng.integers(91), WEEKS: rng.integers(53), YEAR: rng.choice([94, 95])}
        values |= {WORKER: rng.choice(["Private", "State government", "Never worked", "Without pay"])}
        values |= {INDUSTRY: rng.integers(52), WAGE: rng.choice([0, 725]), GAINS: rng.choice([0, 7688])}
        values |= {EDUCATION: rng.choice(list(CENSUS_DEGREES)), WEIGHT: f"{rng.uniform(38, 18_656):.2f}"}
        values |= {MARITAL: rng.choice(["Never married", "Divorced", "Married-A F spouse present"])}
        values |= {STATE: rng.choice(["Utah", "?", "Abroad", "Iowa"]), INCOME: rng.choice(["- 50000.", "50000+."])}
        rows.append(with_values(CENSUS_ROW, values))
    return rows


def adult_rows(num_rows: int, *, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        number = int(rng.choice(list(ADULT_DEGREES)))
        values: dict[int, object] = {0: rng.integers(17, 91), 3: ADULT_DEGREES[number], 4: number}
        values |= {2: rng.integers(10_000, 99_999), 5: rng.choice(["Never-married", "Widowed"])}
        values |= {6: rng.choice(["Sales", "?", "Tech-support"]), 10: rng.choice([0, 99_999]), 12: rng.integers(1, 100)}
        rows.append(with_values(ADULT_ROW, values | {14: rng.choice(["<=50K", ">50K"])}))
    return rows


def census_text(rows: Iterable[Row]) -> str:
    words = lambda cell: cell if cell.replace(".", "").isdigit() else f" {cell}"  # noqa: E731
    return "".join(",".join(map(words, row)) + "\n" for row in rows)


def write_census(folder: Path, train: list[Row], test: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "census-income.data").write_text(census_text(train))
    (folder / "census-income.test").write_text(census_text(test))
    return folder


def write_adult(folder: Path, train: list[Row], test: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adult.data").write_text("".join(", ".join(row) + "\n" for row in train) + "\n")
    lines = "".join(", ".join(row) + ".\n" for row in test)
    (folder / "adult.test").write_text("|1x3 Cross validator\n" + lines + "\n")
    return folder


def build(data: CensusData, raw: Path, summary: Summary | None = None) -> adapter.CensusTable:
    return adapter.build_table(data, adapter.find_files(data, raw), summary or Summary())


def refusal(data: CensusData, raw: Path) -> str:
    with pytest.raises(RawDataError) as caught:
        build(data, raw)
    return str(caught.value)


def column(rows: list[Row], place: int) -> list[str]:
    return [row[place] for row in rows]


@pytest.fixture(scope="module")
def census() -> tuple[list[Row], list[Row]]:
    return census_rows(80), census_rows(40, seed=1)


@pytest.fixture(scope="module")
def adult() -> tuple[list[Row], list[Row]]:
    return adult_rows(60), adult_rows(30, seed=1)


def written(data: CensusData, folder: Path, rows: tuple[list[Row], list[Row]]) -> Path:
    return (write_census if data is CENSUS else write_adult)(folder, *rows)


def test_census_is_read_as_published(census: tuple[list[Row], list[Row]], tmp_path: Path) -> None:
    built = build(CENSUS, write_census(tmp_path, *census))
    table, rows = built.table.to_pydict(), [*census[0], *census[1]]
    assert built.num_train == len(census[0])
    workers = sorted(set(column(rows, WORKER)))
    assert built.vocabularies["class_of_worker"] == workers
    assert table["class_of_worker"] == [1 + workers.index(worker) for worker in column(rows, WORKER)]
    states = ["Abroad", "Iowa", "Utah"]
    assert table["previous_state"] == [1 + states.index(s) if s != "?" else 0 for s in column(rows, STATE)]
    assert table["detailed_industry"] == [int(industry) for industry in column(rows, INDUSTRY)]
    assert table["year"] == [int(year) - 94 for year in column(rows, YEAR)]
    assert table["wage_per_hour"] == [int(wage) for wage in column(rows, WAGE)]
    assert table["capital_gains"] == [int(gains) for gains in column(rows, GAINS)]
    np.testing.assert_allclose(table["age"], [(int(age) - 40) / 20 for age in column(rows, AGE)], rtol=1e-6)
    np.testing.assert_allclose(table["weeks_worked"], [(int(w) - 25) / 25 for w in column(rows, WEEKS)], rtol=1e-6)
    assert table["income_50k"] == [income == "50000+." for income in column(rows, INCOME)]
    assert table["never_married"] == [status == "Never married" for status in column(rows, MARITAL)]
    degrees = [CENSUS_DEGREES[degree] for degree in column(rows, EDUCATION)]
    assert list(zip(table["education_college"], table["education_some_college"], strict=True)) == degrees


def test_adult_is_read_as_published(adult: tuple[list[Row], list[Row]], tmp_path: Path) -> None:
    built = build(ADULT, write_adult(tmp_path, *adult))
    table, rows = built.table.to_pydict(), [*adult[0], *adult[1]]
    assert built.num_train == len(adult[0])
    assert table["occupation"] == [["?", "Sales", "Tech-support"].index(o) for o in column(rows, 6)]
    assert table["capital_gains"] == [int(gains) for gains in column(rows, 10)]
    np.testing.assert_allclose(table["hours_per_week"], [(int(h) - 40) / 12 for h in column(rows, 12)], rtol=1e-6)
    assert table["income_50k"] == [income == ">50K" for income in column(rows, 14)]
    assert table["never_married"] == [status == "Never-married" for status in column(rows, 5)]
    assert table["education_college"] == [int(number) >= 13 for number in column(rows, 4)]
    assert table["education_some_college"] == [int(number) >= 10 for number in column(rows, 4)]


@pytest.mark.parametrize(
    ("data", "places"), [(CENSUS, {EDUCATION, MARITAL, WEIGHT, INCOME}), (ADULT, {2, 3, 4, 5, 14})]
)
def test_features_do_not_know_labels_and_weights(
    data: CensusData, places: set[int], census: tuple, adult: tuple, tmp_path: Path
) -> None:
    train, test = census if data is CENSUS else adult
    config = load_data_config(CONF / "data" / f"{'census' if data is CENSUS else 'adult'}.yaml")
    columns = sorted({config.column_of(name) for name in config.features})
    assert len(columns) == len(train[0]) - len(places)
    before = build(data, written(data, tmp_path / "a", (train, test))).table
    # each row takes what is left out from the next row, and keeps the rest
    pairs = zip(train, [*train[1:], train[0]], strict=True)
    moved = [[after[i] if i in places else cell for i, cell in enumerate(row)] for row, after in pairs]
    after = build(data, written(data, tmp_path / "b", (moved, test))).table
    assert after.select(columns).equals(before.select(columns))
    assert not after.equals(before)


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [
        (AGE, "old", "'age' holds 'old' in line 7, expected a number from 0 to 130"),
        (AGE, "-1", "'age' holds '-1' in line 7"),
        (AGE, "", "'age' holds '' in line 7"),
        (INDUSTRY, "52", "'detailed_industry' holds '52' in line 7, expected a whole number from 0 to 51"),
        (INDUSTRY, "1.5", "'detailed_industry' holds '1.5' in line 7, expected a whole number"),
        (WAGE, "1e3", "'wage_per_hour' holds '1e3' in line 7"),
        (WORKER, "", "'class_of_worker' holds '' in line 7, expected a value"),
        (WEIGHT, "nan", "'instance_weight' holds 'nan' in line 7"),
        (YEAR, "1994", "'year' holds '1994' in line 7, expected a whole number from 94 to 95"),
        (
            MARITAL,
            "Never maried",
            "'marital_status' holds 'Never maried' in line 7, expected a known value; did you mean 'Never",
        ),
        (EDUCATION, "?", "'education' holds '?' in line 7, expected a known value"),
        (INCOME, "50000", "'income' holds '50000' in line 7, expected a known value; did you mean"),
    ],
)
def test_a_bad_value_is_named(census: tuple, tmp_path: Path, place: int, value: str, says: str) -> None:
    for name, rows in zip(("census-income.data", "census-income.test"), census, strict=True):
        raw = write_census(tmp_path / name, *census)
        bad = [with_values(",".join(row), {place: value}) if i == 6 else row for i, row in enumerate(rows)]
        (raw / name).write_text(census_text(bad))
        message = refusal(CENSUS, raw)
        assert f"{name}: column {says}" in message
        assert "mend or remove the line, or download" in message


def test_lines_are_counted_from_the_comment_on(adult: tuple, tmp_path: Path) -> None:
    train, test = adult
    bad = [with_values(",".join(row), {12: "all"}) if i == 3 else row for i, row in enumerate(test)]
    message = refusal(ADULT, write_adult(tmp_path, train, bad))
    assert "adult.test: column 'hours_per_week' holds 'all' in line 5" in message


@pytest.mark.parametrize(("change", "has"), [(slice(0, 41), 41), (slice(1, 42), 41), (slice(0, 43), 43)])
def test_a_line_of_another_width_is_named(census: tuple, tmp_path: Path, change: slice, has: int) -> None:
    train, test = census
    raw = write_census(tmp_path, [*train[:4], [*train[4], "more"][change], *train[5:]], test)
    assert f"census-income.data: line 5 has {has} values between commas, expected 42: '" in refusal(CENSUS, raw)


def test_an_empty_line_between_rows_is_named(census: tuple, tmp_path: Path) -> None:
    raw = write_census(tmp_path, *census)
    lines = (raw / "census-income.test").read_text().splitlines()
    (raw / "census-income.test").write_text("\n".join([*lines[:8], "", *lines[8:]]))
    assert "census-income.test: column 'age' holds '' in line 9" in refusal(CENSUS, raw)


def test_a_value_too_many_is_named_by_the_rarest(census: tuple, tmp_path: Path) -> None:
    train, test = census
    more = [with_values(",".join(row), {12: f"{'Male' if i else 'Mael'}"}) for i, row in enumerate(test)]
    message = refusal(CENSUS, write_census(tmp_path, train, more))
    assert (
        "census-income.test: column 'sex' holds 'Mael' in line 1, expected one of 2 values, but there are 3" in message
    )


@pytest.mark.parametrize("content", [b"", b"\n\n", b"|a comment\n", b"\xff\xfe" + 41 * b",", 41 * b"\xff," + b"\xff\n"])
def test_files_that_cannot_be_read_are_named(census: tuple, tmp_path: Path, content: bytes) -> None:
    raw = write_census(tmp_path, *census)
    (raw / "census-income.test").write_bytes(content)
    message = refusal(CENSUS, raw)
    assert str(raw / "census-income.test") in message
    assert "download" in message


def test_packed_files_are_read_and_damaged_ones_named(census: tuple, tmp_path: Path) -> None:
    raw = write_census(tmp_path, *census)
    table = build(CENSUS, raw).table
    packed = gzip.compress((raw / "census-income.data").read_bytes())
    (raw / "census-income.data").unlink()
    assert "neither census-income.data nor census-income.data.gz" in refusal(CENSUS, raw)
    (raw / "census-income.data.gz").write_bytes(packed)
    assert build(CENSUS, raw).table.equals(table)
    (raw / "census-income.data.gz").write_bytes(packed[: len(packed) // 2])
    message = refusal(CENSUS, raw)
    assert "census-income.data.gz" in message
    assert "download it again" in message


def test_what_was_unknown_and_what_is_short_is_told(
    census: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = Summary()
    build(CENSUS, write_census(tmp_path, *census), summary)
    unknown = column(census[0], STATE).count("?")
    assert summary.missing["census-income.data: previous_state '?', read as code 0"] == unknown > 0
    assert "census-income.data has 80 rows, the official file has 199523" in caplog.text


def test_correlations_are_pearsons(census: tuple, tmp_path: Path) -> None:
    table = build(CENSUS, write_census(tmp_path, *census)).table
    labels = ["income_50k", "never_married", "education_college"]
    pearson = adapter.label_correlations(table, labels)
    assert len(pearson) == 3
    for pair, value in pearson.items():
        one, other = pair.split(", ")
        assert value == pytest.approx(pearsonr(table[one].to_numpy(), table[other].to_numpy()).statistic, rel=1e-9)
    constant = table.slice(0, 1)  # nothing varies in a single row
    assert adapter.label_correlations(constant, labels) == {}


@pytest.mark.parametrize("data", [CENSUS, ADULT], ids=["census", "adult"])
def test_the_yaml_describes_the_output(data: CensusData, census: tuple, adult: tuple, tmp_path: Path) -> None:
    config = load_data_config(CONF / "data" / f"{'census' if data is CENSUS else 'adult'}.yaml")
    table = build(data, written(data, tmp_path, census if data is CENSUS else adult)).table
    read = {config.column_of(name) for name in config.features} | set(data.labels)
    assert read == set(table.column_names)
    for name, feature in config.features.items():
        column = data.columns[config.column_of(name)]
        if feature.kind is FeatureKind.id:
            assert table.schema.field(config.column_of(name)).type == pa.int64()
            size = column.num_values + 1 if isinstance(column, adapter.Category) else column.high - column.low + 1
            assert config.tables[config.table_of(name)].num_embeddings == size, name
    encoder = Encoder(config)
    encoder.encode(table, where="here")
    assert not encoder.repairs


@pytest.mark.parametrize("data", ["census", "adult"])
@pytest.mark.parametrize(
    ("experiment", "task"), [("census_income", "income"), ("census_education", "education_college")]
)
def test_experiments_fit_both_data_sets(data: str, experiment: str, task: str) -> None:
    config = compose([f"experiment={experiment}", f"data={data}"])
    assert config.data.name == data
    assert list(config.data.tasks) == config.data.learn == [task, "never_married"]
    assert config.trainer.monitor_tasks == [task]
    assert {"education", "marital_status", "instance_weight", "fnlwgt", "education_num"}.isdisjoint(
        config.data.features
    )
    assert (config.model.experts.num_experts, config.model.experts.layer_sizes) == (8, [16])

import json
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rec import prepare
from rec.schema import ConfigError
from tests.test_census import adult_rows, census_rows, write_adult, write_census
from tests.test_kuairand import LOG, Row, log_rows, write_csv, write_raw


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return log_rows()


def run(raw: Path, out: Path, *options: str, dataset: str = "kuairand") -> None:
    prepare.main([dataset, "--raw", str(raw), "--out", str(out), *options])


def ages(out: Path) -> dict[str, list[float]]:
    return {split: pq.read_table(out / split)["age"].to_pylist() for split in ("train", "valid", "test")}


def tree(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_files_are_split_by_day_in_time_order(rows: list[Row], tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", rows)
    run(raw / "data", tmp_path / "out", "--valid-days", "2")
    parts = {name: pq.read_table(tmp_path / "out" / name) for name in ("train", "valid", "test")}
    count = lambda low, high: sum(low <= int(row["date"]) <= high for row in rows)  # noqa: E731
    assert parts["train"].num_rows == count(20220425, 20220428) > 0
    assert parts["valid"].num_rows == count(20220429, 20220430) > 0
    assert parts["test"].num_rows == count(20220501, 20230000) > 0
    for part in parts.values():
        assert (np.diff(part["time_ms"].to_numpy()) >= 0).all()
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("raw", "out")] == []


def test_complete_output_is_reused_and_other_output_kept(
    rows: list[Row], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, out = write_raw(tmp_path / "raw", rows), tmp_path / "out"
    caplog.set_level("INFO")
    run(raw, out)
    assert "user_features_pure.csv: user_active_degree empty or not in the vocabulary, read as code 0" in caplog.text
    file = out / "train" / "part-00000.parquet"
    first, content = file.stat().st_ino, file.read_bytes()
    run(raw, out)
    assert file.stat().st_ino == first
    assert "nothing to do" in caplog.text
    with pytest.raises(SystemExit, match="--overwrite"):
        run(raw, out, "--valid-days", "1")
    assert file.read_bytes() == content
    run(raw, out, "--overwrite")
    assert file.stat().st_ino != first
    assert file.read_bytes() == content
    assert json.loads((out / "prepared.json").read_text())["rows"]["train"] == pq.read_metadata(file).num_rows


def test_days_without_rows_are_named(rows: list[Row], tmp_path: Path) -> None:
    raw = write_raw(tmp_path / "raw", rows)
    with pytest.raises(SystemExit, match=r"no rows from 2023-01-01 .*test.*--test-from"):
        run(raw, tmp_path / "out", "--test-from", "2023-01-01")
    with pytest.raises(SystemExit, match="--valid-days 6 leaves no day"):
        run(raw, tmp_path / "out", "--valid-days", "6")


def test_a_failure_leaves_the_folder_as_it_was(rows: list[Row], tmp_path: Path) -> None:
    raw, out = write_raw(tmp_path / "raw", rows), tmp_path / "out"
    run(raw, out)
    before = tree(out)
    write_csv(raw / "data" / LOG, [*rows[:5], rows[5] | {"tab": 15}, *rows[6:]])
    with pytest.raises(SystemExit, match=rf"error: .*{LOG}: column 'tab' holds '15' in line 7"):
        run(raw, out, "--overwrite")
    with pytest.raises(SystemExit, match="'tab' holds '15'"):
        run(raw, tmp_path / "new")
    assert tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_splits_need_a_day_to_train_on() -> None:
    with pytest.raises(ConfigError, match="expected 0 to 5"):
        prepare.make_splits(date(2022, 4, 25), date(2022, 5, 1), valid_days=-1)


def test_the_real_slice_is_split_as_it_says(kuairand: Path, tmp_path: Path) -> None:
    run(kuairand, tmp_path / "out")
    num_rows = {
        split: pq.read_metadata(tmp_path / "out" / split / "part-00000.parquet").num_rows for split in ("train", "test")
    }
    assert num_rows == {"train": 91_805, "test": 75_127}


def test_the_census_test_file_is_halved_at_random(tmp_path: Path) -> None:
    train, test = census_rows(30), census_rows(61, seed=1)
    for i, row in enumerate(test):
        row[0] = str(i)  # each age once, in rising order
    raw = write_census(tmp_path / "raw", train, test)
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        run(raw, tmp_path / name, "--seed", seed, dataset="census")
    a, b, c = (ages(tmp_path / name) for name in "abc")
    assert a == b
    assert a["valid"] != c["valid"]
    np.testing.assert_allclose(a["train"], [(int(row[0]) - 40) / 20 for row in train], rtol=1e-6)
    assert (len(a["valid"]), len(a["test"])) == (30, 31)
    np.testing.assert_allclose(sorted(a["valid"] + a["test"]), (np.arange(61) - 40) / 20, atol=1e-6)
    assert a["valid"] == sorted(a["valid"]) and a["test"] == sorted(a["test"])
    assert 5 < sum(age < -10 / 20 for age in a["valid"]) < 25  # from all of the file


def test_complete_adult_output_is_reused_and_other_output_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw, out = write_adult(tmp_path / "raw", adult_rows(40), adult_rows(20, seed=1)), tmp_path / "out"
    caplog.set_level("INFO")
    run(raw, out, dataset="adult")
    assert "adult.data: occupation '?', read as code 0" in caplog.text
    assert "Pearson  income_50k, never_married" in caplog.text
    made = json.loads((out / "prepared.json").read_text())
    assert made["rows"] == {"train": 40, "valid": 10, "test": 10}
    assert made["vocabularies"]["occupation"] == ["Sales", "Tech-support"]
    before, first = tree(out), (out / "prepared.json").stat().st_ino
    run(raw, out, dataset="adult")
    assert (out / "prepared.json").stat().st_ino == first
    assert "nothing to do" in caplog.text
    with pytest.raises(SystemExit, match="--overwrite"):
        run(raw, out, "--seed", "1", dataset="adult")
    write_adult(raw, adult_rows(41), [["40", *adult_rows(1)[0]]])
    with pytest.raises(SystemExit, match=r"error: .*adult\.test: line 2 has 16 values"):
        run(raw, out, "--overwrite", dataset="adult")
    assert tree(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_bad_arguments_of_the_census_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--seed is -1, expected 0 or more"):
        run(tmp_path, tmp_path / "out", "--seed", "-1", dataset="census")
    with pytest.raises(SystemExit, match=r"neither census-income\.data nor census-income\.data\.gz; --raw names"):
        run(tmp_path, tmp_path / "out", dataset="census")

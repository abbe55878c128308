import json
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rec import prepare
from rec.schema import ConfigError
from tests.test_kuairand import LOG, Row, log_rows, write_csv, write_raw


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return log_rows()


def run(raw: Path, out: Path, *options: str) -> None:
    prepare.main(["kuairand", "--raw", str(raw), "--out", str(out), *options])


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
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    write_csv(raw / "data" / LOG, [*rows[:5], rows[5] | {"tab": 15}, *rows[6:]])
    with pytest.raises(SystemExit, match=rf"error: .*{LOG}: column 'tab' holds '15' in line 7"):
        run(raw, out, "--overwrite")
    with pytest.raises(SystemExit, match="'tab' holds '15'"):
        run(raw, tmp_path / "new")
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
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

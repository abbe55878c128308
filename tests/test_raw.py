import csv
import math
from pathlib import Path

import numpy as np
import pytest

from rec.raw import RawDataError, Summary, check_values, order_by_id, read_columns

CELLS = [["id", "name", "price", "unread"], ["1", "5", "2.5", "x"], ["0", "", "", "y"], ["2", "b,c", "-3e2", ""]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "some.csv", CELLS)


def write(file: Path, cells: list[list[str]]) -> Path:
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(cells)
    return file


def test_numbers_strings_and_empty_cells(file: Path) -> None:
    found = read_columns(file, {"price": True, "id": False, "name": True}, text=["name"])
    assert list(found) == ["price", "id", "name"]
    np.testing.assert_array_equal(found["price"], [2.5, math.nan, -300])
    np.testing.assert_array_equal(found["id"], [1, 0, 2])
    assert found["name"].tolist() == ["5", "", "b,c"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [("", "a value"), ("ten", "a number"), ("inf", "a finite number"), ("nan", "a finite number")],
)
def test_a_bad_cell_is_named_with_its_line(tmp_path: Path, value: str, expected: str) -> None:
    file = write(tmp_path / "some.csv", [["price", "id"], ["1.5", "1"], ["-2", "2"], [value, "3"]])
    with pytest.raises(
        RawDataError, match=rf"some\.csv: column 'price' holds '{value}' in line 4, expected {expected};"
    ):
        read_columns(file, {"price": False})


def test_missing_damaged_and_empty_files_are_named(file: Path) -> None:
    with pytest.raises(RawDataError, match=r"some\.csv: no column 'prize'; did you mean 'price'.*download"):
        read_columns(file, {"prize": False})
    with pytest.raises(RawDataError, match=r"none\.csv is missing: --raw"):
        read_columns(file.with_name("none.csv"), {"id": False})
    file.write_text("id,name\n1,a\n2\n")
    with pytest.raises(RawDataError, match=r"some\.csv: .*damaged or cut short: download it again"):
        read_columns(file, {"id": False})
    file.write_text("id,name\n")
    with pytest.raises(RawDataError, match=r"some\.csv: no rows; download"):
        read_columns(file, {"id": False})
    file.write_text("")
    with pytest.raises(RawDataError, match=r"some\.csv: .*damaged or cut short"):
        read_columns(file, {"id": False})


def test_ids_are_put_in_their_places() -> None:
    ids = np.array([2.0, 0.0, 1.0])
    np.testing.assert_array_equal(ids[order_by_id(Path("f"), "id", ids)], [0, 1, 2])
    with pytest.raises(RawDataError, match="'id' holds '2' in line 3, expected each id from 0 to 2 once"):
        order_by_id(Path("f"), "id", np.array([0.0, 2.0, 2.0]))
    with pytest.raises(RawDataError, match="'id' holds '3' in line 2"):
        order_by_id(Path("f"), "id", np.array([3.0, 0.0, 1.0]))


@pytest.mark.parametrize("value", [-1.0, 11.0, 1.5, math.nan])
def test_values_out_of_bounds_are_refused(value: float) -> None:
    assert check_values(Path("f"), "x", np.array([0.0, 10.0]), low=0, high=10, expected="0 to 10").dtype == np.int64
    with pytest.raises(RawDataError, match=rf"'x' holds '{value:g}' in line 3, expected 0 to 10"):
        check_values(Path("f"), "x", np.array([0.0, value]), low=0, high=10, expected="0 to 10")


def test_the_summary_adds_up() -> None:
    summary = Summary()
    for count in (2, 0, 3):
        summary.note(Path("a/b.csv"), "tag", count, "empty, read as no tags")
    summary.note(Path("a/b.csv"), "age", 0, "empty")
    assert dict(summary.missing) == {"b.csv: tag empty, read as no tags": 5}

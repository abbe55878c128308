import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec import sample
from rec.data import RowGroup, Split
from rec.sample import Sample, take_sample
from tests.test_bad_input import make_config, make_table, value, write_files


def groups(*sizes: int) -> list[RowGroup]:
    return [RowGroup("f", i, n) for i, n in enumerate(sizes)]


def take(folder: Path) -> Sample:
    data = make_config(folder)
    return take_sample(Split(data, "train"), data)


def test_is_bounded_and_from_all_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MAX_ROWS", 1000)
    assert sample.chosen(groups(100, 0, 900)) == [RowGroup("f", 0, 100), RowGroup("f", 2, 900)]
    found = [group.index for group in sample.chosen(groups(*[100] * 1000))]
    assert len(found) == 10 and found[0] == 0 and found[-1] == 999
    assert len(sample.chosen(groups(5000, 5000))) == 1
    assert len(sample.chosen(groups(*[1] * 900))) == sample.MAX_ROW_GROUPS
    assert sample.chosen(groups(0, 0)) == []


def test_parts_of_a_data_set_read_the_columns_of_the_whole(tmp_path: Path) -> None:
    parts = list(sample.each_alone(make_config(write_files(tmp_path)), truth=False))
    assert {column for part in parts for column in part.columns} == set(make_table().column_names)


def test_of_a_whole_split(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    taken, table = take(folder), pa.concat_tables(pq.read_table(file) for file in sorted((folder / "train").iterdir()))
    assert taken.num_rows == table.num_rows == 60 and taken.share == 1 and not taken.problems and not +taken.nulls
    assert taken.highest == {"user": 59, "item": 29, "tags": 29, "history": 29}
    assert len(np.unique(np.concatenate(taken.ids["query"]))) == 7
    labels = np.concatenate(taken.labels)
    np.testing.assert_array_equal(labels[:, 0], table["click"].to_numpy().astype(np.float32))
    assert np.concatenate(taken.weights).shape == labels.shape


def test_a_part_of_a_split_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_files(tmp_path)
    monkeypatch.setattr(sample, "MAX_ROWS", 20)
    taken = take(folder)
    assert 0 < taken.num_rows < 60 and taken.share == taken.num_rows / 60


def test_every_spoilt_column_is_told_once_and_hides_no_other(tmp_path: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        for name, values in {"price": math.nan, "click": 7, "user": -4}.items():
            for row in (3, 13):  # in two row groups
                table = value(name, values, row=row)(table)
        return table

    taken = take(write_files(tmp_path, spoil))
    assert len(taken.problems) == 3
    for name in ("price", "click", "user"):
        (problem,) = (p for p in taken.problems if f"'{name}'" in p)
        assert "part-1.parquet" in problem and "row group 0" in problem


def test_nulls_are_counted_within_lists_too(tmp_path: Path) -> None:
    def spoil(table: pa.Table) -> pa.Table:
        return value("tags", [1, None, None], row=4)(value("price", None, row=2)(table))

    assert +take(write_files(tmp_path, spoil)).nulls == {"tags": 2, "price": 1}

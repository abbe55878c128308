import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rec.config import compose
from rec.data import Reader
from rec.schema import ConfigError
from rec.select import Condition, main, select
from tests.conftest import CONF, toy_overrides, write_toy

Row = dict[str, Any]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of 180, 0 and 70 rows in each of two splits."""
    return write_toy(tmp_path_factory.mktemp("toy"), [180, 0, 70], row_group_size=40)


def rows_of(folder: Path) -> dict[str, list[Row]]:
    """File -> its rows, in order."""
    return {str(f.relative_to(folder)): pq.read_table(f).to_pylist() for f in sorted(folder.rglob("*.parquet"))}


def chosen(folder: Path, keep: Callable[[Row], bool]) -> dict[str, list[Row]]:
    return {file: [row for row in rows if keep(row)] for file, rows in rows_of(folder).items()}


def tree(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def run(data: Path | str, out: Path, *where: str, options: tuple[str, ...] = ()) -> None:
    main(["--data", str(data), "--out", str(out), *(word for text in where for word in ("--where", text)), *options])


def write(folder: Path, table: pa.Table, split: str = "train", **options: Any) -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / split / "part-0.parquet", **options)
    return folder


CHOICES: dict[str, tuple[list[str], Callable[[Row], bool]]] = {
    "text": (["tab=search"], lambda row: row["tab"] == "search"),
    "texts with spaces": (["query=query 3,query 17"], lambda row: row["query"] in ("query 3", "query 17")),
    "integers": (["item=1,2,3,50,101"], lambda row: row["item"] in (1, 2, 3, 50, 101)),
    "booleans": (["click=true"], lambda row: row["click"]),
    "floats": (["dwell=0"], lambda row: row["dwell"] == 0.0),
    "others": (["tab!=search"], lambda row: row["tab"] != "search"),
    "neither": (["tab!=search", "click!=true"], lambda row: row["tab"] != "search" and not row["click"]),
    "both": (["tab=home,search", "purchase=0"], lambda row: row["purchase"] == 0),
}


class TestRows:
    @pytest.mark.parametrize("name", CHOICES)
    def test_are_those_that_a_loop_chooses(self, toy: Path, tmp_path: Path, name: str) -> None:
        where, keep = CHOICES[name]
        run(toy, tmp_path / "out", *where)
        expected = chosen(toy, keep)
        assert rows_of(tmp_path / "out") == expected
        counts = json.loads((tmp_path / "out" / "selected.json").read_text())["rows"]
        for split in ("train", "valid"):
            kept = sum(len(rows) for file, rows in expected.items() if file.startswith(split))
            assert counts[split] == {"rows": kept, "of": 250}
            assert 0 < kept < 250

    @pytest.mark.parametrize("size", [7, 40, 1000])
    def test_row_groups_are_as_large_as_before(self, tmp_path: Path, size: int) -> None:
        toy = write_toy(tmp_path / "toy", [180, 0, 70], row_group_size=size)
        run(toy, tmp_path / "out", "tab=home")
        assert rows_of(tmp_path / "out") == chosen(toy, lambda row: row["tab"] == "home")
        for file in (tmp_path / "out").rglob("*.parquet"):
            metadata = pq.read_metadata(file)
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            assert all(rows == min(size, 180) for rows in groups[:-1])
            assert pq.read_schema(file).equals(pq.read_schema(toy / file.relative_to(tmp_path / "out")))

    def test_a_null_equals_nothing(self, tmp_path: Path) -> None:
        data = write(tmp_path / "data", pa.table({"a": [None, 1, 2, None, 1], "b": ["x", None, "", "x", "y"]}))
        for text, expected in {"a=1": [1, 4], "a!=1": [0, 2, 3], "b=": [2], "b!=x,y": [1, 2]}.items():
            run(data, tmp_path / text, text)
            table = pq.read_table(data / "train").to_pylist()
            assert rows_of(tmp_path / text)["train/part-0.parquet"] == [table[i] for i in expected], text

    def test_a_column_of_nothing_but_nulls(self, tmp_path: Path) -> None:
        """As writers make it of a part without a value: it has no type."""
        data = write(tmp_path / "data", pa.table({"a": ["x", "y"]}), "train/1")
        write(data, pa.table({"a": pa.nulls(2)}), "train/2")
        for text, expected in {"a=x": [["x"], []], "a!=x": [["y"], [None, None]]}.items():
            run(data, tmp_path / text, text)
            assert [[row["a"] for row in rows] for rows in rows_of(tmp_path / text).values()] == expected

    def test_text_written_as_a_dictionary(self, tmp_path: Path) -> None:
        """Each row group with another dictionary, which the copy's rows straddle."""
        words = [f"word {i // 3 % 7}" for i in range(60)]
        table = pa.table({"word": pa.array(words).dictionary_encode(), "row": range(60)})
        data = write(tmp_path / "data", table, row_group_size=10)
        run(data, tmp_path / "out", "word!=word 3,word 5")
        assert rows_of(tmp_path / "out") == chosen(data, lambda row: row["word"] not in ("word 3", "word 5"))
        assert pa.types.is_dictionary(pq.read_schema(tmp_path / "out" / "train" / "part-0.parquet").field("word").type)

    def test_folders_within_splits_and_what_is_beside_them(self, tmp_path: Path) -> None:
        data = write(tmp_path / "data", pa.table({"a": [1, 2]}), "train/day=1")
        write(data, pa.table({"a": [2, 2]}), "train/day=2")
        write(data, pa.table({"a": [1]}), "_temporary")
        pq.write_table(pa.table({"a": [1, 1, 2]}), data / "test.parquet")
        run(data, tmp_path / "out", "a=1")
        assert rows_of(tmp_path / "out") == {
            "test.parquet": [{"a": 1}, {"a": 1}],
            "train/day=1/part-0.parquet": [{"a": 1}],
            "train/day=2/part-0.parquet": [],
        }

    def test_a_data_set_behind_a_uri_is_read_and_trained_on(self, toy: Path, tmp_path: Path) -> None:
        run(toy.as_uri(), tmp_path / "out", "tab=home")
        config = compose(toy_overrides(tmp_path / "out"), config_dir=str(CONF))
        reader = Reader(config.data, config.reader, split="train", training=False)
        expected = chosen(toy, lambda row: row["tab"] == "home")
        assert reader.num_rows == sum(len(rows) for file, rows in expected.items() if file.startswith("train"))
        assert {domain for batch in reader.batches() for domain in batch.domain_id[batch.row_id >= 0].tolist()} == {0}


@pytest.mark.parametrize(
    "condition",
    [
        Condition("a", ("1", "b c")),
        Condition("a", ("1,2",)),
        Condition("a", ("x=",), True),
        Condition("a", ('"q"', "")),
    ],
)
def test_a_condition_is_read_as_it_is_written(condition: Condition) -> None:
    assert Condition.parse(str(condition)) == condition


class TestOut:
    def test_is_left_alone_where_it_is_the_same(
        self, toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "out"
        run(toy, out, "tab=home")
        file = out / "train" / "part-0.parquet"
        first = file.stat().st_ino
        run(toy, out, "tab=home")
        assert file.stat().st_ino == first and "nothing to do" in capsys.readouterr().out
        with pytest.raises(SystemExit, match=r"error: --out .*out exists and holds something else: add --overwrite"):
            run(toy, out, "tab=search")
        assert file.stat().st_ino == first
        run(toy, out, "tab=search", options=("--overwrite",))
        assert rows_of(out) == chosen(toy, lambda row: row["tab"] == "search")

    def test_is_made_anew_where_the_data_changed(self, tmp_path: Path) -> None:
        data = write(tmp_path / "data", pa.table({"a": [1, 2]}))
        run(data, tmp_path / "out", "a=1")
        write(data, pa.table({"a": [1, 1, 1]}))
        with pytest.raises(SystemExit, match="something else"):
            run(data, tmp_path / "out", "a=1")

    def test_of_another_kind_is_kept(self, toy: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "selected.json").write_text("mine")
        before = tree(tmp_path / "out")
        with pytest.raises(SystemExit, match="something else"):
            run(toy, tmp_path / "out", "tab=home")
        assert tree(tmp_path / "out") == before

    @pytest.mark.parametrize("place", [".", "..", "train/more"])
    def test_must_not_be_the_data_nor_hold_it_nor_lie_in_it(self, tmp_path: Path, place: str) -> None:
        data = write_toy(tmp_path / "toy", [50])
        before = tree(tmp_path)
        for path in (data, data.as_uri()):
            with pytest.raises(SystemExit, match=r"error: --out .* and --data .*toy are not apart"):
                run(path, data / place, "tab=home", options=("--overwrite",))
        assert tree(tmp_path) == before

    def test_is_as_it_was_where_a_file_is_damaged(self, tmp_path: Path) -> None:
        data, out = write_toy(tmp_path / "toy", [180]), tmp_path / "out"
        run(data, out, "tab=home")
        before, file = tree(out), data / "valid" / "part-0.parquet"
        content = bytearray(file.read_bytes())
        content[100:2000] = bytes(1900)
        file.write_bytes(content)
        with pytest.raises(SystemExit, match=r"error: valid/part-0.parquet, row group 0: cannot be decoded"):
            run(data, out, "tab=home", options=("--overwrite",))
        os.truncate(file, 50)
        with pytest.raises(SystemExit, match=r"error: valid/part-0.parquet: not a readable Parquet file"):
            run(data, out, "tab=home", options=("--overwrite",))
        assert tree(out) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "toy"]


REFUSED = {
    "tabb=home": r"--where tabb=home: train/part-0.parquet has no column 'tabb'; did you mean 'tab'\?",
    "item=12x": r"--where item=12x: column 'item' is int32 in .*'12x'",
    "item=": r'--where item="": column .item. is int32',
    "click=maybe": r".*column 'click' is bool.*maybe",
    "tags=3": r".*column 'tags' is list<.*expected one value a row",
    "tab": r"--where 'tab' is no condition; write COLUMN=VALUE",
    "=home": r"--where '=home' is no condition",
    "row=0": r"none of the 250 rows of 'valid' is left by --where row=0; choose other values",
}


class TestRefused:
    @pytest.mark.parametrize("text", REFUSED)
    def test_condition(self, toy: Path, tmp_path: Path, text: str) -> None:
        with pytest.raises(SystemExit, match=f"error: {REFUSED[text]}"):
            run(toy, tmp_path / "out", text)
        assert not list(tmp_path.iterdir())

    def test_column_that_only_one_file_lacks(self, tmp_path: Path) -> None:
        data = write(tmp_path / "data", pa.table({"a": [1], "b": [1]}))
        write(data, pa.table({"b": [1]}), "valid")
        with pytest.raises(SystemExit, match="valid/part-0.parquet has no column 'a'"):
            run(data, tmp_path / "out", "a=1")

    def test_data(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for data, said in {
            tmp_path / "absent": "--data .*absent is no folder",
            tmp_path / "empty": "--data .*empty has no Parquet files",
            "nosuch://a/b": "--data is nosuch://a/b, which Arrow cannot open",
        }.items():
            with pytest.raises(SystemExit, match=f"error: {said}"):
                run(data, tmp_path / "out", "a=1")


def test_values_that_no_row_holds_are_named(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    selection = select(
        str(toy), tmp_path / "out", [Condition("tab", ("home", "serch")), Condition("item", ("-1",), True)]
    )
    assert selection and selection.unmet == ["tab=home,serch: no row holds 'serch'", "item!=-1: no row holds '-1'"]
    total = sum(len(rows) for rows in chosen(toy, lambda row: row["tab"] == "home").values())
    assert selection.met["tab=home,serch"]["home"] == sum(kept.rows for kept in selection.splits.values()) == total
    run(toy, tmp_path / "out", "tab=home,serch", options=("--overwrite",))
    said = capsys.readouterr()
    assert "warning: tab=home,serch: no row holds 'serch'" in said.err
    assert [line.split()[:4] for line in said.out.splitlines()] == [
        [split, str(kept.rows), "of", "250"] for split, kept in selection.splits.items()
    ]


def test_from_python_errors_are_config_errors(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no column"):
        select(str(toy), tmp_path / "out", [Condition("tabb", ("home",))])

"""A Parquet data set becomes a copy of it with only some of its rows.

    python -m rec.select --data DIR --out DIR --where placement=0,1 --where "source!=cache"

For rows that must not be trained on, such as impressions that were answered from a cache and never seen, and for a model of one
placement alone. Folders, files, columns and the order of rows stay as they are; `selected.json` says what was asked for, and
how many rows of each split are left. Files are read row group by row group.
"""

import argparse
import csv
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs
from tqdm import tqdm

from rec.columns import LISTS, DataError, decoded, is_any, one_chunk, plain_type
from rec.data import _files, _open
from rec.prepare import whole_folder
from rec.schema import ConfigError, nearest

RECORD = "selected.json"


@dataclass(frozen=True)
class Condition:
    """Rows whose `column` holds one of `values`, or with `negated` all others.

    A null equals nothing, so it is among the others.
    """

    column: str
    values: tuple[str, ...]  # as written; read as the column's type
    negated: bool = False

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """What `--where` was given; values with commas or quotes are written as in CSV.

        >>> Condition.parse('query!=red,"round, blue"')
        Condition(column='query', values=('red', 'round, blue'), negated=True)

        Raises:
            ConfigError: it is neither COLUMN=VALUE nor COLUMN!=VALUE.
        """
        parts = re.fullmatch(r"(.+?)(!?=)(.*)", text)
        if not parts:
            raise ConfigError(f"--where {text!r} is no condition; write COLUMN=VALUE,VALUE or COLUMN!=VALUE")
        column, sign, values = parts.groups()
        return cls(column, tuple(next(csv.reader([values])) or [""]), negated=sign == "!=")

    def __str__(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow(self.values)
        return f"{self.column}{'!=' if self.negated else '='}{text.getvalue()}"

    def typed(self, schema: pa.Schema, where: str) -> pa.Array:
        """The values as the column's type; nulls for a column that has nothing else.

        Raises:
            ConfigError: no such column, or values that its type cannot hold.
        """
        if self.column not in schema.names:
            raise ConfigError(
                f"--where {self}: {where} has no column '{self.column}'; {nearest(self.column, schema.names)}"
            )
        kind = plain_type(schema.field(self.column).type)
        if is_any(kind, LISTS) or pa.types.is_nested(kind):
            raise ConfigError(f"--where {self}: column '{self.column}' is {kind} in {where}; expected one value a row")
        if pa.types.is_null(kind):
            return pa.nulls(len(self.values))
        try:
            return pa.array(self.values, pa.string()).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"--where {self}: column '{self.column}' is {kind} in {where}, and not all values are ({error})"
            ) from error


@dataclass
class Kept:
    """Rows of one split."""

    rows: int = 0  # that the copy has
    of: int = 0  # that the data set has


@dataclass
class Selection:
    """What was selected.

    Attributes:
        splits: rows of each folder or file that lies directly in the data set's folder.
        met: condition, as written -> rows that held each of its values, also rows that another condition left out.
    """

    splits: dict[str, Kept] = field(default_factory=dict)
    met: dict[str, Counter] = field(default_factory=dict)

    @property
    def unmet(self) -> list[str]:
        """Conditions' values that no row holds, in words."""
        return [
            f"{where}: no row holds '{v}'" for where, met in self.met.items() for v, rows in met.items() if not rows
        ]


class Source:
    """The Parquet files of a data set.

    Args:
        path: folder, or URI of one that Arrow's filesystems can open.

    Raises:
        ConfigError: no such folder, or no Parquet files in it.
    """

    def __init__(self, path: str) -> None:
        self.path = path if "://" in path else str(Path(path).resolve())
        try:
            self.filesystem, root = _open(self.path)
        except ConfigError as error:  # is of a run's setting
            raise ConfigError(str(error).replace("data.path", "--data")) from error
        self.root = root.rstrip("/")
        if self.filesystem.get_file_info(self.root).type != fs.FileType.Directory:
            raise ConfigError(f"--data {path} is no folder; expected that of a data set")
        self.files = [file[len(self.root) + 1 :] for file in _files(self.filesystem, self.root, "*.parquet")]
        if not self.files:
            raise ConfigError(f"--data {path} has no Parquet files; expected the folder above those of the splits")

    def open(self, file: str) -> pq.ParquetFile:
        """One of `files`."""
        try:
            return pq.ParquetFile(f"{self.root}/{file}", filesystem=self.filesystem)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file ({error}); write it again or remove it") from error

    def stamp(self) -> dict[str, list[int | None]]:
        """File -> its size and time of change, by which another state of the data set is told apart."""
        infos = self.filesystem.get_file_info([f"{self.root}/{file}" for file in self.files])
        return {file: [info.size, info.mtime_ns] for file, info in zip(self.files, infos, strict=True)}

    def check_apart(self, out: Path) -> None:
        """Refuse an `out` that is, holds or lies in the data set's folder: it would be replaced, or read as part of it."""
        root = Path(self.root).resolve()
        local = isinstance(self.filesystem, fs.LocalFileSystem)
        if local and (out.is_relative_to(root) or root.is_relative_to(out)):
            raise ConfigError(
                f"--out {out} and --data {root} are not apart; choose a folder beside that of the data set"
            )


def select(path: str, out: Path, conditions: Sequence[Condition], *, overwrite: bool = False) -> Selection | None:
    """Write the rows of a data set that meet all `conditions` to the folder `out`, which is whole or not there.

    Args:
        path: folder of the data set, or a URI that Arrow's filesystems can open.
        out: folder to write.
        conditions: one or more.
        overwrite: replace what `out` holds.

    Returns:
        What was selected; None if `out` holds it already.

    Raises:
        ConfigError: conditions that do not fit the columns, a split without rows left, an `out` that must not be replaced.
        DataError: a file that cannot be read.
    """
    source, out = Source(path), out.resolve()
    source.check_apart(out)
    stamp = {"data": source.path, "where": [str(condition) for condition in conditions], "files": source.stamp()}
    if not overwrite and _is_done(out, stamp):
        return None
    for file in source.files:
        for condition in conditions:
            condition.typed(source.open(file).schema_arrow, file)
    with whole_folder(out) as folder:
        selection = _write(source, folder, conditions)
        rows = {split: vars(kept) for split, kept in selection.splits.items()}
        (folder / RECORD).write_text(json.dumps({"made_from": stamp, "rows": rows}, indent=2))
    return selection


def _is_done(out: Path, stamp: dict[str, Any]) -> bool:
    """Whether `out` holds what `stamp` describes; ConfigError where it holds something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / RECORD).read_text())["made_from"]
    except (OSError, ValueError, KeyError, TypeError):
        found = None  # no record of a selection
    if found == stamp:
        return True
    raise ConfigError(f"--out {out} exists and holds something else: add --overwrite, or choose another")


def _write(source: Source, folder: Path, conditions: Sequence[Condition]) -> Selection:
    selection = Selection(met={str(c): Counter(dict.fromkeys(c.values, 0)) for c in conditions})
    for name in tqdm(source.files, unit=" files", desc="select", disable=None):
        kept = selection.splits.setdefault(name.split("/")[0], Kept())
        file, target = source.open(name), folder / name
        kept.of += file.metadata.num_rows
        target.parent.mkdir(parents=True, exist_ok=True)
        groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        with pq.ParquetWriter(target, file.schema_arrow, compression="zstd", write_page_checksum=True) as writer:
            for table in _regroup(_rows_of(file, name, conditions, selection), max(groups, default=1)):
                writer.write_table(table)
                kept.rows += table.num_rows
    for split, kept in selection.splits.items():
        if not kept.rows:
            asked = " ".join(f"--where {condition}" for condition in conditions)
            raise ConfigError(f"none of the {kept.of} rows of '{split}' is left by {asked}; choose other values")
    return selection


def _rows_of(
    file: pq.ParquetFile, name: str, conditions: Sequence[Condition], selection: Selection
) -> Iterator[pa.Table]:
    """The rows of every row group that meet all conditions; groups without any are decoded no further than these ask."""
    columns = sorted({condition.column for condition in conditions})
    for i in range(file.num_row_groups):
        try:
            table = file.read_row_group(i, columns=columns)
            masks = [_meets(condition, table, selection.met[str(condition)]) for condition in conditions]
            mask = np.logical_and.reduce(masks)
            if mask.any():
                yield file.read_row_group(i).filter(pa.array(mask))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{name}, row group {i}: cannot be decoded ({error}); the file is damaged, write it again"
            ) from error


def _meets(condition: Condition, table: pa.Table, met: Counter) -> np.ndarray:
    """Rows [n] bool that meet a condition; `met` counts the rows of each value."""
    values = condition.typed(table.schema, "the row group")
    found = pc.index_in(decoded(one_chunk(table[condition.column])), values, skip_nulls=True)  # null: none of them
    for position in pc.value_counts(found.drop_null()):
        met[condition.values[position["values"].as_py()]] += position["counts"].as_py()
    return np.asarray(found.is_null() if condition.negated else found.is_valid())


def _regroup(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one smaller; none of `tables` has more."""
    rest: pa.Table | None = None
    for table in tables:
        rest = table if rest is None else pa.concat_tables([rest, table])
        if rest.num_rows >= size:
            yield rest.slice(0, size)
            rest = rest.slice(size)
    if rest is not None and rest.num_rows:
        yield rest


# ---- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    own = argparse.ArgumentParser(
        prog="python -m rec.select",
        description="Copy a Parquet data set with only the rows that meet every --where; a null equals nothing.",
        epilog="example: python -m rec.select --data data/market --out data/search --where placement=0,1",
    )
    own.add_argument(
        "--data", required=True, metavar="DIR", help="folder of the data set, or a URI such as s3://bucket/folder"
    )
    own.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; whole or not there")
    own.add_argument(
        "--where",
        action="append",
        required=True,
        metavar="COLUMN=VALUE,VALUE",
        help="rows whose column holds one of the values, with != those that hold none of them; may be given several times",
    )
    own.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return own


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    try:
        conditions = [Condition.parse(text) for text in args.where]
        selection = select(args.data, args.out, conditions, overwrite=args.overwrite)
    except (ConfigError, DataError) as error:
        raise SystemExit(f"error: {error}") from error
    if selection is None:
        print(f"{args.out} holds these rows already: nothing to do (--overwrite selects them anew)")
        return
    for split, kept in selection.splits.items():
        print(f"{split:16} {kept.rows:11,} of {kept.of:11,} rows  {args.out / split}")
    for words in selection.unmet:
        print(f"warning: {words}", file=sys.stderr)


if __name__ == "__main__":
    main()

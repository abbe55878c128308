"""A public data set's raw files become Parquet: command line, splits, writing, reuse.

`python -m rec.prepare kuairand --raw DIR --out DIR` writes what `rec.kuairand` reads from the official files of
KuaiRand-Pure; `census` and `adult` write what `rec.census` reads. The output is whole or not there, and is left alone when
it was made from the same files and arguments. A further data set is a `Recipe` and a parser of its arguments.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec import census, kuairand
from rec.raw import RawDataError, Summary
from rec.schema import ConfigError

log = logging.getLogger(__name__)

ROW_GROUP = 16_384  # rows


# ---- splits


@dataclass(frozen=True)
class Days:
    """First and last day of one split, both included, as the data set's `date` column counts them."""

    name: str
    first: date
    last: date

    def mask(self, days: np.ndarray) -> np.ndarray:
        """Rows [N] bool whose day (yyyymmdd) is in the split."""
        return (days >= _number(self.first)) & (days <= _number(self.last))


def _number(day: date) -> int:
    return day.year * 10_000 + day.month * 100 + day.day


def make_splits(train_from: date, test_from: date, *, valid_days: int) -> list[Days]:
    """Train until the day before `test_from`, of which `valid_days` are cut off as valid, and test from then on.

    >>> [f"{s.name} {s.first:%m-%d} {s.last:%m-%d}" for s in make_splits(date(2022, 4, 25), date(2022, 5, 1), valid_days=1)[:2]]
    ['train 04-25 04-29', 'valid 04-30 04-30']
    """
    one = timedelta(days=1)
    valid_from = test_from - valid_days * one
    if valid_days < 0 or valid_from <= train_from:
        raise ConfigError(
            f"--valid-days {valid_days} leaves no day to train on between --train-from {train_from} and --test-from "
            f"{test_from}; expected 0 to {max((test_from - train_from).days - 1, 0)}"
        )
    valid = [Days("valid", valid_from, test_from - one)] if valid_days else []
    return [Days("train", train_from, valid_from - one), *valid, Days("test", test_from, date.max)]


def split_by_day(table: pa.Table, splits: Sequence[Days]) -> Iterator[tuple[str, pa.Table]]:
    """Name and rows of each split, without `date`; `RawDataError` where one has no rows."""
    days = table["date"].to_numpy()
    for split in splits:
        rows = table.filter(pa.array(split.mask(days))).drop_columns(["date"])
        if not rows.num_rows:
            raise RawDataError(
                f"no rows from {split.first} to {split.last} for split '{split.name}': the log has {days.min()} to "
                f"{days.max()}; choose other days with --train-from and --test-from"
            )
        yield split.name, rows


def halve_test(table: pa.Table, num_train: int, *, seed: int) -> dict[str, pa.Table]:
    """The first `num_train` rows to train on; of the others, a random half for valid, the rest for test, in their order.

    >>> table = pa.table({"row": range(9)})
    >>> {name: rows["row"].to_pylist() for name, rows in halve_test(table, 4, seed=0).items()}
    {'train': [0, 1, 2, 3], 'valid': [7, 8], 'test': [4, 5, 6]}
    """
    num_others = table.num_rows - num_train
    in_valid = np.random.default_rng(seed).permutation(num_others) < num_others // 2
    others = table.slice(num_train)
    return {
        "train": table.slice(0, num_train),
        "valid": others.filter(pa.array(in_valid)),
        "test": others.filter(pa.array(~in_valid)),
    }


# ---- writing


def write_split(rows: pa.Table, folder: Path) -> None:
    """Write `folder`/part-00000.parquet."""
    folder.mkdir()
    path = folder / "part-00000.parquet"
    pq.write_table(rows, path, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well, and is removed when it does not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as holder:
        fresh = Path(holder) / "new"
        fresh.mkdir()
        yield fresh
        old = Path(holder) / "old"
        if out.exists():
            os.replace(out, old)
        try:
            os.replace(fresh, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise


@dataclass(frozen=True)
class Prepared:
    """What a data set's raw files become."""

    splits: Iterable[tuple[str, pa.Table]]  # name and rows of each; may be made one at a time
    notes: dict[str, object] = field(default_factory=dict)  # what prepared.json says besides; JSON


@dataclass(frozen=True)
class Recipe:
    """One data set with the arguments of one command line."""

    version: int  # of the columns: a change makes earlier output stale
    files: Sequence[Path]  # raw files that are read
    arguments: dict[str, object]  # what the output depends on besides; JSON
    make: Callable[[Summary], Prepared]

    def fingerprint(self) -> dict[str, object]:
        """What the output depends on: version of the columns, arguments, raw files by name, size and time of change."""
        files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in self.files if file.is_file()}
        return {"version": self.version, "files": files, **self.arguments}


def prepare(recipe: Recipe, out: Path, *, overwrite: bool) -> Summary | None:
    """Write every split of a data set to `out`; None where they are there already.

    Raises:
        RawDataError: raw files that cannot be read; `out` is then as it was.
        ConfigError: `out` holds something else and `overwrite` is False.
    """
    out = out.resolve()
    stamp, record = recipe.fingerprint(), out / "prepared.json"
    same = record.is_file() and json.loads(record.read_text())["made_from"] == stamp
    if same and not overwrite:
        return None
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(
            f"--out {out} holds files made from other arguments or raw files: add --overwrite, or choose another"
        )
    summary = Summary()
    with whole_folder(out) as folder:
        prepared = recipe.make(summary)
        for split, rows in prepared.splits:
            write_split(rows, folder / split)
            summary.rows[split] = rows.num_rows
        made = {"made_from": stamp, "rows": summary.rows, "missing": summary.missing, **prepared.notes}
        (folder / record.name).write_text(json.dumps(made, indent=2))
    return summary


# ---- recipes


def kuairand_recipe(args: argparse.Namespace) -> Recipe:
    """KuaiRand-Pure, split by day."""
    days = make_splits(args.train_from, args.test_from, valid_days=args.valid_days)
    files = kuairand.find_files(args.raw, random_log=args.random_log)
    return Recipe(
        version=kuairand.VERSION,
        files=files.all,
        arguments={"splits": [{k: str(v) for k, v in asdict(split).items()} for split in days]},
        make=lambda summary: Prepared(split_by_day(kuairand.build_table(files, summary), days)),
    )


def census_recipe(data: census.CensusData, args: argparse.Namespace) -> Recipe:
    """Census-Income or Adult, the official test file split in two at random."""
    if args.seed < 0:
        raise ConfigError(f"--seed is {args.seed}, expected 0 or more")
    files = census.find_files(data, args.raw)

    def make(summary: Summary) -> Prepared:
        built = census.build_table(data, files, summary)
        pearson = census.label_correlations(built.table, list(data.labels))
        for pair, value in pearson.items():
            log.info("%17.4f Pearson  %s", value, pair)
        splits = halve_test(built.table, built.num_train, seed=args.seed)
        return Prepared(splits.items(), {"vocabularies": built.vocabularies, "pearson": pearson})

    return Recipe(version=census.VERSION, files=files, arguments={"seed": args.seed}, make=make)


# ---- command line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="python -m rec.prepare", description="Turn a public data set's raw files into Parquet impressions."
    )
    datasets = main_parser.add_subparsers(dest="dataset", required=True, metavar="DATASET")
    _add_kuairand(datasets)
    _add_census(
        datasets, "census", census.CENSUS, help="Census-Income (KDD): income, marriage, education of 299,285 people"
    )
    _add_census(datasets, "adult", census.ADULT, help="Adult, the small sibling of census: 48,842 people")
    return main_parser


def _add(datasets: Any, name: str, *, raw: str, **words: str) -> argparse.ArgumentParser:
    """A data set's own parser, with the arguments that all have."""
    own: argparse.ArgumentParser = datasets.add_parser(
        name, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **words
    )
    own.add_argument("--raw", type=Path, required=True, help=raw)
    own.add_argument("--out", type=Path, required=True, help="folder to write; whole or not there")
    own.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return own


def _add_kuairand(datasets: Any) -> None:
    own = _add(
        datasets,
        "kuairand",
        help="KuaiRand-Pure: short videos of Kuaishou, 15 tabs, clicks, long views, likes and rarer labels",
        description="Reads log_standard_*_pure.csv, user_features_pure.csv and video_features_basic_pure.csv of "
        "KuaiRand-Pure (kuairand.com, CC BY-SA 4.0) and writes train/ and test/, described by conf/data/kuairand.yaml. "
        "Histories and counters know only rows of a strictly earlier time_ms. video_features_statistic_pure.csv is not "
        "read: it sums up the whole period, so it leaks.",
        epilog="example: python -m rec.prepare kuairand --raw KuaiRand-Pure --out data/kuairand",
        raw="the unpacked download, or its folder data/",
    )
    days = {
        "--train-from": (date(2022, 4, 25), "first day of train; earlier days only feed histories and counters"),
        "--test-from": (date(2022, 5, 1), "first day of test; train ends the day before"),
    }
    for name, (default, words) in days.items():
        own.add_argument(name, type=date.fromisoformat, metavar="YYYY-MM-DD", default=default, help=words)
    own.add_argument(
        "--valid-days", type=int, default=0, help="last days of train to write as valid/ instead, for tuning"
    )
    own.add_argument("--random-log", action="store_true", help="read log_random_*_pure.csv too (randomly shown videos)")
    own.set_defaults(recipe=kuairand_recipe)


def _add_census(datasets: Any, name: str, data: census.CensusData, *, help: str) -> None:
    train, test = data.num_rows
    own = _add(
        datasets,
        name,
        help=help,
        description=f"Reads {train} and {test} of {data.title} ({data.page}), packed (.gz) or not, and writes train/, "
        f"valid/ and test/, described by conf/data/{name}.yaml: valid/ and test/ are random halves of {test}. "
        "Education, marital status and the weights of rows become no features.",
        epilog=f"example: python -m rec.prepare {name} --raw DOWNLOAD --out data/{name}",
        raw="the folder with the unpacked download",
    )
    own.add_argument("--seed", type=int, default=0, help="of the random halves, 0 or more")
    own.set_defaults(recipe=partial(census_recipe, data))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser().parse_args(argv)
    try:
        summary = prepare(args.recipe(args), args.out, overwrite=args.overwrite)
    except (RawDataError, ConfigError) as error:
        raise SystemExit(f"error: {error}") from error
    if summary is None:
        log.info(
            "%s is complete and made from the same files and arguments: nothing to do (--overwrite makes it anew)",
            args.out,
        )
        return
    for name, rows in summary.rows.items():
        log.info("%-8s %9d rows  %s", name, rows, args.out / name)
    for what, cells in sorted(summary.missing.items()):
        log.info("%17d cells  %s", cells, what)


if __name__ == "__main__":
    main()

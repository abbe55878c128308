"""A public data set's raw files become Parquet impressions: command line, splits by day, writing, reuse.

`python -m rec.prepare kuairand --raw DIR --out DIR` writes what `rec.kuairand` reads from the official files of
KuaiRand-Pure. The output is whole or not there, and is left alone when it was made from the same files and arguments.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec import kuairand
from rec.raw import RawDataError, Summary
from rec.schema import ConfigError

log = logging.getLogger(__name__)

ROW_GROUP = 16_384  # rows


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


def write_splits(table: pa.Table, splits: Sequence[Days], folder: Path, summary: Summary) -> None:
    """Write `folder`/<split>/part-00000.parquet; `RawDataError` where a split has no rows."""
    days = table["date"].to_numpy()
    for split in splits:
        rows = table.filter(pa.array(split.mask(days))).drop_columns(["date"])
        if not rows.num_rows:
            raise RawDataError(
                f"no rows from {split.first} to {split.last} for split '{split.name}': the log has {days.min()} to "
                f"{days.max()}; choose other days with --train-from and --test-from"
            )
        (folder / split.name).mkdir()
        pq.write_table(rows, folder / split.name / "part-00000.parquet", row_group_size=ROW_GROUP, compression="zstd")
        summary.rows[split.name] = rows.num_rows


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


def fingerprint(raw: kuairand.RawFiles, splits: Sequence[Days]) -> dict[str, object]:
    """What the output depends on: arguments, raw files by name, size and time of change, version of the columns."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in raw.all if file.is_file()}
    return {
        "version": kuairand.VERSION,
        "files": files,
        "splits": [{k: str(v) for k, v in asdict(s).items()} for s in splits],
    }


def prepare_kuairand(
    raw: Path, out: Path, *, splits: Sequence[Days], random_log: bool, overwrite: bool
) -> Summary | None:
    """Write the splits of KuaiRand-Pure to `out`; None where they are there already.

    Raises:
        RawDataError: raw files that cannot be read; `out` is then as it was.
        ConfigError: `out` holds something else and `overwrite` is False.
    """
    out = out.resolve()
    files = kuairand.find_files(raw, random_log=random_log)
    stamp, record = fingerprint(files, splits), out / "prepared.json"
    same = record.is_file() and json.loads(record.read_text())["made_from"] == stamp
    if same and not overwrite:
        return None
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(
            f"--out {out} holds files made from other arguments or raw files: add --overwrite, or choose another"
        )
    summary = Summary()
    with whole_folder(out) as folder:
        write_splits(kuairand.build_table(files, summary), splits, folder, summary)
        made = {"made_from": stamp, "rows": summary.rows, "missing": summary.missing}
        (folder / record.name).write_text(json.dumps(made, indent=2))
    return summary


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main_parser = argparse.ArgumentParser(
        prog="python -m rec.prepare", description="Turn a public data set's raw files into Parquet impressions."
    )
    kuairand = main_parser.add_subparsers(dest="dataset", required=True, metavar="DATASET").add_parser(
        "kuairand",
        help="KuaiRand-Pure: short videos of Kuaishou, 15 tabs, clicks, long views, likes and rarer labels",
        description="Reads log_standard_*_pure.csv, user_features_pure.csv and video_features_basic_pure.csv of "
        "KuaiRand-Pure (kuairand.com, CC BY-SA 4.0) and writes train/ and test/, described by conf/data/kuairand.yaml. "
        "Histories and counters know only rows of a strictly earlier time_ms. video_features_statistic_pure.csv is not "
        "read: it sums up the whole period, so it leaks.",
        epilog="example: python -m rec.prepare kuairand --raw KuaiRand-Pure --out data/kuairand",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    kuairand.add_argument("--raw", type=Path, required=True, help="the unpacked download, or its folder data/")
    kuairand.add_argument("--out", type=Path, required=True, help="folder to write; whole or not there")
    days = {
        "--train-from": (date(2022, 4, 25), "first day of train; earlier days only feed histories and counters"),
        "--test-from": (date(2022, 5, 1), "first day of test; train ends the day before"),
    }
    for name, (default, words) in days.items():
        kuairand.add_argument(name, type=date.fromisoformat, metavar="YYYY-MM-DD", default=default, help=words)
    kuairand.add_argument(
        "--valid-days", type=int, default=0, help="last days of train to write as valid/ instead, for tuning"
    )
    kuairand.add_argument(
        "--random-log", action="store_true", help="read log_random_*_pure.csv too (randomly shown videos)"
    )
    kuairand.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    return main_parser


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parser().parse_args(argv)
    try:
        splits = make_splits(args.train_from, args.test_from, valid_days=args.valid_days)
        summary = prepare_kuairand(
            args.raw, args.out, splits=splits, random_log=args.random_log, overwrite=args.overwrite
        )
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

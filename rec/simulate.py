"""Simulate the log of an ads-search marketplace whose true probabilities are known.

    python -m rec.simulate --out data/market --rows 600000 --seed 0

Nothing public holds queries, clicks, carts and purchases together, so the log is simulated, and the probability that each
label was drawn with is written beside it: a model can be scored against all that can be known. One row is an impression,
in time order: `DIR/train`, `DIR/valid`, `DIR/test` (the first 80 %, the next 10 %, the last 10 %) hold `part-*.parquet`.
`rec/market.py` says how a row comes about; here labels are drawn, columns are written down and files are kept.

What may be relied on
- The same arguments give the same bytes (on one machine and one version of numpy and pyarrow).
- The world depends on the seed and the sizes only; so does the log, and a longer log begins with the rows of a shorter
  one. `rows` decides only where it ends and where it is split.
- Memory does not grow with rows: `CHUNK_ROWS` rows at a time, and state only by user and by listing.
- `recent_listings` lags: the log reaches the feature store in batches of `CHUNK_ROWS` rows, so a row knows the clicks of
  the batches before its own and none of its own batch.
- A folder named DIR is whole: everything is written beside it, to `.DIR.<process id>.partial`, and renamed at the end.
  A run that was killed outright leaves that folder behind, to be removed by hand; an exception or Ctrl-C does not.
"""

import argparse
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rec.market import CHUNK_ROWS, PAGE, TASKS, Clock, Impressions, Market, Probabilities
from rec.population import TEXT_SIZE, History, MarketConfig
from rec.schema import ConfigError

FORMAT = 1  # raise it when the same arguments no longer give the same bytes
FILE_ROWS = 4 * CHUNK_ROWS  # a row group is a chunk
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}

IDS = ("query_id", "user_id", "listing_id", "shop_id")
CATEGORICALS = (
    *("query_category", "listing_category", "country", "device", "hour", "weekday", "price_band", "user_segment"),
    "placement",
)
LISTS = ("query_tokens", "listing_tags", "recent_listings")
HEAVY_TAILED = (
    *("price", "position", "num_reviews", "shop_sales", "shop_age_days", "listing_age_days", "user_tenure_days"),
    "query_length",
)
STANDARDISED = ("discount", "price_ratio", "rating", "text_match", "popularity", "historical_ctr", "noise_a", "noise_b")
SCHEMA = pa.schema(
    [("timestamp", pa.int64())]
    + [(name, pa.int64()) for name in IDS + CATEGORICALS]
    + [(name, pa.list_(pa.int64())) for name in LISTS]
    + [("listing_text", pa.list_(pa.float32(), TEXT_SIZE))]
    + [(name, pa.float32()) for name in HEAVY_TAILED + STANDARDISED]
    + [(name, pa.int8()) for name in TASKS]
    + [("dwell_seconds", pa.float32())]
    + [(f"true_{name}", pa.float32()) for name in TASKS]
)

Columns = dict[str, np.ndarray | pa.Array]  # name of a column -> its values [B]


def chunks(market: Market) -> Iterator[pa.Table]:
    """The log of `market`, without an end, as tables of `CHUNK_ROWS` rows of `SCHEMA`; each call begins it anew."""
    clock, history = Clock(), History(market.config.num_users)
    for index in itertools.count():
        rng = np.random.default_rng([market.seed, 2, index])
        shown = market.show(rng, clock, history)
        table = respond(rng, market, shown)
        clicked = table["click"].to_numpy() > 0
        history.append(shown.user[clicked], shown.listing[clicked])
        yield table


def respond(rng: np.random.Generator, market: Market, shown: Impressions) -> pa.Table:
    """Draw the labels of `shown` and write down its rows, as a table of `SCHEMA`."""
    scores = market.score(shown)
    truth = market.probabilities(scores.tasks, shown.placement)
    columns = id_columns(market, shown) | list_columns(market, shown) | dense_columns(market, shown)
    columns |= noisy_columns(rng, scores.match)
    columns |= draw_labels(rng, truth, scores.delight)
    columns |= {f"true_{task}": truth.of(task) for task in TASKS}
    return pa.table({field.name: pa.array(columns[field.name]).cast(field.type) for field in SCHEMA}, schema=SCHEMA)


def id_columns(market: Market, shown: Impressions) -> Columns:
    """The columns of whole numbers, but for the labels."""
    listings = market.listings
    return {
        "timestamp": shown.timestamp,
        "query_id": shown.query,
        "user_id": shown.user,
        "listing_id": shown.listing,
        "shop_id": listings.shop[shown.listing],
        "query_category": market.queries.category[shown.query],
        "listing_category": listings.category[shown.listing],
        "country": market.users.country[shown.user],
        "device": shown.device,
        "hour": shown.hour,
        "weekday": shown.weekday,
        "price_band": listings.price_band[shown.listing],
        "user_segment": market.users.known_segment[shown.user],
        "placement": shown.placement,
    }


def list_columns(market: Market, shown: Impressions) -> Columns:
    """Bags, the history of clicks and the vector of the listing's text."""
    tokens, tags, text = market.queries.tokens, market.listings.tags, market.listings.text[shown.listing]
    seen = shown.history >= 0
    return {
        "query_tokens": as_lists(tokens.take(shown.query), lengths=tokens.lengths[shown.query]),
        "listing_tags": as_lists(tags.take(shown.listing), lengths=tags.lengths[shown.listing]),
        "recent_listings": as_lists(shown.history[seen], lengths=seen.sum(1)),
        "listing_text": pa.FixedSizeListArray.from_arrays(text.ravel(), TEXT_SIZE),
    }


def dense_columns(market: Market, shown: Impressions) -> Columns:
    """The float columns that follow from the ids, the page and the time."""
    listings, shops, listing = market.listings, market.shops, shown.listing
    shop = listings.shop[listing]
    return {
        "price": listings.price[listing],
        "position": shown.position,
        "num_reviews": listings.num_reviews[listing],
        "shop_sales": shops.sales[shop],
        "shop_age_days": shops.age_days[shop] + shown.days,
        "listing_age_days": listings.age_days[listing] + shown.days,
        "user_tenure_days": market.users.tenure_days[shown.user] + shown.days,
        "query_length": market.queries.tokens.lengths[shown.query],
        "discount": listings.discount[listing],
        "price_ratio": listings.price_ratio[listing],
        "rating": listings.rating[listing],
        "popularity": listings.popularity[listing],
        "historical_ctr": listings.historical_ctr[listing],
    }


def noisy_columns(rng: np.random.Generator, match: np.ndarray) -> Columns:
    """What a text matcher makes of `match` [B], and two columns that tell nothing."""
    noise = rng.standard_normal((3, len(match)), np.float32)
    text_match = (match - 0.4 + 0.7 * noise[0]) / np.float32(np.sqrt(1.5))  # 0.4: its mean, as what is shown fits
    return {"text_match": text_match, "noise_a": noise[1], "noise_b": noise[2]}


def as_lists(values: np.ndarray, *, lengths: np.ndarray) -> pa.ListArray:
    """`values`, one row's after the other, cut into lists of `lengths` [B], as an Arrow column.

    >>> as_lists(np.array([7, 8, 9]), lengths=np.array([1, 0, 2])).to_pylist()
    [[7], [], [8, 9]]
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def draw_labels(rng: np.random.Generator, truth: Probabilities, delight: np.ndarray) -> dict[str, np.ndarray]:
    """Labels [B], 0 or 1, and seconds of dwell [B]; all 0 without a click."""
    uniform = rng.random((len(TASKS), len(delight)), np.float32)
    click = uniform[0] < truth.click
    cart = click & (uniform[1] < truth.add_to_cart)
    favourite = click & (uniform[2] < truth.favourite)
    purchase = click & (uniform[3] < np.where(cart, truth.purchase_with_cart, truth.purchase_without_cart))
    dwell = np.exp(3.2 + delight + 0.8 * rng.standard_normal(len(delight), np.float32))
    labels = dict(zip(TASKS, (click, cart, favourite, purchase), strict=True))
    return {name: label.astype(np.int8) for name, label in labels.items()} | {"dwell_seconds": dwell * click}


def joined(tables: list[pa.Table]) -> pa.Table:
    """Tables of `SCHEMA` one after the other. A slice without rows keeps its whole table alive, so it is left out."""
    return pa.concat_tables([SCHEMA.empty_table(), *(table for table in tables if table.num_rows)])


class SplitWriter:
    """Writes tables of any length to `folder`/part-*.parquet: row groups of `CHUNK_ROWS` rows, files of `FILE_ROWS`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._pending, self._rows = folder, SCHEMA.empty_table(), 0
        self._file: pq.ParquetWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._pending = joined([self._pending, table])
        while self._pending.num_rows >= CHUNK_ROWS:
            self._write_group(self._pending.slice(0, CHUNK_ROWS))
            self._pending = joined([self._pending.slice(CHUNK_ROWS)])

    def close(self) -> None:
        """Write what is left, as a shorter row group."""
        if self._pending.num_rows:
            self._write_group(self._pending)
        if self._file is not None:
            self._file.close()

    def _write_group(self, table: pa.Table) -> None:
        if self._rows % FILE_ROWS == 0:
            if self._file is not None:
                self._file.close()
            # Floats hardly ever repeat: a dictionary of them costs time and space.
            coded = [*IDS, *CATEGORICALS, *TASKS, *(f"{name}.list.element" for name in LISTS)]
            path = self._folder / f"part-{self._rows // FILE_ROWS:05d}.parquet"
            checked = {"compression": "zstd", "write_page_checksum": True}
            self._file = pq.ParquetWriter(path, SCHEMA, use_dictionary=coded, **checked)
        assert self._file is not None
        self._file.write_table(table, row_group_size=CHUNK_ROWS)
        self._rows += table.num_rows


def split_ends(rows: int) -> dict[str, int]:
    """Each split's end in the log, in rows; the inner ones fall between two requests.

    >>> split_ends(1003)
    {'train': 800, 'valid': 900, 'test': 1003}
    """
    train, valid, _ = (round(share * rows) for share in np.cumsum(list(SPLITS.values())))
    return dict(zip(SPLITS, (train - train % PAGE, valid - valid % PAGE, rows), strict=True))


def write_log(folder: Path, *, rows: int, seed: int, market: MarketConfig) -> None:
    """Write `rows` rows of the world `(seed, market)` to the splits below `folder`."""
    writers = {split: SplitWriter(folder / split) for split in SPLITS}
    ends, at = split_ends(rows), 0
    log = chunks(Market(market, seed=seed))
    with tqdm(total=rows, unit=" rows", unit_scale=True, desc="simulate", disable=None) as bar:
        while at < rows:
            chunk, begin = next(log), at
            for split, end in ends.items():
                part = chunk.slice(at - begin, max(0, min(end, begin + CHUNK_ROWS) - at))
                writers[split].write(part)
                at += part.num_rows
            bar.update(at - begin)
    for writer in writers.values():
        writer.close()


def is_done(out: Path, arguments: dict) -> bool:
    """Whether `out` already holds the log of `arguments`.

    Raises:
        ConfigError: it holds something else, which is left as it is.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = recorded_arguments(out)
    if found == arguments:
        return True
    names = sorted(name for name in found | arguments if found.get(name) != arguments.get(name))
    differ = ", ".join(f"{name}={found.get(name)} (asked for {arguments.get(name)})" for name in names)
    raise ConfigError(f"{out} holds another log: {differ}. Choose another --out, or remove {out}")


def recorded_arguments(out: Path) -> dict:
    """The arguments that the log in `out` was made with; ConfigError where there is no record of them."""
    record = out / "simulation.json"
    if not record.is_file():
        raise ConfigError(f"{out} exists and is no simulated log (it has no simulation.json): choose another --out")
    try:
        found = json.loads(record.read_text())
    except ValueError as error:
        raise ConfigError(f"{record} is not JSON ({error}): choose another --out, or remove {out}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{out} holds another log: {found}. Choose another --out, or remove {out}")
    return found


def simulate(out: str | Path, *, rows: int = 600_000, seed: int = 0, market: MarketConfig | None = None) -> bool:
    """Write a log to the folder `out`, unless it is there already.

    Args:
        out: folder to make; its parents are made too.
        rows: impressions in all splits together, 40 or more.
        seed: of the world and the log, 0 or more.
        market: sizes; default `MarketConfig()`.

    Returns:
        True if it was written, False if `out` already held the log of the same arguments.

    Raises:
        ConfigError: an argument is out of range, or `out` holds something else.
    """
    market, out = market or MarketConfig(), Path(out).absolute()
    if rows < 10 * PAGE or seed < 0:
        raise ConfigError(f"rows is {rows} and seed {seed}, expected {10 * PAGE} or more rows and a seed of 0 or more")
    arguments = {"format": FORMAT, "rows": rows, "seed": seed, **asdict(market)}
    if is_done(out, arguments):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_log(partial, rows=rows, seed=seed, market=market)
        (partial / "simulation.json").write_text(json.dumps(arguments, indent=2) + "\n")
        partial.rename(out)  # atomic; replaces an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


DESCRIPTION = """\
Simulate the log of an ads-search marketplace, as Parquet: one row an impression, in time order, with ids, bags, a history
of clicks, dense floats, the labels click, add_to_cart, favourite and purchase, and the true probability of each (true_*).
conf/data/market.yaml describes the columns."""
EXAMPLES = """\
Examples:
  python -m rec.simulate --out data/market                    # 600,000 rows, what conf/data/market.yaml expects
  python -m rec.simulate --out /tmp/small --rows 50000 --seed 1

The same arguments give the same bytes; run again, it finds the log and does nothing. A longer log of the same
seed and sizes begins with the same rows. With other sizes, give training the tables' sizes as well, such as
data.tables.user.num_embeddings=N."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m rec.simulate", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=as_written
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, with train/, valid/ and test/")
    numbers = [("rows", "N", 600_000, "impressions in all"), ("seed", "S", 0, "of the world and the log")]
    for name, size in asdict(MarketConfig()).items():
        numbers.append((name, "N", size, name.removeprefix("num_").replace("_", " ")))
    for name, metavar, default, words in numbers:
        flag = "--" + name.removeprefix("num_").replace("_", "-")
        words += " (default: %(default)s)"
        parser.add_argument(flag, dest=name, type=int, default=default, metavar=metavar, help=words)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = vars(parse_arguments(argv))
    out, rows, seed = (arguments.pop(name) for name in ("out", "rows", "seed"))
    try:
        written = simulate(out, rows=rows, seed=seed, market=MarketConfig(**arguments))
    except ConfigError as error:
        print(f"rec.simulate: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {'wrote' if written else 'already holds'} {rows:,} rows of seed {seed}; see {out}/simulation.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

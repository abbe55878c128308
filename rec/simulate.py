"""Simulate the log of an ads-search marketplace whose true probabilities are known.

    python -m rec.simulate --out data/market --rows 600000 --seed 0

Nothing public holds queries, clicks, carts and purchases together, so the log is simulated, and the probability that each
label was drawn with is written beside it: a model can be scored against all that can be known. One row is an impression,
in time order: `DIR/train`, `DIR/valid`, `DIR/test` (the first 80 %, the next 10 %, the last 10 %) hold `part-*.parquet`.

How a row comes about
    A user sends a query from a placement; `PAGE` listings are shown, most of them of the query's category.
    score_t = latent terms (user x listing, query x listing, likeness to recent clicks; biases of listing, shop, category,
              user) + effects of dense features, some of them different from segment to segment
    logit_t = slope[placement] * score_t + offset[placement] + intercept_t        t: click, add_to_cart, favourite, purchase
    click ~ p(click); only after a click: cart ~ p(cart), favourite ~ p(favourite), purchase ~ p(purchase | cart or none)

Click and purchase partly agree and partly conflict: a bargain hunter clicks on discounts and buys by rating; a browser
clicks on what is new and dear and buys what is cheap. Multitask learning has something to share and something to separate.

What may be relied on
- The same arguments give the same bytes (on one machine and one version of numpy and pyarrow).
- The world (every id's latent factors) depends on the seed and the sizes only; so does the log, and a longer log begins
  with the rows of a shorter one. `rows` decides only where it ends and where it is split.
- Memory does not grow with rows: `CHUNK_ROWS` rows at a time, and state only by user and by listing.
- `recent_listings` lags: the log reaches the feature store in batches of `CHUNK_ROWS` rows, so a row knows the clicks of
  the batches before its own and none of its own batch.
- A folder named DIR is whole: everything is written beside it, to `.DIR.<process id>.partial`, and renamed at the end.
  A run that was killed outright leaves that folder behind, to be removed by hand; an exception or Ctrl-C does not.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from rec.schema import ConfigError

FORMAT = 1  # raise it when the same arguments no longer give the same bytes
CHUNK_ROWS = 16_384  # rows simulated at a time, and rows a row group
FILE_ROWS = 4 * CHUNK_ROWS
PAGE = 4  # impressions a request
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}

START_MS = 1_736_121_600_000  # Monday 2025-01-06 00:00 UTC
DAY_MS = 86_400_000
ROWS_PER_DAY = 40_000
# Requests by hour of the day, relative, and by day of the week from Monday on.
HOURLY = [5, 3, 2, 2, 2, 3, 5, 8, 11, 13, 14, 15, 16, 15, 14, 14, 15, 17, 20, 23, 24, 21, 15, 9]
DAILY = [1.0, 0.95, 0.95, 1.0, 1.05, 1.2, 1.3]

NUM_FACTORS = 8
TEXT_SIZE = 16
HISTORY_LENGTH = 20
NUM_CATEGORIES = 40
NUM_COUNTRIES = 20
NUM_DEVICES = 3
NUM_PRICE_BANDS = 10
SEGMENTS = ("bargain_hunter", "quality_seeker", "browser", "loyal")
SEGMENT_SHARES = (0.35, 0.25, 0.25, 0.15)
TASKS = ("click", "add_to_cart", "favourite", "purchase")
# Clicks among impressions, the others among clicks, while nobody has a history; tastes then raise them by about a tenth.
BASE_RATES = (0.095, 0.108, 0.056, 0.040)
SPREADS = (1.15, 1.2, 1.1, 0.95)  # standard deviation of a task's logits at slope 1; sets how well it can be ranked
NO_CART = -3.6  # logit of a purchase without a cart, relative to one with it


@dataclass(frozen=True)
class Placement:
    """Where an ad is shown. Slopes and offsets differ, so one Platt scaling for all placements cannot calibrate."""

    name: str
    share: float  # of requests
    slope: float  # of the score
    click_offset: float  # logit
    later_offset: float  # logit of what follows a click


PLACEMENTS = (
    Placement("search_top", 0.50, 1.15, 0.35, 0.15),
    Placement("search_bottom", 0.25, 0.95, -0.45, 0.0),
    Placement("listing_page", 0.17, 1.0, -0.1, -0.2),
    Placement("home", 0.08, 0.6, -0.8, -0.6),
)

# Weights of the latent terms in each task's score. Every term has a variance of about 1.
#                  click  cart  fav.  purchase
TERM_WEIGHTS = {
    "want": (0.55, 0.35, 0.50, 0.10),  # user x listing: what the user likes to look at
    "need": (0.00, 0.35, -0.25, 0.55),  # user x listing: what the user is out to buy
    "match": (0.70, 0.25, 0.10, 0.25),  # query x listing
    "taste": (0.45, 0.20, 0.35, 0.15),  # the listing's likeness to the nearest of the recent clicks
    "appeal": (0.45, 0.15, 0.35, -0.10),  # the listing's, to the eye
    "quality": (0.00, 0.35, 0.05, 0.50),  # the listing's, in the hand
    "trust": (0.10, 0.25, 0.05, 0.30),  # the shop's
    "keenness": (0.25, 0.10, 0.20, 0.00),  # the user's to click
    "purse": (0.00, 0.20, -0.10, 0.40),  # the user's to spend
    "position": (-0.45, -0.05, 0.00, -0.05),
    "low_rating": (-0.30, -0.45, -0.10, -0.55),  # a cliff, not a slope
    "evening": (0.10, 0.15, 0.10, 0.20),
}
CATEGORY_WEIGHTS = (0.20, 0.25, 0.25, 0.25)  # a category's bias is another one in each task

# Weights of dense features by segment: these are where the tasks conflict.
#                click  cart  fav.  purchase
SEGMENT_WEIGHTS = {
    "bargain_hunter": {
        "discount": (0.90, 0.35, 0.10, -0.10),
        "price_ratio": (-0.40, -0.30, 0.10, -0.30),
        "rating": (-0.10, 0.40, 0.05, 0.75),
        "reviews": (0.00, 0.15, 0.00, 0.30),
        "freshness": (0.00, 0.00, 0.10, 0.00),
    },
    "quality_seeker": {
        "discount": (-0.20, -0.05, -0.20, 0.10),
        "price_ratio": (0.25, 0.00, 0.20, -0.20),
        "rating": (0.75, 0.55, 0.30, 0.60),
        "reviews": (0.30, 0.25, 0.00, 0.25),
        "freshness": (-0.10, 0.00, 0.00, 0.00),
    },
    "browser": {
        "discount": (0.10, 0.20, -0.10, 0.45),
        "price_ratio": (0.45, -0.30, 0.55, -0.70),
        "rating": (0.10, 0.15, 0.00, 0.20),
        "reviews": (-0.20, 0.10, -0.30, 0.20),
        "freshness": (0.60, 0.10, 0.50, -0.20),
    },
    "loyal": {
        "discount": (0.20, 0.20, 0.00, 0.25),
        "price_ratio": (-0.10, -0.20, 0.10, -0.30),
        "rating": (0.25, 0.30, 0.10, 0.35),
        "reviews": (0.50, 0.40, 0.10, 0.40),
        "freshness": (-0.30, -0.10, 0.10, -0.10),
    },
}
SEGMENT_FEATURES = tuple(SEGMENT_WEIGHTS["loyal"])
TERM_MATRIX = np.array(list(TERM_WEIGHTS.values()), np.float32)  # [terms, T]
SEGMENT_TENSOR = np.array(
    [[SEGMENT_WEIGHTS[s][f] for f in SEGMENT_FEATURES] for s in SEGMENTS], np.float32
)  # [S, F, T]

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


@dataclass(frozen=True)
class MarketConfig:
    """How many of each there are; ids run from 0 to one less. The same seed and sizes are the same world.

    Raises:
        ConfigError: a size is below 1.

    """

    num_users: int = 50_000
    num_queries: int = 20_000
    num_listings: int = 100_000
    num_shops: int = 5_000
    num_query_tokens: int = 20_000
    num_listing_tags: int = 10_000

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(f"{field.name} is {getattr(self, field.name)}, expected 1 or more")


def standardise(x: np.ndarray, *, weights: np.ndarray | None = None) -> np.ndarray:
    """`x` [N] or [N, K] with (weighted) mean 0 and variance 1 in each column, float32; a constant column becomes 0."""
    x = x - np.average(x, axis=0, weights=weights)
    return (x / np.maximum(np.sqrt(np.average(x**2, axis=0, weights=weights)), 1e-9)).astype(np.float32)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), of the same shape and type; |x| below 80 in float32."""
    return 1 / (1 + np.exp(-x))


class ZipfSampler:
    """Draws ids 0 to N - 1 with Zipf-Mandelbrot frequencies, 1 / (rank + 10), among all ids or among one group's.

    Ranks are dealt to ids at random: an id's number says nothing of its frequency, as with hashed ids in production.
    """

    def __init__(self, rng: np.random.Generator, group: np.ndarray) -> None:
        """`group` [N]: every id's group, 0 or more."""
        self.weights = 1 / (rng.permutation(len(group)) + 10.0)
        self._ids = np.argsort(group, kind="stable")
        self._cumulative = np.concatenate([[0.0], np.cumsum(self.weights[self._ids])])
        self._bounds = self._cumulative[np.searchsorted(group[self._ids], np.arange(NUM_CATEGORIES + 1))]

    def draw(self, uniform: np.ndarray, *, group: np.ndarray, anywhere: np.ndarray) -> np.ndarray:
        """One id for each number in [0, 1): of `group`, or of all ids where `anywhere`. All of one shape.

        A group that has no ids gives an id of the next one.
        """
        low = np.where(anywhere, 0.0, self._bounds[group])
        high = np.where(anywhere, self._cumulative[-1], self._bounds[group + 1])
        place = np.searchsorted(self._cumulative, low + uniform * (high - low), side="right") - 1
        return self._ids[np.minimum(place, len(self._ids) - 1)]

    def draw_any(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """`num` ids among all."""
        nowhere = np.zeros(num, np.int64)
        return self.draw(rng.random(num), group=nowhere, anywhere=nowhere == 0)


def ungrouped(rng: np.random.Generator, num: int) -> ZipfSampler:
    """A sampler of ids that belong to no group."""
    return ZipfSampler(rng, np.zeros(num, np.int64))


class Bags:
    """A fixed list of ids for each of N owners; their length is Poisson, so it may be 0."""

    def __init__(self, rng: np.random.Generator, *, mean: float, category: np.ndarray, num_ids: int) -> None:
        """Owners [N] have a `category`, and so have ids; three in four of a bag's ids are of the owner's."""
        self.lengths = rng.poisson(mean, len(category))
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._owner = np.repeat(np.arange(len(category)), self.lengths)
        sampler = ZipfSampler(rng, rng.integers(NUM_CATEGORIES, size=num_ids))
        total = len(self._owner)
        self._ids = sampler.draw(rng.random(total), group=category[self._owner], anywhere=rng.random(total) < 0.25)

    def mean_of(self, factors: np.ndarray) -> np.ndarray:
        """The mean [N, K] of the `factors` [ids, K] of each owner's ids; 0 for an empty bag."""
        num = len(self.lengths)
        sums = [np.bincount(self._owner, weights=column[self._ids], minlength=num) for column in factors.T]
        return np.stack(sums, axis=1) / np.maximum(self.lengths, 1)[:, None]

    def take(self, owners: np.ndarray) -> pa.ListArray:
        """The bags of `owners` [B] as an Arrow list column."""
        lengths = self.lengths[owners]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        values = np.arange(offsets[-1]) + np.repeat(self._starts[owners] - offsets[:-1], lengths)
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(self._ids[values]))


class History:
    """Each user's last `HISTORY_LENGTH` clicked listings, newest last, right-aligned in [users, length]; -1 is none."""

    def __init__(self, num_users: int) -> None:
        self._clicks = np.full((num_users, HISTORY_LENGTH), -1, np.int64)

    def of(self, users: np.ndarray) -> np.ndarray:
        """A copy of the rows [B, HISTORY_LENGTH] of `users` [B]."""
        return self._clicks[users]

    def append(self, users: np.ndarray, listings: np.ndarray) -> None:
        """Add clicks [N], oldest first; a user may occur many times."""
        order = np.argsort(users, kind="stable")
        unique, first, counts = np.unique(users[order], return_index=True, return_counts=True)
        row = np.repeat(np.arange(len(unique)), counts)
        rank = np.arange(len(users)) - np.repeat(first, counts)  # 0 for the user's oldest new click
        shift = np.minimum(counts, HISTORY_LENGTH)
        place = rank - np.repeat(counts - shift, counts)  # below 0: older than the history is long
        both = np.concatenate([self._clicks[unique], np.full((len(unique), HISTORY_LENGTH), -1, np.int64)], axis=1)
        kept = place >= 0
        both[row[kept], HISTORY_LENGTH + place[kept]] = listings[order][kept]
        self._clicks[unique] = np.take_along_axis(both, shift[:, None] + np.arange(HISTORY_LENGTH), axis=1)


@dataclass
class Shops:
    """What does not change about shops, [shops] each."""

    factors: np.ndarray  # [shops, K]
    trust: np.ndarray
    sales: np.ndarray
    age_days: np.ndarray  # at the start of the log


@dataclass
class Listings:
    """What does not change about listings, [listings] each."""

    sampler: ZipfSampler
    category: np.ndarray
    shop: np.ndarray
    tags: Bags
    factors: np.ndarray  # [listings, K], variance 1
    text: np.ndarray  # [listings, TEXT_SIZE]
    appeal: np.ndarray
    quality: np.ndarray
    price: np.ndarray
    price_ratio: np.ndarray  # log of price over the category's, standardised
    price_band: np.ndarray
    discount: np.ndarray  # standardised
    rating: np.ndarray  # standardised
    num_reviews: np.ndarray
    popularity: np.ndarray
    historical_ctr: np.ndarray
    age_days: np.ndarray  # at the start of the log


@dataclass
class Users:
    """What does not change about users, [users] each."""

    sampler: ZipfSampler
    segment: np.ndarray
    known_segment: np.ndarray  # what marketing takes the segment to be; right for 9 in 10
    want: np.ndarray  # [users, K]
    need: np.ndarray  # [users, K]
    keenness: np.ndarray
    purse: np.ndarray
    country: np.ndarray
    device: np.ndarray
    tenure_days: np.ndarray  # at the start of the log


@dataclass
class Queries:
    """What does not change about queries, [queries] each."""

    sampler: ZipfSampler
    category: np.ndarray
    tokens: Bags
    factors: np.ndarray  # [queries, K], variance 1


def draw_shops(rng: np.random.Generator, num: int) -> Shops:
    """Shops; the older and the larger are the more trusted."""
    age, sales = rng.standard_normal((2, num))
    return Shops(
        factors=rng.standard_normal((num, NUM_FACTORS)),
        trust=standardise(0.5 * age + 0.5 * sales + 0.7 * rng.standard_normal(num)),
        sales=np.floor(np.exp(5 + 1.5 * sales)),
        age_days=np.exp(6 + 0.8 * age),
    )


def draw_queries(rng: np.random.Generator, market: MarketConfig, centres: np.ndarray) -> Queries:
    """Queries; their tokens' factors are part of theirs, so tokens tell of queries too rare to learn by id."""
    category = draw_categories(rng, market.num_queries)
    tokens = Bags(rng, mean=3, category=category, num_ids=market.num_query_tokens)
    meaning = tokens.mean_of(rng.standard_normal((market.num_query_tokens, NUM_FACTORS)))
    own = rng.standard_normal((market.num_queries, NUM_FACTORS))
    return Queries(
        sampler=ungrouped(rng, market.num_queries),
        category=category,
        tokens=tokens,
        factors=standardise(0.5 * centres[category] + 1.2 * meaning + 0.4 * own),
    )


def draw_users(rng: np.random.Generator, num: int) -> Users:
    """Users; what they like to look at and what they buy are two independent tastes."""
    segment = rng.choice(len(SEGMENTS), size=num, p=SEGMENT_SHARES)
    mistaken = rng.random(num) < 0.1
    return Users(
        sampler=ungrouped(rng, num),
        segment=segment,
        known_segment=np.where(mistaken, rng.integers(len(SEGMENTS), size=num), segment),
        want=rng.standard_normal((num, NUM_FACTORS), np.float32),
        need=rng.standard_normal((num, NUM_FACTORS), np.float32),
        keenness=rng.standard_normal(num, np.float32),
        purse=rng.standard_normal(num, np.float32),
        country=np.minimum(rng.geometric(0.2, num) - 1, NUM_COUNTRIES - 1),
        device=rng.choice(NUM_DEVICES, size=num, p=(0.6, 0.3, 0.1)),
        tenure_days=rng.exponential(400, num),
    )


def draw_categories(rng: np.random.Generator, num: int) -> np.ndarray:
    """Categories [num] of unequal size: the largest is 8 times the smallest."""
    shares = np.linspace(8, 1, NUM_CATEGORIES)
    return rng.choice(NUM_CATEGORIES, size=num, p=shares / shares.sum())


def draw_listings(rng: np.random.Generator, market: MarketConfig, centres: np.ndarray, shops: Shops) -> Listings:
    """Listings; category, shop, tags and text all tell something of their latent factors, none of them everything."""
    num = market.num_listings
    category, shop = draw_categories(rng, num), ungrouped(rng, market.num_shops).draw_any(rng, num)
    tags = Bags(rng, mean=5, category=category, num_ids=market.num_listing_tags)
    meaning = tags.mean_of(rng.standard_normal((market.num_listing_tags, NUM_FACTORS)))
    own = rng.standard_normal((num, NUM_FACTORS))
    factors = standardise(0.5 * centres[category] + 0.3 * shops.factors[shop] + 1.2 * meaning + 0.5 * own)
    projection = rng.standard_normal((NUM_FACTORS, TEXT_SIZE)) / np.sqrt(NUM_FACTORS)
    sampler = ZipfSampler(rng, category)
    noise = rng.standard_normal((9, num))
    fame = standardise(np.log(sampler.weights), weights=sampler.weights)  # over impressions, not listings
    appeal, quality = standardise(0.3 * fame + noise[0]), noise[1].astype(np.float32)
    log_price = rng.normal(3, 0.6, NUM_CATEGORIES)[category] + 0.6 * noise[2]
    cut = np.where(noise[3] > 0.1, rng.beta(2, 4, num), 0)  # half of the listings are on sale
    return Listings(
        sampler=sampler,
        category=category,
        shop=shop,
        tags=tags,
        factors=factors,
        text=standardise(factors @ projection + 0.5 * rng.standard_normal((num, TEXT_SIZE))),
        appeal=appeal,
        quality=quality,
        price=np.exp(log_price),
        price_ratio=standardise(noise[2]),
        price_band=np.argsort(np.argsort(log_price)) * NUM_PRICE_BANDS // num,
        discount=standardise(cut),
        rating=standardise(quality + 0.8 * noise[4]),
        num_reviews=np.floor(np.exp(3.5 + fame + 0.8 * noise[5])),
        popularity=standardise(fame + 0.5 * noise[6], weights=sampler.weights),
        historical_ctr=standardise(appeal + 0.9 * noise[7]),
        age_days=np.exp(4.5 + noise[8]),
    )


@dataclass
class Impressions:
    """One chunk of rows as they are shown, [B] each, before anybody has clicked."""

    timestamp: np.ndarray  # ms, strictly rising
    hour: np.ndarray
    weekday: np.ndarray
    days: np.ndarray  # since the start of the log
    user: np.ndarray
    query: np.ndarray
    listing: np.ndarray
    placement: np.ndarray
    position: np.ndarray
    device: np.ndarray
    history: np.ndarray  # [B, HISTORY_LENGTH], -1 is none


@dataclass
class Scores:
    """Each row's scores, and what of the latent terms a marketplace gets to see or feel."""

    tasks: np.ndarray  # [B, T], not yet centred and scaled
    match: np.ndarray  # [B]
    delight: np.ndarray  # [B], drives the dwell time after a click


@dataclass
class Probabilities:
    """The probabilities that the labels of a chunk are drawn with, [B] each; all but `click` given a click."""

    click: np.ndarray
    add_to_cart: np.ndarray
    favourite: np.ndarray
    purchase_with_cart: np.ndarray
    purchase_without_cart: np.ndarray

    @property
    def purchase(self) -> np.ndarray:
        """Of a purchase given a click, whether or not it goes through the cart."""
        return self.purchase_without_cart + self.add_to_cart * (self.purchase_with_cart - self.purchase_without_cart)

    def of(self, task: str) -> np.ndarray:
        """The truth column of `task`."""
        return getattr(self, task)


class Clock:
    """Times of requests: a Poisson process whose rate follows the hour of the day and the day of the week."""

    def __init__(self) -> None:
        rates = np.outer(DAILY, HOURLY).ravel()
        self._shares = np.concatenate([[0.0], np.cumsum(rates)]) / rates.sum()  # of a week's requests, by hour
        self._weeks = 0.0  # in requests, not in hours: 0.5 is when half of a week's requests have come
        self._requests = 0

    def next(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Start times [num] of the next requests, int64 ms, at least `PAGE` ms apart."""
        weeks = self._weeks + np.cumsum(rng.exponential(PAGE / ROWS_PER_DAY / 7, num))
        whole = np.floor(weeks)
        hours = np.interp(weeks - whole, self._shares, np.arange(len(self._shares)))
        times = START_MS + ((whole * 168 + hours) * 3_600_000).astype(np.int64)
        spacing = PAGE * (self._requests + np.arange(num))  # makes the order strict; 15 minutes in a million rows
        self._weeks, self._requests = float(weeks[-1]), self._requests + num
        return times + spacing


class Market:
    """A world, fixed by its sizes and its seed. `chunks` plays its log; playing it again gives the same rows."""

    def __init__(self, market: MarketConfig, *, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        centres = rng.standard_normal((NUM_CATEGORIES, NUM_FACTORS))
        self.config, self._seed = market, seed
        self.category_bias = rng.standard_normal((NUM_CATEGORIES, len(TASKS))).astype(np.float32) * CATEGORY_WEIGHTS
        self.shops = draw_shops(rng, market.num_shops)
        self.queries = draw_queries(rng, market, centres)
        self.users = draw_users(rng, market.num_users)
        self.listings = draw_listings(rng, market, centres, self.shops)
        norms = np.linalg.norm(self.listings.factors, axis=1, keepdims=True)
        self._directions = self.listings.factors / np.maximum(norms, 1e-6)
        self._calibrate()

    def chunks(self) -> Iterator[pa.Table]:
        """The log, without an end, as tables of `CHUNK_ROWS` rows of `SCHEMA`."""
        clock, history, index = Clock(), History(self.config.num_users), 0
        while True:
            rng = np.random.default_rng([self._seed, 2, index])
            shown = self.show(rng, clock, history)
            table = self.respond(rng, shown)
            clicked = table["click"].to_numpy() > 0
            history.append(shown.user[clicked], shown.listing[clicked])
            yield table
            index += 1

    def show(self, rng: np.random.Generator, clock: Clock, history: History) -> Impressions:
        """The next `CHUNK_ROWS` impressions, `PAGE` a request."""
        num = CHUNK_ROWS // PAGE
        shape = (num, PAGE)
        user, query = self.users.sampler.draw_any(rng, num), self.queries.sampler.draw_any(rng, num)
        # Points evenly spaced round the wheel: a page repeats no listing that has less than 1 / PAGE of its category.
        wheel = (rng.random((num, 1)) + np.arange(PAGE) / PAGE) % 1
        category = np.broadcast_to(self.queries.category[query][:, None], shape)
        listing = self.listings.sampler.draw(wheel, group=category, anywhere=rng.random(shape) < 0.3)
        timestamp = (clock.next(rng, num)[:, None] + np.arange(PAGE)).ravel()
        page_number = np.minimum(rng.geometric(0.65, num) - 1, 20)
        since = timestamp - START_MS
        device = np.where(rng.random(num) < 0.8, self.users.device[user], rng.integers(NUM_DEVICES, size=num))
        placement = rng.choice(len(PLACEMENTS), size=num, p=[p.share for p in PLACEMENTS])
        return Impressions(
            timestamp=timestamp,
            hour=since // 3_600_000 % 24,
            weekday=since // DAY_MS % 7,
            days=since / DAY_MS,
            user=np.repeat(user, PAGE),
            query=np.repeat(query, PAGE),
            listing=listing.ravel(),
            placement=np.repeat(placement, PAGE),
            position=(page_number[:, None] * PAGE + np.arange(PAGE)).ravel(),
            device=np.repeat(device, PAGE),
            history=history.of(np.repeat(user, PAGE)),
        )

    def score(self, shown: Impressions) -> Scores:
        """Score every row for every task: latent terms, biases, and dense effects by segment."""
        users, listings, scale = self.users, self.listings, np.float32(1 / np.sqrt(NUM_FACTORS))
        factors = listings.factors[shown.listing]
        rating = listings.rating[shown.listing]
        terms = {
            "want": (users.want[shown.user] * factors).sum(1) * scale,
            "need": (users.need[shown.user] * factors).sum(1) * scale,
            "match": (self.queries.factors[shown.query] * factors).sum(1) * scale,
            "taste": self._taste(shown.history, shown.listing),
            "appeal": listings.appeal[shown.listing],
            "quality": listings.quality[shown.listing],
            "trust": self.shops.trust[listings.shop[shown.listing]],
            "keenness": users.keenness[shown.user],
            "purse": users.purse[shown.user],
            "position": np.log1p(shown.position) - 1,
            "low_rating": 2.0 * (rating < -0.8),
            "evening": np.cos((shown.hour - 20) * (np.pi / 12)),
        }
        dense = {
            "discount": listings.discount[shown.listing],
            "price_ratio": listings.price_ratio[shown.listing],
            "rating": rating,
            "reviews": np.tanh(np.log1p(listings.num_reviews[shown.listing]) - 3.5),
            "freshness": 4.5 - np.log(listings.age_days[shown.listing] + shown.days),
        }
        tasks = np.stack([terms[name] for name in TERM_WEIGHTS], axis=1) @ TERM_MATRIX
        tasks += self.category_bias[listings.category[shown.listing]]
        by_segment = SEGMENT_TENSOR[users.segment[shown.user]]  # [B, F, T]
        tasks += np.einsum("bf,bft->bt", np.stack([dense[name] for name in SEGMENT_FEATURES], axis=1), by_segment)
        return Scores(tasks=tasks, match=terms["match"], delight=0.5 * terms["want"] + 0.4 * terms["quality"])

    def _taste(self, history: np.ndarray, listing: np.ndarray) -> np.ndarray:
        """Cosine [B] of each `listing` [B] to the nearest of its row's `history` [B, L], centred; 0 without a history.

        The nearest and not the mean: a user who clicks lamps and shoes is no better served by what lies between.
        """
        rows, places = np.nonzero(history >= 0)
        cosine = np.full(history.shape, -1, np.float32)
        cosine[rows, places] = np.einsum(
            "nk,nk->n", self._directions[history[rows, places]], self._directions[listing[rows]]
        )
        return np.where((history >= 0).any(1), 2.5 * (cosine.max(1) - 0.45), 0)

    def probabilities(self, scores: np.ndarray, placement: np.ndarray) -> Probabilities:
        """`scores` [B, T] and `placement` [B] -> the probabilities that labels are drawn with, float32 [B] each."""
        slope = np.array([p.slope for p in PLACEMENTS])[placement]
        later = np.array([p.later_offset for p in PLACEMENTS])[placement]
        first = np.array([p.click_offset for p in PLACEMENTS])[placement]
        offset = np.stack([first, later, later, later], axis=1)
        logits = slope[:, None] * (scores - self._centre) * self._gain + offset + self._intercept
        click, cart, favourite, purchase = sigmoid(logits).astype(np.float32).T
        without = sigmoid(logits[:, 3] + NO_CART).astype(np.float32)
        return Probabilities(click, cart, favourite, purchase, without)

    def _calibrate(self) -> None:
        """Scale scores to `SPREADS` and find the intercepts that give `BASE_RATES`, on one chunk without histories."""
        shown = self.show(np.random.default_rng([self._seed, 1]), Clock(), History(self.config.num_users))
        scores = self.score(shown).tasks
        self._centre, self._gain = scores.mean(0), np.array(SPREADS) / scores.std(0)
        self._intercept = np.zeros(len(TASKS))
        for t, task in enumerate(
            TASKS
        ):  # in this order: what follows a click is weighted by it, purchase needs the cart
            low, high = -12.0, 12.0
            while high - low > 1e-6:
                self._intercept[t] = (low + high) / 2
                probabilities = self.probabilities(scores, shown.placement)
                weights = np.ones(len(scores)) if t == 0 else probabilities.click
                if np.average(probabilities.of(task), weights=weights) < BASE_RATES[t]:
                    low = self._intercept[t]
                else:
                    high = self._intercept[t]

    def respond(self, rng: np.random.Generator, shown: Impressions) -> pa.Table:
        """Draw the labels of `shown` and write down its rows, as a table of `SCHEMA`."""
        scores = self.score(shown)
        truth = self.probabilities(scores.tasks, shown.placement)
        columns = self._features(rng, shown, scores.match) | draw_labels(rng, truth, scores.delight)
        columns |= {f"true_{task}": truth.of(task) for task in TASKS}
        arrays = [columns[f.name] for f in SCHEMA]
        arrays = [
            a if isinstance(a, pa.Array) else pa.array(a).cast(f.type) for a, f in zip(arrays, SCHEMA, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=SCHEMA)

    def _features(self, rng: np.random.Generator, shown: Impressions, match: np.ndarray) -> dict:
        """Every input column of `SCHEMA`."""
        listings, users, shops, num = self.listings, self.users, self.shops, len(shown.user)
        shop = listings.shop[shown.listing]
        noise = rng.standard_normal((3, num), np.float32)
        return {
            "timestamp": shown.timestamp,
            "query_id": shown.query,
            "user_id": shown.user,
            "listing_id": shown.listing,
            "shop_id": shop,
            "query_category": self.queries.category[shown.query],
            "listing_category": listings.category[shown.listing],
            "country": users.country[shown.user],
            "device": shown.device,
            "hour": shown.hour,
            "weekday": shown.weekday,
            "price_band": listings.price_band[shown.listing],
            "user_segment": users.known_segment[shown.user],
            "placement": shown.placement,
            "query_tokens": self.queries.tokens.take(shown.query),
            "listing_tags": listings.tags.take(shown.listing),
            "recent_listings": as_lists(shown.history),
            "listing_text": pa.FixedSizeListArray.from_arrays(listings.text[shown.listing].ravel(), TEXT_SIZE),
            "price": listings.price[shown.listing],
            "position": shown.position.astype(np.float32),
            "num_reviews": listings.num_reviews[shown.listing],
            "shop_sales": shops.sales[shop],
            "shop_age_days": shops.age_days[shop] + shown.days,
            "listing_age_days": listings.age_days[shown.listing] + shown.days,
            "user_tenure_days": users.tenure_days[shown.user] + shown.days,
            "query_length": self.queries.tokens.lengths[shown.query].astype(np.float32),
            "discount": listings.discount[shown.listing],
            "price_ratio": listings.price_ratio[shown.listing],
            "rating": listings.rating[shown.listing],
            "text_match": (match - 0.4 + 0.7 * noise[0])
            / np.float32(np.sqrt(1.5)),  # 0.4: its mean, as what is shown fits
            "popularity": listings.popularity[shown.listing],
            "historical_ctr": listings.historical_ctr[shown.listing],
            "noise_a": noise[1],
            "noise_b": noise[2],
        }


def as_lists(padded: np.ndarray) -> pa.ListArray:
    """`padded` [B, L] without its -1, as an Arrow list column.

    >>> as_lists(np.array([[-1, 7], [-1, -1], [8, 9]])).to_pylist()
    [[7], [], [8, 9]]
    """
    filled = padded >= 0
    offsets = np.concatenate([[0], np.cumsum(filled.sum(1))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(padded[filled]))


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
            self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd", use_dictionary=coded)
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
    chunks = Market(market, seed=seed).chunks()
    with tqdm(total=rows, unit=" rows", unit_scale=True, desc="simulate", disable=None) as bar:
        while at < rows:
            chunk, begin = next(chunks), at
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
    record = out / "simulation.json"
    if not record.is_file():
        raise ConfigError(f"{out} exists and is no simulated log (it has no simulation.json): choose another --out")
    try:
        found = json.loads(record.read_text())
    except ValueError as error:
        raise ConfigError(f"{record} is not JSON ({error}): choose another --out, or remove {out}") from error
    if found == arguments:
        return True
    names = sorted(set(found) | set(arguments)) if isinstance(found, dict) else []
    differ = ", ".join(
        f"{n}={found.get(n)} (asked for {arguments.get(n)})" for n in names if found.get(n) != arguments.get(n)
    )
    raise ConfigError(f"{out} holds another log: {differ or found}. Choose another --out, or remove {out}")


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


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m rec.simulate",
        description="Simulate the log of an ads-search marketplace, as Parquet: one row an impression, in time order, with "
        "ids, bags, a history of clicks, dense floats, the labels click, add_to_cart, favourite and purchase, and the true "
        "probability of each (true_*). conf/data/market.yaml describes the columns.",
        epilog="Examples:\n"
        "  python -m rec.simulate --out data/market                    # 600,000 rows, what conf/data/market.yaml expects\n"
        "  python -m rec.simulate --out /tmp/small --rows 50000 --seed 1\n\n"
        "The same arguments give the same bytes; run again, it finds the log and does nothing. A longer log of the same\n"
        "seed and sizes begins with the same rows. With other sizes, give training the tables' sizes as well, such as\n"
        "data.tables.user.num_embeddings=N.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make, with train/, valid/ and test/")
    parser.add_argument(
        "--rows", type=int, default=600_000, metavar="N", help="impressions in all (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of the world and the log (default: %(default)s)"
    )
    for field in fields(MarketConfig):
        flag, words = (
            "--" + field.name.removeprefix("num_").replace("_", "-"),
            field.name.replace("num_", "").replace("_", " "),
        )
        parser.add_argument(
            flag, dest=field.name, type=int, default=field.default, metavar="N", help=f"{words} (default: %(default)s)"
        )
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

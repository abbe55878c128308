"""Who and what the simulated marketplace holds: users, queries, listings and shops with their latent factors, all drawn from a seed."""

from dataclasses import dataclass, fields

import numpy as np

from rec.schema import ConfigError

NUM_FACTORS = 8
TEXT_SIZE = 16
HISTORY_LENGTH = 20
NUM_CATEGORIES = 40
NUM_COUNTRIES = 20
NUM_DEVICES = 3
NUM_PRICE_BANDS = 10
SEGMENTS = ("bargain_hunter", "quality_seeker", "browser", "loyal")
SEGMENT_SHARES = (0.35, 0.25, 0.25, 0.15)


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

    def take(self, owners: np.ndarray) -> np.ndarray:
        """The ids of the bags of `owners` [B], one bag after the other; `lengths[owners]` says how they part."""
        lengths = self.lengths[owners]
        ends = np.cumsum(lengths)
        return self._ids[np.arange(lengths.sum()) + np.repeat(self._starts[owners] - (ends - lengths), lengths)]


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


def draw_categories(rng: np.random.Generator, num: int) -> np.ndarray:
    """Categories [num] of unequal size: the largest is 8 times the smallest."""
    shares = np.linspace(8, 1, NUM_CATEGORIES)
    return rng.choice(NUM_CATEGORIES, size=num, p=shares / shares.sum())


class Shops:
    """What does not change about shops, [shops] each; the older and the larger are the more trusted."""

    def __init__(self, rng: np.random.Generator, num: int) -> None:
        age, sales = rng.standard_normal((2, num))
        self.factors = rng.standard_normal((num, NUM_FACTORS))  # [shops, K]
        self.trust = standardise(0.5 * age + 0.5 * sales + 0.7 * rng.standard_normal(num))
        self.sales = np.floor(np.exp(5 + 1.5 * sales))
        self.age_days = np.exp(6 + 0.8 * age)  # at the start of the log


class Queries:
    """What does not change about queries, [queries] each.

    Their tokens' factors are part of theirs, so tokens tell of queries too rare to learn by id.
    """

    def __init__(self, rng: np.random.Generator, market: MarketConfig, centres: np.ndarray) -> None:
        num = market.num_queries
        self.category = draw_categories(rng, num)
        self.tokens = Bags(rng, mean=3, category=self.category, num_ids=market.num_query_tokens)
        meaning = self.tokens.mean_of(rng.standard_normal((market.num_query_tokens, NUM_FACTORS)))
        own = rng.standard_normal((num, NUM_FACTORS))
        self.sampler = ungrouped(rng, num)
        self.factors = standardise(0.5 * centres[self.category] + 1.2 * meaning + 0.4 * own)  # [queries, K]


class Users:
    """What does not change about users, [users] each; what they like to look at and what they buy are independent."""

    def __init__(self, rng: np.random.Generator, num: int) -> None:
        self.segment = rng.choice(len(SEGMENTS), size=num, p=SEGMENT_SHARES)
        mistaken = rng.random(num) < 0.1
        self.sampler = ungrouped(rng, num)
        # What marketing takes the segment to be.
        self.known_segment = np.where(mistaken, rng.integers(len(SEGMENTS), size=num), self.segment)
        self.want = rng.standard_normal((num, NUM_FACTORS), np.float32)  # [users, K]
        self.need = rng.standard_normal((num, NUM_FACTORS), np.float32)  # [users, K]
        self.keenness = rng.standard_normal(num, np.float32)
        self.purse = rng.standard_normal(num, np.float32)
        self.country = np.minimum(rng.geometric(0.2, num) - 1, NUM_COUNTRIES - 1)
        self.device = rng.choice(NUM_DEVICES, size=num, p=(0.6, 0.3, 0.1))
        self.tenure_days = rng.exponential(400, num)  # at the start of the log


class Listings:
    """What does not change about listings, [listings] each.

    Category, shop, tags and text all tell something of their latent factors, none of them everything.
    """

    def __init__(self, rng: np.random.Generator, market: MarketConfig, centres: np.ndarray, shops: Shops) -> None:
        num = market.num_listings
        self.category = draw_categories(rng, num)
        self.shop = ungrouped(rng, market.num_shops).draw_any(rng, num)
        self.tags = Bags(rng, mean=5, category=self.category, num_ids=market.num_listing_tags)
        meaning = self.tags.mean_of(rng.standard_normal((market.num_listing_tags, NUM_FACTORS)))
        own = rng.standard_normal((num, NUM_FACTORS))
        base = 0.5 * centres[self.category] + 0.3 * shops.factors[self.shop]
        self.factors = standardise(base + 1.2 * meaning + 0.5 * own)  # [listings, K]
        projection = rng.standard_normal((NUM_FACTORS, TEXT_SIZE)) / np.sqrt(NUM_FACTORS)
        self.sampler = ZipfSampler(rng, self.category)
        self._draw_traits(rng, num)
        noise = rng.standard_normal((num, TEXT_SIZE))
        self.text = standardise(self.factors @ projection + 0.5 * noise)  # [listings, TEXT_SIZE]

    def _draw_traits(self, rng: np.random.Generator, num: int) -> None:
        """Numbers that hang together through how often a listing is shown, its looks, its quality and its price."""
        noise, often = rng.standard_normal((9, num)), self.sampler.weights
        fame = standardise(np.log(often), weights=often)  # over impressions, not listings
        self.appeal = standardise(0.3 * fame + noise[0])
        self.quality = noise[1].astype(np.float32)
        log_price = rng.normal(3, 0.6, NUM_CATEGORIES)[self.category] + 0.6 * noise[2]
        self.price = np.exp(log_price)
        self.price_ratio = standardise(noise[2])  # log of price over the category's
        self.price_band = np.argsort(np.argsort(log_price)) * NUM_PRICE_BANDS // num
        self.discount = standardise(
            np.where(noise[3] > 0.1, rng.beta(2, 4, num), 0)
        )  # half of the listings are on sale
        self.rating = standardise(self.quality + 0.8 * noise[4])
        self.num_reviews = np.floor(np.exp(3.5 + fame + 0.8 * noise[5]))
        self.popularity = standardise(fame + 0.5 * noise[6], weights=often)
        self.historical_ctr = standardise(self.appeal + 0.9 * noise[7])
        self.age_days = np.exp(4.5 + noise[8])  # at the start of the log

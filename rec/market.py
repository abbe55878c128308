"""The world of the simulated marketplace: users, queries, listings and shops, and the chances that they give a row.

`Market(config, seed=...)` draws a world; its `show` gives a chunk of impressions, its `score` and `probabilities` the
chance of every label, as numpy arrays. `rec/simulate.py` draws the labels and writes the log.

How a row comes about
    A user sends a query from a placement; `PAGE` listings are shown, most of them of the query's category.
    score_t = latent terms (user x listing, query x listing, likeness to recent clicks; biases of listing, shop, category,
              user) + effects of dense features, some of them different from segment to segment
    logit_t = slope[placement] * score_t + offset[placement] + intercept_t        t: click, add_to_cart, favourite, purchase
    click ~ p(click); only after a click: cart ~ p(cart), favourite ~ p(favourite), purchase ~ p(purchase | cart or none)

Click and purchase partly agree and partly conflict: a bargain hunter clicks on discounts and buys by rating; a browser
clicks on what is new and dear and buys what is cheap. Multitask learning has something to share and something to separate.

The world (every id's latent factors) depends on the seed and the sizes only, and so does the log. A user's history lags:
clicks reach the feature store in batches of `CHUNK_ROWS` rows, so a row knows the clicks of the batches before its own
and none of its own batch.
"""

from dataclasses import dataclass

import numpy as np

from rec.population import (
    NUM_CATEGORIES,
    NUM_DEVICES,
    NUM_FACTORS,
    SEGMENTS,
    History,
    Listings,
    MarketConfig,
    Queries,
    Shops,
    Users,
    sigmoid,
)

CHUNK_ROWS = 16_384  # rows simulated at a time
PAGE = 4  # impressions a request

START_MS = 1_736_121_600_000  # Monday 2025-01-06 00:00 UTC
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
ROWS_PER_DAY = 40_000
# Requests by hour of the day, relative, and by day of the week from Monday on.
HOURLY = [5, 3, 2, 2, 2, 3, 5, 8, 11, 13, 14, 15, 16, 15, 14, 14, 15, 17, 20, 23, 24, 21, 15, 9]
DAILY = [1.0, 0.95, 0.95, 1.0, 1.05, 1.2, 1.3]

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

# Weights of dense features: under each of SEGMENTS its tasks, click to purchase. These are where the tasks conflict.
# fmt: off
SEGMENT_WEIGHTS = {
    #               bargain_hunter            quality_seeker            browser                   loyal
    "discount":    ( .90,  .35,  .10, -.10,   -.20, -.05, -.20,  .10,    .10,  .20, -.10,  .45,    .20,  .20,  .00,  .25),
    "price_ratio": (-.40, -.30,  .10, -.30,    .25,  .00,  .20, -.20,    .45, -.30,  .55, -.70,   -.10, -.20,  .10, -.30),
    "rating":      (-.10,  .40,  .05,  .75,    .75,  .55,  .30,  .60,    .10,  .15,  .00,  .20,    .25,  .30,  .10,  .35),
    "reviews":     ( .00,  .15,  .00,  .30,    .30,  .25,  .00,  .25,   -.20,  .10, -.30,  .20,    .50,  .40,  .10,  .40),
    "freshness":   ( .00,  .00,  .10,  .00,   -.10,  .00,  .00,  .00,    .60,  .10,  .50, -.20,   -.30, -.10,  .10, -.10),
}
# fmt: on
TERM_MATRIX = np.array(list(TERM_WEIGHTS.values()), np.float32)  # [terms, T]
_BY_FEATURE = np.array(list(SEGMENT_WEIGHTS.values()), np.float32).reshape(-1, len(SEGMENTS), len(TASKS))
SEGMENT_TENSOR = np.ascontiguousarray(_BY_FEATURE.swapaxes(0, 1))  # [S, F, T]


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
        times = START_MS + ((whole * 168 + hours) * HOUR_MS).astype(np.int64)
        spacing = PAGE * (self._requests + np.arange(num))  # makes the order strict; 15 minutes in a million rows
        self._weeks, self._requests = float(weeks[-1]), self._requests + num
        return times + spacing


@dataclass
class Impressions:
    """One chunk of rows as they are shown, [B] each, before anybody has clicked."""

    timestamp: np.ndarray  # ms, strictly rising
    user: np.ndarray
    query: np.ndarray
    listing: np.ndarray
    placement: np.ndarray
    position: np.ndarray
    device: np.ndarray
    history: np.ndarray  # [B, HISTORY_LENGTH], -1 is none

    @property
    def hour(self) -> np.ndarray:
        """Of the day, 0 to 23."""
        return (self.timestamp - START_MS) // HOUR_MS % 24

    @property
    def weekday(self) -> np.ndarray:
        """0, Monday, to 6."""
        return (self.timestamp - START_MS) // DAY_MS % 7

    @property
    def days(self) -> np.ndarray:
        """Since the start of the log."""
        return (self.timestamp - START_MS) / DAY_MS


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


class Market:
    """A world, fixed by its sizes and its seed: who is there, what is shown, and how likely each label is."""

    def __init__(self, market: MarketConfig, *, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        centres = rng.standard_normal((NUM_CATEGORIES, NUM_FACTORS))
        self.config, self.seed = market, seed
        self.category_bias = rng.standard_normal((NUM_CATEGORIES, len(TASKS))).astype(np.float32) * CATEGORY_WEIGHTS
        self.shops = Shops(rng, market.num_shops)
        self.queries = Queries(rng, market, centres)
        self.users = Users(rng, market.num_users)
        self.listings = Listings(rng, market, centres, self.shops)
        norms = np.linalg.norm(self.listings.factors, axis=1, keepdims=True)
        self._directions = self.listings.factors / np.maximum(norms, 1e-6)
        self._calibrate()

    def show(self, rng: np.random.Generator, clock: Clock, history: History) -> Impressions:
        """The next `CHUNK_ROWS` impressions, `PAGE` a request."""
        num, page = CHUNK_ROWS // PAGE, np.arange(PAGE)
        user, query = self.users.sampler.draw_any(rng, num), self.queries.sampler.draw_any(rng, num)
        # Points evenly spaced round the wheel: a page repeats no listing that has less than 1 / PAGE of its category.
        wheel = (rng.random((num, 1)) + page / PAGE) % 1
        category = np.broadcast_to(self.queries.category[query][:, None], wheel.shape)
        listing = self.listings.sampler.draw(wheel, group=category, anywhere=rng.random(wheel.shape) < 0.3)
        timestamp = clock.next(rng, num)[:, None] + page
        page_number = np.minimum(rng.geometric(0.65, num) - 1, 20)
        device = np.where(rng.random(num) < 0.8, self.users.device[user], rng.integers(NUM_DEVICES, size=num))
        placement = rng.choice(len(PLACEMENTS), size=num, p=[p.share for p in PLACEMENTS])
        user, query, placement, device = (np.repeat(x, PAGE) for x in (user, query, placement, device))
        return Impressions(
            timestamp=timestamp.ravel(),
            user=user,
            query=query,
            listing=listing.ravel(),
            placement=placement,
            position=(page_number[:, None] * PAGE + page).ravel(),
            device=device,
            history=history.of(user),
        )

    def score(self, shown: Impressions) -> Scores:
        """Score every row for every task: latent terms, biases, and dense effects by segment."""
        terms, effects = self._terms(shown), self._effects(shown)
        tasks = np.stack([terms[name] for name in TERM_WEIGHTS], axis=1) @ TERM_MATRIX
        tasks += self.category_bias[self.listings.category[shown.listing]]
        by_segment = SEGMENT_TENSOR[self.users.segment[shown.user]]  # [B, F, T]
        tasks += np.einsum("bf,bft->bt", np.stack([effects[name] for name in SEGMENT_WEIGHTS], axis=1), by_segment)
        return Scores(tasks=tasks, match=terms["match"], delight=0.5 * terms["want"] + 0.4 * terms["quality"])

    def _terms(self, shown: Impressions) -> dict[str, np.ndarray]:
        """What `TERM_WEIGHTS` weigh, [B] each."""
        users, listings, scale = self.users, self.listings, np.float32(1 / np.sqrt(NUM_FACTORS))
        factors = listings.factors[shown.listing]
        return {
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
            "low_rating": 2.0 * (listings.rating[shown.listing] < -0.8),
            "evening": np.cos((shown.hour - 20) * (np.pi / 12)),
        }

    def _effects(self, shown: Impressions) -> dict[str, np.ndarray]:
        """What `SEGMENT_WEIGHTS` weigh, [B] each."""
        listings, listing = self.listings, shown.listing
        return {
            "discount": listings.discount[listing],
            "price_ratio": listings.price_ratio[listing],
            "rating": listings.rating[listing],
            "reviews": np.tanh(np.log1p(listings.num_reviews[listing]) - 3.5),
            "freshness": 4.5 - np.log(listings.age_days[listing] + shown.days),
        }

    def _taste(self, history: np.ndarray, listing: np.ndarray) -> np.ndarray:
        """Cosine [B] of each `listing` [B] to the nearest of its row's `history` [B, L], centred; 0 without a history.

        The nearest and not the mean: a user who clicks lamps and shoes is no better served by what lies between.
        """
        rows, places = np.nonzero(history >= 0)
        clicked, now = self._directions[history[rows, places]], self._directions[listing[rows]]
        cosine = np.full(history.shape, -1, np.float32)
        cosine[rows, places] = np.einsum("nk,nk->n", clicked, now)
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
        shown = self.show(np.random.default_rng([self.seed, 1]), Clock(), History(self.config.num_users))
        scores = self.score(shown).tasks
        self._centre, self._gain = scores.mean(0), np.array(SPREADS) / scores.std(0)
        self._intercept = np.zeros(len(TASKS))
        # In this order, since what follows a click is weighted by its probability and a purchase needs the cart's.
        for t, task in enumerate(TASKS):
            low, high = -12.0, 12.0
            while high - low > 1e-6:
                self._intercept[t] = (low + high) / 2
                truth = self.probabilities(scores, shown.placement)
                weights = np.ones(len(scores)) if t == 0 else truth.click
                too_low = np.average(truth.of(task), weights=weights) < BASE_RATES[t]
                low, high = (self._intercept[t], high) if too_low else (low, self._intercept[t])

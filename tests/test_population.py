"""The parts of the simulated world against loops."""

from collections import deque

import numpy as np
import pytest

from rec.population import HISTORY_LENGTH, Bags, History, MarketConfig, ZipfSampler
from rec.schema import ConfigError


def test_history_append_equals_deques() -> None:
    rng = np.random.default_rng(0)
    history, expected = History(7), [deque(maxlen=HISTORY_LENGTH) for _ in range(7)]
    for size in (0, 5, 200, 1, 30):
        users, listings = rng.integers(7, size=size), rng.integers(1000, size=size)
        history.append(users, listings)
        for user, listing in zip(users, listings, strict=True):
            expected[user].append(listing)
        padded = [[-1] * (HISTORY_LENGTH - len(clicks)) + list(clicks) for clicks in expected]
        np.testing.assert_array_equal(history.of(np.arange(7)), padded)


def test_zipf_sampler_draws_in_proportion_and_within_groups() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(3, size=30)
    sampler = ZipfSampler(rng, group)
    ids = sampler.draw_any(rng, 300_000)
    np.testing.assert_allclose(
        np.bincount(ids, minlength=30) / 300_000, sampler.weights / sampler.weights.sum(), atol=3e-3
    )
    wanted = rng.integers(3, size=1000)
    drawn = sampler.draw(rng.random(1000), group=wanted, anywhere=np.zeros(1000, bool))
    np.testing.assert_array_equal(group[drawn], wanted)


def test_bags_take_and_mean_equal_loops() -> None:
    rng = np.random.default_rng(0)
    category, factors = rng.integers(40, size=50), rng.normal(size=(200, 3))
    bags = Bags(rng, mean=2, category=category, num_ids=200)
    everything = np.split(bags.take(np.arange(50)), np.cumsum(bags.lengths)[:-1])
    assert min(map(len, everything)) == 0
    owners = rng.integers(50, size=300)
    np.testing.assert_array_equal(bags.take(owners), np.concatenate([everything[owner] for owner in owners]))
    means = [factors[bag].mean(axis=0) if len(bag) else np.zeros(3) for bag in everything]
    np.testing.assert_allclose(bags.mean_of(factors), means, atol=1e-12)


@pytest.mark.parametrize("name", list(vars(MarketConfig())))
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0, expected 1 or more"):
        MarketConfig(**{name: 0})

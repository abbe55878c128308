"""Fusions against loops over rows and groups, and what each does to a probability that is a hundred times smaller."""

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import rankdata

from rec.fusion import FusionConfig, FusionKind, combine, contributions, fuse, group_ranks, variance_shares
from rec.schema import ConfigError

SUM, PRODUCT, RANK = FusionKind.weighted_sum, FusionKind.product, FusionKind.rank
WEIGHTS = {"click": 0.7, "buy": 0.3}
Preds = dict[str, np.ndarray]


def make_preds(num_rows: int = 300, *, seed: int = 0) -> Preds:
    """Float32 probabilities in steps, so that many tie."""
    rng = np.random.default_rng(seed)
    steps = {"click": rng.integers(1, 9, num_rows) / 10, "buy": rng.integers(1, 9, num_rows) / 1000}
    return {name: x.astype(np.float32) for name, x in steps.items()}


def make_groups(num_rows: int = 300, *, seed: int = 1) -> np.ndarray:
    """Groups of any number and size, some of one row, their rows scattered."""
    groups = np.random.default_rng(seed).choice([-5, 3, 3, 3, 8, 2**60], num_rows)
    groups[[10, 200]] = 77, 78
    return groups


def ranks_by_loop(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Of each row: the share of the others of its group that are below it, those that tie as half."""
    ranks = []
    for value, group in zip(values, groups, strict=True):
        others = [float(value > x) + (value == x) / 2 for x, g in zip(values, groups, strict=True) if g == group]
        ranks.append((sum(others) - 0.5) / (len(others) - 1) if len(others) > 1 else 0.5)
    return np.array(ranks)


def test_a_weighted_sum_equals_a_loop() -> None:
    preds = make_preds()
    expected = [0.7 * float(c) + 0.3 * float(b) for c, b in zip(preds["click"], preds["buy"], strict=True)]
    scores = fuse(preds, FusionConfig(SUM, WEIGHTS), group_id=make_groups())
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_a_product_of_powers_equals_a_loop() -> None:
    preds = make_preds()
    expected = [float(c) ** 0.7 * float(b) ** 0.3 for c, b in zip(preds["click"], preds["buy"], strict=True)]
    np.testing.assert_allclose(fuse(preds, FusionConfig(PRODUCT, WEIGHTS)), expected, rtol=1e-12)


def test_a_sum_of_ranks_equals_a_loop_over_groups_with_ties() -> None:
    preds, groups = make_preds(), make_groups()
    expected = 0.7 * ranks_by_loop(preds["click"], groups) + 0.3 * ranks_by_loop(preds["buy"], groups)
    np.testing.assert_allclose(fuse(preds, FusionConfig(RANK, WEIGHTS), group_id=groups), expected, atol=1e-12)


def test_ranks_without_groups_are_those_of_scipy() -> None:
    values = make_preds()["click"]
    np.testing.assert_allclose(group_ranks(values), (rankdata(values) - 1) / (len(values) - 1), atol=1e-12)


def test_ranks_of_groups_of_one_and_of_equals_are_in_the_middle() -> None:
    assert group_ranks(np.array([5.0, 1.0, 2.0, 2.0]), np.array([1, 2, 3, 3])).tolist() == [0.5] * 4
    assert group_ranks(np.array([2.0, 1.0]), np.array([4, 4])).tolist() == [1.0, 0.0]
    assert group_ranks(np.empty(0)).shape == (0,)
    for kind in FusionKind:
        assert fuse({"click": np.empty(0)}, FusionConfig(kind, {"click": 1.0})).shape == (0,)


def test_a_hundredth_of_a_probability_changes_ranks_nothing_products_by_a_factor_and_sums_in_their_order() -> None:
    preds, groups = make_preds(), make_groups()
    smaller = preds | {"buy": preds["buy"].astype(np.float64) / 100}
    weights = {"click": 0.01, "buy": 1.0}  # so that both count in the sum
    before, after = (
        {kind: fuse(p, FusionConfig(kind, weights), group_id=groups) for kind in FusionKind} for p in (preds, smaller)
    )
    assert (before[RANK] == after[RANK]).all()
    np.testing.assert_allclose(after[PRODUCT], before[PRODUCT] / 100, rtol=1e-12)
    assert not np.array_equal(rankdata(before[SUM].round(9)), rankdata(after[SUM].round(9)))


def test_a_term_of_two_tasks_is_their_product() -> None:
    preds = make_preds()
    joint = preds | {"click_and_buy": preds["click"].astype(np.float64) * preds["buy"]}
    for kind in FusionKind:
        scores = fuse(preds, FusionConfig(kind, {"click": 0.95, "click * buy": 0.05}))
        np.testing.assert_allclose(scores, fuse(joint, FusionConfig(kind, {"click": 0.95, "click_and_buy": 0.05})))
    assert fuse({"a*b": np.array([0.3])}, FusionConfig(SUM, {"a*b": 1.0})).tolist() == [0.3]  # a task of that name


def test_weights_below_0_take_away_and_weights_of_0_do_nothing() -> None:
    preds = {"click": np.array([0.5, 0.5]), "report": np.array([0.0, 0.5])}
    assert fuse(preds, FusionConfig(SUM, {"click": 1.0, "report": -1.0})).tolist() == [0.5, 0.0]
    assert fuse(preds, FusionConfig(RANK, {"click": 1.0, "report": -1.0})).tolist() == [0.5, -0.5]
    assert fuse(preds, FusionConfig(PRODUCT, {"click": 1.0, "report": 0.0})).tolist() == [0.5, 0.5]


def test_a_probability_of_0_makes_a_product_0_and_a_tiny_one_does_not() -> None:
    preds = {"click": np.array([0.0, 1e-300, 0.5]), "buy": np.array([0.5, 1e-300, 0.5])}
    scores = fuse(preds, FusionConfig(PRODUCT, {"click": 0.5, "buy": 0.5}))
    np.testing.assert_allclose(scores, [0.0, 1e-300, 0.5], rtol=1e-9)


def test_what_terms_contribute_adds_up_to_the_score() -> None:
    preds, groups = make_preds(), make_groups()
    for kind in FusionKind:
        config = FusionConfig(kind, WEIGHTS)
        parts = contributions(preds, config, group_id=groups)
        assert list(parts) == ["click", "buy"]
        assert (combine(parts, kind) == fuse(preds, config, group_id=groups)).all()
    np.testing.assert_allclose(contributions(preds, FusionConfig(PRODUCT, WEIGHTS))["buy"], 0.3 * np.log(preds["buy"]))


def test_shares_of_variance_equal_a_loop_over_groups() -> None:
    parts, groups = contributions(make_preds(), FusionConfig(SUM, {"click": 1.0, "buy": 40.0})), make_groups()
    total, covariance = parts["click"] + parts["buy"], {"click": 0.0, "buy": 0.0}
    for group in np.unique(groups):
        inside = groups == group
        for name in covariance:
            covariance[name] += inside.sum() * np.cov(parts[name][inside], total[inside], ddof=0)[0, 1]
    expected = {name: value / sum(covariance.values()) for name, value in covariance.items()}
    assert variance_shares(parts, groups) == pytest.approx(expected)
    assert variance_shares(parts) != pytest.approx(expected)


def test_shares_show_a_weight_that_is_lost_on_a_small_probability() -> None:
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(500), 4)
    click, buy = rng.beta(1, 9, 2000), rng.beta(1, 9, 2000) / 100
    shares = {
        kind: variance_shares(
            contributions({"click": click, "buy": buy}, FusionConfig(kind, {"click": 0.5, "buy": 0.5}), group_id=groups)
        )
        for kind in FusionKind
    }
    assert shares[SUM]["buy"] is not None and abs(shares[SUM]["buy"]) < 0.005
    assert shares[RANK]["buy"] == pytest.approx(0.5, abs=0.05) == shares[PRODUCT]["buy"]
    for of_kind in shares.values():
        assert math.fsum(x or 0 for x in of_kind.values()) == pytest.approx(1)


def test_shares_have_no_meaning_without_variance() -> None:
    groups = np.repeat(np.arange(5), 3)
    none = {"click": None, "buy": None}
    assert variance_shares({"click": groups / 7, "buy": groups / 3}, groups) == none  # differs between groups alone
    assert variance_shares({"click": np.array([-np.inf, 0.0]), "buy": np.zeros(2)}) == none
    assert variance_shares({"click": np.empty(0), "buy": np.empty(0)}) == none


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        (SUM, {}, "the weights are none: give at least one"),
        (RANK, {"click": 0.0, "buy": 0.0}, "the weights are click=0, buy=0: give at least one"),
        (SUM, {"click": math.nan}, "the weight of 'click' is nan, expected a finite number"),
        (
            PRODUCT,
            {"click": -1.0},
            "the weight of 'click' is -1.0, of a product expected 0 or more; choose weighted_sum",
        ),
    ],
)
def test_weights_that_rank_nothing_are_refused(kind: FusionKind, weights: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FusionConfig(kind, weights)


@pytest.mark.parametrize(
    ("kind", "changed", "weights", "message"),
    [
        (SUM, {}, {"clck": 1.0}, "'clck', which is no task: did you mean 'click'"),
        (SUM, {}, {"click*by": 1.0}, "'by', which is no task: did you mean 'buy'"),
        (SUM, {"buy": np.ones(3)}, {"click": 1.0}, r"differ in length: {'click': 2, 'buy': 3}"),
        (RANK, {"buy": np.array([0.1, np.nan])}, WEIGHTS, r"'buy' is nan in row 1 \(1 such rows\), expected finite;"),
        (
            PRODUCT,
            {"buy": np.array([-2.0, -1])},
            WEIGHTS,
            r"'buy' is -2 in row 0 \(2 such rows\), expected finite and 0 or",
        ),
        (PRODUCT, {}, {"click": 1e4}, "a product has the logarithm -6931, beyond .*divide all weights"),
        (RANK, {}, WEIGHTS | {"group_id": 1}, "group_id has 1 rows, expected 2"),
    ],
)
def test_what_cannot_be_fused_is_named(kind: FusionKind, changed: Preds, weights: dict[str, Any], message: str) -> None:
    preds = {"click": np.array([0.5, 0.5]), "buy": np.array([0.1, 0.2])} | changed
    weights = dict(weights)
    groups = np.zeros(weights.pop("group_id", 2), dtype=np.int64)
    with pytest.raises(ConfigError, match=message):
        fuse(preds, FusionConfig(kind, weights), group_id=groups)

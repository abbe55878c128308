"""Intervals against brute force, scipy, scikit-learn, and simulations in which the truth is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from rec.curves import exact_curve, expected_calibration_error, group_auc
from rec.intervals import (
    BinaryMeasure,
    CurveMeasure,
    RegressionMeasure,
    TaskRows,
    bootstrap,
    bootstrap_interval,
    delong,
    paired_t,
    t_interval,
)

ALL = ["auc", "expected_auc", "pr_auc", "gauc", "logloss", "ne", "calibration", "ece", "field_ece"]


def two_runs(rng: np.random.Generator, *, num_rows: int, rate: float = -1.0) -> tuple[np.ndarray, np.ndarray]:
    """Scores [2, R] of two runs that share much of their error, with ties, and hard labels [R]."""
    true = rng.normal(size=num_rows) + rate
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-true))).astype(float)
    shared = true + rng.normal(size=num_rows)
    scores = np.stack([shared + rng.normal(size=num_rows), shared + 0.5 * rng.normal(size=num_rows)])
    return np.round(scores, 1), labels


def task_rows(*, seed: int = 0, num_rows: int = 400) -> TaskRows:
    """Rows with ties, uneven weights, three domains, groups of any int64, and a truth that some rows lack."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=num_rows) - 1
    preds = 1 / (1 + np.exp(-true))
    return TaskRows(
        scores=np.round(true + rng.normal(size=num_rows), 1),
        labels=(rng.random(num_rows) < preds).astype(float),
        weights=rng.choice([0.5, 1.0, 2.5], num_rows),
        domain_id=rng.integers(0, 3, num_rows),
        groups=rng.choice(rng.integers(-(2**62), 2**62, 50), num_rows),
        truth=np.where(rng.random(num_rows) < 0.8, preds, np.nan),
    )


# ---- intervals


def test_t_interval_is_that_of_scipy() -> None:
    for df in (3, math.inf):
        interval = t_interval(0.4, standard_error=0.3, level=0.9, df=df)
        assert (interval.low, interval.high) == pytest.approx(stats.t.interval(0.9, df, loc=0.4, scale=0.3))
        assert interval.p_value == pytest.approx(2 * stats.t.cdf(-0.4 / 0.3, df))
        assert not interval.excludes_zero
        assert t_interval(-2, standard_error=0.3, level=0.9, df=df).excludes_zero


@pytest.mark.parametrize(("difference", "p_value"), [(0.0, 1.0), (0.1, 0.0), (-0.1, 0.0)])
def test_a_difference_without_error(difference: float, p_value: float) -> None:
    interval = t_interval(difference, standard_error=0, level=0.95)
    assert (interval.low, interval.high, interval.p_value) == (difference, difference, p_value)
    assert interval.excludes_zero == (difference != 0)


def test_paired_t_is_scipys_paired_test() -> None:
    rng = np.random.default_rng(0)
    reference, candidate = rng.normal(size=5), rng.normal(size=5)
    expected = stats.ttest_rel(candidate, reference)
    interval = paired_t((candidate - reference).tolist(), level=0.9)
    assert interval is not None
    assert interval.p_value == pytest.approx(expected.pvalue)
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval(0.9)))
    assert paired_t([0.1]) is None
    assert paired_t([]) is None


# ---- DeLong


def loop_delong(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUCs and covariance from all pairs of a positive and a negative: the structural components of DeLong's paper."""
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    wins = np.zeros((len(scores), len(positives), len(negatives)))
    for run, of_run in enumerate(scores):
        for i, p in enumerate(positives):
            for j, n in enumerate(negatives):
                wins[run, i, j] = float(of_run[p] > of_run[n]) + 0.5 * float(of_run[p] == of_run[n])
    aucs = wins.mean((1, 2))
    by_positive, by_negative = wins.mean(2) - aucs[:, None], wins.mean(1) - aucs[:, None]
    covariance = by_positive @ by_positive.T / (len(positives) - 1) / len(positives)
    return aucs, covariance + by_negative @ by_negative.T / (len(negatives) - 1) / len(negatives)


@pytest.mark.parametrize("num_runs", [1, 2, 3])
def test_delong_equals_all_pairs(num_runs: int) -> None:
    scores, labels = two_runs(np.random.default_rng(num_runs), num_rows=90)
    scores = np.concatenate([scores, -scores])[:num_runs]
    outcome = delong(scores, labels=labels)
    aucs, covariance = loop_delong(scores, labels)
    assert outcome is not None
    assert outcome.aucs == pytest.approx(aucs, rel=1e-12)
    assert outcome.aucs == pytest.approx([roc_auc_score(labels, z) for z in scores], rel=1e-12)
    assert outcome.covariance == pytest.approx(covariance, rel=1e-12)


def test_delongs_interval_is_that_of_its_covariance() -> None:
    scores, labels = two_runs(np.random.default_rng(0), num_rows=500)
    outcome = delong(np.concatenate([scores, -scores[:1]]), labels=labels)
    assert outcome is not None
    c = outcome.covariance
    error = math.sqrt(c[1, 1] + c[0, 0] - 2 * c[0, 1])
    interval = outcome.interval(1, level=0.9)
    assert interval.difference == pytest.approx(roc_auc_score(labels, scores[1]) - roc_auc_score(labels, scores[0]))
    assert (interval.high - interval.low) / 2 == pytest.approx(1.6448536 * error)
    opposite = outcome.interval(0, reference=1, level=0.9)
    assert (opposite.low, opposite.high) == pytest.approx((-interval.high, -interval.low))
    same = outcome.interval(1, reference=1)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


@pytest.mark.parametrize("labels", [[], [0, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]])
def test_delong_needs_two_of_each_class(labels: list[int]) -> None:
    assert delong(np.zeros((2, len(labels))), labels=np.array(labels, float)) is None


def test_delong_agrees_with_a_large_bootstrap() -> None:
    scores, labels = two_runs(np.random.default_rng(3), num_rows=1000)
    measures = [BinaryMeasure(plain_rows(z, labels), metrics=["auc"]) for z in scores]
    draws = bootstrap(measures, groups=np.arange(1000), replicates=2000)[:, :, 0]
    outcome = delong(scores, labels=labels)
    assert outcome is not None
    assert np.cov(draws.T) == pytest.approx(outcome.covariance, rel=0.1)
    contrast = outcome.covariance @ [1, -1] @ [1, -1]
    assert np.var(draws[:, 1] - draws[:, 0], ddof=1) == pytest.approx(contrast, rel=0.1)


def plain_rows(scores: np.ndarray, labels: np.ndarray, **more: np.ndarray | None) -> TaskRows:
    return TaskRows(scores, labels, np.ones(len(labels)), np.zeros(len(labels), np.int64), **more)


def test_intervals_hold_the_true_difference_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    big, big_labels = two_runs(rng, num_rows=400_000)
    truth = roc_auc_score(big_labels, big[1]) - roc_auc_score(big_labels, big[0])
    held = np.zeros(2)
    for seed in range(150):
        scores, labels = two_runs(rng, num_rows=300)
        outcome = delong(scores, labels=labels)
        assert outcome is not None
        measures = [BinaryMeasure(plain_rows(z, labels), metrics=["auc"]) for z in scores]
        draws = bootstrap(measures, groups=np.arange(300), replicates=60, seed=seed)[:, :, 0]
        closed = outcome.interval(1, level=0.8)
        drawn = bootstrap_interval(closed.difference, replicates=draws[:, 1] - draws[:, 0], num_groups=300, level=0.8)
        assert drawn is not None
        held += [closed.low <= truth <= closed.high, drawn.low <= truth <= drawn.high]
    assert held / 150 == pytest.approx(0.8, abs=0.1)  # three standard deviations of a share of 150


# ---- bootstrap


def test_every_run_sees_the_same_draw_of_whole_groups() -> None:
    groups = np.array([7, -3, 7, 2**62, -3, 7])
    seen: list[list[np.ndarray]] = [[], []]

    def spy(run: int) -> Callable[[np.ndarray], list[float | None]]:
        def measure(counts: np.ndarray) -> list[float | None]:
            seen[run].append(counts)
            return [float(counts.sum()), None]

        return measure

    values = bootstrap([spy(0), spy(1)], groups=groups, replicates=500, seed=1)
    assert values.shape == (500, 2, 2)
    assert np.isnan(values[:, :, 1]).all()
    counts = np.array(seen[0])
    assert (counts == seen[1]).all()
    assert (counts[:, 0] == counts[:, 2]).all() and (counts[:, 1] == counts[:, 4]).all()
    assert (counts[:, [0, 1, 3]].sum(1) == 3).all()  # three groups, three draws
    assert counts[:, [0, 1, 3]].var(0) == pytest.approx(3 * (1 / 3) * (2 / 3), abs=0.15)  # multinomial
    again = bootstrap([spy(0)], groups=groups, replicates=500, seed=1)
    assert (again[:, 0, 0] == values[:, 0, 0]).all()
    assert (bootstrap([spy(0)], groups=groups, replicates=500, seed=2)[:, 0, 0] != values[:, 0, 0]).any()


def test_the_bootstrap_of_a_mean_has_its_standard_error() -> None:
    rng = np.random.default_rng(0)
    errors = rng.normal(size=200)
    rows = plain_rows(errors, np.zeros(200))
    draws = bootstrap([RegressionMeasure(rows, metrics=["mae"])], groups=np.arange(200), replicates=4000)[:, 0, 0]
    interval = bootstrap_interval(0.5, replicates=draws, num_groups=200, level=0.95)
    assert interval is not None
    reach = stats.t.ppf(0.975, 199) * stats.sem(np.abs(errors))
    assert (interval.low, interval.high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=0.05 * reach)


def test_few_groups_widen_the_interval() -> None:
    draws = np.random.default_rng(0).normal(size=300)
    interval = bootstrap_interval(0.5, replicates=draws, num_groups=4, level=0.95)
    assert interval is not None
    reach = stats.t.ppf(0.975, 3) * draws.std(ddof=1) * math.sqrt(4 / 3)  # a draw of 4 varies by 3/4 of their variance
    assert (interval.low, interval.high) == pytest.approx((0.5 - reach, 0.5 + reach))


def test_correlated_rows_of_a_group_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), 20)
    true = rng.normal(size=60)[groups]  # a query's rows are alike
    labels = (rng.random(1200) < 1 / (1 + np.exp(-2 * true))).astype(float)
    rows = plain_rows(true + rng.normal(size=60)[groups], labels)
    measure = BinaryMeasure(rows, metrics=["auc", "calibration"])
    by_group = bootstrap([measure], groups=groups, replicates=300)[:, 0].std(0)
    by_row = bootstrap([measure], groups=np.arange(1200), replicates=300)[:, 0].std(0)
    assert (by_group > 1.5 * by_row).all()


def test_a_metric_that_lacks_a_meaning_in_many_replicates_has_no_interval() -> None:
    draws = np.linspace(0, 1, 100)
    assert bootstrap_interval(0.1, replicates=draws, num_groups=9) is not None
    draws[:5] = np.nan
    few = bootstrap_interval(0.1, replicates=draws, num_groups=9)
    assert few is not None and few.difference == 0.1
    draws[5] = np.nan
    assert bootstrap_interval(0.1, replicates=draws, num_groups=9) is None
    assert bootstrap_interval(0.1, replicates=np.linspace(0, 1, 100), num_groups=1) is None
    assert bootstrap_interval(math.nan, replicates=np.linspace(0, 1, 100), num_groups=9) is None


# ---- metrics of drawn rows


def drawn_rows(rows: TaskRows, counts: np.ndarray) -> TaskRows:
    return rows.select(np.repeat(np.arange(len(counts)), counts.astype(int)))


def test_a_curve_of_counts_is_that_of_repeated_rows() -> None:
    rows, counts = task_rows(), np.random.default_rng(1).integers(0, 3, 400).astype(float)
    curve = CurveMeasure(rows.scores, labels=rows.labels, weights=rows.weights)(counts)
    repeated = drawn_rows(rows, counts)
    expected = exact_curve(repeated.scores, labels=repeated.labels, weights=repeated.weights)
    assert curve == pytest.approx(expected, rel=1e-12)


def loop_expected_auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Over all pairs of rows: how likely the first is positive and the second negative, and is it ranked above?"""
    above = pairs = 0.0
    for z, p, w in zip(scores, truth, weights, strict=True):
        share = w * p * weights * (1 - truth)
        above += float(share @ ((z > scores) + 0.5 * (z == scores)))
        pairs += float(share.sum())
    return above / pairs


@pytest.mark.parametrize("seed", [0, 1])
def test_metrics_of_drawn_rows_are_those_of_repeated_rows(seed: int) -> None:
    rows = task_rows(seed=seed)
    _, place = np.unique(rows.groups, return_inverse=True)
    counts = np.random.default_rng(seed).integers(0, 3, 50)[place].astype(float)  # whole groups
    values = dict(zip(ALL, BinaryMeasure(rows, metrics=ALL, ece_bins=7)(counts), strict=True))
    many = drawn_rows(rows, counts)
    preds = 1 / (1 + np.exp(-many.scores))
    labels, weights = many.labels, many.weights
    assert values["auc"] == pytest.approx(roc_auc_score(labels, preds, sample_weight=weights))
    assert values["pr_auc"] == pytest.approx(average_precision_score(labels, preds, sample_weight=weights))
    assert values["logloss"] == pytest.approx(log_loss(labels, preds, sample_weight=weights))
    rate = np.average(labels, weights=weights)
    assert values["ne"] == pytest.approx(values["logloss"] / stats.entropy([rate, 1 - rate]))
    assert values["calibration"] == pytest.approx((weights @ preds) / (weights @ labels))
    curves = [
        exact_curve(many.scores[of], labels=labels[of], weights=weights[of])
        for of in (slice(None), *(many.domain_id == d for d in range(3)))
    ]
    ece, *within = (expected_calibration_error(curve, num_bins=7) for curve in curves)
    assert values["ece"] == pytest.approx(ece)
    shares = np.bincount(many.domain_id, weights)
    assert values["field_ece"] == pytest.approx(np.average(within, weights=shares))
    assert values["field_ece"] != pytest.approx(ece, rel=0.01)
    # group_auc takes repeats of a group as one, and so weighs it by all of them
    assert [values["gauc"]] == pytest.approx(
        group_auc(many.groups, scores=many.scores, labels=labels, weights=weights), rel=1e-12
    )
    known = ~np.isnan(many.truth)
    assert values["expected_auc"] == pytest.approx(
        loop_expected_auc(many.scores[known], many.truth[known], weights[known]), rel=1e-9
    )


def test_expected_auc_is_the_mean_auc_of_many_draws_of_the_labels() -> None:
    rng = np.random.default_rng(0)
    truth = 1 / (1 + np.exp(1 - rng.normal(size=3000)))
    scores = truth + 0.3 * rng.normal(size=3000)
    (expected,) = BinaryMeasure(plain_rows(scores, np.zeros(3000), truth=truth), metrics=["expected_auc"])(
        np.ones(3000)
    )
    aucs = [roc_auc_score(rng.random(3000) < truth, scores) for _ in range(60)]
    assert expected == pytest.approx(np.mean(aucs), abs=4 * np.std(aucs) / math.sqrt(60))


def test_metrics_that_rows_do_not_have_are_none() -> None:
    rows = plain_rows(np.zeros(3), np.array([0.0, 1, 1]))
    assert BinaryMeasure(rows, metrics=["gauc", "expected_auc"])(np.ones(3)) == [None, None]
    nothing = plain_rows(np.zeros(0), np.zeros(0), groups=np.zeros(0, np.int64), truth=np.zeros(0))
    assert BinaryMeasure(nothing, metrics=ALL)(np.zeros(0)) == [None] * len(ALL)
    assert BinaryMeasure(task_rows(), metrics=ALL)(np.zeros(400)) == [None] * len(ALL)
    assert RegressionMeasure(nothing, metrics=["mae", "rmse", "calibration"])(np.zeros(0)) == [None] * 3
    assert bootstrap([BinaryMeasure(nothing, metrics=ALL)], groups=np.zeros(0), replicates=3).shape == (3, 1, len(ALL))


def test_regression_metrics_of_drawn_rows() -> None:
    rows, counts = task_rows(), np.random.default_rng(1).integers(0, 3, 400).astype(float)
    mae, rmse, calibration, num_rows = RegressionMeasure(rows, metrics=["mae", "rmse", "calibration", "rows"])(counts)
    many = drawn_rows(rows, counts)
    error = many.scores - many.labels
    assert mae == pytest.approx(np.average(abs(error), weights=many.weights))
    assert rmse == pytest.approx(math.sqrt(np.average(error**2, weights=many.weights)))
    assert calibration == pytest.approx((many.weights @ many.scores) / (many.weights @ many.labels))
    assert num_rows == len(many.labels)

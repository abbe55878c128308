"""The pure functions of curves, groups and sums against scikit-learn and loops."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from rec.curves import (
    BINARY_METRICS,
    REGRESSION_METRICS,
    TRUTH_METRICS,
    auc,
    average_precision,
    binary_metrics,
    exact_curve,
    expected_calibration_error,
    group_auc,
    regression_metrics,
    truth_metrics,
)


def loop_ece(logits, labels, weights, *, num_bins: int) -> float:
    """Row by row, equal logits sharing their gap evenly; a row is cut where a bin ends."""
    preds = 1 / (1 + np.exp(-logits))
    tied = {z: ((weights * (preds - labels))[logits == z].sum(), weights[logits == z].sum()) for z in np.unique(logits)}
    capacity = weights.sum() / num_bins
    gaps, bin_, room = np.zeros(num_bins + 1), 0, capacity
    for gap, weight in tied.values():
        left = weight
        while left > 1e-12:
            part = min(left, room)
            gaps[bin_] += gap * part / weight
            left, room = left - part, room - part
            if room <= 1e-9:
                bin_, room = bin_ + 1, capacity
    return float(np.abs(gaps).sum() / weights.sum())


def loop_gauc(logits, labels, weights, groups) -> float:
    total = share = 0.0
    for group in np.unique(groups):
        z, y, w = (x[groups == group] for x in (logits, labels, weights))
        if 0 < y.sum() < len(y):
            total += w.sum() * roc_auc_score(y, z, sample_weight=w)
            share += w.sum()
    return total / share


def make_rows(num_rows: int, *, seed: int = 0) -> dict[str, np.ndarray]:
    """Float64 scores with ties, hard labels that they predict, uneven weights."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=num_rows) - 1
    scores = true + rng.normal(size=num_rows)
    scores[::3] = np.round(scores[::3])
    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-true))).astype(float)
    return {"scores": scores, "labels": labels, "weights": rng.choice([0.5, 1.0, 2.5], num_rows)}


@pytest.mark.parametrize("seed", range(3))
def test_ranking_equals_scikit_learn(seed: int) -> None:
    rows = make_rows(1000, seed=seed)
    curve, weights = exact_curve(**rows), rows["weights"]
    assert curve.shape == (3, len(np.unique(rows["scores"])))
    for ours, theirs in ((auc, roc_auc_score), (average_precision, average_precision_score)):
        assert ours(curve) == pytest.approx(theirs(rows["labels"], rows["scores"], sample_weight=weights), rel=1e-12)


def test_curve_sums_rows_by_score() -> None:
    rows = make_rows(500)
    preds = 1 / (1 + np.exp(-rows["scores"]))
    sums = {score: np.zeros(3) for score in sorted(rows["scores"])}
    for score, label, weight, pred in zip(*rows.values(), preds, strict=True):
        sums[score] += np.array([weight * (1 - label), weight * label, weight * pred])
    np.testing.assert_allclose(exact_curve(**rows), np.stack(list(sums.values()), axis=1), rtol=1e-12)


def test_curve_of_far_logits_does_not_overflow() -> None:
    curve = exact_curve(np.array([-1e30, -800.0, 800.0, 1e30]), labels=np.array([0.0, 1, 0, 1]), weights=np.ones(4))
    np.testing.assert_array_equal(curve[2], [0, 0, 1, 1])
    assert auc(curve) == 0.75


@pytest.mark.parametrize("num_bins", [1, 7, 20, 2000])
def test_expected_calibration_error_equals_a_loop(num_bins: int) -> None:
    rows = make_rows(1000)
    error = expected_calibration_error(exact_curve(**rows), num_bins=num_bins)
    assert error == pytest.approx(loop_ece(*rows.values(), num_bins=num_bins), rel=1e-6)


def test_soft_labels_are_a_positive_and_a_negative() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=500), rng.random(500)
    curve = exact_curve(scores, labels=labels, weights=np.ones(500))
    hard, both = np.repeat([1, 0], 500), np.concatenate([scores, scores])
    weights = np.concatenate([labels, 1 - labels])
    assert auc(curve) == pytest.approx(roc_auc_score(hard, both, sample_weight=weights), rel=1e-9)
    assert average_precision(curve) == pytest.approx(
        average_precision_score(hard, both, sample_weight=weights), rel=1e-9
    )


def test_group_auc_equals_a_loop_over_all_rows_and_in_each_domain() -> None:
    rng, rows = np.random.default_rng(0), make_rows(1000)
    groups = rng.choice(rng.integers(-(2**62), 2**62, 60), 1000)  # hashes: any int64
    domain_id = rng.integers(0, 3, 1000)
    assert group_auc(groups, **rows) == [pytest.approx(loop_gauc(*rows.values(), groups), rel=1e-12)]
    *values, never = group_auc(groups, **rows, domain_id=domain_id, num_domains=4)
    for d, value in enumerate(values):
        part = [x[domain_id == d] for x in (*rows.values(), groups)]
        assert value == pytest.approx(loop_gauc(*part), rel=1e-12)
    assert never is None


def test_group_auc_without_rows_or_without_both_classes_is_none() -> None:
    nothing = {"scores": np.zeros(0), "labels": np.zeros(0), "weights": np.zeros(0)}
    no_id = np.zeros(0, np.int64)
    assert group_auc(no_id, **nothing) == [None]
    assert group_auc(no_id, **nothing, domain_id=no_id, num_domains=2) == [None, None]
    rows = {"scores": np.arange(4.0), "labels": np.array([0.0, 0, 1, 1]), "weights": np.ones(4)}
    assert group_auc(np.array([0, 0, 1, 1]), **rows) == [None]


@pytest.mark.parametrize(("labels", "expected_ece"), [([], None), ([0, 0], 0.5), ([1, 1], 0.5)])
def test_a_curve_without_meaning_is_none(labels: list[int], expected_ece: float | None) -> None:
    curve = exact_curve(np.zeros(len(labels)), labels=np.array(labels, float), weights=np.ones(len(labels)))
    assert auc(curve) is None
    assert average_precision(curve) is None
    assert expected_calibration_error(curve, num_bins=3) == expected_ece


def totals(rows: dict[str, np.ndarray]) -> dict[str, float]:
    scores, labels, weights = rows.values()
    preds = 1 / (1 + np.exp(-scores))
    bce = np.logaddexp(0, scores) - scores * labels
    sums = {"labels": labels, "preds": preds, "logloss": bce, "absolute_error": abs(preds - labels)}
    sums = {name: float(weights @ x) for name, x in (sums | {"squared_error": (preds - labels) ** 2}).items()}
    rows_and_positives = {"rows": float(len(labels)), "positives": float(labels.sum())}
    return {**rows_and_positives, "weight": float(weights.sum()), **sums}


def test_binary_metrics_of_sums() -> None:
    rows, best = make_rows(1000), make_rows(1000) | {"scores": make_rows(1000)["labels"]}
    curve = exact_curve(**rows)
    values = binary_metrics(totals(rows), curve=curve, truth=exact_curve(**best), gauc=0.6, ece_bins=20)
    assert tuple(values) == BINARY_METRICS + TRUTH_METRICS
    assert tuple(binary_metrics(totals(rows), curve=curve)) == BINARY_METRICS
    labels, weights, preds = rows["labels"], rows["weights"], 1 / (1 + np.exp(-rows["scores"]))
    rate, logloss = np.average(labels, weights=weights), log_loss(labels, preds, sample_weight=weights)
    entropy = -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    assert values["logloss"] == pytest.approx(logloss, rel=1e-9)
    assert values["ne"] == pytest.approx(logloss / entropy, rel=1e-9)
    assert values["calibration"] == pytest.approx((weights * preds).sum() / (weights * labels).sum(), rel=1e-9)
    assert values["auc_truth"] == pytest.approx(1)
    assert values["gap_closed"] == pytest.approx(2 * auc(curve) - 1)
    assert (values["gauc"], values["rows"], values["positives"]) == (0.6, 1000, int(labels.sum()))


def test_positives_of_soft_labels_are_not_whole() -> None:
    rows = make_rows(10) | {"labels": np.full(10, 0.25)}
    assert binary_metrics(totals(rows), curve=exact_curve(**rows))["positives"] == 2.5


def test_regression_metrics_of_sums() -> None:
    rows = make_rows(300)
    values = regression_metrics(totals(rows))
    error = 1 / (1 + np.exp(-rows["scores"])) - rows["labels"]
    assert tuple(values) == REGRESSION_METRICS
    assert values["mae"] == pytest.approx(np.average(abs(error), weights=rows["weights"]))
    assert values["rmse"] == pytest.approx(math.sqrt(np.average(error**2, weights=rows["weights"])))
    assert regression_metrics(dict.fromkeys(totals(rows), 0.0)) == dict.fromkeys(REGRESSION_METRICS) | {"rows": 0}


@pytest.mark.parametrize(("ours", "best"), [(None, 0.9), (0.7, None), (0.5, 0.5), (0.4, 0.3)])
def test_no_gap_to_close(ours: float | None, best: float | None) -> None:
    assert truth_metrics(ours, auc_truth=best) == {"auc_truth": best, "gap_closed": None}

"""Metrics as pure functions: of a curve of scores, of rows in groups, of sums over rows. numpy in, plain numbers out.

With w > 0 the weight of a row, p its predicted probability, and y its label in [0, 1], a soft label being y of a positive
and 1 - y of a negative:

- `auc`: chance that a random positive is ranked above a random negative, ties half; `pr_auc`: average precision
- `logloss`: sum(w * bce) / sum(w), natural logarithm; `ne`: logloss over the entropy of the base rate, which is
  sum(wy) / sum(w)
- `calibration`: sum(wp) / sum(wy), ideally 1
- `ece`: sum over `ece_bins` bins of equal weight, in the order of p, of |sum(wp) - sum(wy)| over sum(w), ideally 0.
  Rows of one logit, or of one bin of a histogram, are taken as alike and shared out between two bins
- `field_ece`: mean over domains of the ECE within each, weighted by their weight; it sees a domain that is too high and another
  that is too low, which the ECE of all rows does not
- `gauc`: mean AUC of the groups that hold positives and negatives, weighted by the group's weight. In a domain, the same
  among the domain's rows
- `rows`: rows of weight > 0; `positives`: the sum of their labels, unweighted
- `auc_truth`, `gap_closed`: where the true probability is known, its AUC, and (auc - .5) / (auc_truth - .5), the share
  that was learned of what can be known
- `mae`, `rmse`, `calibration`, `rows`: of a regression task, in the space in which the labels arrive

A metric without meaning (no rows, no positives, no negatives, no entropy) is None.
"""

import math
from collections.abc import Sequence

import numpy as np

Array = np.ndarray
# [3, K] float64, a column for each score, ascending: weight of negatives, of positives, weighted sum of preds. The bins of
# a histogram are one, too.
Curve = np.ndarray
MetricValues = dict[str, float | int | None]  # name of a metric -> its value, None where it has no meaning

BINARY_METRICS = ("auc", "pr_auc", "logloss", "ne", "calibration", "ece", "field_ece", "gauc", "rows", "positives")
TRUTH_METRICS = ("auc_truth", "gap_closed")  # of a binary task whose true probability is known
REGRESSION_METRICS = ("mae", "rmse", "calibration", "rows")


# ---- of a curve


def exact_curve(scores: Array, *, labels: Array, weights: Array) -> Curve:
    """The curve of rows with logits `scores`, labels in [0, 1] and `weights`, each [N], without binning."""
    distinct, place = np.unique(scores, return_inverse=True)
    preds = np.exp(-np.logaddexp(0, -distinct))  # the sigmoid, without overflow
    sums = [np.bincount(place, x, minlength=len(distinct)) for x in (weights * (1 - labels), weights * labels, weights)]
    return np.stack([sums[0], sums[1], sums[2] * preds])


def auc(curve: Curve) -> float | None:
    """Area under the ROC curve: positives ranked above negatives, ties half; None without one or the other.

    >>> auc(exact_curve(np.array([1.0, 2.0, 2.0]), labels=np.array([0.0, 0.0, 1.0]), weights=np.ones(3)))
    0.75
    """
    negatives, positives, _ = curve
    below = negatives.cumsum() - negatives / 2
    return _ratio(float(positives @ below), float(positives.sum() * negatives.sum()))


def average_precision(curve: Curve) -> float | None:
    """Sum of precision times the gain in recall, down the scores; as in scikit-learn. None without both classes.

    >>> average_precision(exact_curve(np.array([1.0, 2.0, 3.0]), labels=np.array([1.0, 0.0, 1.0]), weights=np.ones(3)))
    0.8333333333333333
    """
    negatives, positives, _ = curve[:, ::-1]
    total = float(positives.sum()) if negatives.any() else 0.0
    precision = positives.cumsum() / (positives + negatives).cumsum()
    return _ratio(float(precision @ positives), total)


def expected_calibration_error(curve: Curve, *, num_bins: int) -> float | None:
    """Mean distance between predicted and true rate over `num_bins` bins of equal weight; None without rows."""
    negatives, positives, preds = np.pad(curve, ((0, 0), (1, 0)))
    weight, gap = (negatives + positives).cumsum(), (preds - positives).cumsum()
    ends = np.linspace(0, weight[-1], num_bins + 1)
    return _ratio(float(np.abs(np.diff(np.interp(ends, weight, gap))).sum()), float(weight[-1]))


def field_ece(eces: Sequence[float | None], shares: Sequence[float]) -> float | None:
    """Mean of the domains' expected calibration errors, weighted by their `shares` of the weight; None without rows.

    >>> field_ece([0.25, 0.5, None], [3.0, 1.0, 0.0])
    0.3125
    """
    known = [(ece, share) for ece, share in zip(eces, shares, strict=True) if ece is not None]
    return _ratio(sum(ece * share for ece, share in known), sum(share for _, share in known))


# ---- of rows in groups


def group_auc(
    groups: Array,
    *,
    scores: Array,
    labels: Array,
    weights: Array,
    domain_id: Array | None = None,
    num_domains: int = 1,
) -> list[float | None]:
    """Mean AUC of the groups of each domain, 0 to 1, weighted by their weight; None where no group holds both classes.

    Args:
        groups: [R] integer, any value.
        scores: [R] float, any that rank.
        labels: [R] float, 0 to 1.
        weights: [R] float, above 0.
        domain_id: [R] int64, 0 to num_domains - 1; None takes all rows as one domain. Rows of one group in two domains
            are two groups.
        num_domains: length of the outcome.

    >>> rows = {"scores": np.arange(5.0), "labels": np.array([0.0, 1, 1, 0, 1]), "weights": np.ones(5)}
    >>> group_auc(np.array([7, 7, 8, 8, 9]), **rows)
    [0.5]
    >>> group_auc(np.array([7, 7, 8, 8, 9]), **rows, domain_id=np.array([0, 0, 1, 1, 2]), num_domains=3)
    [1.0, 0.0, None]
    """
    place = np.unique(groups, return_inverse=True)[1]
    if domain_id is not None:
        place = place * num_domains + domain_id
    groups, place = np.unique(place, return_inverse=True)
    area, positives, negatives = _areas(place, scores=scores, labels=labels, weights=weights)
    both = positives * negatives > 0
    share, domain = (positives + negatives)[both], groups[both] % num_domains
    aucs = area[both] / (positives * negatives)[both]
    sums = (np.bincount(domain, x, minlength=num_domains).tolist() for x in (aucs * share, share))
    return [_ratio(total, weight) for total, weight in zip(*sums, strict=True)]


def _areas(groups: Array, *, scores: Array, labels: Array, weights: Array) -> Array:
    """Area under the ROC curve, not yet normed, and weight of positives and negatives [3, G] of `groups` 0 to G - 1."""
    order = np.lexsort((scores, groups))
    groups, scores, labels, weights = groups[order], scores[order], labels[order], weights[order]
    new = np.ones(len(groups), dtype=bool)  # starts of runs of the same group and score, whose ties count half
    new[1:] = (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])
    run, owner = new.cumsum() - 1, groups[new]
    positives, negatives = np.bincount(run, weights * labels), np.bincount(run, weights * (1 - labels))
    num_positives, num_negatives = np.bincount(owner, positives), np.bincount(owner, negatives)
    below = negatives.cumsum() - negatives / 2 - (num_negatives.cumsum() - num_negatives)[owner]
    return np.stack([np.bincount(owner, positives * below), num_positives, num_negatives])


# ---- of sums over rows


def binary_metrics(
    total: dict[str, float],
    *,
    curve: Curve,
    truth: Curve | None = None,
    field_ece: float | None = None,
    gauc: float | None = None,
    ece_bins: int = 20,
) -> MetricValues:
    """`BINARY_METRICS` of rows with the sums `total`, and `TRUTH_METRICS` where there is a truth.

    Args:
        total: `rows` of weight above 0, their `positives`; the sum of `weight`, and of `labels`, `preds` and `logloss`,
            each times weight.
        curve: [3, K] float64, of the predictions.
        truth: [3, K] float64, of the true probabilities.
        field_ece: 0 to 1, passed on.
        gauc: 0 to 1, passed on.
        ece_bins: of `expected_calibration_error`, 1 or more.
    """
    base_rate = _ratio(total["labels"], total["weight"])
    logloss = _ratio(total["logloss"], total["weight"])
    values: MetricValues = {
        "auc": auc(curve),
        "pr_auc": average_precision(curve),
        "logloss": logloss,
        "ne": None if logloss is None or base_rate is None else _ratio(logloss, _entropy(base_rate)),
        "calibration": _ratio(total["preds"], total["labels"]),
        "ece": expected_calibration_error(curve, num_bins=ece_bins),
        "field_ece": field_ece,
        "gauc": gauc,
        "rows": int(total["rows"]),
        "positives": int(total["positives"]) if total["positives"].is_integer() else total["positives"],
    }
    return values if truth is None else values | truth_metrics(values["auc"], auc_truth=auc(truth))


def truth_metrics(auc: float | None, *, auc_truth: float | None) -> MetricValues:
    """`TRUTH_METRICS` of the AUC of the predictions and of the true probabilities, each 0 to 1.

    >>> truth_metrics(0.75, auc_truth=1.0)
    {'auc_truth': 1.0, 'gap_closed': 0.5}
    """
    if auc is None or auc_truth is None or auc_truth <= 0.5:  # nothing there to be learned
        return {"auc_truth": auc_truth, "gap_closed": None}
    return {"auc_truth": auc_truth, "gap_closed": (auc - 0.5) / (auc_truth - 0.5)}


def regression_metrics(total: dict[str, float]) -> MetricValues:
    """`REGRESSION_METRICS` of rows with the sums `total`.

    Args:
        total: `rows` of weight above 0; the sum of `weight`, and of `labels`, `preds`, `absolute_error` and
            `squared_error`, each times weight.
    """
    mean_squared = _ratio(total["squared_error"], total["weight"])
    return {
        "mae": _ratio(total["absolute_error"], total["weight"]),
        "rmse": None if mean_squared is None else math.sqrt(mean_squared),
        "calibration": _ratio(total["preds"], total["labels"]),
        "rows": int(total["rows"]),
    }


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator != 0 else None


def _entropy(rate: float) -> float:
    return -sum(p * math.log(p) for p in (rate, 1 - rate) if p > 0)

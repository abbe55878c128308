"""One score to rank by, out of several tasks' probabilities: a sum, a product of powers, or a sum of ranks.

- weighted_sum: sum_t w_t p_t. The sum of .95 pCTR and .05 pCTCVR is one. A probability a hundred times smaller moves such a
  score a hundred times less than its weight says.
- product: prod_t p_t^{w_t}, as in PLE (Tang et al., RecSys 2020, section 3.1). Only the ratios of a task's probabilities
  matter, so neither its scale nor a factor that its calibration lacks.
- rank: sum_t w_t r_t, r_t the row's rank by task t among the rows of its group (a request), 0 to 1. Only the order of a
  task's probabilities matters. It needs all candidates of the request at once; the other two score each row by itself.

A term of a fusion is a task, or a product of tasks: of a purchase given a click, `click*purchase` is a click with a purchase.
numpy in, numpy out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np
from scipy.special import xlogy

from rec.curves import Array
from rec.schema import ConfigError, nearest

_LARGEST_LOG = 700.0  # beyond it, up or down, exp leaves float64 and rows that differ would tie


class FusionKind(Enum):
    """How terms become one score."""

    weighted_sum = "weighted_sum"  # sum of w p
    product = "product"  # product of p^w
    rank = "rank"  # sum of w r, r the rank within the group, 0 to 1


@dataclass
class FusionConfig:
    """A way to make one score of several tasks.

    A weight below 0 takes away from the score, as a report of abuse should; a product refuses it, since a negative power of a
    probability near 0 grows without bound, and with it the weight of what hardly ever happens.

    Raises:
        ConfigError: no weight is other than 0, or one is not finite, or one of a product is below 0.
    """

    kind: FusionKind
    weights: dict[str, float]  # term (a task, or tasks joined by *) -> its weight in a sum, its power in a product

    def __post_init__(self) -> None:
        for term, weight in self.weights.items():
            if not math.isfinite(weight):
                raise ConfigError(f"the weight of '{term}' is {weight}, expected a finite number")
            if weight < 0 and self.kind is FusionKind.product:
                fix = "choose weighted_sum or rank, or leave it out"
                raise ConfigError(f"the weight of '{term}' is {weight}, of a product expected 0 or more; {fix}")
        if not any(self.weights.values()):
            found = ", ".join(f"{term}={weight:g}" for term, weight in self.weights.items()) or "none"
            raise ConfigError(f"the weights are {found}: give at least one term a weight other than 0")


# ---- scores


def fuse(preds: Mapping[str, Array], config: FusionConfig, *, group_id: Array | None = None) -> Array:
    """The score of each row [B] float64, higher is better.

    Args:
        preds: [B] float by task: probabilities, of a regression the prediction (of a product 0 or more).
        config: kind and weights; tasks that it does not name do not count.
        group_id: [B] integer, any value, of the groups that are ranked by themselves; None ranks all rows together.

    Raises:
        ConfigError: a term names an unknown task, columns differ in length, a value is not finite or, in a product, below 0,
            or the powers of a product are so large that it leaves float64.

    >>> preds = {"click": np.array([0.25, 0.5]), "buy": np.array([0.02, 0.01])}
    >>> fuse(preds, FusionConfig(FusionKind.weighted_sum, {"click": 0.5, "buy": 100.0}))
    array([2.125, 1.25 ])
    >>> fuse(preds, FusionConfig(FusionKind.product, {"click": 0.5, "buy": 1.0})).round(5)
    array([0.01   , 0.00707])
    >>> fuse(preds, FusionConfig(FusionKind.rank, {"click": 0.5, "buy": 1.0}))
    array([1. , 0.5])
    """
    return combine(contributions(preds, config, group_id=group_id), config.kind)


def contributions(
    preds: Mapping[str, Array], config: FusionConfig, *, group_id: Array | None = None
) -> dict[str, Array]:
    """What each term adds to the score, [B] float64 by term; of a product, to its logarithm. As `fuse`.

    >>> contributions({"click": np.array([0.25, 0.5])}, FusionConfig(FusionKind.weighted_sum, {"click": 2.0}))
    {'click': array([0.5, 1. ])}
    """
    terms = {term: term_values(preds, term) for term in config.weights}
    _check_terms(terms, config.kind)
    if config.kind is FusionKind.product:
        return {term: xlogy(config.weights[term], values) for term, values in terms.items()}  # 0 log 0 is 0
    if config.kind is FusionKind.rank:
        terms = {term: group_ranks(values, group_id) for term, values in terms.items()}
    return {term: config.weights[term] * values for term, values in terms.items()}


def combine(parts: Mapping[str, Array], kind: FusionKind) -> Array:
    """The score [B] of what `contributions` gives; `ConfigError` for a product that leaves float64.

    >>> combine({"click": np.log([0.5]), "buy": np.log([0.25])}, FusionKind.product).round(6)
    array([0.125])
    """
    total = _total(parts)
    if kind is not FusionKind.product:
        return total
    finite = total[np.isfinite(total)]  # minus infinity is the logarithm of a true 0
    if np.abs(finite).max(initial=0) > _LARGEST_LOG:
        found = f"a product has the logarithm {finite[np.abs(finite).argmax()]:.0f}, beyond +-{_LARGEST_LOG:.0f}"
        raise ConfigError(f"{found}: divide all weights by the same number, which leaves the order as it is")
    return np.exp(total)


def term_values(preds: Mapping[str, Array], term: str) -> Array:
    """A task's values [B] float64, or the product of those of tasks joined by `*`; `ConfigError` for an unknown one.

    >>> term_values({"click": np.array([0.5]), "buy": np.array([0.5])}, "click*buy")
    array([0.25])
    """
    tasks = [term] if term in preds else [name.strip() for name in term.split("*")]
    for task in tasks:
        if task not in preds:
            raise ConfigError(f"the weights name '{task}', which is no task: {nearest(task, preds)}")
    lengths = {task: len(preds[task]) for task in preds}
    if len(set(lengths.values())) > 1:
        raise ConfigError(f"the predictions differ in length: {lengths}; give the same rows of each task")
    return np.prod([np.asarray(preds[task], dtype=np.float64) for task in tasks], axis=0)


def group_ranks(values: Array, group_id: Array | None = None) -> Array:
    """The rank of each row by `values` [B] within its group, [B] float64: 0 the lowest, 1 the highest.

    Equal values share the mean of their ranks; the row of a group of one gets .5, so does every row where all are equal.

    >>> group_ranks(np.array([3.0, 1.0, 3.0, 9.0, 4.0, 8.0]), np.array([7, 7, 7, 7, 5, 6]))
    array([0.5, 0. , 0.5, 1. , 0.5, 0.5])
    """
    group = _groups(group_id, len(values))
    order = np.lexsort((values, group))
    values, group = values[order], group[order]
    new = np.ones(len(values), dtype=bool)  # starts of runs of the same group and value
    new[1:] = (group[1:] != group[:-1]) | (values[1:] != values[:-1])
    starts = np.flatnonzero(new)
    middle = (starts + np.append(starts[1:], len(values)) - 1) / 2  # of each run, its mean place among all rows
    sizes = np.bincount(group)
    place = middle[new.cumsum() - 1] - (sizes.cumsum() - sizes)[group]
    others = sizes[group] - 1
    ranks = np.empty(len(values))
    ranks[order] = np.where(others > 0, place / np.maximum(others, 1), 0.5)
    return ranks


# ---- who moves the score


def variance_shares(parts: Mapping[str, Array], group_id: Array | None = None) -> dict[str, float | None]:
    """Share of the score's variance within groups that each term brings; they add up to 1.

    The covariance of the term's contribution with the score, over the variance of the score, both around the groups' means:
    differences between groups do not reorder any. A term that pulls against the rest has a share below 0. None where the
    score does not vary within groups, or is minus infinity (a product with a 0) somewhere.

    Args:
        parts: [B] float64 by term, as `contributions` gives them.
        group_id: [B] integer; None takes all rows as one group.

    >>> variance_shares({"click": np.array([0.0, 3.0, 9.0]), "buy": np.array([0.0, 1.0, 9.0])}, np.array([1, 1, 2]))
    {'click': 0.75, 'buy': 0.25}
    """
    total = _total(parts)
    if not np.isfinite(total).all():
        return dict.fromkeys(parts)
    group = _groups(group_id, len(total))
    within = _around_means(total, group)
    variance = float(within @ within)
    largest = max(float(np.abs(values).max(initial=0)) for values in parts.values())
    if variance <= len(total) * (8 * np.finfo(np.float64).eps * largest) ** 2:  # rounding, no more
        return dict.fromkeys(parts)
    return {term: float(_around_means(values, group) @ within) / variance for term, values in parts.items()}


def _around_means(values: Array, group: Array) -> Array:
    """Values [B] less the mean of their group."""
    return values - (np.bincount(group, values) / np.maximum(np.bincount(group), 1))[group]


def _groups(group_id: Array | None, num_rows: int) -> Array:
    """Groups [B] int64, numbered from 0 without gaps."""
    if group_id is None:
        return np.zeros(num_rows, dtype=np.int64)
    if len(group_id) != num_rows:
        raise ConfigError(f"group_id has {len(group_id)} rows, expected {num_rows}: one a prediction")
    return np.unique(group_id, return_inverse=True)[1]


def _total(parts: Mapping[str, Array]) -> Array:
    return np.sum([*parts.values()], axis=0)


def _check_terms(terms: Mapping[str, Array], kind: FusionKind) -> None:
    """Raise `ConfigError` where a value cannot be fused."""
    lowest = 0.0 if kind is FusionKind.product else -math.inf
    expected = "finite and 0 or more in a product" if kind is FusionKind.product else "finite"
    for term, values in terms.items():
        wrong = np.flatnonzero(~np.isfinite(values) | (values < lowest))
        if wrong.size:
            found = f"'{term}' is {values[wrong[0]]:g} in row {wrong[0]} ({wrong.size:,} such rows)"
            raise ConfigError(f"{found}, expected {expected}; leave the task out, or mend its predictions")

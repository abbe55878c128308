"""How far predicted probabilities and rates are apart, in bins for people to read."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from rec.platt import over_ranks
from rec.predictions import Rows

_FINE_BINS = 2**16  # of logits over all ranks, from which coarser bins are cut


@dataclass
class Reliability:
    """Bins of equal weight, in the order of the predictions: rows of each, their mean prediction and rate, all [bins]."""

    rows: list[float]
    mean_pred: list[float]
    rate: list[float]


def reliability(rows: Rows, task: int, *, num_bins: int = 10) -> Reliability:
    """How predictions and rates compare over the rows of all ranks; empty without rows. A collective.

    Rows of one logit are taken as alike and shared out between two bins.

    Args:
        rows: of this rank.
        task: index of a binary task.
        num_bins: 1 or more.
    """
    sums = _fine_bins(rows, task)
    if not sums[0].any():
        return Reliability([], [], [])
    reached = np.pad(sums.cumsum(1), ((0, 0), (1, 0)))
    ends = np.linspace(0, reached[0, -1], num_bins + 1)
    weight, count, preds, positives = (np.diff(np.interp(ends, reached[0], each)) for each in reached)
    return Reliability(count.tolist(), (preds / weight).tolist(), (positives / weight).tolist())


def _fine_bins(rows: Rows, task: int) -> np.ndarray:
    """Weight, rows, weight times prediction and weight times label [4, bins] of fine bins of logits, over all ranks."""
    counts = rows.weights[:, task] > 0
    logits, labels, weights = (x[counts, task].double() for x in (rows.logits, rows.labels, rows.weights))
    far = torch.stack([-logits.min(), logits.max()]) if len(logits) else torch.full((2,), -torch.inf).double()
    if dist.is_initialized():
        dist.all_reduce(far, op=dist.ReduceOp.MAX)
    low, high = -far[0], far[1]
    place = ((logits - low) / (high - low).clamp(min=1e-12) * (_FINE_BINS - 1)).long()
    values = torch.stack([weights, torch.ones_like(weights), weights * logits.sigmoid(), weights * labels])
    sums = torch.zeros(4, _FINE_BINS, dtype=torch.float64).scatter_add_(1, place.expand_as(values), values)
    return over_ranks(sums).numpy()

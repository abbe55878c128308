"""Monotone curves from logits to logits, fitted to labels by least squares without a form in mind.

Rows in the order of their logits are pooled into blocks of equal rate (`scipy.optimize.isotonic_regression`). The curve is
level within a block, so that its mean over the fitted rows is their rate, and linear in logits from one block to the next.
Rows of one block become ties; a line (`rec/platt.py`) keeps their order. Rates of 0 and 1 are drawn in to Platt's targets
1 / (N- + 2) and (N+ + 1) / (N+ + 2), N+ and N- being the weight of positives and negatives.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import isotonic_regression
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from rec.predictions import Rows


@dataclass
class Knots:
    """A curve through `calibrated` logits at `logits`, [K], which never falls; none where the labels are of one kind.

    Attributes:
        rows: of weight above 0.
        labels: their sum.
    """

    rows: int
    labels: float
    logits: list[float] = field(default_factory=list)
    calibrated: list[float] = field(default_factory=list)


@dataclass
class Curves:
    """The curve of all rows and that of each domain, [D]."""

    overall: Knots
    domains: list[Knots]


def fit_knots(rows: Rows, task: int, *, num_domains: int, min_positives: int) -> Curves:
    """Curves of a task over the rows of all ranks, which are gathered on every rank, 32 bytes each. A collective.

    Args:
        rows: of this rank.
        task: index of the task.
        num_domains: D; 0 fits no domain.
        min_positives: positives that a domain's curve needs; with fewer it has no knots.
    """
    counts = rows.weights[:, task] > 0
    own = torch.stack([x[counts, task].double() for x in (rows.logits, rows.labels, rows.weights)], dim=1)
    values, domain = _gathered(own), _gathered(rows.domain_id[counts])
    domains = [_knots(values[domain == d], min_positives=min_positives) for d in range(num_domains)]
    return Curves(_knots(values, min_positives=0), domains)


def _knots(values: np.ndarray, *, min_positives: int) -> Knots:
    """The curve of rows with logit, label and weight [N, 3] float64."""
    logits, labels, weights = values.T
    found = Knots(rows=len(values), labels=float(labels.sum()))
    positives, negatives = float(weights @ labels), float(weights @ (1 - labels))
    if positives <= 0 or negatives <= 0 or found.labels < min_positives:
        return found
    distinct, place = np.unique(logits, return_inverse=True)  # rows of one logit get one value
    weight = np.bincount(place, weights)
    fitted = isotonic_regression(np.bincount(place, weights * labels) / weight, weights=weight)
    ends = np.unique(
        [fitted.blocks[:-1], fitted.blocks[1:] - 1]
    )  # first and last logit of each block, once if the same
    rates = np.clip(fitted.x[ends], 1 / (negatives + 2), (positives + 1) / (positives + 2))
    found.logits, found.calibrated = distinct[ends].tolist(), (np.log(rates) - np.log1p(-rates)).tolist()
    return found


def _gathered(values: Tensor) -> np.ndarray:
    """The rows of all ranks, of which each gives another number."""
    return torch.cat(gather_all_tensors(values) if dist.is_initialized() else [values]).numpy()

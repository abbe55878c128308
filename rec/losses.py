"""Logits, labels and weights become one loss a task, normalised over the global batch.

The mean of a task over its rows is a sum over all ranks divided by the task's weight over all ranks. A mean taken on each
rank and averaged is another number as soon as ranks hold different numbers of rows that count, as with purchases given a click.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rec.hashing import uniform
from rec.schema import TaskConfig, TaskKind


@dataclass
class Losses:
    """This rank's share of a step's losses; over all ranks the shares add up to the losses.

    Attributes:
        total: scalar, the sum of `weighted`.
        weighted: [T], loss_weight times each task's mean loss, differentiable.
        by_task: [T], unweighted mean loss of each task; 0 where a task has no rows in the step.
    """

    total: Tensor
    weighted: Tensor
    by_task: Tensor


class MultitaskLoss(nn.Module):
    """sum_t loss_weight_t * sum_b w_bt l_bt / sum_b w_bt, l being binary cross-entropy or squared error.

    A task's positives count `positive_weight` times in the numerator.
    """

    loss_weights: Tensor
    positive_weights: Tensor

    def __init__(self, tasks: dict[str, TaskConfig]) -> None:
        super().__init__()
        self.kinds = [task.kind for task in tasks.values()]
        self.kept = [task.negatives_kept for task in tasks.values()]
        self.register_buffer("loss_weights", torch.tensor([task.loss_weight for task in tasks.values()]))
        self.register_buffer("positive_weights", torch.tensor([task.positive_weight for task in tasks.values()]))

    def sampled(self, labels: Tensor, weights: Tensor, draws: Tensor) -> Tensor:
        """The weights [B, T] with those of the negatives that a task leaves out in this step set to 0.

        Args:
            labels: [B, T].
            weights: [B, T], >= 0.
            draws: [B, 2] int64, random bits of row and step; the same rows are left out on any number of ranks.
        """
        if all(share == 1 for share in self.kept):
            return weights
        chances = torch.stack([uniform(draws[:, 0], salt=-1 - t) for t in range(len(self.kept))], dim=1)
        left_out = (chances >= chances.new_tensor(self.kept)) & (labels == 0)
        return weights.masked_fill(left_out, 0.0)

    def forward(self, logits: Tensor, labels: Tensor, weights: Tensor, global_weights: Tensor) -> Losses:
        """Losses of this rank's rows.

        Args:
            logits: [B, T].
            labels: [B, T].
            weights: [B, T], >= 0.
            global_weights: [T], the sum of `weights` over the rows of all ranks.
        """
        losses = torch.stack([self._row_losses(k, logits[:, k], labels[:, k]) for k in range(len(self.kinds))], dim=1)
        row_weights = weights * torch.lerp(torch.ones_like(labels), self.positive_weights.expand_as(labels), labels)
        sums = torch.where(weights > 0, losses * row_weights, 0.0).sum(dim=0)
        by_task = sums / torch.where(global_weights > 0, global_weights, 1.0)
        weighted = by_task * self.loss_weights
        return Losses(weighted.sum(), weighted, by_task.detach())

    def _row_losses(self, task: int, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kinds[task] is TaskKind.regression:
            return F.mse_loss(logits, labels, reduction="none")
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none")

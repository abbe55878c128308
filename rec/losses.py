"""Logits, labels and weights become one loss a task, normalised over the global batch.

The mean of a task over its rows is a sum over all ranks divided by the task's weight over all ranks. A mean taken on each
rank and averaged is another number as soon as ranks hold different numbers of rows that count, as with purchases given a click.

With z a row's logit, p = sigmoid(z), y its label and w its weight, a task's loss is the mean, weighted by w, of

- cross-entropy, positives counting `positive_weight` times in the numerator; of a regression (z - y)**2
- `teacher`: cross-entropy less the entropy of y, which is KL(y || p): the same gradient, and 0 where p is y;
  and `align` |log p - log y| in rows with y above 0, y taken as no less than `MIN_PROB`
- `at_most` another task with probability q: `at_most_weight` relu(p - q), or of their logarithms, is added (AITM, Xi et al.,
  KDD 2021, equation 12); both p and q are corrected for sampled negatives and positive weights, and both are moved

and, for a task with `debias`, of an estimate over all rows of the click task, those without a click included, of what the
step's own cross-entropy e would be there (ESCM2, Wang et al., SIGIR 2022). With o the label, w the weight and r the probability
of the click task, r no less than `propensity_floor` and without gradient, and e' = softplus of the imputation tower's logit:

- ips: o e / r
- dr: e' + o (e - e') / r + o (sg(e) - e')**2 / r, the last term being what teaches e'; sg stops the gradient

It takes the place of a conditional task's loss, and is added to that of a product. Clicked rows without a label (the step's
weight is 0) are left out of it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rec.funnel import imputation_towers
from rec.hashing import uniform
from rec.schema import Scale, TaskConfig, TaskKind

MIN_PROB = 1e-12  # a teacher's probability below it is its noise; the logarithm of it is -27.6


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
    """The losses that the module describes, times `loss_weight`.

    >>> loss = MultitaskLoss({"click": TaskConfig(label="p_click", teacher=True)})
    >>> loss(torch.zeros(2, 1), torch.tensor([[0.5], [1.0]]), torch.ones(2, 1), torch.tensor([2.0])).total
    tensor(0.3466)
    """

    loss_weights: Tensor
    positive_weights: Tensor
    correction: Tensor

    def __init__(self, tasks: dict[str, TaskConfig]) -> None:
        super().__init__()
        names, self.tasks = list(tasks), list(tasks.values())
        self.kept = [task.negatives_kept for task in self.tasks]
        self.bounds = {t: names.index(task.at_most) for t, task in enumerate(self.tasks) if task.at_most}
        self.clicks = {
            t: names.index(task.given) for t, task in enumerate(self.tasks) if task.is_debiased and task.given
        }
        self.imputing = imputation_towers(tasks)
        for name, values in (
            ("loss_weights", [task.loss_weight for task in self.tasks]),
            ("positive_weights", [task.positive_weight for task in self.tasks]),
            ("correction", [task.correction for task in self.tasks]),
        ):
            self.register_buffer(name, torch.tensor(values))

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

    def forward(
        self, logits: Tensor, labels: Tensor, weights: Tensor, global_weights: Tensor, *, towers: Tensor | None = None
    ) -> Losses:
        """Losses of this rank's rows.

        Args:
            logits: [B, T], as in training: not corrected for sampling.
            labels: [B, T].
            weights: [B, T], >= 0.
            global_weights: [T], the sum of `weights` over the rows of all ranks.
            towers: [B, towers], the logits that a funnel composed `logits` of, which `debias` reads; None: `logits`.
        """
        labels = torch.where(
            weights > 0, labels, 0.0
        )  # what masked rows hold must reach no gradient, not even as 0 * NaN
        losses = torch.stack([self._row_losses(t, logits[:, t], labels[:, t]) for t in range(len(self.tasks))], dim=1)
        row_weights = weights * torch.lerp(torch.ones_like(labels), self.positive_weights.expand_as(labels), labels)
        terms = losses * row_weights
        if self.bounds:
            terms = terms + weights * self._excess(logits)
        norms = torch.where(global_weights > 0, global_weights, 1.0)
        by_task = torch.where(weights > 0, terms, 0.0).sum(dim=0) / norms
        if self.clicks:
            towers = logits if towers is None else towers
            by_task = self._debiased(by_task, logits, labels, weights, norms, towers=towers)
        weighted = by_task * self.loss_weights
        return Losses(weighted.sum(), weighted, by_task.detach())

    def _row_losses(self, task: int, logits: Tensor, labels: Tensor) -> Tensor:
        config = self.tasks[task]
        if config.kind is TaskKind.regression:
            return F.mse_loss(logits, labels, reduction="none")
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        if config.teacher:
            losses = losses + torch.xlogy(labels, labels) + torch.xlogy(1 - labels, 1 - labels)
        if config.align:
            # log p is exact at any logit; clamping it would take the gradient from the rows that are farthest off
            distance = (F.logsigmoid(logits) - labels.clamp(min=MIN_PROB).log()).abs()
            losses = losses + config.align * torch.where(labels > 0, distance, 0.0)
        return losses

    def _excess(self, logits: Tensor) -> Tensor:
        """[B, T], what a row costs a task whose prediction is above its bound."""
        corrected, costs = logits + self.correction, [torch.zeros_like(logits[:, 0])] * len(self.tasks)
        for t, other in self.bounds.items():
            squash = F.logsigmoid if self.tasks[t].at_most_of is Scale.log else torch.sigmoid
            excess = squash(corrected[:, t]) - squash(corrected[:, other])
            costs[t] = self.tasks[t].at_most_weight * excess.relu()
        return torch.stack(costs, dim=1)

    def _debiased(
        self, by_task: Tensor, logits: Tensor, labels: Tensor, weights: Tensor, norms: Tensor, *, towers: Tensor
    ) -> Tensor:
        """`by_task` [T] with the estimates of the tasks that have `debias`; `norms` [T] are those of their click tasks, too."""
        means = list(by_task.unbind())
        for t, click in self.clicks.items():
            config, clicked = self.tasks[t], labels[:, click]
            propensity = logits[:, click].detach().sigmoid().clamp(min=config.propensity_floor)
            losses = F.binary_cross_entropy_with_logits(towers[:, t], labels[:, t], reduction="none")
            imputed = F.softplus(towers[:, self.imputing[t]]) if t in self.imputing else None
            risks = _counterfactual(losses, clicked / propensity, imputed)
            counts = (weights[:, click] > 0) & ((clicked == 0) | (weights[:, t] > 0))
            risk = torch.where(counts, weights[:, click] * risks, 0.0).sum() / norms[click]
            own = 0.0 if config.condition else means[t]
            means[t] = own + config.debias_weight * risk
        return torch.stack(means)


def _counterfactual(losses: Tensor, inverse: Tensor, imputed: Tensor | None) -> Tensor:
    """Each row's estimate [B] of its loss, whether or not it was clicked.

    Args:
        losses: [B], meaningful where there was a click.
        inverse: [B], click over its probability.
        imputed: [B], what the losses are taken to be without a look at the label; None for ips.
    """
    if imputed is None:
        return inverse * losses
    # the square teaches the imputation alone: through the loss itself it would push probabilities up
    return imputed + inverse * (losses - imputed + (losses.detach() - imputed).square())

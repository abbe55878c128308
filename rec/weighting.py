"""How much each task counts in a step: as configured, or found in training, the same on any number of ranks.

    fixed        loss_weight alone
    uncertainty  sum_t c_t exp(-s_t) L_t + s_t / 2 with s_t learned, c_t 1 of a binary task and 1/2 of a regression (Kendall et al.,
                 CVPR 2018, s = log sigma^2)
    gradnorm     sum_t w_t L_t, w moved so that the tasks' gradients have like norms, larger where a task lags (Chen et al., ICML 2018)
    pcgrad       gradients that conflict are projected onto each other's normal plane (Yu et al., NeurIPS 2020)

Gradients of single tasks are taken at the shared representation z [B, d], which experts and gates read. Its rows are spread
over the ranks, so norms and products are sums over all of them, and what is decided from these is decided alike everywhere.
PCGrad hands its gradient on at z: the tables (whose fused optimizer runs in the backward) and DDP see one ordinary backward,
and experts, gates and towers keep the plain sum. `loss_weight` multiplies L_t in all of them.
"""

from dataclasses import dataclass
from enum import Enum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rec.distributed import sum_over_ranks
from rec.schema import ConfigError, TaskConfig, TaskKind, check_range


class Weighting(Enum):
    """Ways to weigh tasks."""

    fixed = "fixed"
    uncertainty = "uncertainty"
    gradnorm = "gradnorm"
    pcgrad = "pcgrad"


@dataclass
class WeightingConfig:
    """How tasks are weighed against each other."""

    kind: Weighting = Weighting.fixed
    gradnorm_alpha: float = 1.5  # 0 to 10; how much a task that lags is pushed
    gradnorm_lr: float = 0.025  # > 0; step of the weights

    def __post_init__(self) -> None:
        check_range("weighting.gradnorm_alpha", self.gradnorm_alpha, 0, 10)
        check_range("weighting.gradnorm_lr", self.gradnorm_lr, 1e-12, 1e3)


class TaskWeighting(nn.Module):
    """Fixed weights, and the base of the others.

    Args:
        config: settings.
        tasks: by name.
    """

    def __init__(self, config: WeightingConfig, tasks: dict[str, TaskConfig]) -> None:
        super().__init__()
        self.config = config
        self.tasks = list(tasks)

    def forward(self, losses: Tensor, *, shares: Tensor, shared: Tensor, step: int) -> Tensor:
        """This rank's share of the loss to differentiate. Ranks may wait for each other here.

        Args:
            losses: [T], this rank's shares of the tasks' losses, differentiable.
            shares: [T], this rank's share of each task's weight in the step; 0 everywhere where a task has no rows.
            shared: [B, d], z.
            step: steps done; what PCGrad's order of tasks is drawn from.
        """
        return losses.sum()

    def describe(self) -> dict[str, dict[str, float] | float]:
        """What to log of the last step."""
        return {}

    def after_backward(self) -> None:
        """Called in every step that is learned from: averages the gradients of learned weights over ranks, as DDP does. Ranks wait here."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                sum_over_ranks(parameter.grad)
                parameter.grad /= dist.get_world_size()

    def _by_task(self, values: Tensor) -> dict[str, float]:
        return dict(zip(self.tasks, values.tolist(), strict=True))


class UncertaintyWeighting(TaskWeighting):
    """Weights exp(-s_t), learned with the dense optimizer. For a constant L_t the optimum is s_t = log(2 c_t L_t)."""

    factors: Tensor

    def __init__(self, config: WeightingConfig, tasks: dict[str, TaskConfig]) -> None:
        super().__init__(config, tasks)
        factors = [0.5 if task.kind is TaskKind.regression else 1.0 for task in tasks.values()]
        self.register_buffer("factors", torch.tensor(factors), persistent=False)
        self.log_variances = nn.Parameter(torch.zeros(len(tasks)))

    def forward(self, losses: Tensor, *, shares: Tensor, shared: Tensor, step: int) -> Tensor:
        """See `TaskWeighting`."""
        weights = self.factors * torch.exp(-self.log_variances)
        return (weights * losses + shares * self.log_variances / 2).sum()

    def describe(self) -> dict[str, dict[str, float] | float]:
        """The tasks' weights."""
        return {"task_weights": self._by_task((self.factors * torch.exp(-self.log_variances)).detach())}


class GradNorm(TaskWeighting):
    """Weights w_t, summing to T; the step after this one uses what is found in this one."""

    weights: Tensor
    first_losses: Tensor

    def __init__(self, config: WeightingConfig, tasks: dict[str, TaskConfig]) -> None:
        super().__init__(config, tasks)
        self.register_buffer("weights", torch.ones(len(tasks)))
        self.register_buffer("first_losses", torch.zeros(len(tasks)))
        self._found = torch.zeros(2, len(tasks))  # norms of the tasks' gradients at z, losses: of the last forward

    def forward(self, losses: Tensor, *, shares: Tensor, shared: Tensor, step: int) -> Tensor:
        """See `TaskWeighting`."""
        total = (self.weights.clone() * losses).sum()
        squares = torch.stack([gradient.float().square().sum() for gradient in _gradients(losses, shared)])
        summed = sum_over_ranks(torch.cat([squares, losses.detach()]))
        self._found = torch.stack([summed[: len(losses)].sqrt(), summed[len(losses) :]])
        return total

    def after_backward(self) -> None:
        """Not in the forward: what a skipped step found is not to move the weights."""
        super().after_backward()
        self._update(*self._found)

    def _update(self, norms: Tensor, losses: Tensor) -> None:
        """Move the weights against the gradient of sum_t |w_t n_t - mean(w n) r_t^alpha|, r_t the relative inverse pace."""
        there = losses > 0
        self.first_losses.copy_(torch.where((self.first_losses == 0) & there, losses, self.first_losses))
        pace = torch.where(there, losses / self.first_losses.clamp(min=1e-12), 1.0)
        weighted = self.weights * norms
        target = weighted[there].mean() * (pace / pace[there].mean()) ** self.config.gradnorm_alpha
        moved = self.weights - self.config.gradnorm_lr * torch.sign(weighted - target) * norms * there
        moved = moved.clamp(min=1e-3)
        self.weights.copy_(torch.where(there.any(), moved * len(moved) / moved.sum(), self.weights))

    def describe(self) -> dict[str, dict[str, float] | float]:
        """The tasks' weights."""
        return {"task_weights": self._by_task(self.weights)}


class PCGrad(TaskWeighting):
    """The plain sum above z; at z and below, the sum of gradients that were freed of their conflicts."""

    def __init__(self, config: WeightingConfig, tasks: dict[str, TaskConfig]) -> None:
        super().__init__(config, tasks)
        self.conflicts = 0.0

    def forward(self, losses: Tensor, *, shares: Tensor, shared: Tensor, step: int) -> Tensor:
        """See `TaskWeighting`."""
        gradients = torch.stack([gradient.flatten() for gradient in _gradients(losses, shared)])
        products = sum_over_ranks((gradients.float() @ gradients.float().T).double())
        coefficients = project(products, seed=step).sum(dim=0)
        combined = (coefficients.to(gradients.dtype) @ gradients).view_as(shared) * dist.get_world_size()
        shared.register_hook(lambda _: combined)  # of the one backward to come, whose loss is scaled by the world size
        pairs = len(losses) * (len(losses) - 1) / 2
        self.conflicts = (products.triu(1) < 0).sum().item() / max(1.0, pairs)
        return losses.sum()

    def describe(self) -> dict[str, dict[str, float] | float]:
        """The share of pairs of tasks whose gradients pointed away from each other."""
        return {"conflicts": self.conflicts}


def project(products: Tensor, *, seed: int) -> Tensor:
    """PCGrad (Yu et al. 2020, algorithm 1) on inner products alone.

    Args:
        products: [T, T] float64, inner products of the tasks' gradients.
        seed: the order in which each task meets the others is drawn from it.

    Returns:
        [T, T], row t the coefficients of task t's projected gradient in terms of the original ones.
    """
    num_tasks = len(products)
    generator = torch.Generator().manual_seed(seed)
    coefficients = torch.eye(num_tasks, dtype=products.dtype, device=products.device)
    for task in range(num_tasks):
        for other in torch.randperm(num_tasks, generator=generator).tolist():
            product = coefficients[task] @ products[:, other]
            if other != task and product < 0:
                coefficients[task, other] -= product / products[other, other]
    return coefficients


def _gradients(losses: Tensor, shared: Tensor) -> list[Tensor]:
    """Each task's gradient at z [B, d]."""
    if not shared.requires_grad:
        raise ConfigError(
            "weighting.kind=gradnorm and pcgrad compare gradients of what tasks share, and below the experts nothing is trained: "
            "add an interaction (interaction=dcn_v2) or tables, or set weighting.kind=fixed"
        )
    return [torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in losses]


def balance_loss(gate_weights: Tensor, counts: Tensor) -> Tensor:
    """This rank's share of sum_t (log N - H(mean gate of t)), N the experts in t's reach: 0 where all are used alike.

    The mean is over all ranks' rows, and so is its gradient, d/dg of g log g. Ranks wait for each other here.

    Args:
        gate_weights: [B, T, N].
        counts: [B] bool, rows that are not padding.
    """
    sums = (gate_weights * counts[:, None, None]).sum(dim=0)
    summed = sum_over_ranks(torch.cat([sums.detach().flatten(), counts.sum().to(sums.dtype)[None]]))
    rows = summed[-1].clamp(min=1)
    mean = summed[:-1].view_as(sums) / rows
    reach = (mean > 0).sum(dim=1).clamp(min=1).log().sum()
    return (mean.clamp(min=1e-12).log() * sums / rows).sum() + reach * counts.sum() / rows


WEIGHTINGS: dict[Weighting, type[TaskWeighting]] = {
    Weighting.fixed: TaskWeighting,
    Weighting.uncertainty: UncertaintyWeighting,
    Weighting.gradnorm: GradNorm,
    Weighting.pcgrad: PCGrad,
}


def build_weighting(config: WeightingConfig, tasks: dict[str, TaskConfig]) -> TaskWeighting:
    """The module that `config` describes."""
    return WEIGHTINGS[config.kind](config, tasks)

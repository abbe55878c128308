"""Kinds of sharing in which each task has a network of its own: apart, drawn together, mixed layer by layer, or in a chain.

Separate and L2-constrained networks (Duong et al., ACL 2015), cross-stitch networks (Misra et al., CVPR 2016) and AITM (Xi
et al., KDD 2021), all behind `ExpertInputs -> Mixture`. None has gates.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from rec.mixtures import ExpertInputs, Experts, ExpertsConfig, Mixture, Sizes
from rec.schema import check_range
from rec.stacked import StackedMLP, prune_stack


@dataclass
class SeparateConfig(ExpertsConfig):
    """A network a task."""

    kind: str = "separate"
    l2_constraint: float = 0.0  # >= 0; weight of the squared distances between the tasks' networks in the loss

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.l2_constraint", self.l2_constraint, 0, 1e6)


@dataclass
class CrossStitchConfig(ExpertsConfig):
    """A network a task, mixed after every layer."""

    kind: str = "cross_stitch"
    own_share: float = 0.9  # 0 to 1; what a task starts to take of its own activations, the rest evenly of the others'

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.own_share", self.own_share, 0, 1)


@dataclass
class AITMConfig(ExpertsConfig):
    """A network a task, each handing on to the next in the order of `data.tasks`: click before cart before purchase."""

    kind: str = "aitm"


class Separate(Experts):
    """y_t = tower_t(f_t(x)): tasks share the embeddings and the crosses alone."""

    def __init__(self, config: SeparateConfig, sizes: Sizes) -> None:
        super().__init__()
        self.l2_constraint = config.l2_constraint
        self.networks = StackedMLP(sizes.num_tasks, sizes.in_features, config.layer_sizes)

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]."""
        return Mixture(self.networks(inputs.x).transpose(0, 1))

    def penalty(self) -> Tensor | None:
        """l2_constraint * sum_{t<u} ||theta_t - theta_u||^2, scalar (a baseline of Ma et al., KDD 2018).

        theta_t are all weights and biases of task t's network; the towers, whose shapes may differ, have no part in it.
        """
        if not self.l2_constraint:
            return None
        return self.l2_constraint * torch.stack([_between(p) for p in self.networks.parameters()]).sum()

    def prune(self, tasks: list[int]) -> None:
        """Leave only the networks of `tasks`."""
        prune_stack(self.networks, tasks)


def _between(stacked: Tensor) -> Tensor:
    """[T, ...] -> sum over pairs of ||x_t - x_u||^2, scalar; it is T times the sum of the squared distances to the mean."""
    return len(stacked) * (stacked - stacked.mean(dim=0)).square().sum()


class CrossStitch(Experts):
    """x_t <- sum_u a_tu x_u after every layer's ReLU, with a learned a [T, T] a layer (Misra et al. 2016, equation 1).

    One number for each pair of tasks and layer. Rows of a need not sum to one after training.
    """

    def __init__(self, config: CrossStitchConfig, sizes: Sizes) -> None:
        super().__init__()
        widths = pairwise([sizes.in_features, *config.layer_sizes])
        self.layers = nn.ModuleList(StackedMLP(sizes.num_tasks, i, [o]) for i, o in widths)
        self.stitches = nn.ParameterList([_stitch(sizes.num_tasks, config.own_share) for _ in self.layers])

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]."""
        x = inputs.x
        for layer, stitch in zip(self.layers, self.stitches, strict=True):
            x = self._mixed(stitch, layer(x))
        return Mixture(x.transpose(0, 1))

    def prune(self, tasks: list[int]) -> None:
        """Leave only the last stitch's rows of `tasks`; every network stays, since each of these rows reads all."""
        last = self.stitches[-1]
        last.data = last.data[tasks]

    def _mixed(self, stitch: Tensor, x: Tensor) -> Tensor:
        """[S, T] and [T, B, H] -> [S, B, H]; outside training a product a row, of which other rows change no bit."""
        rows = [stitch] if self.training else stitch.split(1)
        return torch.cat([torch.mm(row, x.flatten(1)) for row in rows]).unflatten(1, x.shape[1:])


def _stitch(num_tasks: int, own_share: float) -> Tensor:
    """[T, T], own_share on the diagonal and rows that sum to one; one task alone has all."""
    if num_tasks == 1:
        return torch.ones(1, 1)
    others = torch.full((num_tasks, num_tasks), (1 - own_share) / (num_tasks - 1))
    return others.fill_diagonal_(own_share)


@dataclass
class Transferred:
    """What an adaptive information transfer gives.

    Attributes:
        values: [B, H], z_t.
        weights: [B, 2] float32, of what the task before hands on and of the task's own network; they sum to one.
    """

    values: Tensor
    weights: Tensor


class Transfer(nn.Module):
    """From one task to the next: z_t = sum_{u in {p, q_t}} softmax_u(<h2(u), h3(u)> / sqrt(H)) h1(u), p = g(z_{t-1}).

    The AIT module of Xi et al. 2021. g is a linear layer with ReLU; h1, h2 and h3 are linear maps H -> H without bias.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hand_on = StackedMLP(1, width, [width])  # g
        self.projections = nn.Linear(width, 3 * width, bias=False)  # h1, h2 and h3, below each other
        nn.init.kaiming_normal_(self.projections.weight, nonlinearity="linear")

    def forward(self, before: Tensor, own: Tensor) -> Transferred:
        """z_{t-1} and q_t, each [B, H]."""
        pair = torch.stack([self.hand_on(before)[0], own], dim=1)  # [B, 2, H]
        h1, h2, h3 = self.projections(pair).chunk(3, dim=-1)
        scores = (h2.float() * h3.float()).sum(dim=-1) * h2.shape[-1] ** -0.5
        weights = torch.softmax(scores, dim=-1)  # [B, 2]
        return Transferred((weights.unsqueeze(-1).to(h1.dtype) * h1).sum(dim=1), weights)


class AITM(Experts):
    """A chain of tasks: z_1 = q_1, z_t = transfer_t(z_{t-1}, q_t), y_t = tower_t(z_t) (Xi et al. 2021); q_t is task t's network.

    A task depends on those before it in `data.tasks`, never on those after it.
    """

    def __init__(self, config: AITMConfig, sizes: Sizes) -> None:
        super().__init__()
        self.networks = StackedMLP(sizes.num_tasks, sizes.in_features, config.layer_sizes)
        self.transfers = nn.ModuleList(Transfer(config.layer_sizes[-1]) for _ in range(1, sizes.num_tasks))
        self.kept = list(range(sizes.num_tasks))  # links of the chain that towers read

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]."""
        own = self.networks(inputs.x)
        chain = [own[0]]
        for transfer, q in zip(self.transfers, own[1:], strict=True):
            chain.append(transfer(chain[-1], q).values)
        return Mixture(torch.stack([chain[link] for link in self.kept], dim=1))

    def prune(self, tasks: list[int]) -> None:
        """Leave only the values of `tasks`, and of the chain all up to the last of them: each link needs those before it."""
        self.kept = [self.kept[t] for t in tasks]
        length = max(self.kept) + 1
        prune_stack(self.networks, list(range(length)))
        self.transfers = self.transfers[: length - 1]


TASK_NETWORK_KINDS: dict[str, type[ExpertsConfig]] = {
    "separate": SeparateConfig,
    "cross_stitch": CrossStitchConfig,
    "aitm": AITMConfig,
}
TASK_NETWORKS: dict[type[ExpertsConfig], type[Experts]] = {
    SeparateConfig: Separate,
    CrossStitchConfig: CrossStitch,
    AITMConfig: AITM,
}

"""What tasks share: one bottom for all, or experts that each task mixes through a gate of its own.

Shared bottom (Caruana 1997), MMoE and OMoE (Ma et al., KDD 2018), CGC and PLE (Tang et al., RecSys 2020), all behind
`[B, d] -> Mixture`. Experts may be of several kinds, MLPs and cross networks; those of one shape run as one batched product.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from rec.hashing import uniform
from rec.schema import ConfigError, check_range
from rec.stacked import StackedCross, StackedMLP, prune_stack


@dataclass
class ExpertsConfig:
    """Base of the choices in `conf/experts/`."""

    kind: str = MISSING  # one of EXPERTS_KINDS
    layer_sizes: list[int] = field(
        default_factory=lambda: [256, 128]
    )  # widths of the layers; the last goes to the towers

    def __post_init__(self) -> None:
        if not self.layer_sizes or min(self.layer_sizes) < 1:
            raise ConfigError(f"model.experts.layer_sizes is {self.layer_sizes}, expected one or more positive widths")


@dataclass
class SharedBottomConfig(ExpertsConfig):
    """One network that every task's tower reads."""

    kind: str = "shared_bottom"


class DropoutUnit(Enum):
    """What loses the same experts together."""

    step = "step"  # all rows of a step, on all ranks
    row = "row"


@dataclass
class GatedConfig(ExpertsConfig):
    """What every mixture of experts has."""

    gate_layer_sizes: list[int] = field(default_factory=list)  # widths of the gates' hidden layers; empty: linear gates
    temperature: float = 1.0  # > 0; divides the gates' logits, in training and serving; above 1 evens the mixture out
    expert_dropout: float = 0.0  # 0 to below 1; in training, chance of each expert to be left out of the mixtures
    expert_dropout_per: DropoutUnit = DropoutUnit.step
    balance_loss: float = 0.0  # >= 0; weight of sum_t (log N - entropy of task t's mean gate weights) in the loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(size < 1 for size in self.gate_layer_sizes):
            raise ConfigError(f"model.experts.gate_layer_sizes is {self.gate_layer_sizes}, expected positive widths")
        check_range("model.experts.temperature", self.temperature, 1e-3, 1e3)
        check_range("model.experts.expert_dropout", self.expert_dropout, 0, 0.99)
        check_range("model.experts.balance_loss", self.balance_loss, 0, 1e6)


class ExpertKind(Enum):
    """What an expert is."""

    mlp = "mlp"  # a multilayer perceptron
    cross = "cross"  # DCN-v2 layers of its own, then a projection with ReLU


@dataclass
class ExpertConfig:
    """Experts of one shape, in a list of several; each gives model.experts.layer_sizes[-1] numbers."""

    kind: ExpertKind = ExpertKind.mlp
    num: int = 1  # how many, at least 1
    layer_sizes: list[int] = field(default_factory=list)  # mlp: widths of the layers; empty: model.experts.layer_sizes
    num_layers: int = 1  # cross: layers
    low_rank: int | None = None  # cross: rank of the layers' matrices; null: full

    def __post_init__(self) -> None:
        check_range("an expert's num", self.num, 1, 10_000)
        check_range("an expert's num_layers", self.num_layers, 1, 100)
        check_range("an expert's low_rank", self.low_rank, 1, 100_000)
        if any(size < 1 for size in self.layer_sizes):
            raise ConfigError(f"an expert's layer_sizes is {self.layer_sizes}, expected positive widths")


@dataclass
class MMoEConfig(GatedConfig):
    """Experts that all tasks may use, and a softmax gate a task."""

    kind: str = "mmoe"
    num_experts: int = 6  # at least 1; MLPs of layer_sizes
    mixed: list[ExpertConfig] = field(default_factory=list)  # experts of several kinds, instead of num_experts MLPs
    shared_gate: bool = False  # one gate for all tasks (OMoE)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.num_experts", self.num_experts, 1, 10_000)
        _check_widths("model.experts.mixed", self.mixed, self.layer_sizes)

    @property
    def experts(self) -> list[ExpertConfig]:
        """The experts, by shape."""
        return self.mixed or [ExpertConfig(num=self.num_experts)]


@dataclass
class PLEConfig(GatedConfig):
    """Experts of each task beside shared ones, on one level (CGC) or several."""

    kind: str = "ple"
    num_levels: int = 2  # at least 1; 1 is CGC
    num_shared_experts: int = 2  # at least 1, on every level; MLPs of layer_sizes
    num_task_experts: int = 2  # at least 1 for each task, on every level
    mixed_shared: list[ExpertConfig] = field(default_factory=list)  # instead of num_shared_experts MLPs
    mixed_task: list[ExpertConfig] = field(default_factory=list)  # instead of num_task_experts MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.num_levels", self.num_levels, 1, 100)
        check_range("model.experts.num_shared_experts", self.num_shared_experts, 1, 10_000)
        check_range("model.experts.num_task_experts", self.num_task_experts, 1, 10_000)
        _check_widths("model.experts.mixed_shared", self.mixed_shared, self.layer_sizes)
        _check_widths("model.experts.mixed_task", self.mixed_task, self.layer_sizes)

    @property
    def shared(self) -> list[ExpertConfig]:
        """The shared experts of a level, by shape."""
        return self.mixed_shared or [ExpertConfig(num=self.num_shared_experts)]

    @property
    def of_task(self) -> list[ExpertConfig]:
        """The experts of one task on a level, by shape."""
        return self.mixed_task or [ExpertConfig(num=self.num_task_experts)]


def _check_widths(where: str, experts: list[ExpertConfig], layer_sizes: list[int]) -> None:
    for expert in experts:
        if expert.layer_sizes and expert.layer_sizes[-1] != layer_sizes[-1]:
            raise ConfigError(
                f"{where} has an expert of layer_sizes {expert.layer_sizes}, expected the last to be {layer_sizes[-1]}, as in "
                "model.experts.layer_sizes: all experts feed one mixture"
            )


class ExpertStack(nn.Module):
    """Experts of one or more shapes, `repeat` times over, all of the same output width.

    Args:
        experts: the shapes.
        in_features: width of the input.
        layer_sizes: of MLPs that name none; the last is everyone's output.
        repeat: R, times that the whole list is made: once for each of R inputs.
    """

    def __init__(
        self, experts: list[ExpertConfig], in_features: int, layer_sizes: list[int], *, repeat: int = 1
    ) -> None:
        super().__init__()
        self.repeat = repeat
        self.nums = [expert.num for expert in experts]
        self.stacks = nn.ModuleList(
            StackedMLP(repeat * expert.num, in_features, expert.layer_sizes or layer_sizes)
            if expert.kind is ExpertKind.mlp
            else StackedCross(
                repeat * expert.num,
                in_features,
                num_layers=expert.num_layers,
                low_rank=expert.low_rank,
                out_features=layer_sizes[-1],
            )
            for expert in experts
        )

    def forward(self, x: Tensor) -> Tensor:
        """[R, B, in] or [B, in] (the same for all) -> [B, R * N, H], the N experts of the first input first."""
        outputs = []
        for num, stack in zip(self.nums, self.stacks, strict=True):
            inputs = x.repeat_interleave(num, dim=0) if x.dim() == 3 else x
            outputs.append(stack(inputs).unflatten(0, (self.repeat, num)))
        return torch.cat(outputs, dim=1).flatten(0, 1).transpose(0, 1)

    def prune(self, repeats: list[int]) -> None:
        """Leave only the experts of the inputs numbered `repeats`, in that order."""
        for num, stack in zip(self.nums, self.stacks, strict=True):
            prune_stack(stack, [r * num + i for r in repeats for i in range(num)])
        self.repeat = len(repeats)


class Gates(nn.Module):
    """G softmax gates over N experts, linear or with hidden layers: softmax((W x + b) / temperature).

    Args:
        config: hidden layers, temperature, dropout.
        in_features: width of the input.
        allowed: [G, N] bool, which experts a gate may choose.
    """

    allowed: Tensor

    def __init__(self, config: GatedConfig, in_features: int, *, allowed: Tensor) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("allowed", allowed, persistent=False)
        num_gates, num_experts = allowed.shape
        self.logits = StackedMLP(num_gates, in_features, [*config.gate_layer_sizes, num_experts], activate_last=False)
        last = self.logits.weights[-1]
        nn.init.uniform_(last, -(last.shape[1] ** -0.5), last.shape[1] ** -0.5)  # as nn.Linear: gates start near even

    def forward(self, x: Tensor, draws: Tensor) -> Tensor:
        """Inputs [G, B, in] or [B, in] and random bits [B, 2] of row and step -> weights [B, G, N] float32."""
        logits = self.logits(x).transpose(0, 1).float() / self.config.temperature
        weights = torch.softmax(logits.masked_fill(~self.allowed, -torch.inf), dim=-1)
        return self._dropped(weights, draws) if self.training and self.config.expert_dropout else weights

    def prune(self, gates: list[int]) -> None:
        """Leave only the gates numbered `gates`, in that order."""
        prune_stack(self.logits, gates)
        self.allowed = self.allowed[gates]

    def _dropped(self, weights: Tensor, draws: Tensor) -> Tensor:
        """The weights without the experts that are left out, renormalised; all stay where a gate would lose every one.

        The draws are the same whatever rank serves a row, so training does not depend on the number of ranks.
        """
        keys = draws[:, 0 if self.config.expert_dropout_per is DropoutUnit.row else 1]
        chances = torch.stack([uniform(keys, salt=i) for i in range(weights.shape[-1])], dim=1)
        kept = (chances >= self.config.expert_dropout).unsqueeze(1) & self.allowed  # [B, G, N]
        kept = torch.where(kept.any(dim=-1, keepdim=True), kept, self.allowed)
        left = weights * kept
        return left / left.sum(dim=-1, keepdim=True).clamp(min=1e-20)


@dataclass
class Mixture:
    """What each task's tower reads, and how it came about.

    Attributes:
        values: [B, T, H].
        gate_weights: [B, T, N], 0 to 1, summing to 1 over N; None where there are no gates.
        expert_outputs: [B, N, H], what the gates weigh; None where there are no gates.
    """

    values: Tensor
    gate_weights: Tensor | None = None
    expert_outputs: Tensor | None = None


def mix_experts(gate_weights: Tensor, expert_outputs: Tensor, *, apart: bool = False) -> Tensor:
    """[B, G, N] and [B, N, H] -> [B, G, H], sum_i g_i E_i; `apart`: a product a gate, of which other gates change no bit."""
    gate_weights = gate_weights.to(expert_outputs.dtype)
    if apart:
        return torch.cat([torch.bmm(gate, expert_outputs) for gate in gate_weights.split(1, dim=1)], dim=1)
    return torch.bmm(gate_weights, expert_outputs)


class Experts(nn.Module, ABC):
    """[B, d] and random bits [B, 2] -> Mixture of T tasks. Base of the kinds."""

    @abstractmethod
    def prune(self, tasks: list[int]) -> None:
        """Leave only what the towers of `tasks` read, in that order: T becomes their number, and no bit of theirs changes."""


class SharedBottom(Experts):
    """y_t = tower_t(f(z)): every task reads the same f(z) (Caruana 1997)."""

    def __init__(self, config: SharedBottomConfig, *, in_features: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.bottom = StackedMLP(1, in_features, config.layer_sizes)

    def forward(self, z: Tensor, draws: Tensor) -> Mixture:
        """[B, d] -> values [B, T, H]."""
        return Mixture(self.bottom(z)[0].unsqueeze(1).expand(-1, self.num_tasks, -1))

    def prune(self, tasks: list[int]) -> None:
        """Every tower reads the one network."""
        self.num_tasks = len(tasks)


class MMoE(Experts):
    """y_t = tower_t(sum_i g_t(z)_i f_i(z)), g_t(z) = softmax((W_t z + b_t) / temperature) (Ma et al. 2018, equations 6 and 7).

    With a shared gate g_t is the same for all tasks (OMoE, equation 5).
    """

    def __init__(self, config: MMoEConfig, *, in_features: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.experts = ExpertStack(config.experts, in_features, config.layer_sizes)
        num_gates = 1 if config.shared_gate else num_tasks
        allowed = torch.ones(num_gates, sum(self.experts.nums), dtype=torch.bool)
        self.gates = Gates(config, in_features, allowed=allowed)

    def forward(self, z: Tensor, draws: Tensor) -> Mixture:
        """[B, d] -> values [B, T, H], gate_weights [B, T, N]."""
        gate_weights = self.gates(z, draws).expand(-1, self.num_tasks, -1)
        outputs = self.experts(z)
        return Mixture(mix_experts(gate_weights, outputs, apart=not self.training), gate_weights, outputs)

    def prune(self, tasks: list[int]) -> None:
        """Leave only the gates of `tasks`; every expert stays, since each of these gates reads all."""
        self.gates.prune([0] if len(self.gates.allowed) == 1 else tasks)
        self.num_tasks = len(tasks)


class PLELevel(nn.Module):
    """One level of PLE: experts of each task, shared experts, a gate a task and, but on the last level, a shared gate.

    Experts are numbered task by task, the shared ones last. A task's gate chooses among its own and the shared ones, the
    shared gate among all (Tang et al. 2020, equations 1 to 6).
    """

    def __init__(self, config: PLEConfig, *, in_features: int, num_tasks: int, last: bool) -> None:
        super().__init__()
        self.task_experts = ExpertStack(config.of_task, in_features, config.layer_sizes, repeat=num_tasks)
        self.shared_experts = ExpertStack(config.shared, in_features, config.layer_sizes)
        num_own, num_shared = sum(self.task_experts.nums), sum(self.shared_experts.nums)
        own = torch.eye(num_tasks, dtype=torch.bool).repeat_interleave(num_own, dim=1)
        allowed = torch.cat([own, torch.ones(num_tasks, num_shared, dtype=torch.bool)], dim=1)
        if not last:
            allowed = torch.cat([allowed, torch.ones_like(allowed[:1])])
        self.gates = Gates(config, in_features, allowed=allowed)
        self.read: slice | list[int] = slice(len(allowed))  # of the inputs, by the gates
        self.mixed: slice | list[int] = slice(None)  # of the experts that the gates know

    def forward(self, x: Tensor, draws: Tensor) -> Mixture:
        """[T + 1, B, in], the tasks' inputs and the shared one -> values [B, T + 1 (last level: T), H]."""
        outputs = torch.cat([self.task_experts(x[:-1]), self.shared_experts(x[-1])], dim=1)
        gate_weights = self.gates(x[self.read], draws)[..., self.mixed]
        return Mixture(mix_experts(gate_weights, outputs, apart=not self.training), gate_weights, outputs)

    def prune(self, tasks: list[int], *, last: bool) -> None:
        """Leave only the gates of `tasks`, and the shared one; on the last level, where there is none, also only their experts."""
        num_tasks, num_own = self.task_experts.repeat, sum(self.task_experts.nums)
        if last:
            of_tasks = [t * num_own + i for t in tasks for i in range(num_own)]
            self.mixed = [*of_tasks, *range(num_tasks * num_own, self.gates.allowed.shape[1])]
            self.task_experts.prune(tasks)
        self.gates.prune(tasks if last else [*tasks, num_tasks])
        self.read = slice(len(tasks)) if last else [*tasks, num_tasks]


class PLE(Experts):
    """Progressive layered extraction (Tang et al. 2020): levels of task and shared experts; one level is CGC."""

    def __init__(self, config: PLEConfig, *, in_features: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        widths = [in_features] + [config.layer_sizes[-1]] * (config.num_levels - 1)
        self.levels = nn.ModuleList(
            PLELevel(config, in_features=width, num_tasks=num_tasks, last=i + 1 == len(widths))
            for i, width in enumerate(widths)
        )

    def forward(self, z: Tensor, draws: Tensor) -> Mixture:
        """[B, d] -> values [B, T, H]; gate_weights [B, T, N] and expert_outputs of the last level."""
        x = z.expand(self.num_tasks + 1, *z.shape)
        for level in self.levels:
            mixture = level(x, draws)
            x = mixture.values.transpose(0, 1)
        return mixture

    def prune(self, tasks: list[int]) -> None:
        """Leave only what the towers of `tasks` read: not all that is of the others.

        The last level loses the other tasks' gates and experts, the one before it their gates. Their experts stay there, since
        the shared gate reads them, and so does all that these read on the levels before.
        """
        for level in self.levels[-2:]:
            assert isinstance(level, PLELevel)
            level.prune(tasks, last=level is self.levels[-1])
        if len(self.levels) == 1:
            self.num_tasks = len(tasks)


EXPERTS_KINDS: dict[str, type[ExpertsConfig]] = {
    "shared_bottom": SharedBottomConfig,
    "mmoe": MMoEConfig,
    "ple": PLEConfig,
}
EXPERTS: dict[type[ExpertsConfig], type[Experts]] = {
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
}


def build_experts(config: ExpertsConfig, *, in_features: int, num_tasks: int) -> Experts:
    """The module that `config` describes: [B, d] and random bits [B, 2] -> Mixture."""
    return EXPERTS[type(config)](config, in_features=in_features, num_tasks=num_tasks)

"""What every kind of sharing between tasks is made of: a stack of experts, softmax gates, and the mixture that comes out.

The kinds themselves are in `task_networks.py` (a network a task), `domain_experts.py` (what depends on the domain) and `experts.py`
(shared bottom, MMoE, PLE), all behind `ExpertInputs -> Mixture`.
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


def check_widths(where: str, experts: list[ExpertConfig], layer_sizes: list[int]) -> None:
    """Refuse experts whose last width is not the section's."""
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
class Sizes:
    """What a network between the crosses and the towers is built for."""

    in_features: int  # d, width of what experts read
    num_tasks: int  # T
    gate_features: int | None = None  # width of what gates read; None: in_features
    num_domains: int = 1  # D

    @property
    def gates(self) -> int:
        """Width of what gates read."""
        return self.in_features if self.gate_features is None else self.gate_features


@dataclass
class ExpertInputs:
    """What experts and gates read of B rows.

    Attributes:
        x: [B, d], read by experts.
        draws: [B, 2] int64, random bits of row and step; only training reads them.
        gate_x: [B, gates' width], read by gates; None: x.
        domain_id: [B] int64, 0 to D - 1; -1 for a domain that training did not know. None: all rows of domain 0.
    """

    x: Tensor
    draws: Tensor
    gate_x: Tensor | None = None
    domain_id: Tensor | None = None

    @property
    def gates(self) -> Tensor:
        """What gates read."""
        return self.x if self.gate_x is None else self.gate_x

    @property
    def domains(self) -> Tensor:
        """[B] int64."""
        return self.x.new_zeros(self.x.shape[0], dtype=torch.int64) if self.domain_id is None else self.domain_id


@dataclass
class Mixture:
    """What each task's tower reads, and how it came about.

    Attributes:
        values: [B, T, H].
        gate_weights: [B, T, N], 0 to 1, summing to 1 over N; None where there are no gates.
        expert_outputs: [B, N, H], what the gates weigh; None where there are no gates.
        row_penalty: [B], a loss of each row beside the tasks' own; None where there is none.
    """

    values: Tensor
    gate_weights: Tensor | None = None
    expert_outputs: Tensor | None = None
    row_penalty: Tensor | None = None


def mix_experts(gate_weights: Tensor, expert_outputs: Tensor, *, apart: bool = False) -> Tensor:
    """[B, G, N] and [B, N, H] -> [B, G, H], sum_i g_i E_i; `apart`: a product a gate, of which other gates change no bit."""
    gate_weights = gate_weights.to(expert_outputs.dtype)
    if apart:
        return torch.cat([torch.bmm(gate, expert_outputs) for gate in gate_weights.split(1, dim=1)], dim=1)
    return torch.bmm(gate_weights, expert_outputs)


class Experts(nn.Module, ABC):
    """`ExpertInputs` -> `Mixture` of T tasks. Base of the kinds, each made of its config and `Sizes`."""

    def penalty(self) -> Tensor | None:
        """A loss that depends on weights alone, scalar, the same on every rank; None where there is none."""
        return None

    @abstractmethod
    def prune(self, tasks: list[int]) -> None:
        """Leave only what the towers of `tasks` read, in that order: T becomes their number, and no bit of theirs changes."""

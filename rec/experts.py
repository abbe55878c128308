"""What tasks share: one bottom for all, or experts that each task mixes through a gate of its own (MMoE, Ma et al., KDD 2018)."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from omegaconf import MISSING
from torch import Tensor, nn

from rec.schema import ConfigError, check_range


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


@dataclass
class MMoEConfig(ExpertsConfig):
    """Experts of one shape, and a softmax gate a task."""

    kind: str = "mmoe"
    num_experts: int = 6  # at least 1
    temperature: float = 1.0  # > 0; divides the gates' logits, in training and serving; above 1 evens the mixture out

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.num_experts", self.num_experts, 1, 10_000)
        check_range("model.experts.temperature", self.temperature, 1e-3, 1e3)


class StackedMLP(nn.Module):
    """N multilayer perceptrons of one shape, each with its own weights, run as one batched product a layer.

    Args:
        num: N.
        in_features: width of the input.
        layer_sizes: widths of the layers, ReLU after each.
        activate_last: whether the last layer has its ReLU.
    """

    def __init__(self, num: int, in_features: int, layer_sizes: list[int], *, activate_last: bool = True) -> None:
        super().__init__()
        widths = [in_features, *layer_sizes]
        self.activate_last = activate_last
        self.weights = nn.ParameterList([torch.empty(num, i, o) for i, o in pairwise(widths)])
        self.biases = nn.ParameterList([torch.zeros(num, 1, o) for o in widths[1:]])
        for weight in self.weights:
            for one in weight:
                nn.init.kaiming_uniform_(
                    one, mode="fan_out", nonlinearity="relu"
                )  # stored [in, out]: fan_out is the input

    def forward(self, x: Tensor) -> Tensor:
        """[N, B, in] or [B, in] (the same for all) -> [N, B, out]."""
        x = x.expand(len(self.weights[0]), *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if self.activate_last or i + 1 < len(self.weights):
                x = torch.relu(x)
        return x


@dataclass
class Mixture:
    """What each task's tower reads.

    Attributes:
        values: [B, T, H].
        gate_weights: [B, T, N], 0 to 1, summing to 1 over N; None where there are no gates.
    """

    values: Tensor
    gate_weights: Tensor | None = None


class SharedBottom(nn.Module):
    """y_t = tower_t(f(z)): every task reads the same f(z) (Caruana 1997)."""

    def __init__(self, config: SharedBottomConfig, *, in_features: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.bottom = StackedMLP(1, in_features, config.layer_sizes)

    def forward(self, z: Tensor) -> Mixture:
        """[B, d] -> values [B, T, H]."""
        return Mixture(self.bottom(z)[0].unsqueeze(1).expand(-1, self.num_tasks, -1))


class MMoE(nn.Module):
    """y_t = tower_t(sum_i g_t(z)_i f_i(z)), g_t(z) = softmax((W_t z + b_t) / temperature) (Ma et al. 2018, equations 6 and 7)."""

    def __init__(self, config: MMoEConfig, *, in_features: int, num_tasks: int) -> None:
        super().__init__()
        self.num_tasks = num_tasks
        self.temperature = config.temperature
        self.experts = StackedMLP(config.num_experts, in_features, config.layer_sizes)
        self.gates = nn.Linear(in_features, num_tasks * config.num_experts)

    def forward(self, z: Tensor) -> Mixture:
        """[B, d] -> values [B, T, H], gate_weights [B, T, N]."""
        gate_logits = self.gates(z).float().view(len(z), self.num_tasks, -1)
        gate_weights = torch.softmax(gate_logits / self.temperature, dim=-1)
        outputs = self.experts(z).transpose(0, 1)  # [B, N, H]
        return Mixture(torch.bmm(gate_weights.to(outputs.dtype), outputs), gate_weights)


EXPERTS_KINDS: dict[str, type[ExpertsConfig]] = {"shared_bottom": SharedBottomConfig, "mmoe": MMoEConfig}
EXPERTS: dict[type[ExpertsConfig], type[nn.Module]] = {SharedBottomConfig: SharedBottom, MMoEConfig: MMoE}


def build_experts(config: ExpertsConfig, *, in_features: int, num_tasks: int) -> nn.Module:
    """The module that `config` describes: [B, d] -> Mixture."""
    return EXPERTS[type(config)](config, in_features=in_features, num_tasks=num_tasks)

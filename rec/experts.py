"""What tasks share: one bottom for all, or experts that each task mixes through a gate of its own.

Shared bottom (Caruana 1997), MMoE and OMoE (Ma et al., KDD 2018), CGC and PLE (Tang et al., RecSys 2020), all behind
`ExpertInputs -> Mixture`. Experts may be of several kinds, MLPs and cross networks; those of one shape run as one batched product.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rec.domain_experts import DOMAIN_EXPERTS, DOMAIN_KINDS
from rec.mixtures import (
    ExpertConfig,
    ExpertInputs,
    Experts,
    ExpertsConfig,
    ExpertStack,
    GatedConfig,
    Gates,
    Mixture,
    Sizes,
    check_widths,
    mix_experts,
)
from rec.schema import check_range
from rec.stacked import StackedMLP
from rec.task_networks import TASK_NETWORK_KINDS, TASK_NETWORKS


@dataclass
class SharedBottomConfig(ExpertsConfig):
    """One network that every task's tower reads."""

    kind: str = "shared_bottom"


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
        check_widths("model.experts.mixed", self.mixed, self.layer_sizes)

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
        check_widths("model.experts.mixed_shared", self.mixed_shared, self.layer_sizes)
        check_widths("model.experts.mixed_task", self.mixed_task, self.layer_sizes)

    @property
    def shared(self) -> list[ExpertConfig]:
        """The shared experts of a level, by shape."""
        return self.mixed_shared or [ExpertConfig(num=self.num_shared_experts)]

    @property
    def of_task(self) -> list[ExpertConfig]:
        """The experts of one task on a level, by shape."""
        return self.mixed_task or [ExpertConfig(num=self.num_task_experts)]


class SharedBottom(Experts):
    """y_t = tower_t(f(z)): every task reads the same f(z) (Caruana 1997)."""

    def __init__(self, config: SharedBottomConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_tasks = sizes.num_tasks
        self.bottom = StackedMLP(1, sizes.in_features, config.layer_sizes)

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]."""
        return Mixture(self.bottom(inputs.x)[0].unsqueeze(1).expand(-1, self.num_tasks, -1))

    def prune(self, tasks: list[int]) -> None:
        """Every tower reads the one network."""
        self.num_tasks = len(tasks)


class MMoE(Experts):
    """y_t = tower_t(sum_i g_t(z)_i f_i(z)), g_t(z) = softmax((W_t z + b_t) / temperature) (Ma et al. 2018, equations 6 and 7).

    With a shared gate g_t is the same for all tasks (OMoE, equation 5).
    """

    def __init__(self, config: MMoEConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_tasks = sizes.num_tasks
        self.experts = ExpertStack(config.experts, sizes.in_features, config.layer_sizes)
        num_gates = 1 if config.shared_gate else sizes.num_tasks
        allowed = torch.ones(num_gates, sum(self.experts.nums), dtype=torch.bool)
        self.gates = Gates(config, sizes.gates, allowed=allowed)

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H], gate_weights [B, T, N]."""
        gate_weights = self.gates(inputs.gates, inputs.draws).expand(-1, self.num_tasks, -1)
        outputs = self.experts(inputs.x)
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

    def __init__(self, config: PLEConfig, sizes: Sizes, *, last: bool) -> None:
        super().__init__()
        num_tasks = sizes.num_tasks
        self.task_experts = ExpertStack(config.of_task, sizes.in_features, config.layer_sizes, repeat=num_tasks)
        self.shared_experts = ExpertStack(config.shared, sizes.in_features, config.layer_sizes)
        num_own, num_shared = sum(self.task_experts.nums), sum(self.shared_experts.nums)
        own = torch.eye(num_tasks, dtype=torch.bool).repeat_interleave(num_own, dim=1)
        allowed = torch.cat([own, torch.ones(num_tasks, num_shared, dtype=torch.bool)], dim=1)
        if not last:
            allowed = torch.cat([allowed, torch.ones_like(allowed[:1])])
        self.gates = Gates(config, sizes.gates, allowed=allowed)
        self.read: slice | list[int] = slice(len(allowed))  # of the inputs, by the gates
        self.mixed: slice | list[int] = slice(None)  # of the experts that the gates know

    def forward(self, x: Tensor, gate_x: Tensor, draws: Tensor) -> Mixture:
        """[T + 1, B, in], the tasks' inputs and the shared one, for experts and gates -> values [B, T + 1 (last level: T), H]."""
        outputs = torch.cat([self.task_experts(x[:-1]), self.shared_experts(x[-1])], dim=1)
        gate_weights = self.gates(gate_x[self.read], draws)[..., self.mixed]
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

    def __init__(self, config: PLEConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_tasks = sizes.num_tasks
        above = Sizes(in_features=config.layer_sizes[-1], num_tasks=sizes.num_tasks)
        levels = [sizes] + [above] * (config.num_levels - 1)
        self.levels = nn.ModuleList(PLELevel(config, s, last=i + 1 == len(levels)) for i, s in enumerate(levels))

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]; gate_weights [B, T, N] and expert_outputs of the last level. Gates' own inputs go to the first."""
        x, gate_x = (z.expand(self.num_tasks + 1, *z.shape) for z in (inputs.x, inputs.gates))
        for level in self.levels:
            mixture = level(x, gate_x, inputs.draws)
            x = gate_x = mixture.values.transpose(0, 1)
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
    **TASK_NETWORK_KINDS,
    **DOMAIN_KINDS,
}
EXPERTS: dict[type[ExpertsConfig], type[Experts]] = {
    SharedBottomConfig: SharedBottom,
    MMoEConfig: MMoE,
    PLEConfig: PLE,
    **TASK_NETWORKS,
    **DOMAIN_EXPERTS,
}


def build_experts(config: ExpertsConfig, sizes: Sizes) -> Experts:
    """The module that `config` describes: `ExpertInputs` -> `Mixture`."""
    return EXPERTS[type(config)](config, sizes)

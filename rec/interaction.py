"""Explicit feature crosses: DCN-v2, full or low-rank (Wang et al., WWW 2021, equations 1 and 2), and factorisation machines."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor, nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from rec.embeddings import Embedded
from rec.schema import ConfigError, DataConfig, check_range, nearest


@dataclass
class InteractionConfig:
    """No crosses: the input passes through. Base of the other choices in `conf/interaction/`."""

    kind: str = "none"  # one of INTERACTION_KINDS


@dataclass
class DCNv2Config(InteractionConfig):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, with W_l [d, d]."""

    kind: str = "dcn_v2"
    num_layers: int = 2

    def __post_init__(self) -> None:
        check_range("model.interaction.num_layers", self.num_layers, 1, 100)


@dataclass
class LowRankDCNv2Config(InteractionConfig):
    """x_{l+1} = x_0 * (U_l (V_l x_l) + b_l) + x_l, with V_l [r, d] and U_l [d, r]."""

    kind: str = "dcn_v2_low_rank"
    num_layers: int = 2
    low_rank: int = 64  # r, 1 to d; d / 4 kept the full form's accuracy in the paper

    def __post_init__(self) -> None:
        check_range("model.interaction.num_layers", self.num_layers, 1, 100)
        check_range("model.interaction.low_rank", self.low_rank, 1, 100_000)


INTERACTION_KINDS: dict[str, type[InteractionConfig]] = {
    "none": InteractionConfig,
    "dcn_v2": DCNv2Config,
    "dcn_v2_low_rank": LowRankDCNv2Config,
}


def build_interaction(config: InteractionConfig, in_features: int) -> nn.Module:
    """The module that `config` describes: [B, d] -> [B, d]."""
    if isinstance(config, LowRankDCNv2Config):
        return LowRankCrossNet(in_features, config.num_layers, low_rank=min(config.low_rank, in_features))
    if isinstance(config, DCNv2Config):
        return CrossNet(in_features, config.num_layers)
    return nn.Identity()


class FMKind(Enum):
    """Whether a factorisation machine adds to the logits."""

    none = "none"
    shared = "shared"  # the same number for every task
    per_task = "per_task"  # each task weighs the D products that the number is the sum of


@dataclass
class FMConfig:
    """A factorisation machine over the embeddings, added to the logits; its first-order part is `linear=v1`."""

    kind: FMKind = FMKind.none
    features: list[str] | None = None  # sparse features of one embedding_dim; null: all
    scale: bool = False  # a learned factor a task, 1 at the start

    def fields(self, data: DataConfig) -> list[str]:
        """The features that are multiplied; none where there is no machine.

        Raises:
            ConfigError: unknown features, fewer than two, or of several widths.
        """
        if self.kind is FMKind.none:
            return []
        dims = {name: data.tables[data.table_of(name)].embedding_dim for name in data.sparse_features}
        chosen = list(dims) if self.features is None else self.features
        for name in chosen:
            if name not in dims:
                raise ConfigError(f"model.fm.features has '{name}', expected sparse features; {nearest(name, dims)}")
        widths = {dims[name] for name in chosen}
        if len(chosen) < 2 or len(widths) > 1:
            raise ConfigError(
                f"model.fm multiplies {len(chosen)} features of embedding_dim {sorted(widths)}, expected two or more of one: "
                "choose with model.fm.features, or set data.tables.*.embedding_dim"
            )
        return chosen


class FM(nn.Module):
    """sum_{i<j} <v_i, v_j> = 1/2 sum_f ((sum_j v_jf)^2 - sum_j v_jf^2) (Rendle, ICDM 2010, equation 5), a logit a task.

    Args:
        config: whether there is one, whether tasks share it, and of which features.
        data: description of the data set.
    """

    tasks: Tensor

    def __init__(self, config: FMConfig, data: DataConfig) -> None:
        super().__init__()
        self.fields, num_tasks = config.fields(data), len(data.tasks)
        dim = data.tables[data.table_of(self.fields[0])].embedding_dim if self.fields else 0
        self.register_buffer("tasks", torch.arange(num_tasks), persistent=False)
        self.weights = nn.Parameter(torch.ones(num_tasks, dim)) if config.kind is FMKind.per_task else None
        self.scale = nn.Parameter(torch.ones(num_tasks)) if self.fields and config.scale else None

    def forward(self, embedded: Embedded) -> Tensor | None:
        """B rows -> [B, T]; None where there is no machine."""
        if not self.fields:
            return None
        vectors = torch.stack([embedded.pooled[name] for name in self.fields], dim=1)  # [B, F, D]
        products = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)) / 2  # [B, D]
        if self.weights is None:
            sums = products.sum(dim=1, keepdim=True).expand(-1, len(self.tasks))
        else:
            sums = torch.stack([products @ weights for weights in self.weights], dim=1)
        return sums if self.scale is None else sums * self.scale

    def prune(self, tasks: list[int]) -> None:
        """Leave only the logits of `tasks`, in that order."""
        self.tasks = self.tasks[tasks]
        for parameter in self.parameters():
            parameter.data = parameter.data[tasks]

"""From a task's mixture to its logit: one small network a task, or a product with the vector of an item tower."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rec.schema import ConfigError, DataConfig, nearest
from rec.stacked import StackedMLP, prune_stack


@dataclass
class TowersConfig:
    """Towers of one shape, each with its own weights. Base of the other choice in `conf/towers/`."""

    kind: str = "mlp"  # one of TOWERS_KINDS
    layer_sizes: list[int] = field(default_factory=lambda: [64])  # widths of the hidden layers; may be empty

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.layer_sizes):
            raise ConfigError(f"model.towers.layer_sizes is {self.layer_sizes}, expected positive widths")

    @property
    def item(self) -> list[str]:
        """Features that only the item tower reads."""
        return []

    def check(self, data: DataConfig, *, crossing: list[str]) -> None:
        """Refuse what does not fit the data set; `crossing` are features that other parts bring to the logits."""


@dataclass
class DotTowersConfig(TowersConfig):
    """Two towers: a task's logit is the product of its tower's vector and an item's, which depends on the item alone."""

    kind: str = "dot"
    item_features: list[str] = field(default_factory=list)  # what the item tower reads, and nothing else does
    item_layer_sizes: list[int] = field(default_factory=lambda: [128, 64])  # widths of the item tower; the last is r

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.item_layer_sizes or min(self.item_layer_sizes) < 1:
            raise ConfigError(f"model.towers.item_layer_sizes is {self.item_layer_sizes}, expected positive widths")

    def check(self, data: DataConfig, *, crossing: list[str]) -> None:
        """Refuse item features that the data set lacks or that are all it has, and whatever joins query and item.

        Raises:
            ConfigError: naming the features, and what to change.
        """
        for name in self.item_features:
            if name not in data.features:
                raise ConfigError(f"model.towers.item_features has '{name}'; {nearest(name, data.features)}")
        if not 0 < len(set(self.item_features)) < len(data.features):
            raise ConfigError(
                f"model.towers.item_features names {len(set(self.item_features))} of {len(data.features)} features, expected "
                "some for each of the two towers"
            )
        if crossing:
            raise ConfigError(
                f"model.histories, model.linear or model.fm bring {crossing} to the logits beside the two towers, but with towers=dot "
                "a logit is the product of two vectors, one of them of the item alone; leave them out, or choose towers=mlp"
            )

    @property
    def item(self) -> list[str]:
        """Features that only the item tower reads."""
        return self.item_features


TOWERS_KINDS: dict[str, type[TowersConfig]] = {"mlp": TowersConfig, "dot": DotTowersConfig}


class TaskTowers(nn.Module):
    """The towers of all tasks, run as one batched product a layer.

    Args:
        config: their shape.
        in_features: H.
        tower_of: the task whose mixture each tower reads; a task may have two.
        out_features: numbers that a tower gives.
    """

    def __init__(self, config: TowersConfig, *, in_features: int, tower_of: list[int], out_features: int = 1) -> None:
        super().__init__()
        self.tower_of = tower_of
        sizes = [*config.layer_sizes, out_features]
        self.towers = StackedMLP(len(tower_of), in_features, sizes, activate_last=False)

    def forward(self, values: Tensor, items: Tensor | None = None, domain_id: Tensor | None = None) -> Tensor:
        """[B, T, H] -> logits [B, towers] (of a regression: predictions)."""
        return self.vectors(values).squeeze(-1)

    def items(self, x: Tensor) -> Tensor:
        """What an item tower reads [B, d_item] -> items' vectors [B, r]."""
        raise ConfigError("these towers have no item side; choose towers=dot")

    def vectors(self, values: Tensor) -> Tensor:
        """[B, T, H] -> [B, towers, out_features]."""
        if self.tower_of != [*range(values.shape[1])]:  # a copy in the backward that is seldom needed
            values = values[:, self.tower_of]
        return self.towers(values.transpose(0, 1)).transpose(0, 1)

    def prune(self, tasks: list[int], *, towers: list[int]) -> None:
        """Leave only the `towers`, all of `tasks`, which are numbered anew in that order."""
        self.tower_of = [tasks.index(self.tower_of[i]) for i in towers]
        prune_stack(self.towers, towers)


class DotTowers(TaskTowers):
    """logit_t = <u_t, v> + c_t + c_{domain,t}, u_t the vector of task t's tower, v of the item tower.

    Only u and c know the domain and the task: an item has one vector, whatever is predicted of it, and that can be computed
    once, ahead of time. A domain that training did not know has c_t alone.

    Args:
        config: shapes of both sides.
        in_features: H.
        item_features: width of what the item tower reads.
        tower_of: the task whose mixture each tower reads.
        num_domains: D.
    """

    def __init__(
        self, config: DotTowersConfig, *, in_features: int, item_features: int, tower_of: list[int], num_domains: int
    ) -> None:
        width = config.item_layer_sizes[-1]
        super().__init__(config, in_features=in_features, tower_of=tower_of, out_features=width)
        self.item_tower = StackedMLP(1, item_features, config.item_layer_sizes, activate_last=False)
        self.item_tower.weights[-1].data *= width**-0.5  # a product of r terms starts no larger than one of them
        self.bias = nn.Parameter(torch.zeros(len(tower_of)))
        self.domain_bias = nn.Parameter(torch.zeros(num_domains, len(tower_of)))

    def items(self, x: Tensor) -> Tensor:
        """See `TaskTowers.items`."""
        return self.item_tower(x)[0]

    def forward(self, values: Tensor, items: Tensor | None = None, domain_id: Tensor | None = None) -> Tensor:
        """[B, T, H], items' vectors [B, r] and domain_id [B] -> logits [B, towers]."""
        assert items is not None, "two towers need the items' vectors"
        assert domain_id is not None
        products = (self.vectors(values) * items.unsqueeze(1)).sum(dim=-1)
        known = (domain_id >= 0) & (domain_id < len(self.domain_bias))
        of_domain = self.domain_bias[torch.where(known, domain_id, 0)] * known.unsqueeze(1)
        return products + self.bias + of_domain

    def prune(self, tasks: list[int], *, towers: list[int]) -> None:
        """See `TaskTowers.prune`."""
        super().prune(tasks, towers=towers)
        self.bias.data, self.domain_bias.data = self.bias.data[towers], self.domain_bias.data[:, towers]


def build_towers(
    config: TowersConfig, *, in_features: int, item_features: int, tower_of: list[int], num_domains: int
) -> TaskTowers:
    """The towers that `config` describes; `item_features` is the width of what an item tower reads."""
    if isinstance(config, DotTowersConfig):
        return DotTowers(
            config, in_features=in_features, item_features=item_features, tower_of=tower_of, num_domains=num_domains
        )
    return TaskTowers(config, in_features=in_features, tower_of=tower_of)

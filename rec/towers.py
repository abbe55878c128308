"""One small network a task, from its mixture to its logit."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from rec.schema import ConfigError
from rec.stacked import StackedMLP, prune_stack


@dataclass
class TowersConfig:
    """Towers of one shape, each with its own weights."""

    layer_sizes: list[int] = field(default_factory=lambda: [64])  # widths of the hidden layers; may be empty

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.layer_sizes):
            raise ConfigError(f"model.towers.layer_sizes is {self.layer_sizes}, expected positive widths")


class TaskTowers(nn.Module):
    """The towers of all tasks, run as one batched product a layer.

    Args:
        config: their shape.
        in_features: H.
        tower_of: the task whose mixture each tower reads; a task may have two.
    """

    def __init__(self, config: TowersConfig, *, in_features: int, tower_of: list[int]) -> None:
        super().__init__()
        self.tower_of = tower_of
        self.towers = StackedMLP(len(tower_of), in_features, [*config.layer_sizes, 1], activate_last=False)

    def forward(self, values: Tensor) -> Tensor:
        """[B, T, H] -> logits [B, towers] (of a regression: predictions)."""
        if self.tower_of != [*range(values.shape[1])]:  # a copy in the backward that is seldom needed
            values = values[:, self.tower_of]
        return self.towers(values.transpose(0, 1)).squeeze(-1).transpose(0, 1)

    def prune(self, tasks: list[int]) -> None:
        """Leave only the towers of `tasks`, which are numbered anew in that order."""
        kept = [i for i, task in enumerate(self.tower_of) if task in tasks]
        self.tower_of = [tasks.index(self.tower_of[i]) for i in kept]
        prune_stack(self.towers, kept)

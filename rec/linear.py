"""The linear part: features that reach the logits, towers, experts or gates without the deep network's generalisation.

Taobao's channel "Lying Flat" has tried five ways of it, which `linear=v1` to `linear=v5` choose. With l the linear features
    v1  logit_k = tower_k(f_k(x)) + w_k l + b_k        to: [logits]
    v2  logit_k = tower_k([f_k(x); l])                 to: [towers]
    v3  experts and gates read [x; l]                  to: [experts, gates]
    v4  v3 and v1                                      to: [logits, experts, gates]
    v5  v2 and v1                                      to: [logits, towers]
An id's entry in l is a vector of one weight a task, from a table of its own; a dense column's is its value.
"""

from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from rec.embeddings import Embedded, linear_width
from rec.schema import ConfigError, DataConfig, nearest


class Route(Enum):
    """Where the linear features go."""

    logits = "logits"
    towers = "towers"
    experts = "experts"
    gates = "gates"


@dataclass
class LinearConfig:
    """Which features are linear, and where they go."""

    features: list[str] = field(default_factory=list)  # sparse and dense features
    to: list[Route] = field(default_factory=list)  # empty: there is no linear part
    exclusive: bool = False  # the deep part does not read these features

    def __post_init__(self) -> None:
        if self.to and not self.features:
            raise ConfigError(
                f"model.linear.to is {[route.name for route in self.to]} and model.linear.features is empty; name the features"
            )

    def check(self, data: DataConfig) -> None:
        """Refuse features that the data set lacks."""
        for name in self.features:
            if name not in data.features:
                raise ConfigError(f"model.linear.features has '{name}'; {nearest(name, data.features)}")

    @property
    def used(self) -> list[str]:
        """The features, where they go anywhere."""
        return self.features if self.to else []

    @property
    def hidden(self) -> list[str]:
        """The features that the deep part does not read."""
        return self.used if self.exclusive else []


@dataclass
class LinearFeatures:
    """The linear features of B rows.

    Attributes:
        values: l [B, width]: the ids' weights, feature by feature, and the dense columns.
        logits: w_k l + b_k [B, T]; None where l does not go to the logits.
        to: where l goes.
    """

    values: Tensor
    logits: Tensor | None
    to: list[Route]

    def joined(self, x: Tensor, route: Route) -> Tensor:
        """X [B, d] or [B, T, d] with l behind it, where l goes to `route`."""
        if route not in self.to:
            return x
        values = self.values.to(x.dtype)
        return torch.cat([x, values if x.dim() == 2 else values.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=-1)


class Linear(nn.Module):
    """The linear part of a data set's tasks.

    Args:
        config: features and routes.
        data: description of the data set.
    """

    def __init__(self, config: LinearConfig, data: DataConfig) -> None:
        super().__init__()
        self.routes = config.to
        self.sparse = [name for name in data.sparse_features if name in config.used]
        self.columns = [c for name, columns in data.dense_columns.items() if name in config.used for c in columns]
        self.out_features = linear_width(len(data.tasks)) * len(self.sparse) + len(self.columns)
        self.tasks = [*range(len(data.tasks))]
        self.dense = None
        if Route.logits in config.to:
            self.dense = nn.Linear(len(self.columns), len(data.tasks))
            nn.init.zeros_(self.dense.weight)
            nn.init.zeros_(self.dense.bias)

    def width(self, route: Route) -> int:
        """Width of what goes to a route; 0 where nothing does."""
        return self.out_features if route in self.routes else 0

    def forward(self, embedded: Embedded, dense: Tensor) -> LinearFeatures:
        """B rows -> l, and its logits."""
        columns = dense[:, self.columns]
        values = (
            torch.cat([*(embedded.linear[name] for name in self.sparse), columns], dim=1) if self.routes else columns
        )
        logits = None
        if self.dense is not None:
            logits = self.dense(columns)
            for name in self.sparse:
                logits = logits + embedded.linear[name][:, self.tasks]
        return LinearFeatures(values, logits, self.routes)

    def prune(self, tasks: list[int]) -> None:
        """Leave only the logits of `tasks`, in that order."""
        self.tasks = [self.tasks[t] for t in tasks]
        for parameter in self.parameters():
            parameter.data = parameter.data[tasks]

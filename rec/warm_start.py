"""A new run starts from the weights of another run's checkpoint, which may know fewer domains.

Weights are matched by name. What the checkpoint lacks keeps its own start. Where domains have been added behind the old ones, a weight
has grown in one or two dimensions: its old part is taken over, the new one keeps its own start. Optimizers start anew.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from rec import config as configuration
from rec.checkpoint import Checkpoints
from rec.config import Config
from rec.schema import ConfigError

_MODEL = "model."
# Logits with which an old domain reads a new one's experts: none of them, so that it predicts as before.
_APART = {"experts.adaptation": -30.0}


@dataclass
class Taken:
    """What became of the network's weights, by name."""

    whole: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)  # their new part keeps its own start
    new: list[str] = field(default_factory=list)  # keep their own start


def check_domains(config: Config, path: Path) -> None:
    """Refuse a checkpoint whose domains are not the first of this configuration's: the weights of one would go to another.

    Raises:
        ConfigError: no readable checkpoint there, or other domains.
    """
    old, new = configuration.load(path / "config.yaml").data.domains, config.data.domains
    if new[: len(old)] != old:
        raise ConfigError(
            f"checkpoint.warm_start={path} knows the domains {old}, and data.domain.names is {new}; expected the same ones first, "
            "in the same order, and new ones behind them"
        )


def warm_start(model: nn.Module, config: Config, path: Path) -> Taken:
    """Fill the sharded `model` from the checkpoint `path`. Ranks wait for each other here.

    Raises:
        ConfigError: not a checkpoint, other domains, or a weight of another shape.
    """
    check_domains(config, path)
    saved = FileSystemReader(str(path)).read_metadata().state_dict_metadata
    sizes = {
        key.removeprefix(_MODEL): tuple(entry.size)
        for key, entry in saved.items()
        if key.startswith(_MODEL) and isinstance(entry, TensorStorageMetadata)
    }
    state, taken, smaller = model.state_dict(), Taken(), {}
    wanted: dict[str, Any] = {}
    for name, value in state.items():
        if name not in sizes:
            taken.new.append(name)
        elif sizes[name] == tuple(value.size()):
            taken.whole.append(name)
            wanted[name] = value
        else:
            smaller[name] = wanted[name] = _smaller(name, value, sizes[name], path)
            taken.grown.append(name)
    Checkpoints(path.parent, config.checkpoint).load(path, {"model": wanted})
    with torch.no_grad():
        for name, old in smaller.items():
            if name in _APART:
                state[name][: len(old), len(old) :] = _APART[name]
            state[name][tuple(slice(size) for size in old.shape)] = old
    model.load_state_dict(state)
    return taken


def _smaller(name: str, value: Tensor, size: tuple[int, ...], path: Path) -> Tensor:
    """Room for the old part of a weight that has grown."""
    new = tuple(value.size())
    fits = len(size) == len(new) and all(old <= now for old, now in zip(size, new, strict=True))
    if name.startswith("embeddings.") or not fits:
        raise ConfigError(
            f"checkpoint.warm_start={path} has {name} of shape {list(size)}, the network {list(new)}; only domains may be added: "
            "choose the same data.tables, tasks and model as that run"
        )
    return value.new_empty(size)

"""A new run starts from the weights of another run's checkpoint, which may know fewer tables, domains and tasks.

Weights are matched by name, or by `checkpoint.rename`. What the checkpoint lacks keeps its own start. Where domains or tasks have been
added behind the old ones, a weight has grown: its old part is taken over, the new one keeps its own start. Optimizers start anew.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec import config as configuration
from rec.checkpoint import Checkpoints
from rec.config import Config
from rec.schema import ConfigError, nearest
from rec.tensor_files import sizes

_MODEL = "model."
# Logits with which an old domain reads a new one's experts: none of them, so that it predicts as before.
_APART = {"experts.adaptation": -30.0}


@dataclass
class Taken:
    """What became of the network's weights, by name."""

    whole: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)  # their new part keeps its own start
    new: list[str] = field(default_factory=list)  # keep their own start


def check_order(config: Config, path: Path) -> None:
    """Refuse a checkpoint whose domains or tasks are not the first of this configuration's: the weights of one would go to another.

    Raises:
        ConfigError: no readable checkpoint there, or other domains or tasks.
    """
    old, new = configuration.load(path / "config.yaml").data, config.data
    for what, key, before, now in (
        ("domains", "data.domain.names", old.domains, new.domains),
        ("tasks", "data.tasks", list(old.tasks), list(new.tasks)),
    ):
        if now[: len(before)] != before:
            raise ConfigError(
                f"checkpoint.warm_start={path} knows the {what} {before}, and {key} is {now}; expected the same ones first, "
                "in the same order, and new ones behind them"
            )


def warm_start(model: nn.Module, config: Config, path: Path) -> Taken:
    """Fill the sharded `model` from the checkpoint `path`. Ranks wait for each other here.

    Raises:
        ConfigError: not a checkpoint, other domains or tasks, a weight of another shape, or a new name for what is not there.
    """
    check_order(config, path)
    saved = {name.removeprefix(_MODEL): size for name, size in sizes(path).items() if name.startswith(_MODEL)}
    state, taken, smaller = model.state_dict(), Taken(), {}
    old_names = _old_names(list(state), config.checkpoint.rename, saved)
    wanted: list[dict[str, Any]] = [{}]  # more than one where several weights start from the same
    for name, value in state.items():
        old = old_names[name]
        if old not in saved:
            taken.new.append(name)
            continue
        if saved[old] == tuple(value.size()):
            taken.whole.append(name)
        else:
            taken.grown.append(name)
            value = smaller[name] = _smaller(name, value, saved[old], path)
        if all(old in part for part in wanted):
            wanted.append({})
        next(part for part in wanted if old not in part)[old] = value
    for part in wanted:
        Checkpoints(path.parent, config.checkpoint).load(path, {"model": part})
    with torch.no_grad():
        for name, old_part in smaller.items():
            if name in _APART:
                state[name][: len(old_part), len(old_part) :] = _APART[name]
            state[name][tuple(slice(size) for size in old_part.shape)] = old_part
    model.load_state_dict(state)
    return taken


def _old_names(names: list[str], rename: list[str], saved: Collection[str]) -> dict[str, str]:
    """Each name -> its name in the checkpoint: parts between dots that `rename` names are replaced.

    >>> _old_names(["tables.member.weight"], ["member:user"], ["tables.user.weight"])
    {'tables.member.weight': 'tables.user.weight'}
    """
    old = {name: name for name in names}
    for pair in rename:
        new_part, _, old_part = pair.partition(":")
        whole = rf"(^|(?<=\.)){re.escape(new_part)}(?=\.|$)"
        found = {name: re.sub(whole, old_part, before) for name, before in old.items() if re.search(whole, before)}
        where = f"checkpoint.rename has {pair}"
        if not found:
            raise ConfigError(
                f"{where}, and no weight here has '{new_part}' in its name; {nearest(new_part, _parts(names))}"
            )
        if not any(name in saved for name in found.values()):
            raise ConfigError(
                f"{where}, and no weight of the checkpoint has '{old_part}' there; {nearest(old_part, _parts(saved))}"
            )
        old |= found
    return old


def _parts(names: Iterable[str]) -> set[str]:
    return {part for name in names for part in name.split(".") if not part.isdigit()}


def _smaller(name: str, value: Tensor, size: tuple[int, ...], path: Path) -> Tensor:
    """Room for the old part of a weight that has grown."""
    new = tuple(value.size())
    fits = len(size) == len(new) and all(old <= now for old, now in zip(size, new, strict=True))
    if name.startswith("embeddings.") or not fits:
        raise ConfigError(
            f"checkpoint.warm_start={path} has {name} of shape {list(size)}, the network {list(new)}; only domains and tasks may be added: "
            "choose the same data.tables, tasks and model as that run"
        )
    return value.new_empty(size)

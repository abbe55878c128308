"""Checkpoints: whole or invisible, readable by any number of ranks under any sharding plan.

    checkpoints/step_000001000/checkpoint.json     step, score, world size, version of the format, configuration
    checkpoints/step_000001000/.metadata, *.distcp torch.distributed.checkpoint: model, both optimizers

A checkpoint is written into a hidden sibling and renamed when every rank is done, so that what has its name is complete.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from rec.schema import ConfigError, check_range

VERSION = 1
_INFO = "checkpoint.json"


class Resume(Enum):
    """What a run does with checkpoints that are already in its folder."""

    auto = "auto"  # go on from the newest, if there is one
    never = "never"  # start anew; refused where there are checkpoints


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    resume: Resume = Resume.auto
    every_steps: int | None = None  # steps; besides, one is written at the end; null: only there
    keep_last: int = 2  # newest checkpoints that stay, at least 1
    keep_best: int = 1  # best checkpoints that stay beside them, by trainer.monitor; 0 or more

    def __post_init__(self) -> None:
        check_range("checkpoint.every_steps", self.every_steps, 1, 1e12)
        check_range("checkpoint.keep_last", self.keep_last, 1, 1e6)
        check_range("checkpoint.keep_best", self.keep_best, 0, 1e6)


@dataclass
class Info:
    """What `checkpoint.json` says.

    Attributes:
        step: steps done.
        rows: rows seen.
        score: the monitored metric at this step, higher is better; None if it was not evaluated.
        best_score: the best so far.
        stale_evals: evaluations since the best.
        world_size: ranks that wrote it; any number may read it.
        version: of the format.

    """

    step: int
    rows: int
    score: float | None = None
    best_score: float | None = None
    stale_evals: int = 0
    world_size: int = 1
    version: int = VERSION


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        config: which stay.

    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder = folder
        self.config = config

    def all(self) -> dict[Path, Info]:
        """Complete checkpoints, oldest first."""
        found = {}
        for path in sorted(self.folder.glob("step_*")):
            if (path / _INFO).is_file() and (path / ".metadata").is_file():
                found[path] = Info(**json.loads((path / _INFO).read_text()))
        return found

    def find(self, which: str = "latest") -> Path | None:
        """The checkpoint called `latest`, `best`, or by its step; None if there is none at all.

        Raises:
            ConfigError: checkpoints, but not that one.

        """
        found = self.all()
        if not found:
            return None
        if which == "latest":
            return list(found)[-1]
        if which == "best":
            scored = [path for path in found if found[path].score is not None]
            return max(scored, key=lambda path: found[path].score or 0.0) if scored else list(found)[-1]
        for path, info in found.items():
            if which == str(info.step):
                return path
        steps = ", ".join(str(info.step) for info in found.values())
        raise ConfigError(
            f"no checkpoint '{which}' in {self.folder}; expected latest, best or one of the steps {steps}"
        )

    def save(self, state: dict[str, Any], info: Info) -> Path:
        """Write a checkpoint and drop those that need not stay. Ranks wait for each other here."""
        final = self.folder / f"step_{info.step:09d}"
        draft = self.folder / f".writing_{final.name}"
        self._on_main(lambda: shutil.rmtree(draft, ignore_errors=True))
        dcp.save(state, checkpoint_id=str(draft))

        def publish() -> None:
            info.world_size = dist.get_world_size()
            (draft / _INFO).write_text(json.dumps(asdict(info)))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            self._prune()

        self._on_main(publish)
        return final

    def load(self, path: Path, state: dict[str, Any]) -> Info:
        """Fill the tensors of `state` in place. Ranks wait for each other here.

        Raises:
            ConfigError: the checkpoint does not fit the model, or was written by a newer version.

        """
        info = Info(**json.loads((path / _INFO).read_text()))
        if info.version > VERSION:
            raise ConfigError(
                f"{path} has format {info.version}, this version reads up to {VERSION}; update to read it"
            )
        try:
            dcp.load(state, checkpoint_id=str(path))
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            raise ConfigError(f"{path} does not fit this configuration: {first}") from error
        return info

    def _prune(self) -> None:
        found = self.all()
        newest_first = list(found)[::-1]
        best_first = sorted(
            (p for p in found if found[p].score is not None), key=lambda p: found[p].score or 0.0, reverse=True
        )
        keep = set(newest_first[: self.config.keep_last]) | set(best_first[: self.config.keep_best])
        for path in set(found) - keep:
            shutil.rmtree(path, ignore_errors=True)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 alone while the others wait."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            action()
        dist.barrier()

"""Checkpoints: whole or invisible, readable by any number of ranks under any sharding plan.

    checkpoints/step_000001000/checkpoint.json     step, score, world size, version of the format, sizes of the files
    checkpoints/step_000001000/config.yaml         the configuration that wrote it
    checkpoints/step_000001000/.metadata, *.distcp torch.distributed.checkpoint: model, both optimizers

A checkpoint is written into a hidden sibling and renamed when every rank is done, so that what has its name is complete.
One that was cut short later (a full disk, an interrupted copy) shows by the sizes of its files and is passed over.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
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
    warm_start: str | None = None  # a checkpoint's folder: its weights are what a new run starts from
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
        files: name -> bytes, of the files beside checkpoint.json.
    """

    step: int
    rows: int
    score: float | None = None
    best_score: float | None = None
    stale_evals: int = 0
    world_size: int = 1
    version: int = VERSION
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Info":
        """What the checkpoint in the folder `path` says, less what only a newer version knows."""
        said = json.loads((path / _INFO).read_text())
        return cls(**{f.name: said[f.name] for f in fields(cls) if f.name in said})


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint in the folder `path`; None if nothing is."""
    try:
        files = Info.read(path).files
    except (OSError, ValueError, TypeError) as error:
        return f"{_INFO}: {error}"
    for name in {".metadata", *files}:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if name in files and file.stat().st_size != files[name]:
            return f"{name} has {file.stat().st_size} bytes, {files[name]} were written"
    return None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        config: which stay.
        settings: the run's configuration as YAML, kept in every checkpoint.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, settings: str = "") -> None:
        self.folder = folder
        self.config = config
        self.settings = settings

    def all(self) -> dict[Path, Info]:
        """Whole checkpoints, oldest first."""
        return {path: Info.read(path) for path in sorted(self.folder.glob("step_*")) if not _damage(path)}

    def damaged(self) -> dict[Path, str]:
        """Checkpoints that cannot be read, with the reason, oldest first."""
        return {path: why for path in sorted(self.folder.glob("step_*")) if (why := _damage(path))}

    def find(self, which: str = "latest") -> Path | None:
        """The checkpoint called `latest`, `best`, or by its step; None if there is none at all.

        Raises:
            ConfigError: checkpoints, but not that one, or none that is whole.
        """
        found, damaged = self.all(), [f"{path} ({why})" for path, why in self.damaged().items()]
        if damaged and not found:
            raise ConfigError(
                f"no whole checkpoint, only damaged ones: {'; '.join(damaged)}; move them away to start anew"
            )
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
            + (f"; damaged: {'; '.join(damaged)}" if damaged else "")
        )

    def save(self, state: dict[str, Any], info: Info) -> Path:
        """Write a checkpoint and drop those that need not stay. Ranks wait for each other here."""
        final = self.folder / f"step_{info.step:09d}"
        draft = self.folder / f".writing_{final.name}"
        self._on_main(lambda: shutil.rmtree(draft, ignore_errors=True))
        dcp.save(state, checkpoint_id=str(draft))

        def publish() -> None:
            (draft / "config.yaml").write_text(self.settings)
            info.world_size = dist.get_world_size()
            info.files = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
            (draft / _INFO).write_text(json.dumps(asdict(info)))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            self._prune()

        self._on_main(publish)
        return final

    def load(self, path: Path, state: dict[str, Any]) -> Info:
        """Fill the tensors of `state` in place. Ranks wait for each other here.

        Raises:
            ConfigError: the checkpoint does not fit the model, or was written by a newer version of the format.
        """
        info = Info.read(path)
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
        for path in set(found) - keep:  # hidden first: half a checkpoint must not have the name of one
            path.rename(path.with_name(f".dropping_{path.name}"))
        for path in self.folder.glob(".*_step_*"):  # also what a kill left behind
            shutil.rmtree(path, ignore_errors=True)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 alone while the others wait."""
        if dist.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            action()
        dist.barrier()

"""Checkpoints: whole or invisible, written while training goes on, readable by any number of ranks under any sharding plan.

    checkpoints/step_000001000/checkpoint.json     step, score, world size, version of the format, SHA-256 of the files
    checkpoints/step_000001000/config.yaml         the configuration that wrote it
    checkpoints/step_000001000/plan.json           how its tables were sharded
    checkpoints/step_000001000/.metadata, *.distcp torch.distributed.checkpoint: model, optimizers, state of the loop, random numbers

Tensors are copied first; a thread then writes the copy, over a process group of its own. In a file system it writes into a hidden
sibling, which is renamed when every rank is done. An object store cannot rename: there checkpoint.json, written last, makes a
checkpoint visible. What was damaged later (a full disk, an interrupted copy, a bad sector) shows by sizes and sums and is passed over.
"""

import copy
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from enum import Enum
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from rec.distributed import from_main
from rec.schema import ConfigError, check_range
from rec.storage import is_file, is_local, is_of_storage
from rec.tensor_files import Sum, damage, read, staged, write

VERSION = 2  # 1 had sizes alone, and neither state of the loop nor random numbers; it is still read
_INFO = "checkpoint.json"
_PATIENCE_S = 30


class Resume(Enum):
    """What a run does with checkpoints that are already in its folder."""

    auto = "auto"  # go on from the newest, if there is one
    never = "never"  # start anew; refused where there are checkpoints


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    resume: Resume = Resume.auto
    every_steps: int | None = None  # steps; besides, one is written at the end; null: only there
    asynchronous: bool = (
        True  # training goes on while one is written, which takes a copy of model and optimizers in memory
    )
    warm_start: str | None = None  # a checkpoint's folder: its weights are what a new run starts from
    rename: list[str] = field(
        default_factory=list
    )  # warm_start: `new:old`, parts of names between dots, e.g. member:user
    keep_last: int = 2  # newest checkpoints that stay, at least 1
    keep_best: int = 1  # best checkpoints that stay beside them, by trainer.monitor; 0 or more
    timeout_s: float = 3600  # seconds that a rank waits for the others' writing

    def __post_init__(self) -> None:
        check_range("checkpoint.every_steps", self.every_steps, 1, 1e12)
        check_range("checkpoint.keep_last", self.keep_last, 1, 1e6)
        check_range("checkpoint.keep_best", self.keep_best, 0, 1e6)
        check_range("checkpoint.timeout_s", self.timeout_s, 1, 1e6)
        for pair in self.rename:
            if pair.count(":") != 1 or pair.startswith(":"):
                raise ConfigError(f"checkpoint.rename has '{pair}', expected new:old, such as member:user")


@dataclass
class Info:
    """What `checkpoint.json` says.

    Attributes:
        step: steps done.
        rows: rows seen.
        score: the monitored metric at this step, higher is better; None if it was not evaluated.
        best_score: the best so far.
        stale_evals: evaluations since the best.
        owes_eval: an evaluation was due at this step and did not take place, since the run was told to stop.
        world_size: ranks that wrote it; any number may read it.
        version: of the format.
        files: the files beside checkpoint.json, by name.
    """

    step: int
    rows: int
    score: float | None = None
    best_score: float | None = None
    stale_evals: int = 0
    owes_eval: bool = False
    world_size: int = 1
    version: int = VERSION
    files: dict[str, Sum] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Info":
        """What the checkpoint in the folder `path` says, less what only a newer version knows."""
        said = json.loads((path / _INFO).read_text())
        info = cls(**{f.name: said[f.name] for f in fields(cls) if f.name in said})
        info.files = {n: Sum(f, "") if isinstance(f, int) else Sum(**f) for n, f in said.get("files", {}).items()}
        return info


class DamagedError(ConfigError):
    """A checkpoint whose files are not as they were written."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written; the message names the folder and the cause."""


@dataclass
class Written:
    """What became of a checkpoint: `error` is None when it lies, whole, in the folder `path`."""

    path: Path
    info: Info
    seconds: float
    error: str | None = None


def _cut_short(path: Path) -> str | None:
    """What is wrong with the checkpoint in the folder `path`, as far as names and sizes tell; None if nothing is."""
    try:
        files = Info.read(path).files
    except (ValueError, TypeError, FileNotFoundError) as error:
        return f"{_INFO}: {error}"
    except OSError as error:
        if not is_local(path):  # a store that fails has lost nothing
            raise
        return f"{_INFO}: {error}"
    for name in {".metadata", *files}:
        file = path / name
        if not is_file(file):
            return f"{name} is missing"
        if name in files and file.stat().st_size != files[name].bytes:
            return f"{name} has {file.stat().st_size} bytes, {files[name].bytes} were written"
    return None


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        config: which stay.
        settings: the run's configuration as YAML, kept in every checkpoint.
        plan: how its tables are sharded, as JSON, kept likewise.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, settings: str = "", plan: str = "{}") -> None:
        self.folder = folder
        self.config = config
        self.beside = {"config.yaml": settings, "plan.json": plan}
        self._damaged: dict[Path, str] = {}  # by their sums, which only `newest` looks at
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Written] | None = None

    def all(self) -> dict[Path, Info]:
        """Whole checkpoints, oldest first."""
        return {path: Info.read(path) for path in self._visible() if not self._why_damaged(path)}

    def damaged(self) -> dict[Path, str]:
        """Checkpoints that cannot be read, with the reason, oldest first."""
        return {path: why for path in self._visible() if (why := self._why_damaged(path))}

    def _visible(self) -> list[Path]:
        found = [path for path in _children(self.folder) if path.name.startswith("step_")]
        return [path for path in found if is_local(path) or is_file(path / _INFO)]

    def _why_damaged(self, path: Path) -> str | None:
        return self._damaged.get(path) or _cut_short(path)

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

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are, bit for bit, as they were written. Ranks wait for each other here.

        Raises:
            ConfigError: checkpoints, but none that is whole.
        """
        while True:
            found: Any = from_main(_attempt(self.find) if dist.get_rank() == 0 else None)
            if isinstance(found, Exception):
                raise found
            if found is None:
                return None
            why = _altered(found)
            if why is None:
                return found
            self._damaged[found] = why

    # ---- writing

    def save(self, state: dict[str, Any], info: Info) -> None:
        """Begin to write a checkpoint; `finish` the one before first. Ranks wait for each other here."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout_s))
        self._writing = self._thread.submit(self._write, staged(state), copy.deepcopy(info))
        if not self.config.asynchronous:
            self._writing.exception()  # waits; what came of it is told by `finish` and `poll`

    def poll(self) -> Written | None:
        """What became of the last checkpoint, once, if it is done; None while it is being written. Waits for nobody."""
        return self.finish() if self._writing is not None and self._writing.done() else None

    def finish(self) -> Written | None:
        """Wait for the checkpoint that is being written; what became of it, or None if there is none or it was told before."""
        writing, self._writing = self._writing, None
        return writing.result() if writing is not None else None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if (
            error is not None and self._writing is not None
        ):  # the other ranks may be gone: do not wait for them for long
            wait([self._writing], timeout=_PATIENCE_S)
        self._thread.shutdown(wait=error is None)
        self._group = None

    def _write(self, state: dict[str, Any], info: Info) -> Written:
        started = time.monotonic()
        final = self.folder / f"step_{info.step:09d}"
        draft = self.folder / f".writing_{final.name}" if is_local(final) else final
        error = None
        try:
            self._on_main(lambda: _make_empty(draft))
            sums = self._gathered(write(state, draft, group=self._group))  # type: ignore[arg-type]
            self._on_main(lambda: self._publish(draft, final, info, sums))
        except (Exception, CheckpointException) as failed:  # DCP's is no Exception
            if not (isinstance(failed, SaveError | CheckpointException) or is_of_storage(failed)):
                raise
            error = f"{final} could not be written: {_cause(failed)}{_room(self.folder)}"
            if dist.get_rank() == 0:
                _attempt(lambda: _remove(draft))
        return Written(final, info, time.monotonic() - started, error)

    def _gathered(self, sums: dict[str, Sum]) -> dict[str, Sum]:
        """The sums of all ranks' files."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, sums, group=self._group)
        return {name: of for part in every for name, of in part.items()}

    def _publish(self, draft: Path, final: Path, info: Info, sums: dict[str, Sum]) -> None:
        for name, text in self.beside.items():
            (draft / name).write_text(text)
            sums[name] = Sum(len(text.encode()), sha256(text.encode()).hexdigest())
        info.world_size, info.files = dist.get_world_size(), dict(sorted(sums.items()))
        (draft / _INFO).write_text(json.dumps(asdict(info)))
        if draft != final:
            _flush(draft / _INFO)
            if final.exists():  # out of the way for a moment: two renames, and `_prune` deletes it
                final.rename(_aside(final))
            draft.rename(final)
            _flush(self.folder)
        self._damaged.pop(final, None)  # if one lay there, it has made way
        self._prune()

    def _prune(self) -> None:
        found = self.all()
        newest_first = list(found)[::-1]
        best_first = sorted(
            (p for p in found if found[p].score is not None), key=lambda p: found[p].score or 0.0, reverse=True
        )
        keep = set(newest_first[: self.config.keep_last]) | set(best_first[: self.config.keep_best])
        for path in set(found) - keep:
            _remove(path)
        for path in _children(self.folder):  # what a kill left behind
            if path.name.startswith((".writing_step_", ".dropping_step_")):
                _remove(path)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 alone while the others wait; where it fails, it fails on all."""
        failed = _attempt(action) if dist.get_rank() == 0 else None
        box = [_cause(failed) if isinstance(failed, Exception) else None]
        dist.broadcast_object_list(box, src=0, group=self._group)
        if box[0]:
            raise SaveError(box[0])

    # ---- reading

    def load(self, path: Path, state: dict[str, Any], *, checked: bool = False) -> Info:
        """Fill the tensors of `state` in place. Ranks wait for each other here.

        Args:
            path: a checkpoint's folder.
            state: nested tensors.
            checked: its files' sums have been compared already, as `newest` does.

        Raises:
            DamagedError: a file is not as it was written.
            ConfigError: the checkpoint does not fit the model, or was written by a newer version of the format.
        """
        info = Info.read(path)
        if info.version > VERSION:
            raise ConfigError(
                f"{path} has format {info.version}, this version reads up to {VERSION}; update to read it"
            )
        why = None if checked else _altered(path)
        if why:
            raise DamagedError(f"{path} is damaged: {why}; choose another checkpoint, or copy this one again")
        try:
            read(state, path)
        except CheckpointException as error:
            first = next(iter(error.failures.values()))[0]
            if isinstance(first, pickle.UnpicklingError):
                raise ConfigError(f"{path} is no checkpoint of rec.train and was not read: {first}") from error
            raise ConfigError(f"{path} does not fit this configuration: {first}") from error
        return info


def _altered(path: Path) -> str | None:
    """What is wrong with the content of a checkpoint's files; ranks share the reading and wait for each other here."""
    sums = {name: of for name, of in Info.read(path).files.items() if of.sha256}
    own = damage(path, sums, sorted(sums)[dist.get_rank() :: dist.get_world_size()])
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return next((why for why in every if why), None)


def _attempt(action: Callable[[], Any]) -> Any:
    """What `action` returns, or the exception that it raises."""
    try:
        return action()
    except Exception as error:
        return error


def _cause(error: BaseException) -> str:
    """The first of the failures of all ranks, in one line."""
    if isinstance(error, CheckpointException):
        rank, (failed, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_cause(failed)}"
    return str(error) if isinstance(error, SaveError) else f"{type(error).__name__}: {error}"


def _room(folder: Path) -> str:
    """The free space of a local folder, in words."""
    try:
        return f"; {shutil.disk_usage(folder).free >> 20:,} MiB are free there" if is_local(folder) else ""
    except OSError:
        return ""


def _children(folder: Path) -> list[Path]:
    """What lies in a folder, sorted; nothing if there is no such folder."""
    try:
        return sorted(folder.iterdir(), key=str)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _make_empty(folder: Path) -> None:
    _remove(folder)
    if is_local(folder):  # a store has no folders, and would make the bucket
        folder.mkdir(parents=True, exist_ok=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint or a draft; half of one must not look like a whole one."""
    if not is_local(path):
        (path / _INFO).unlink(missing_ok=True)
        if path.exists():
            path.fs.rm(path.path, recursive=True)  # type: ignore[attr-defined]
        return
    if path.is_dir() and not path.name.startswith("."):
        path = path.rename(_aside(path))
    shutil.rmtree(path, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".dropping_{path.name}")


def _flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk before going on, also if the power fails."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

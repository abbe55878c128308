"""Tensors over ranks <-> files of `torch.distributed.checkpoint`: hashed while they are written, read without running their code.

DCP describes a checkpoint in a pickle, `.metadata`, and a pickle from elsewhere can run anything. Only the few classes of such a
description are let through here, and what is not a tensor is read with `weights_only`.
"""

import hashlib
import io
import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from rec.storage import is_local

_DESCRIBED_BY = {
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath"},
    "torch": {"Size"} | {str(d).removeprefix("torch.") for d in vars(torch).values() if isinstance(d, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


class _Description(pickle.Unpickler):
    """Unpickles the classes that describe a checkpoint and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _DESCRIBED_BY.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in a checkpoint")
        return super().find_class(module, name)


@dataclass(frozen=True)
class Sum:
    """A file's size in bytes and its SHA-256, in hexadecimal digits, as `sha256sum` prints it."""

    bytes: int
    sha256: str


class _Hashing:
    """DCP's file system, which also hashes what is written through it."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        self.sums: dict[str, Sum] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._filesystem, name)

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with self._filesystem.create_stream(path, mode) as stream:
            hashed = _HashedStream(stream)
            try:
                yield hashed
            except Exception as error:  # the writer of tensors says that writing failed, the disk why
                raise hashed.failed or error from error
        self.sums[Path(path).name] = Sum(hashed.bytes, hashed.digest.hexdigest())

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        self._filesystem.rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _HashedStream:
    """A file that is written from its beginning to its end, and hashed."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream = stream
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.failed: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: Any) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.failed = error
            raise
        self.digest.update(data)
        self.bytes += memoryview(data).nbytes
        return memoryview(data).nbytes


class _Planner(DefaultLoadPlanner):
    """DCP's, but what is not a tensor cannot run code."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # refuses what would run; DCP's own does not
        value.seek(0)
        super().load_bytes(read_item, value)


class _LocalReader(FileSystemReader):
    """DCP's, with a description that cannot run code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_description(self, **kwargs)


class _RemoteReader(FsspecReader):
    """The same of an object store."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_description(self, **kwargs)


def _read_description(reader: FileSystemReader, *, rank: int | None = None, **_: Any) -> Metadata:
    with reader.fs.create_stream(reader._get_metadata_path(rank), "rb") as file:
        metadata = _Description(file).load()
    metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def reader_of(path: Path) -> FileSystemReader:
    """What reads the checkpoint in the folder `path`."""
    return _LocalReader(str(path)) if is_local(path) else _RemoteReader(str(path))


def sizes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in the folder `path`, by its name: the keys of nested dicts, with dots between.

    Raises:
        OSError: no such file.
        pickle.UnpicklingError: not a description of a checkpoint.
    """
    described = reader_of(path).read_metadata().state_dict_metadata
    return {name: tuple(entry.size) for name, entry in described.items() if isinstance(entry, TensorStorageMetadata)}


def staged(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested tensors, sharded ones too, in this machine's memory: the originals may be changed meanwhile."""
    copied = BlockingAsyncStager().stage(state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the copies do not wait for themselves
    return copied


def write(state: dict[str, Any], path: Path, *, group: dist.ProcessGroup) -> dict[str, Sum]:
    """Write this rank's part into the folder `path`; gives its files. Ranks of `group` wait for each other here."""
    writer = FileSystemWriter(str(path)) if is_local(path) else FsspecWriter(str(path), sync_files=False)
    writer.fs = hashing = _Hashing(writer.fs)  # type: ignore[assignment]
    dcp.save(state, storage_writer=writer, process_group=group)
    return hashing.sums


def read(state: dict[str, Any], path: Path) -> None:
    """Fill the tensors of `state` in place. Ranks wait for each other here.

    Raises:
        CheckpointException: a tensor that is not there, or has another shape.
    """
    dcp.load(state, storage_reader=reader_of(path), planner=_Planner())


def damage(path: Path, sums: dict[str, Sum], names: Iterable[str]) -> str | None:
    """What is wrong with the first of the files `names` in the folder `path` that is not as it was written; None if none is."""
    for name in names:
        try:
            with (path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if found != sums[name].sha256:
            return f"{name} has SHA-256 {found[:12]}..., {sums[name].sha256[:12]}... was written"
    return None

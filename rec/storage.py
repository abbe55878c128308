"""Where files lie: in a local folder, or in an object store that a URI names, such as `s3://bucket/folder`.

Runs and artifacts are paths: `path` gives a `pathlib.Path` of a local name and a `upath.UPath`, which has the same methods, of a
URI. Data are read by Arrow through `filesystem`: with its own C++ where it knows the scheme, through fsspec elsewhere. Both
find credentials and the address of the store where its own tools do (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws ...).

A store fails now and then: what is read from one is tried again by `Attempts`, and what stays wrong is an error that says what
it means (`named`).
"""

import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast
from urllib.parse import unquote, urlsplit

import fsspec
import pyarrow as pa
from pyarrow import fs
from upath import UPath

from rec.schema import ConfigError

T = TypeVar("T")

REQUEST_TIMEOUT_S = 10.0  # without a byte from S3, before Arrow tries the request again
_REQUEST_ATTEMPTS = 3  # of one request, by Arrow, within a second or so where the store answers; `Attempts` come on top
_ARROW_SCHEMES = ("gs", "gcs", "hdfs", "viewfs", "file")  # and s3
_CACHED = False  # listings: other ranks and other processes write too


def is_local(uri: str | Path) -> bool:
    """Whether it names something on this machine.

    >>> is_local("/data/train"), is_local("file:///data/train"), is_local("s3://bucket/train")
    (True, True, False)
    """
    return "://" not in str(uri) or str(uri).startswith("file://")


def path(uri: str | Path) -> Path:
    """A path of a run or an artifact; one in a store sees at once what other processes wrote.

    Raises:
        ConfigError: the scheme is unknown, or the package for it is not installed.

    >>> path("runs/a"), path("file:///runs/a")
    (PosixPath('runs/a'), PosixPath('/runs/a'))
    >>> str(path("memory://bucket/runs") / "a")
    'memory://bucket/runs/a'
    """
    if not isinstance(uri, str):
        return uri
    if is_local(uri):
        return Path(unquote(urlsplit(uri).path) if "://" in uri else uri)
    with named(uri):
        found = UPath(uri, use_listings_cache=_CACHED)
        _ = found.fs  # imports the package, which may not be there
        return cast(Path, found)


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """Arrow's filesystem of a folder or file, and its path there.

    Raises:
        ConfigError: the scheme is unknown, the package for it is not installed, or the store cannot be spoken to.

    >>> filesystem("data/train")[1], filesystem("memory://data/train")[1]
    ('data/train', '/data/train')
    """
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    scheme = urlsplit(uri).scheme
    with named(uri):
        if scheme == "s3":
            return _s3(uri)
        if scheme in _ARROW_SCHEMES:
            return fs.FileSystem.from_uri(uri)
        found, root = fsspec.core.url_to_fs(uri, use_listings_cache=_CACHED)
        return fs.PyFileSystem(fs.FSSpecHandler(found)), root


def _s3(uri: str) -> tuple[fs.FileSystem, str]:
    parts = urlsplit(uri)
    if parts.query or parts.username:  # the URI itself says how to connect
        return fs.FileSystem.from_uri(uri)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not endpoint and not region:
        region = fs.resolve_s3_region(parts.netloc)
    found = fs.S3FileSystem(
        endpoint_override=endpoint,
        region=region,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_REQUEST_ATTEMPTS),
    )
    return found, (parts.netloc + unquote(parts.path)).rstrip("/")


def check_bucket(found: fs.FileSystem, root: str) -> None:
    """Raise `ConfigError` if the bucket of `root` is not there: S3 lists one that is missing as it does one that is empty."""
    bucket = root.partition("/")[0]
    if isinstance(found, fs.S3FileSystem) and found.get_file_info(bucket).type is fs.FileType.NotFound:
        raise ConfigError(f"s3://{root}: the bucket '{bucket}' does not exist; make it, or correct the name")


# ---- what is there


def is_file(place: Path) -> bool:
    """Whether a file is there; where a store does not answer, its exception, and not False as from `UPath.is_file`."""
    if not isinstance(place, UPath):
        return place.is_file()
    try:
        return place.fs.info(place.path)["type"] == "file"
    except FileNotFoundError:
        return False


def check_writable(folder: Path) -> None:
    """Make a folder and write a block there, which is deleted; raises `ConfigError` where that fails."""
    probe = folder / f".writing_probe_{os.getpid()}"
    with named(folder):
        if not isinstance(folder, UPath):  # s3fs would make the bucket too, also one whose name is misspelt
            folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A local place to write a file to, which takes the place of `file`, whole, at the end, unless there was an exception."""
    if isinstance(file, UPath):
        with tempfile.TemporaryDirectory(prefix="rec_") as folder:
            yield (draft := Path(folder, file.name))
            put(draft, file)
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".writing_{file.name}")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def put(local: Path, target: Path) -> None:
    """Copy a local file into a store, where it appears whole."""
    assert isinstance(target, UPath)
    target.fs.put_file(str(local), target.path)


def put_folder(local: Path, target: Path, *, last: str) -> None:
    """Replace a folder in a store by the files of a local one; the file `last`, which comes last, tells that it is whole."""
    remove(target)
    for file in sorted(local.iterdir(), key=lambda file: file.name == last):
        put(file, target / file.name)


def remove(folder: Path) -> None:
    """Delete a folder and what is in it, if it is there."""
    if not isinstance(folder, UPath):
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.exists():
        folder.fs.rm(folder.path, recursive=True)


# ---- what a store does wrong


@dataclass
class Attempts:
    """Does something again, up to `retries` times, when a store fails in a way that may pass.

    Args:
        retries: times that it is tried again, 0 or more.
        wait_s: seconds before the first time; each wait is twice the one before, 30 s at most, less up to half of it at
            random, so that ranks do not come back all at once.
    """

    retries: int
    wait_s: float = 1.0
    failed: int = 0  # attempts that failed so far
    _random: random.Random = field(default_factory=random.Random, repr=False)  # never the one that training draws from

    def __call__(self, action: Callable[[], T], *, where: str) -> T:
        """What `action` returns; each failure is told on stderr.

        Raises:
            StoreError: it failed for the last time, or in a way that does not pass; where `retries` is 0, the exception itself.
        """
        started, wait_s = time.monotonic(), self.wait_s
        for attempt in range(1, self.retries + 2):
            try:
                return action()
            except (pa.ArrowException, OSError) as error:
                self.failed += 1
                if self.retries == 0:
                    raise
                if attempt > self.retries or not may_pass(error):
                    times = f"tried {attempt} times in {time.monotonic() - started:.0f} s"
                    raise StoreError(f"{times}: {explain(error)}") from error
                pause = min(wait_s, 30) * self._random.uniform(0.5, 1)
                print(f"{where}: {_words(error)}; trying again in {pause:.1f} s", file=sys.stderr, flush=True)
                time.sleep(pause)
                wait_s *= 2
        raise AssertionError("unreachable")


class StoreError(ValueError):
    """What a store failed at in the end: how often it was tried, the cause, and what helps."""


_MEANINGS = {
    "unknown scheme, expected a folder or a URI such as s3://bucket/folder, gs://, hdfs:// or abfs://": (
        "nsupported filesystem",
        "rotocol not known",
        "Unrecognized filesystem type",
    ),
    "a package is missing; for s3:// pip install s3fs": ("ImportError", "ModuleNotFoundError"),
    "the bucket does not exist; make it, or correct the name": (
        "NO_SUCH_BUCKET",
        "NoSuchBucket",
        "bucket does not exist",
        "Bucket not found",
        "resolve region for bucket",
    ),
    "no credentials, or ones that do not allow this; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE": (
        "ACCESS_DENIED",
        "AccessDenied",
        "INVALID_ACCESS_KEY_ID",
        "InvalidAccessKeyId",
        "SIGNATURE_DOES_NOT_MATCH",
        "SignatureDoesNotMatch",
        "HTTP status 401",
        "HTTP status 403",
        "NoCredentialsError",
        "Forbidden",
    ),
    "the disk is full; free space, or choose another folder": ("No space left", "Disk quota exceeded"),
    "may not be written; choose another folder, or change its owner": ("PermissionError", "Read-only file system"),
    "there is no such file or folder": ("FileNotFoundError", "PATH_NOT_FOUND", "NO_SUCH_KEY"),
}


def explain(error: BaseException) -> str:
    """One line: what an exception of a disk or store means, what helps, and its own words."""
    said = _words(error)
    for meaning, signs in _MEANINGS.items():
        if any(sign in said for sign in signs):
            return f"{meaning} ({said})"
    return said


def may_pass(error: BaseException) -> bool:
    """Whether trying again is worth it: nothing that `explain` knows the meaning of goes away by itself."""
    return explain(error) == _words(error)


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def is_of_storage(error: BaseException) -> bool:
    """Whether a disk, a store or a package that speaks to one raised it, and not a fault in this project."""
    if isinstance(error, OSError | ImportError | pa.ArrowException):
        return True
    if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp", "fsspec", "gcsfs", "adlfs"):
        return True
    return type(error) is ValueError and not may_pass(error)  # fsspec's for a scheme


@contextmanager
def named(where: str | Path, *, kind: type[ValueError] = ConfigError) -> Iterator[None]:
    """Raise what goes wrong with a disk or a store inside as a `kind` of error that says where, what it means and what helps."""
    try:
        yield
    except Exception as error:  # packages of stores have exceptions of their own, of no common type
        if not is_of_storage(error):
            raise
        raise kind(f"{where}: {explain(error)}") from error

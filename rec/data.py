"""Parquet impressions become batches, in an order that depends on the seed and the step and never on the number of ranks.

The rows of a split form one stream: its row groups one after another, permuted by seed and epoch when shuffling. The stream
is cut into blocks of about `shuffle_rows` rows, a whole number of steps each. A block of S steps and G rows a step is cut into
G lanes of S neighbouring rows, and every step takes one row from each lane. A rank serves a contiguous share of the lanes, so

- the rows of a step are the same for any number of ranks, and so is their order over the ranks;
- a rank reads a contiguous piece of each block and nothing else: row groups are decoded once, but for those that straddle
  two ranks' pieces;
- a step is a sample of the whole block, one row from each neighbourhood, whatever the order of the files;
- a position in training is the step number; going on there, with any number of ranks, needs no state.
"""

import fnmatch
import glob
import itertools
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pyarrow import fs
from torch import Tensor

from rec.features import Batch, DataError, Encoder
from rec.hashing import mix
from rec.schema import ConfigError, DataConfig, check_range, nearest
from rec.storage import Attempts, StoreError, check_bucket, filesystem

_OPEN_AT_ONCE = 16  # files whose footers are read: it is a store that they wait for


@dataclass
class ReaderConfig:
    """How a split is read."""

    global_batch_size: int = 4096  # rows a step over all ranks
    shuffle_rows: int = 262_144  # rows a step is drawn from; memory over all ranks grows with it
    shuffle: bool = True  # training: permute row groups and rows; false keeps the order of the files exactly
    prefetch_batches: int = 4  # batches made ahead by a background thread; 0 makes them in the training thread
    retries: int = (
        4  # times that a failed read from an object store is tried again, after 1, 2, 4 ... s; never a local one
    )

    def __post_init__(self) -> None:
        check_range("reader.global_batch_size", self.global_batch_size, 1, 2**31)
        check_range("reader.shuffle_rows", self.shuffle_rows, 1, 2**40)
        check_range("reader.prefetch_batches", self.prefetch_batches, 0, 1000)
        check_range("reader.retries", self.retries, 0, 100)


@dataclass(frozen=True)
class RowGroup:
    """Where one row group lies and how many rows it holds."""

    file: str
    index: int
    num_rows: int

    def __str__(self) -> str:
        return f"{self.file}, row group {self.index}"


class Split:
    """The Parquet files of one split of a data set.

    Args:
        data: description of the data set.
        name: one of `data.splits`.
        retries: see `ReaderConfig`.

    Raises:
        ConfigError: no such split.
        DataError: no files, or a file that cannot be read.
    """

    def __init__(self, data: DataConfig, name: str, *, retries: int = ReaderConfig.retries) -> None:
        if name not in data.splits:
            raise ConfigError(f"data set '{data.name}' has no split '{name}': {nearest(name, data.splits)}")
        self.name = name
        self.filesystem, root = _open(data.path)
        self.attempts = Attempts(0 if isinstance(self.filesystem, fs.LocalFileSystem) else retries)
        self._parquet = lru_cache(maxsize=64)(self._open_file)  # open files
        self.files = self._list(root, data)
        if not self.files:
            check_bucket(self.filesystem, root)
            raise DataError(
                f"no Parquet files in split '{name}' ({data.splits[name]}) of data.path={data.path}; make the data set first "
                f"(the comment on top of conf/data/{data.name}.yaml says how) or set data.path"
            )
        self.schemas: dict[str, pa.Schema] = {}  # of each file
        self.row_groups: list[RowGroup] = []
        for file, schema, sizes in self._footers():
            self.schemas[file] = schema
            self.row_groups += [RowGroup(file, i, num_rows) for i, num_rows in enumerate(sizes)]
        self.num_rows = sum(group.num_rows for group in self.row_groups)

    def _footers(self) -> Iterator[tuple[str, pa.Schema, list[int]]]:
        """Each file with its schema and the rows of its row groups."""
        pool, one = ThreadPoolExecutor(_OPEN_AT_ONCE, thread_name_prefix="footers"), pa.schema([])
        try:
            for file, (schema, sizes) in zip(self.files, pool.map(self._footer, self.files), strict=True):
                one = one if schema.equals(one) else schema  # thousands of files share it
                yield file, one, sizes
        finally:
            pool.shutdown(cancel_futures=True)

    def _footer(self, file: str) -> tuple[pa.Schema, list[int]]:
        opened = self._parquet(file)
        metadata = opened.metadata
        return opened.schema_arrow, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]

    def _list(self, root: str, data: DataConfig) -> list[str]:
        where = f"split '{self.name}' of data.path={data.path}"
        try:
            return self.attempts(lambda: _files(self.filesystem, root, data.splits[self.name]), where=where)
        except (StoreError, pa.ArrowException, OSError) as error:
            raise DataError(f"{where}: cannot be listed: {error}") from error

    def check_schema(self, encoder: Encoder) -> None:
        """Raise one `DataError` that lists everything wrong with the columns of any file."""
        _refuse(encoder.check_schemas(self.schemas))

    def read(self, group: RowGroup, columns: list[str]) -> pa.Table:
        """Decode `columns` of one row group."""
        file = self._parquet(group.file)
        try:
            return self.attempts(
                lambda: file.read_row_group(group.index, columns=columns, use_threads=False), where=str(group)
            )
        except StoreError as error:
            raise DataError(f"{group}: cannot be read: {error}; {_STORE_REMEDY}") from error
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{group}: cannot be decoded ({error}); the file is damaged or truncated, write it again"
            ) from error

    def _open_file(self, file: str) -> pq.ParquetFile:
        try:
            # pages that carry a checksum are held to it; others are read as they are
            return self.attempts(
                lambda: pq.ParquetFile(file, filesystem=self.filesystem, page_checksum_verification=True), where=file
            )
        except StoreError as error:
            raise DataError(f"{file}: cannot be opened: {error}; {_STORE_REMEDY}") from error
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a damaged name in the footer
            raise DataError(f"{file}: not a readable Parquet file ({error}); write it again or remove it") from error


_STORE_REMEDY = "look at the store and the file there, or set reader.retries higher"


def _refuse(findings: list[str]) -> None:
    if findings:
        raise DataError("the files do not fit the configuration:\n  " + "\n  ".join(findings))


def _open(path: str) -> tuple[fs.FileSystem, str]:
    try:
        return filesystem(path)
    except ConfigError as error:
        raise ConfigError(
            f"data.path is {path}, which Arrow cannot open ({error}); expected a folder, or a URI such as s3://bucket/folder"
        ) from error


def _files(filesystem: fs.FileSystem, root: str, pattern: str) -> list[str]:
    """Files below `root` that a file, a folder or a glob names, sorted, so that every rank agrees; none that are hidden."""
    root = root.rstrip("/")
    parts = [part for part in pattern.split("/") if part]
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    folder = "/".join([root, *fixed])
    if parts == fixed and filesystem.get_file_info(folder).type == fs.FileType.File:
        return [folder]
    # in `root` brackets are no pattern; `*` crosses folders
    wanted = "/".join([glob.escape(root), *parts]) if parts != fixed else glob.escape(folder) + "/*.parquet"
    infos = filesystem.get_file_info(fs.FileSelector(folder or "/", recursive=True, allow_not_found=True))
    files = [info.path for info in infos if info.type == fs.FileType.File and fnmatch.fnmatch(info.path, wanted)]
    # writers keep unfinished files in folders such as _temporary
    return sorted(file for file in files if not any(part[0] in "_." for part in file[len(folder) + 1 :].split("/")))


@dataclass(frozen=True)
class Block:
    """`num_steps` steps' rows: `[start, stop)` of the stream of epoch `epoch`, `index` counted from the epoch's first."""

    epoch: int
    index: int
    start: int
    stop: int
    num_steps: int


class Reader:
    """One rank's batches of one split.

    Every rank gets `local_batch_size` rows in every step, the last of which are padding where the rank has fewer.

    Args:
        data: description of the data set.
        config: how to read.
        split: one of `data.splits`.
        seed: what the order of rows and the dropped ids are drawn from.
        rank: this rank, 0 to `world_size` - 1.
        world_size: number of ranks.
        training: shuffle as configured and drop ids; else every epoch is dealt alike, and no ids are dropped.
        truth: also read the tasks' true probabilities.
        labels: read labels and weights; without, labels are 0 and weights 1.

    Raises:
        ConfigError: no such split.
        DataError: no files, no rows, unreadable files, or columns that do not fit the configuration.
    """

    def __init__(
        self,
        data: DataConfig,
        config: ReaderConfig,
        *,
        split: str,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        training: bool = True,
        truth: bool = False,
        labels: bool = True,
    ) -> None:
        self.config = config
        self.seed = seed
        self.training = training
        self.encoder = Encoder(data, truth=truth, labels=labels)
        self.split = Split(data, split, retries=config.retries)
        self.split.check_schema(self.encoder)
        if self.split.num_rows == 0:
            raise DataError(
                f"split '{split}' of data.path={data.path} has {len(self.split.files)} files and no rows, expected at least one; "
                f"write it again, or set data.splits.{split}"
            )
        size = config.global_batch_size
        self.num_rows = self.split.num_rows
        self._first_rows = _first_rows(self.split.row_groups)
        self.steps_per_epoch = -(-self.num_rows // size)
        self.local_batch_size = -(-size // world_size)
        self.lanes = (rank * size // world_size, (rank + 1) * size // world_size)
        in_order = training and not config.shuffle
        self.steps_per_block = 1 if in_order else max(1, round(config.shuffle_rows / size))
        self._decoded = lru_cache(maxsize=2)(self._decode)

    def check_like(self, other: "Reader") -> None:
        """Raise `DataError` if ids are integers in this split and texts in another: the network would not know them again."""
        _refuse(self.encoder.check_drift(self.split.schemas | other.split.schemas))

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Batches of steps `start` to `stop`, counted over epochs from 0; by default to the end of `start`'s epoch."""
        if stop is None:
            stop = (start // self.steps_per_epoch + 1) * self.steps_per_epoch
        batches = self._batches(start, stop)
        return _prefetch(batches, self.config.prefetch_batches) if self.config.prefetch_batches else batches

    def _batches(self, start: int, stop: int) -> Iterator[Batch]:
        step = start
        while step < stop:
            block, offset = self._block_of(step)
            rows, lanes, counts = self._load(block)
            first = np.concatenate([[0], np.cumsum(counts)])
            for i in range(offset, min(block.num_steps, offset + stop - step)):
                yield self._batch(step, rows.slice(first[i], counts[i]), lanes[first[i] : first[i + 1]])
                step += 1

    def _batch(self, step: int, rows: pa.Table, lanes: np.ndarray) -> Batch:
        dropped = {}
        if self.training and self.encoder.dropout:
            # drawn for all G lanes on every rank, so that a row's fate does not depend on who serves it
            draws = self._rng(2, step).random((len(self.encoder.dropout), self.config.global_batch_size), np.float32)
            for draw, (name, share) in zip(draws, self.encoder.dropout.items(), strict=True):
                dropped[name] = draw[lanes] < share
        return self.encoder.collate(
            rows, self.local_batch_size, dropped, draws=self._draws(step, torch.from_numpy(lanes))
        )

    def _draws(self, step: int, lanes: Tensor) -> Tensor:
        """Random bits [n, 2] int64 of the rows in `lanes` [n] and of their step; they depend on seed, step and lane."""
        of_step = mix(mix(torch.tensor(self.seed)) + step)
        of_lanes = mix(of_step + 1 + lanes)
        return torch.stack([of_lanes, of_step.expand_as(of_lanes)], dim=1)

    def _block_of(self, step: int) -> tuple[Block, int]:
        """The block that holds `step`, and the step's place in it."""
        epoch, step = divmod(step, self.steps_per_epoch)
        index, offset = divmod(step, self.steps_per_block)
        block_rows = self.steps_per_block * self.config.global_batch_size
        start, stop = index * block_rows, min((index + 1) * block_rows, self.num_rows)
        num_steps = -(-(stop - start) // self.config.global_batch_size)
        return Block(epoch, index, start, stop, num_steps), offset

    def _load(self, block: Block) -> tuple[pa.Table, np.ndarray, np.ndarray]:
        """This rank's rows of a block in the order of the steps, the lane of each, and the number of them a step."""
        num_lanes, num_rows = self.config.global_batch_size, block.stop - block.start
        # where each lane begins in the block, and for every row its lane and the step of the block that takes it
        bounds = np.arange(self.lanes[0], self.lanes[1] + 1) * num_rows // num_lanes
        lanes = np.repeat(np.arange(*self.lanes), np.diff(bounds))
        turn = np.arange(bounds[0], bounds[-1]) - np.repeat(bounds[:-1], np.diff(bounds))
        order = np.lexsort((lanes, turn))
        taken = order
        if self.training and self.config.shuffle:  # lanes stay in place, the rows of each are permuted
            keys = self._rng(1, block.epoch, block.index).random(num_rows, np.float32)[bounds[0] : bounds[-1]]
            taken = np.lexsort((keys, lanes))[order]
        rows = self._read_range(block.epoch, block.start + int(bounds[0]), block.start + int(bounds[-1]))
        counts = np.bincount(turn, minlength=block.num_steps)
        return rows.take(pa.array(taken)).combine_chunks(), lanes[order], counts

    def _read_range(self, epoch: int, start: int, stop: int) -> pa.Table:
        """Rows `[start, stop)` of the stream of an epoch."""
        groups, ends = self._stream(epoch)
        pieces = []
        for i in range(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1):
            begin = ends[i] - groups[i].num_rows
            low, high = max(start, begin), min(stop, ends[i])
            if low < high:
                pieces.append(self._decoded(groups[i]).slice(low - begin, high - low))
        return pa.concat_tables(pieces) if pieces else self._decoded(groups[0]).slice(0, 0)

    def _stream(self, epoch: int) -> tuple[list[RowGroup], np.ndarray]:
        """The row groups in the order of an epoch, and where each ends in the stream."""
        groups = self.split.row_groups
        if self.training and self.config.shuffle:
            groups = [groups[i] for i in self._rng(0, epoch).permutation(len(groups))]
        return groups, np.cumsum([group.num_rows for group in groups])

    def _decode(self, group: RowGroup) -> pa.Table:
        table = self.split.read(group, self.encoder.columns)
        return self.encoder.encode(table, str(group), first_row=self._first_rows[group])

    def locate(self, row: int) -> str:
        """The file, row group and row of the split's row `row`, in words."""
        first = list(self._first_rows.values())
        place = int(np.searchsorted(first, row, "right")) - 1
        return f"{list(self._first_rows)[place]}, row {row - first[place]}"

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key])


def _first_rows(groups: list[RowGroup]) -> dict[RowGroup, int]:
    """Each row group's first row, counted over the split."""
    ends = itertools.accumulate((group.num_rows for group in groups), initial=0)
    return dict(zip(groups, ends, strict=False))


def _prefetch(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, made up to `depth` ahead by a thread; its exceptions are raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: object) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # to be raised where the batches are used
            put(error)

    thread = threading.Thread(target=work, name="reader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()

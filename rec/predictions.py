"""What the network says of the rows of a split, row by row: in memory, or as Parquet.

A folder of predictions has a file a rank. Every row of the split is there once, in no order; `row` says which it is.

    row       int64    position of the row in the split's files in sorted order
    domain    int32    index into the domains, whose names are in the metadata; -1 for one that is unknown
    group     int64    as the reader tells groups apart; 0 where the data set has none
    T.label   float32  of task T, as it is trained on
    T.weight  float32  0 where the row does not count for the task
    T.logit   float32  calibrated where calibrators were applied; of a regression the prediction
    T.pred    float32  the probability; of a regression the prediction
    T.truth   float32  true probability, where the data set knows it

The metadata of the schema hold, under `rec`, JSON: step, split, calibrated, tasks {name: kind}, domains [names], grouped,
auxiliary [names].
"""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rec import storage
from rec.data import Reader
from rec.distributed import Rank
from rec.features import Batch
from rec.model import Outputs
from rec.schema import ConfigError, DataConfig, TaskKind

_ROW_GROUP = 65_536  # rows that a rank holds in memory before it writes them
_PART = re.compile(r"part-\d+\.parquet")

Correction = Callable[[Tensor, Tensor], Tensor]  # logits [B, T], domain_id [B] -> logits [B, T]


@dataclass
class Predicted:
    """A batch, padding included, and what the network says of it.

    Attributes:
        batch: B rows.
        logits: [B, T] float32, calibrated where calibrators are applied.
        outputs: all of the network's outputs, as they are.
    """

    batch: Batch
    logits: Tensor
    outputs: Outputs


@torch.no_grad()
def predict(
    model: nn.Module,
    reader: Reader,
    *,
    device: torch.device,
    max_steps: int | None = None,
    calibrators: Correction | None = None,
) -> Iterator[Predicted]:
    """A split through the network in evaluation mode. Ranks stay in step throughout.

    Args:
        model: the sharded network.
        reader: batches of the split.
        device: where the model lives.
        max_steps: steps at most; None for the whole split.
        calibrators: applied to the logits; None leaves them as they are.
    """
    model.eval()
    stop = min(reader.steps_per_epoch, max_steps or reader.steps_per_epoch)
    for batch in reader.batches(0, stop):
        batch = batch.to(device, non_blocking=True)
        outputs = model(batch)
        logits = calibrators(outputs.logits, batch.domain_id) if calibrators else outputs.logits
        yield Predicted(batch, logits, outputs)


@dataclass
class Rows:
    """R rows of this rank on the CPU, 12 T + 16 bytes each. Rows of weight 0 do not count, whatever else they hold.

    Attributes:
        logits: [R, T] float32.
        labels: [R, T] float32, 0 to 1 for a binary task.
        weights: [R, T] float32, >= 0.
        domain_id: [R] int64; what is outside 0 to D - 1 is an unknown domain.
        group_id: [R] int64.
    """

    logits: Tensor
    labels: Tensor
    weights: Tensor
    domain_id: Tensor
    group_id: Tensor

    def with_logits(self, logits: Tensor) -> "Rows":
        """The same rows with other logits [R, T]."""
        return Rows(logits, self.labels, self.weights, self.domain_id, self.group_id)


def collect(model: nn.Module, reader: Reader, *, device: torch.device) -> Rows:
    """This rank's rows of a split, without padding. Ranks stay in step throughout."""
    parts = []
    for predicted in predict(model, reader, device=device):
        batch = predicted.batch
        columns = (predicted.logits, batch.labels, batch.weights, batch.domain_id, batch.group_id)
        parts.append([column[: batch.num_rows].cpu() for column in columns])
    return Rows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class About:
    """What a folder of predictions is of.

    Attributes:
        step: of the checkpoint.
        split: name of the split.
        calibrated: whether calibrators were applied.
        labels: whether labels, weights and truths are written.
        auxiliary: whether auxiliary tasks are written.
    """

    step: int
    split: str
    calibrated: bool
    labels: bool = True
    auxiliary: bool = True


class PredictionWriter:
    """Writes one file a rank; the folder appears, and an older one goes, when all ranks are done. A context manager.

    Entering and leaving it wait for all ranks. After an exception the older folder is as it was. In a store, which cannot rename,
    the files come one after another: they are written locally first, and the older ones go when all ranks have theirs.

    Args:
        folder: what is to hold the files.
        data: description of the data set.
        rank: this process among its peers.
        about: what is written.

    Raises:
        ConfigError: `folder` holds something else than predictions.
    """

    def __init__(self, folder: Path, *, data: DataConfig, rank: Rank, about: About) -> None:
        with storage.named(folder):
            _check_replaceable(folder)
        self.folder, self.rank, self.about = folder, rank, about
        self.local = storage.is_local(folder)
        self.draft = folder.with_name(f".writing_{folder.name}")
        self.tasks = {
            t: (name, task)
            for t, (name, task) in enumerate(data.tasks.items())
            if about.auxiliary or not task.auxiliary
        }
        self.schema = self._schema(data)
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "PredictionWriter":
        if not self.local:
            self.draft = Path(tempfile.mkdtemp(prefix="rec_"))  # of this rank alone
        elif self.rank.is_main:
            shutil.rmtree(self.draft, ignore_errors=True)  # what a kill left behind
            self.draft.mkdir(parents=True)
        dist.barrier()
        self._part = self.draft / f"part-{self.rank.rank:05d}.parquet"
        self._file = pq.ParquetWriter(self._part, self.schema)
        return self

    def write(self, batch: Batch, logits: Tensor) -> None:
        """Add the rows of a batch, less its padding, with their logits [B, T]."""
        columns = {"row": batch.row_id, "domain": batch.domain_id, "group": batch.group_id}
        for t, (name, task) in self.tasks.items():
            parts = {"logit": logits[:, t], "pred": logits[:, t]}
            if task.kind is TaskKind.binary:
                parts["pred"] = logits[:, t].sigmoid()
            if self.about.labels:
                parts |= {"label": batch.labels[:, t], "weight": batch.weights[:, t]}
                if task.truth and batch.truth is not None:
                    parts["truth"] = batch.truth[:, t]
            columns |= {f"{name}.{part}": values for part, values in parts.items()}
        arrays = [pa.array(columns[f.name][: batch.num_rows].cpu().numpy(), f.type) for f in self.schema]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self.schema))
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._file.close()
        if kind is None:
            dist.barrier()  # all files are whole
            if not self.local:
                self._upload()
            elif self.rank.is_main:
                self._publish()
            dist.barrier()
        elif not self.local:
            shutil.rmtree(self.draft, ignore_errors=True)

    def _flush(self) -> None:
        if self._waiting:
            self._file.write_table(pa.concat_tables(self._waiting))
            self._waiting = []

    def _publish(self) -> None:
        old = self.folder.with_name(f".dropping_{self.folder.name}")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            self.folder.rename(old)
        self.draft.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _upload(self) -> None:
        with storage.named(self.folder):
            if self.rank.is_main:
                storage.remove(self.folder)
            dist.barrier()  # the older files are gone
            storage.put(self._part, self.folder / self._part.name)
        shutil.rmtree(self.draft, ignore_errors=True)

    def _schema(self, data: DataConfig) -> pa.Schema:
        columns: dict[str, Any] = {"row": pa.int64(), "domain": pa.int32(), "group": pa.int64()}
        for name, task in self.tasks.values():
            parts = ["label", "weight"] * self.about.labels + ["logit", "pred"]
            parts += ["truth"] * (self.about.labels and task.truth is not None)
            columns |= {f"{name}.{part}": pa.float32() for part in parts}
        said = {
            "step": self.about.step,
            "split": self.about.split,
            "calibrated": self.about.calibrated,
            "tasks": {name: task.kind.name for name, task in self.tasks.values()},
            "domains": data.domains,
            "grouped": data.group is not None,
            "auxiliary": [name for name, task in self.tasks.values() if task.auxiliary],
        }
        return pa.schema(columns, metadata={"rec": json.dumps(said)})


def _check_replaceable(folder: Path) -> None:
    """Refuse to replace what is not a folder of predictions."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"out={folder} is a file, expected a folder of predictions or none; choose another")
    others = [path.name for path in folder.iterdir() if not _PART.fullmatch(path.name)] if folder.is_dir() else []
    if others:
        raise ConfigError(
            f"out={folder} holds {', '.join(sorted(others)[:3])}, which is not of predictions and would be lost; "
            "choose a folder that is new, empty or holds predictions"
        )

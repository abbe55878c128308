"""Does a configuration fit its data and this machine? What `python -m rec.doctor key=value ...` looks at, all at once."""

import math
import os
import resource
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from rec.checkpoint import CheckpointConfig
from rec.config import Config, compose
from rec.data import Split
from rec.features import DataError, Encoder
from rec.findings import Finding
from rec.model import Ranker
from rec.optim import DenseOptimizer, SparseOptimizer, fused_params
from rec.sample import Sample, take_sample
from rec.schema import ConfigError, DataConfig, TaskKind
from rec.storage import is_local

FLOAT = 4  # bytes
GIB = 2**30
_SPARSE_STATE = {SparseOptimizer.adagrad: 1, SparseOptimizer.adam: 2}  # floats a weight; row-wise Adagrad has one a row
_USED = 0.01  # a table of which less is ever used is a mistake


def checkup(overrides: Sequence[str], *, ranks: int, memory: int, config_dir: str | None = None) -> list[Finding]:
    """Look at a configuration, its data and the room that a run takes.

    Args:
        overrides: as of `rec.train`.
        ranks: ranks on this machine, 1 or more.
        memory: bytes that they may use together.
        config_dir: a folder laid out like `conf/`, searched as well.
    """
    try:
        config = compose(overrides, config_dir=config_dir)
    except ConfigError as error:
        return [Finding("configuration", "refused", _line(error))]
    data = config.data
    words = f"{data.name}: {len(data.features)} features, {len(data.tables)} tables, {len(data.tasks)} tasks"
    findings = [Finding("configuration", words)]
    size = Size(config)
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # before rows are read
    splits = dict(_open(data, findings))
    findings += check_columns(splits, data)
    samples = (
        {}
        if findings[-1].problem
        else {name: take_sample(split, data, truth=_has_truth(name)) for name, split in splits.items()}
    )
    for name, sample in samples.items():
        findings += check_values(name, sample)
    if samples:
        findings += [*check_nulls(samples, data), *check_tables(samples, data), *check_tasks(samples, data)]
    findings += check_memory(config, size, samples, ranks=ranks, memory=memory, libraries=libraries)
    return findings + check_room(config.run_dir, config.checkpoint, size.checkpoint)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _open(data: DataConfig, findings: list[Finding]) -> Iterator[tuple[str, Split]]:
    """The splits that can be opened; adds a finding for each."""
    for name in data.splits:
        try:
            split = Split(data, name)
        except (DataError, ConfigError) as error:
            findings.append(Finding(f"split {name}", "cannot be read", _line(error)))
            continue
        value = f"{split.num_rows:,} rows in {len(split.row_groups):,} row groups of {len(split.files):,} files"
        empty = None if split.num_rows else f"split '{name}' of data.path={data.path} has no rows"
        findings.append(Finding(f"split {name}", value, empty, f"write it again, or set data.splits.{name}"))
        yield name, split


def check_columns(splits: dict[str, Split], data: DataConfig) -> list[Finding]:
    """The columns of all files of all splits, each file's and against one another."""
    schemas: dict[str, pa.Schema] = {}
    problems: list[str] = []
    try:
        for name, split in splits.items():
            encoder, schemas_there = Encoder(data, truth=_has_truth(name)), split.schemas
            problems += [p for file, schema in schemas_there.items() for p in encoder.check_schema(schema, file)]
            schemas |= schemas_there
    except DataError as error:
        return [Finding("columns", "cannot be read", _line(error))]
    problems = list(dict.fromkeys(problems)) + Encoder(data).check_drift(schemas)
    value = f"{len(Encoder(data).columns)} are read, of {len(schemas)} files"
    return [Finding("columns", value, "\n".join(problems) or None)]


def _has_truth(split: str) -> bool:
    """Whether true probabilities are read of a split: not where a model is trained on it."""
    return split != "train"


def check_values(name: str, sample: Sample) -> list[Finding]:
    """The values of a sample, with what was repaired."""
    repaired = "; ".join(f"{what}: {count:,}" for what, count in sample.repairs.items())
    value = f"{sample.num_rows:,} rows looked at, {sample.share:.0%} of the split" + (repaired and f"; {repaired}")
    return [Finding(f"values {name}", value, "\n".join(" ".join(p.split()) for p in sample.problems) or None)]


def check_nulls(samples: dict[str, Sample], data: DataConfig) -> list[Finding]:
    """The share of nulls a column."""
    nulls = sum((sample.nulls for sample in samples.values()), start=Counter[str]())
    num_rows = max(1, sum(sample.num_rows for sample in samples.values()))
    value = ", ".join(f"{column} {count / num_rows:.2%}" for column, count in nulls.items() if count) or "none"
    columns = {data.column_of(name) for name in data.features}
    empty = [column for column in columns if nulls[column] >= num_rows]
    problem = "\n".join(f"column '{column}' of a feature is null in every row" for column in sorted(empty)) or None
    return [Finding("nulls", value, problem, "fill it, or name the feature in data.leave_out")]


def estimated_distinct(ids: np.ndarray, share: float) -> float:
    """How many distinct values there are where `ids` are a share of them all: the estimator GEE (Charikar et al., PODS 2000).

    Values seen once stand for sqrt(1 / share) values, all others for themselves.

    >>> float(estimated_distinct(np.array([1, 1, 2, 3]), 0.25))
    5.0
    """
    counts = np.unique(ids, return_counts=True)[1]
    once = (counts == 1).sum()
    return once / math.sqrt(share) + len(counts) - once


def check_tables(samples: dict[str, Sample], data: DataConfig) -> list[Finding]:
    """The sizes of the tables against the ids of the first split that has rows."""
    sample = next((s for s in samples.values() if s.num_rows), Sample())
    findings = []
    for name, table in data.tables.items():
        readers = [f for f in data.sparse_features if data.table_of(f) == name]
        found = [ids for f in readers for ids in sample.ids.get(f, [])]
        if sample.problems and not found:
            continue  # nothing is known of it
        distinct = estimated_distinct(np.concatenate(found), sample.share) if found else 0.0
        hashed = any(data.features[f].hashed for f in readers)
        highest = None if hashed else max((sample.highest[f] for f in readers if f in sample.highest), default=0)
        findings.append(_table(name, distinct, table.num_embeddings, highest=highest))
    return findings


def _table(name: str, distinct: float, num_embeddings: int, *, highest: int | None) -> Finding:
    """A table that `distinct` ids read, of which the `highest` is known if they are not hashed."""
    hashed, shared = highest is None, 1 - math.exp(-distinct / num_embeddings)
    distinct = distinct if hashed else min(distinct, num_embeddings)
    value = f"about {distinct:,.0f} ids for {num_embeddings:,} rows"
    if highest is None:
        value += f", hashed: {shared:.0%} of ids share their row"
    else:
        value += f", the highest {highest:,}" + (": no room for new ones" if highest == num_embeddings - 1 else "")
    if hashed and distinct > num_embeddings:
        problem = f"table '{name}' has {num_embeddings:,} rows for about {distinct:,.0f} hashed ids, {shared:.0%} of which share theirs"
        return Finding(f"table {name}", value, problem, f"raise data.tables.{name}.num_embeddings")
    if distinct < _USED * num_embeddings:
        problem = f"table '{name}' has {num_embeddings:,} rows, of which about {distinct:,.0f} are ever used"
        return Finding(f"table {name}", value, problem, f"lower data.tables.{name}.num_embeddings")
    return Finding(f"table {name}", value)


def check_tasks(samples: dict[str, Sample], data: DataConfig) -> list[Finding]:
    """The labels of each task, over the rows that count for it."""
    findings = []
    for i, (name, task) in enumerate(data.tasks.items()):
        labels = {split: _labels(sample, i) for split, sample in samples.items() if sample.labels}
        value = ", ".join(f"{split} {_describe(found, task.kind)}" for split, found in labels.items())
        wrong = {split: _wrong_labels(found, task.kind) for split, found in labels.items()}
        problems = [
            f"task '{name}' has {words} in {samples[split].num_rows:,} rows of split '{split}'"
            for split, words in wrong.items()
            if words
        ]
        remedy = f"look at column '{task.label}', or leave the task out of data.learn"
        findings.append(Finding(f"task {name}", value, "\n".join(problems) or None, remedy))
    return findings


def _labels(sample: Sample, task: int) -> np.ndarray:
    """The labels [n] of the rows that count for a task."""
    return np.concatenate(sample.labels)[np.concatenate(sample.weights)[:, task] > 0, task]


def _describe(labels: np.ndarray, kind: TaskKind) -> str:
    if not len(labels):
        return "none"
    return f"{(labels > 0).mean():.3%} positive" if kind is TaskKind.binary else f"mean {labels.mean():.4g}"


def _wrong_labels(labels: np.ndarray, kind: TaskKind) -> str | None:
    if not len(labels):
        return "no rows that count"
    if kind is TaskKind.binary and not labels.any():
        return "no positives"
    return f"the label {labels[0]:g} alone" if (labels == labels[0]).all() else None


class Size:
    """Bytes of a model and its optimizers, over all ranks."""

    def __init__(self, config: Config) -> None:
        model = Ranker(config.model, config.data, device=torch.device("meta"))
        of_tables = sum(p.numel() for name, p in model.named_parameters() if name.startswith("embeddings."))
        dense = sum(p.numel() for p in model.parameters()) - of_tables
        kind, moments = config.optim.sparse.kind, 0 if config.optim.dense.kind is DenseOptimizer.sgd else 2
        rows = sum(table.num_embeddings for table in model.embeddings.configs.values())
        state = rows if kind is SparseOptimizer.rowwise_adagrad else _SPARSE_STATE.get(kind, 0) * of_tables
        self.tables = FLOAT * (of_tables + state)
        self.dense = FLOAT * dense * (1 + 2 + moments)  # weights, gradients and DDP's copy of them, moments
        self.checkpoint = self.tables + FLOAT * dense * (1 + moments)


def check_memory(
    config: Config, size: Size, samples: dict[str, Sample], *, ranks: int, memory: int, libraries: int
) -> list[Finding]:
    """Memory that the ranks of this machine take before their first step, against what there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        fused_params(config.optim.sparse, device)
    except ConfigError as error:
        return [Finding("memory of ranks", "unknown", _line(error))]
    sample = next((s for s in samples.values() if s.num_rows), Sample(num_rows=1))
    rows = config.reader.shuffle_rows * sample.nbytes // sample.num_rows  # as decoded, and once more as dealt
    copied = size.checkpoint // ranks if config.checkpoint.asynchronous else 0
    model, host = size.tables // ranks + size.dense, libraries + 2 * rows // ranks + copied
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(0).total_memory
        return [_memory("memory of a GPU", model, have), _memory("memory of ranks", ranks * host, memory)]
    return [_memory(f"memory of {ranks} ranks", ranks * (model + host), memory)]


def _memory(name: str, need: int, have: int) -> Finding:
    value = f"{need / GIB:.2f} GiB and what a step takes, of {have / GIB:.2f} GiB"
    problem = f"{name}: {need / GIB:.2f} GiB are needed before the first step, {have / GIB:.2f} GiB are there"
    remedy = "lower data.tables.*.num_embeddings or reader.shuffle_rows, or use more or larger machines"
    return Finding(name, value, problem, remedy) if need > have else Finding(name, value)


def check_room(run_dir: str | None, config: CheckpointConfig, nbytes: int) -> list[Finding]:
    """Free disk space of `run_dir` against the checkpoints that stay and the one being written."""
    count = config.keep_last + config.keep_best + 1
    value = f"{count} of {nbytes / GIB:.3f} GiB"
    if run_dir and not is_local(run_dir):
        return [Finding("checkpoints", f"{value} in {run_dir}")]
    folder = Path((run_dir or "runs").removeprefix("file://")).resolve()
    there = sum(file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file())
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    value += f", {free / GIB:.1f} GiB free at {existing}"
    if count * nbytes - there > free:
        problem = f"run_dir={run_dir or 'runs'} has {free / GIB:.2f} GiB free, {count} checkpoints take {count * nbytes / GIB:.2f} GiB"
        return [Finding("checkpoints", value, problem, "free space, set run_dir, or lower checkpoint.keep_last")]
    if not os.access(existing, os.W_OK):
        return [Finding("checkpoints", value, f"{existing} cannot be written to", "set run_dir")]
    return [Finding("checkpoints", value)]

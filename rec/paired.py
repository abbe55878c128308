"""Predictions of several runs -> the same rows of a split, in the same order, side by side.

A folder of predictions holds `part-<rank>.parquet`, as `rec.evaluate predictions=true` and `rec.predict` write them: columns
`row`, `domain`, `group` and, for each task, `<task>.label`, `.weight`, `.logit` (of a regression the prediction) and, where
it is known, `.truth`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rec.curves import Array
from rec.intervals import TaskRows
from rec.schema import ConfigError


@dataclass(frozen=True)
class Predictions:
    """The rows of one run on one split, in the order of `row`."""

    run: Path
    split: str
    step: int  # of the checkpoint
    calibrated: bool
    tasks: dict[str, str]  # name -> binary or regression
    domains: list[str]
    grouped: bool
    table: pa.Table

    def column(self, name: str, dtype: Any = np.float64) -> Array:
        """A column [R] as `dtype`."""
        return self.table[name].to_numpy().astype(dtype, copy=False)

    def rows_of(self, task: str) -> TaskRows:
        """All rows of a task, also those of weight 0."""
        scores, labels, weights = (self.column(f"{task}.{part}") for part in ("logit", "label", "weight"))
        return TaskRows(
            scores=scores,
            labels=labels,
            weights=weights,
            domain_id=self.column("domain", np.int64),
            groups=self.column("group", np.int64) if self.grouped else None,
            truth=self.column(f"{task}.truth") if f"{task}.truth" in self.table.column_names else None,
        )

    def domain_names(self) -> Array:
        """The domain of each row [R] by name; empty for one outside `domains`."""
        outside = len(self.domains)
        return np.array([*self.domains, ""])[np.clip(self.column("domain", np.int64), -1, outside)]

    @property
    def command(self) -> str:
        """What writes these predictions anew."""
        return _command(self.run, self.split)


def _command(run: Path, split: str) -> str:
    return f"torchrun --standalone --nproc-per-node 1 -m rec.evaluate run_dir={run} split={split} predictions=true"


# ---- reading


def read_predictions(run: Path, *, split: str = "test") -> Predictions:
    """Predictions on `split`, of a run folder or a folder of `rec.predict`; in memory 20 bytes a row and 12 to 16 a task.

    Raises:
        ConfigError: there are none, their parts do not belong together, they have no labels, a row is there twice, or a
            value is not finite.
    """
    files = sorted(run.glob("part-*.parquet"), key=str)
    files = files or sorted((run / "predictions" / split).glob("part-*.parquet"), key=str)
    if not files:
        raise ConfigError(f"{run}: no predictions of split '{split}'; make them: {_command(run, split)}")
    about, table = _read_parts(files, remedy=f"make them anew: {_command(run, split)}")
    if about["split"] != split:
        raise ConfigError(f"{run} holds predictions of split '{about['split']}', not '{split}': choose --split")
    fields = {name: about[name] for name in ("split", "step", "calibrated", "tasks", "domains", "grouped")}
    predictions = Predictions(run=run, table=table, **fields)
    _check_values(predictions)
    return predictions


def _read_parts(files: Sequence[Path], *, remedy: str) -> tuple[dict[str, Any], pa.Table]:
    """What the files say of themselves, and their rows in order."""
    abouts, tables = [], []
    for file in files:
        try:
            with file.open("rb") as opened:
                part = pq.ParquetFile(opened)
                abouts.append(json.loads((part.schema_arrow.metadata or {})[b"rec"]))
                tables.append(part.read(columns=_columns(abouts[0]["tasks"], present=part.schema_arrow.names)))
        except (pa.ArrowInvalid, KeyError, ValueError) as error:
            raise ConfigError(f"{file} is no file of predictions with labels ({error}); {remedy}") from error
        if abouts[-1] != abouts[0]:
            raise ConfigError(f"{file} is of another evaluation than {files[0].name} beside it; {remedy}")
    return abouts[0], pa.concat_tables(tables).sort_by("row").combine_chunks()


def _columns(tasks: Sequence[str], *, present: Sequence[str]) -> list[str]:
    """Names of the columns to read; KeyError for one that is absent."""
    needed = ["row", "domain", "group", *(f"{task}.{part}" for task in tasks for part in ("label", "weight", "logit"))]
    if missing := set(needed) - set(present):
        raise KeyError(f"without column {', '.join(sorted(missing))}")
    return needed + [f"{task}.truth" for task in tasks if f"{task}.truth" in present]


def _check_values(predictions: Predictions) -> None:
    """Raise `ConfigError` where a row is there twice, or where one that counts holds what has no metric."""
    row, remedy = predictions.column("row", np.int64), f"make them anew: {predictions.command}"
    if (twice := np.flatnonzero(np.diff(row) == 0)).size:
        raise ConfigError(f"{predictions.run}: row {row[twice[0]]} was predicted more than once; {remedy}")
    for task in predictions.tasks:
        rows = predictions.rows_of(task)
        for name, values in (("weight", rows.weights), ("logit", rows.scores), ("label", rows.labels)):
            wrong = np.flatnonzero(~np.isfinite(values) & (rows.weights != 0))
            if wrong.size:
                where = f"{predictions.run}: {task}.{name} is {values[wrong[0]]:g} in row {row[wrong[0]]}"
                raise ConfigError(f"{where} ({wrong.size} such rows), expected a finite number; {remedy}")


# ---- pairing


def shared_tasks(runs: Sequence[Predictions]) -> list[str]:
    """Names of the tasks that all runs have, in the order of the first; `ConfigError` if there is none."""
    shared = [task for task, kind in runs[0].tasks.items() if all(run.tasks.get(task) == kind for run in runs)]
    if not shared:
        found = "; ".join(f"{run.run}: {', '.join(run.tasks)}" for run in runs)
        raise ConfigError(f"the runs share no task ({found}): compare runs of one data set")
    return shared


def check_same_rows(runs: Sequence[Predictions], *, tasks: Sequence[str]) -> None:
    """Raise `ConfigError` where a run does not hold the rows of the first, with the same labels and weights."""
    for run in runs[1:]:
        if unlike := how_rows_differ(run, reference=runs[0], tasks=tasks):
            fix = f"evaluate both on the same files:\n  {runs[0].command}\n  {run.command}"
            raise ConfigError(f"{run.run} is not on the rows of {runs[0].run}: {unlike}; {fix}")


def how_rows_differ(run: Predictions, *, reference: Predictions, tasks: Sequence[str]) -> str | None:
    """In which way a run's rows are not those of `reference`; None where they are the same."""
    row, expected = (p.column("row", np.int64) for p in (run, reference))
    if not np.array_equal(row, expected):
        odd = np.setxor1d(row, expected)
        return f"it holds {len(row):,} rows, not {len(expected):,}; {len(odd):,} are in one alone, such as row {odd[0]}"
    for name, unlike in _comparisons(run, reference, tasks=tasks):
        if unlike.any():
            return f"{name} differs in {int(unlike.sum()):,} of {len(row):,} rows, such as row {row[unlike.argmax()]}"
    return None


def _comparisons(run: Predictions, reference: Predictions, *, tasks: Sequence[str]) -> Iterator[tuple[str, Array]]:
    """Name of a column, and in which rows [R] bool two runs differ in it."""
    yield "domain", run.domain_names() != reference.domain_names()
    if run.grouped and reference.grouped:
        yield "group", run.column("group", np.int64) != reference.column("group", np.int64)
    for task in tasks:
        ours, theirs = run.rows_of(task), reference.rows_of(task)
        yield f"{task}.weight", ours.weights != theirs.weights
        yield f"{task}.label", (ours.labels != theirs.labels) & (ours.weights > 0)


@dataclass(frozen=True)
class Slice:
    """Rows of one task that are compared, in M runs."""

    task: str
    kind: str  # binary or regression
    domain: str | None  # None for all rows
    rows: list[TaskRows]  # of each run the same rows; weights above 0

    @property
    def num_rows(self) -> int:
        """How many they are."""
        return len(self.rows[0].labels)


def slices_of(runs: Sequence[Predictions], task: str, *, domains: bool = False) -> Iterator[Slice]:
    """The rows of a task that weigh anything and, if asked and there are several domains, those of each."""
    rows = [run.rows_of(task) for run in runs]
    # Groups and truth belong to the rows, so any run may tell them
    truth = next((r.truth for r in rows if r.truth is not None), None)
    groups = next((r.groups for r in rows if r.groups is not None), None)
    counts = rows[0].weights > 0
    rows = [replace(r, truth=truth, groups=groups).select(counts) for r in rows]
    kind = runs[0].tasks[task]
    yield Slice(task, kind=kind, domain=None, rows=rows)
    for number, domain in enumerate(runs[0].domains if domains and len(runs[0].domains) > 1 else []):
        inside = rows[0].domain_id == number
        yield Slice(task, kind=kind, domain=domain, rows=[r.select(inside) for r in rows])

"""Fit calibrators to a run's checkpoint. `torchrun --standalone --nproc-per-node 2 -m rec.calibrate run_dir=DIR`"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec.calibration import CalibrationConfig, Calibrators, Cell, TaskCells
from rec.config import Config
from rec.curves import MetricValues
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.evaluate import Command, find_checkpoint, restore, split_reader, wants_help
from rec.features import DataError
from rec.logs import RunLog
from rec.metrics import MultitaskMetrics
from rec.predictions import Rows, collect
from rec.reliability import Reliability, reliability
from rec.schema import ConfigError

ABOUT = """Fit calibrators to a run's checkpoint and keep them with it; rec.evaluate and rec.predict apply them from then on.

    torchrun --standalone --nproc-per-node 2 -m rec.calibrate run_dir=DIR [split=valid] [measure=test] [key=value ...]

split            rows to fit on, with the natural ratio of classes: not thinned of negatives, and not trained on; default valid
measure          split to measure on, before and after; default: test, or the rows fitted on where there is none
checkpoint       latest, best, or a step
kind             platt (default), temperature or isotonic
per_domain       true (default) or false: a curve for each domain, or one for all rows
prior_positives  platt, temperature: positives that the fit of all rows counts in each domain; default 20
min_positives    isotonic: positives that a domain needs for a curve of its own; default 200
key=value        changes the run's configuration, e.g. data.path=DIR"""

_SETTINGS = tuple(f.name for f in fields(CalibrationConfig))
_SHOWN = ("logloss", "ece", "calibration")  # of every variant; auc is that of the first and the last
_CHUNK = 2**16  # rows at a time


@dataclass
class Measured:
    """What one variant of the logits is worth on a task: its metrics over all rows, in each domain, and in bins."""

    metrics: MetricValues
    domains: dict[str, MetricValues]
    bins: Reliability

    @property
    def values(self) -> dict[str, Any]:
        """As an event has it."""
        return {**self.metrics, "domains": self.domains}


@dataclass
class Outcome:
    """What was fitted to a task, and what that is worth: variants `none`, `global` and, if fitted, `domain`."""

    cells: TaskCells
    variants: dict[str, Measured]

    def event(self) -> dict[str, Any]:
        """As `rec/logs.py` describes it."""
        first, *between, last = self.variants.values()
        of = self.cells
        return {
            "before": first.values,
            **({"global": between[0].values} if between else {}),
            "after": last.values,
            "cells": {
                "global": _brief(of.overall),
                "domains": {name: _brief(cell) for name, cell in of.domains.items()},
            },
            "reliability": {"before": asdict(first.bins), "after": asdict(last.bins)},
        }


def _brief(cell: Cell) -> dict[str, Any]:
    """A cell without its knots, which may be thousands."""
    said = {name: getattr(cell, name) for name in ("a", "b", "rows", "positives", "note")}
    return said if cell.logits is None else said | {"knots": len(cell.logits)}


def calibrate(config: Config, rank: Rank, *, command: Command, settings: CalibrationConfig) -> None:
    """Fit, keep, measure, say. Ranks stay in step throughout."""
    data, split = config.data, command.own["split"]
    measured_on = command.own["measure"] or ("test" if "test" in data.splits else split)
    fit_reader, reader = split_reader(config, rank, split), split_reader(config, rank, measured_on)
    path = find_checkpoint(config, command.run_dir, command.own["checkpoint"])
    restored = restore(config, rank, path, local_batch_size=reader.local_batch_size)
    rows = collect(restored.model, fit_reader, device=rank.device)
    calibrators = Calibrators(data.tasks, domains=data.domains, config=settings)
    calibrators.fit(rows, split=split, step=restored.info.step)
    if rank.is_main:
        calibrators.save(path)
    if fit_reader.split.files != reader.split.files:
        rows = collect(restored.model, reader, device=rank.device)
    outcomes = measure(calibrators, rows, config)
    with closing(RunLog(command.run_dir, active=rank.is_main)) as log:
        log.event(
            "calibration",
            step=restored.info.step,
            rows=restored.info.rows,
            split=split,
            measured_on=measured_on,
            kind=settings.kind.name,
            tasks={name: outcome.event() for name, outcome in outcomes.items()},
        )
        log.say(
            f"{path.name}: {settings.kind.name}, fitted on {split}, {fit_reader.num_rows:,} rows; kept with the checkpoint"
        )
        log.say(_about(fit_reader, reader))
        for name, outcome in outcomes.items():
            log.say("\n" + "\n".join(_report(name, outcome)))


def measure(calibrators: Calibrators, rows: Rows, config: Config) -> dict[str, Outcome]:
    """Every calibrated task without calibrators, with one curve, and with one a domain, over the rows of all ranks."""
    unknown = torch.full_like(rows.domain_id, -1)  # which the curve of all rows is for
    variants = {"none": rows.logits, "global": calibrators(rows.logits, unknown)}
    if any(of.domains for of in calibrators.cells_.values()):
        variants["domain"] = calibrators(rows.logits, rows.domain_id)
    measured = {name: _measure(calibrators, rows.with_logits(logits), config) for name, logits in variants.items()}
    return {
        task: Outcome(of, {name: values[task] for name, values in measured.items()})
        for task, of in calibrators.cells_.items()
    }


def _measure(calibrators: Calibrators, rows: Rows, config: Config) -> dict[str, Measured]:
    data = config.data
    metrics = MultitaskMetrics(data.tasks, domains=data.domains, config=config.metrics)
    for start in range(0, max(1, len(rows.logits)), _CHUNK):  # once at least, also without rows
        metrics.update(*(x[start : start + _CHUNK] for x in (rows.logits, rows.labels, rows.weights, rows.domain_id)))
    result = metrics.compute()
    return {
        task: Measured(result.metrics[task], result.domains[task], reliability(rows, t))
        for t, task in enumerate(data.tasks)
        if task in calibrators.cells_
    }


# ---- what is printed


def _about(fitted_on: Reader, reader: Reader) -> str:
    """What the numbers below are of, and what they must not be taken for."""
    said = [f"measured on {reader.split.name}, {reader.num_rows:,} rows"]
    if fitted_on.split.files == reader.split.files:
        said += [
            "these are the rows that were fitted on: what is gained is overstated; measure=SPLIT measures on others"
        ]
    if fitted_on.split.name == "train":
        said += [
            "the network was trained on the rows fitted on, and is surer of them than of others; split=SPLIT fits on others"
        ]
    said += ["this takes the ratio of classes there for the natural one; a split thinned of negatives would mislead it"]
    return "\n".join(
        [*said, "none: as trained; global: one curve; domain: one a domain; field: mean ece within domains"]
    )


def _report(task: str, outcome: Outcome) -> Iterator[str]:
    """The lines on a task: its metrics by domain and variant, what went otherwise, and its reliability."""
    variants = outcome.variants
    names, domains = list(variants), list(variants["none"].domains)
    columns = [(metric, name) for metric in _SHOWN for name in names] + [("auc", names[0]), ("auc", names[-1])]
    lines = {task: {name: of.metrics for name, of in variants.items()}}
    if len(domains) > 1:
        lines |= {f"  {domain}": {name: of.domains[domain] for name, of in variants.items()} for domain in domains}
        lines["  field"] = {name: {"ece": of.metrics["field_ece"]} for name, of in variants.items()}
    table = [
        ["", "", "", *(metric if name == "none" else "" for metric, name in columns)],
        ["", "rows", "positives", *(name for _, name in columns)],
    ]
    for label, values in lines.items():
        counts = [_number(values["none"].get(name), 0) for name in ("rows", "positives")]
        table.append([label, *counts, *(_number(values[name].get(metric)) for metric, name in columns)])
    first = max(len(row[0]) for row in table) + 2
    widths = [12, 12, *(12 if name == "none" else 8 for _, name in columns)]
    for label, *cells in table:
        yield label.ljust(first) + "".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    notes = {"all rows": outcome.cells.overall, **outcome.cells.domains}
    yield from (f"  {name}: {cell.note}" for name, cell in notes.items() if cell.note)
    yield from _reliability_table(variants[names[0]].bins, variants[names[-1]].bins)


def _reliability_table(before: Reliability, after: Reliability) -> Iterator[str]:
    if before.rows:
        names = ("rows in bins", "pred before", "rate", "pred after", "rate")
        yield "".join(name.rjust(14) for name in names)
    for rows, *values in zip(before.rows, before.mean_pred, before.rate, after.mean_pred, after.rate, strict=True):
        yield f"{rows:,.0f}".rjust(14) + "".join(f"{value:.5f}".rjust(14) for value in values)


def _number(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


# ---- the command line


def command_of(arguments: Sequence[str]) -> Command:
    """The command line of a calibration."""
    defaults = {"split": "valid", "measure": "", "checkpoint": "latest", **dict.fromkeys(_SETTINGS, "")}
    return Command.parse(arguments, defaults=defaults, purpose="calibrate")


def settings_of(command: Command) -> CalibrationConfig:
    """The settings among a command's values, typed and checked.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """
    tree = OmegaConf.structured(CalibrationConfig)
    try:
        tree.merge_with_dotlist([f"{name}={command.own[name]}" for name in _SETTINGS if command.own[name]])
        settings = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, CalibrationConfig)
    return settings


def run(arguments: list[str]) -> None:
    """Read the run's configuration, join the ranks, calibrate."""
    if wants_help(arguments):
        print(ABOUT)
        return
    command = command_of(arguments)
    settings, config = settings_of(command), command.config()
    with process_group(timeout_s=config.trainer.timeout_s) as rank:
        calibrate(config, rank, command=command, settings=settings)


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()

"""Whether one run is better than another, or within noise: `python -m rec.compare RUN RUN [RUN ...]`.

Reads the predictions that `rec.evaluate predictions=true` leaves in a run folder, or a folder of `rec.predict`, and pairs
them row by row; the first run is the reference. With `--reference RUN RUN ... --candidate RUN RUN ...` runs are paired by
seed, in order: those of a pair hold the same rows, those of different seeds need not.
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from rec import storage
from rec.curves import Array
from rec.intervals import (
    BinaryMeasure,
    Interval,
    Measure,
    RegressionMeasure,
    bootstrap,
    bootstrap_interval,
    delong,
    paired_t,
)
from rec.paired import Predictions, Slice, check_same_rows, how_rows_differ, read_predictions, shared_tasks, slices_of
from rec.report import as_text
from rec.schema import ConfigError, check_range, nearest

METRICS = {
    "binary": ("auc", "expected_auc", "pr_auc", "gauc", "logloss", "ne", "calibration", "ece", "field_ece", "log_mae"),
    "regression": ("mae", "rmse", "calibration"),
}
DEFAULT_METRICS = ("auc", "expected_auc", "ne", "calibration", "ece", "log_mae", "mae", "rmse")
HIGHER_IS_BETTER = ("auc", "expected_auc", "pr_auc", "gauc")
DELONG = "DeLong's test"


@dataclass(frozen=True)
class Settings:
    """How to compare; `ConfigError` where a value is out of range or a metric is unknown."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    level: float = 0.95  # 0.5 to 0.9999; share of intervals that hold the true difference
    replicates: int = 200  # 20 to 100,000; of the bootstrap
    method: str | None = None  # of the AUC's interval: delong or bootstrap; default: delong unless rows have groups
    domains: bool = False  # also a line for each domain
    ece_bins: int = 20  # 1 to 1000, as metrics.ece_bins

    def __post_init__(self) -> None:
        known = {name for names in METRICS.values() for name in names}
        for name in self.metrics:
            if name not in known:
                raise ConfigError(f"--metrics names '{name}': {nearest(name, known)}")
        check_range("--level", self.level, 0.5, 0.9999)
        check_range("--replicates", self.replicates, 20, 100_000)
        check_range("--ece-bins", self.ece_bins, 1, 1000)


@dataclass(frozen=True)
class Line:
    """One metric of one task, in all rows or in those of a domain."""

    task: str
    domain: str | None
    metric: str
    reference: float | None  # None without meaning; over seeds, the mean of those in which both have one
    candidate: float | None
    difference: float | None  # candidate minus reference; of `calibration`, of the distances from 1
    interval: Interval | None
    method: str  # of the interval
    rows: int | None = None  # of weight > 0 for the task; None over seeds
    seeds: int | None = None  # pairs in which both have a meaning
    better_in: int | None = None  # pairs in which the candidate is better

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `within noise`; `-` without an interval."""
        if self.interval is None:
            return "-"
        if not self.interval.excludes_zero:
            return "within noise"
        return "better" if _is_better(self.metric, self.interval.difference) else "worse"

    def as_json(self) -> dict[str, float | int | str | None]:
        """Plain numbers and None."""
        ends = asdict(self.interval) if self.interval else dict.fromkeys(("low", "high", "p_value"))
        return {k: v for k, v in asdict(self).items() if k != "interval"} | ends | {"verdict": self.verdict}


def _is_better(metric: str, difference: float) -> bool:
    return difference > 0 if metric in HIGHER_IS_BETTER else difference < 0


# ---- measuring a slice


def metrics_of(part: Slice, settings: Settings) -> list[str]:
    """Those of the settings that the task has."""
    absent = {"expected_auc": part.rows[0].truth is None, "gauc": part.rows[0].groups is None}
    absent |= {"field_ece": part.domain is not None}  # within a domain it is the ECE
    if part.kind == "binary":
        labels = part.rows[0].labels
        absent["log_mae"] = not ((labels > 0) & (labels < 1)).any()
    return [name for name in settings.metrics if name in METRICS[part.kind] and not absent.get(name)]


def measures_of(part: Slice, metrics: Sequence[str], settings: Settings) -> list[Measure]:
    """One a run."""
    if part.kind == "regression":
        return [RegressionMeasure(rows, metrics=metrics) for rows in part.rows]
    return [BinaryMeasure(rows, metrics=metrics, ece_bins=settings.ece_bins) for rows in part.rows]


def values_of(part: Slice, metrics: Sequence[str], settings: Settings) -> Array:
    """Metrics [M, K] float64 of the rows as they are, NaN without meaning."""
    ones = np.ones(part.num_rows)
    return np.array([measure(ones) for measure in measures_of(part, metrics, settings)], dtype=np.float64)


def differences_of(values: Array, metrics: Sequence[str]) -> Array:
    """Of metrics [..., M, K], the first of M being the reference: [..., M - 1, K].

    >>> differences_of(np.array([[0.70, 1.02], [0.75, 0.99]]), ["auc", "calibration"]).round(4)
    array([[ 0.05, -0.01]])
    """
    compared = np.where([name == "calibration" for name in metrics], np.abs(values - 1), values)
    return compared[..., 1:, :] - compared[..., :1, :]


def method_of(part: Slice, metric: str, settings: Settings) -> str:
    """What the metric's interval comes from; `ConfigError` where --method asks for what the rows do not allow."""
    rows = part.rows[0]
    resampling = "bootstrap over rows" if rows.groups is None else "bootstrap over groups"
    if metric != "auc" or settings.method == "bootstrap":
        return resampling
    whole = all(np.isin(values, (0, 1)).all() for values in (rows.labels, rows.weights))
    if settings.method == "delong" and not whole:
        found = f"task '{part.task}' has labels or weights other than 0 and 1"
        raise ConfigError(f"--method delong: {found}; choose --method bootstrap")
    # Rows of a query resemble each other, and DeLong's intervals are then too narrow
    return DELONG if whole and (rows.groups is None or settings.method == "delong") else resampling


# ---- on the same rows


def compare_runs(runs: Sequence[Predictions], settings: Settings) -> list[list[Line]]:
    """The lines of each run but the first, which is the reference; `ConfigError` where rows differ."""
    tasks = shared_tasks(runs)
    check_same_rows(runs, tasks=tasks)
    parts = (part for task in tasks for part in slices_of(runs, task, domains=settings.domains))
    lines = [compare_slice(part, settings) for part in tqdm(parts, unit=" slices", leave=False, disable=None)]
    return [[line for of_slice in lines for line in of_slice[candidate]] for candidate in range(len(runs) - 1)]


def compare_slice(part: Slice, settings: Settings) -> list[list[Line]]:
    """The lines of each candidate, one a metric."""
    methods = {name: method_of(part, name, settings) for name in metrics_of(part, settings)}
    values = values_of(part, list(methods), settings)
    differences = differences_of(values, list(methods))
    drawn = [name for name in methods if methods[name] != DELONG]
    intervals = _bootstrap_intervals(part, drawn, settings) if drawn else {}
    if DELONG in methods.values():
        intervals["auc"] = _delong_intervals(part, settings)

    def line(candidate: int, k: int, metric: str) -> Line:
        return Line(
            task=part.task,
            domain=part.domain,
            metric=metric,
            reference=_known(values[0, k]),
            candidate=_known(values[1 + candidate, k]),
            difference=_known(differences[candidate, k]),
            interval=intervals[metric][candidate],
            method=methods[metric],
            rows=part.num_rows,
        )

    return [[line(candidate, k, name) for k, name in enumerate(methods)] for candidate in range(len(differences))]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _delong_intervals(part: Slice, settings: Settings) -> list[Interval | None]:
    """Of the AUC, one a candidate."""
    outcome = delong(np.stack([rows.scores for rows in part.rows]), labels=part.rows[0].labels)
    return [outcome.interval(c, level=settings.level) if outcome else None for c in range(1, len(part.rows))]


def _bootstrap_intervals(part: Slice, metrics: Sequence[str], settings: Settings) -> dict[str, list[Interval | None]]:
    """Of each metric, one a candidate."""
    groups = np.arange(part.num_rows) if part.rows[0].groups is None else part.rows[0].groups
    measures = measures_of(part, metrics, settings)
    draws = differences_of(bootstrap(measures, groups=groups, replicates=settings.replicates), metrics)
    differences = differences_of(values_of(part, metrics, settings), metrics)
    interval = partial(bootstrap_interval, num_groups=len(np.unique(groups)), level=settings.level)
    return {
        name: [interval(of_run[k], replicates=draws[:, candidate, k]) for candidate, of_run in enumerate(differences)]
        for k, name in enumerate(metrics)
    }


# ---- over seeds


def compare_seeds(pairs: Sequence[tuple[Predictions, Predictions]], settings: Settings) -> list[Line]:
    """Lines of candidate against reference, one pair a seed; `ConfigError` where rows within a pair differ."""
    tasks = shared_tasks([run for pair in pairs for run in pair])
    values: dict[tuple[str, str | None, str], list[Array]] = defaultdict(list)  # [2] of each pair
    for pair in tqdm(pairs, unit=" pairs", leave=False, disable=None):
        check_same_rows(pair, tasks=tasks)
        for part in (part for task in tasks for part in slices_of(pair, task, domains=settings.domains)):
            metrics = metrics_of(part, settings)
            for name, of_pair in zip(metrics, values_of(part, metrics, settings).T, strict=True):
                values[part.task, part.domain, name].append(of_pair)
    return [
        _line_over_seeds(np.array(of_seeds), task=task, domain=domain, metric=metric, level=settings.level)
        for (task, domain, metric), of_seeds in values.items()
    ]


def _line_over_seeds(values: Array, *, task: str, domain: str | None, metric: str, level: float) -> Line:
    """Of the reference's and the candidate's values [S, 2], NaN without meaning."""
    values = values[~np.isnan(values).any(1)]
    differences = differences_of(values[:, :, None], [metric])[:, 0, 0].tolist()
    reference, candidate = values.mean(0).tolist() if len(values) else (None, None)
    return Line(
        task=task,
        domain=domain,
        metric=metric,
        reference=reference,
        candidate=candidate,
        difference=float(np.mean(differences)) if differences else None,
        interval=paired_t(differences, level=level),
        method="Student's t over seeds",
        seeds=len(differences),
        better_in=sum(_is_better(metric, difference) for difference in differences),
    )


# ---- the command


@dataclass(frozen=True)
class Side:
    """The reference or a candidate."""

    name: str
    runs: list[Predictions]  # one a seed
    lines: list[Line]  # against the reference

    def __str__(self) -> str:
        """Name, folders, and what the predictions are of."""
        folders = [str(run.run) for run in self.runs]
        named = [self.name] if folders == [self.name] else [self.name, ", ".join(folders)]
        steps = " or ".join(f"{step:,}" for step in sorted({run.step for run in self.runs}))
        calibrated = " or ".join(sorted({"calibrated" if run.calibrated else "not calibrated" for run in self.runs}))
        return f"{': '.join(named)} (after {steps} steps, {calibrated})"


def make_table(lines: Sequence[Line], *, level: float) -> list[list[str]]:
    """Cells of the table, its head first."""
    over_seeds = any(line.seeds is not None for line in lines)
    head = ["task", "metric", "reference", "candidate", "difference", f"{100 * level:g} % interval", "verdict"]
    table = [head + ["better in"] * over_seeds]
    for line in lines:
        name = line.task if line.domain is None else f"{line.task} / {line.domain}"
        values = ["-" if value is None else f"{value:.4f}" for value in (line.reference, line.candidate)]
        difference = "-" if line.difference is None else f"{line.difference:+.5f}"
        interval = f"[{line.interval.low:+.5f}, {line.interval.high:+.5f}]" if line.interval else "-"
        wins = [f"{line.better_in} of {line.seeds}"] * over_seeds
        table.append([name, line.metric, *values, difference, interval, line.verdict, *wins])
    return table


def caption(sides: Sequence[Side], settings: Settings) -> str:
    """What was compared, on which rows, and what the intervals mean; the reference is the first of `sides`."""
    lines = [line for side in sides for line in side.lines]
    methods = {line.method: dict.fromkeys(x.metric for x in lines if x.method == line.method) for line in lines}
    by = "; ".join(f"{', '.join(names)} by {method}" for method, names in methods.items())
    draws = f", {settings.replicates} replicates" if "bootstrap" in by else ""
    chance = f"about 1 line in {1 / (1 - settings.level):.0f} without a difference is called better or worse by chance"
    runs = [run for side in sides for run in side.runs]
    rows = " + ".join(f"{len(run.table):,}" for run in sides[0].runs)
    text = [f"Split {runs[0].split}, {rows} rows. Reference: {sides[0]}."]
    text.append(f"Intervals at {100 * settings.level:g} %: {by}{draws}; {chance}. {_scope(sides[0].runs)}")
    if any(line.metric == "calibration" for line in lines):
        text.append("The difference in calibration is that of the distances from 1.")
    if left_out := dict.fromkeys(task for run in runs for task in run.tasks if task not in shared_tasks(runs)):
        text.append(f"Left out, since not all runs have them: {', '.join(left_out)}.")
    return "\n".join(text)


def _scope(references: Sequence[Predictions]) -> str:
    """Which chance the intervals cover, and which they do not."""
    if len(references) == 1:
        return (
            "They cover the choice of rows, not of the seed: for that, give --reference and --candidate several runs."
        )
    tasks = shared_tasks(references)
    if any(how_rows_differ(run, reference=references[0], tasks=tasks) for run in references[1:]):
        return "They cover the choice of seed and of rows: each seed was measured on rows of its own."
    return "They cover the choice of seed, not of rows: all were measured on the same."


def as_json(sides: Sequence[Side], settings: Settings) -> str:
    """All numbers, unrounded; the reference is the first of `sides`."""
    folders = [[str(run.run) for run in side.runs] for side in sides]
    about = {"split": sides[0].runs[0].split, "name": sides[0].name, "reference": folders[0]} | asdict(settings)
    comparisons = [
        {"name": side.name, "candidate": runs, "lines": [line.as_json() for line in side.lines]}
        for side, runs in zip(sides[1:], folders[1:], strict=True)
    ]
    return json.dumps(about | {"comparisons": comparisons}, indent=2, allow_nan=False) + "\n"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m rec.compare",
        description="Paired differences of metrics between runs, with confidence intervals.",
        epilog="Predictions come from: torchrun ... -m rec.evaluate run_dir=RUN split=test predictions=true",
    )
    p.add_argument(
        "runs", type=storage.path, nargs="*", metavar="RUN", help="the reference, then runs to compare with it"
    )
    p.add_argument("--reference", type=storage.path, nargs="+", metavar="RUN", help="runs of several seeds")
    p.add_argument(
        "--candidate", type=storage.path, nargs="+", action="append", metavar="RUN", help="of the same seeds, in order"
    )
    p.add_argument("--names", nargs="+", metavar="NAME", help="for the output: of the reference and each candidate")
    p.add_argument("--split", default="test", help="default: %(default)s")
    p.add_argument("--metrics", help=f"separated by commas; default: {','.join(DEFAULT_METRICS)}")
    p.add_argument("--level", type=float, default=0.95, help="of confidence; default: %(default)s")
    p.add_argument("--replicates", type=int, default=200, help="of the bootstrap; default: %(default)s")
    p.add_argument("--method", choices=("delong", "bootstrap"), help="for auc; default: delong unless rows have groups")
    p.add_argument("--ece-bins", type=int, default=20, help="bins of equal weight; default: %(default)s")
    p.add_argument("--domains", action="store_true", help="also a line for each domain")
    p.add_argument("--markdown", action="store_true", help="print Markdown tables")
    p.add_argument("--json", type=Path, metavar="FILE", help="file to write all numbers to")
    return p


def folders_of(args: argparse.Namespace) -> list[list[Path]]:
    """The runs of the reference, then of each candidate; `ConfigError` where they cannot be paired."""
    seeds = args.reference is not None or args.candidate is not None
    if seeds and (args.runs or not args.reference or not args.candidate):
        raise ConfigError("expected --reference RUN RUN ... and --candidate RUN RUN ..., or runs without either")
    if not seeds and len(args.runs) < 2:
        raise ConfigError(f"{len(args.runs)} run given, expected a reference and one or more to compare with it")
    folders = [args.reference, *args.candidate] if seeds else [[run] for run in args.runs]
    counts = [len(runs) for runs in folders]
    if seeds and (len(set(counts)) > 1 or counts[0] < 2):
        found = f"--reference has {counts[0]} runs, --candidate {' and '.join(map(str, counts[1:]))}"
        raise ConfigError(f"{found}: expected as many each, two or more, a run a seed")
    if seeds and args.method:
        raise ConfigError("--method is for the interval of single runs; over seeds it is Student's: leave it out")
    if args.names and len(args.names) != len(folders):
        raise ConfigError(f"--names has {len(args.names)} names, expected {len(folders)}: reference and each candidate")
    return folders


def compare(args: argparse.Namespace, settings: Settings) -> list[Side]:
    """The reference, without lines, then every candidate."""
    folders = folders_of(args)
    runs = [[read_predictions(folder, split=args.split) for folder in side] for side in folders]
    if args.runs:
        lines = compare_runs([run for side in runs for run in side], settings)
        names = [str(run) for run in args.runs]
    else:
        lines = [compare_seeds(list(zip(runs[0], side, strict=True)), settings) for side in runs[1:]]
        names = ["reference", *(f"candidate {number}" for number in range(1, len(runs)))]
    if not any(lines):
        raise ConfigError(f"no task of the runs has any of the metrics {', '.join(settings.metrics)}: choose --metrics")
    return [Side(*side) for side in zip(args.names or names, runs, [[], *lines], strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_intermixed_args(argv)
    given = {name: getattr(args, name) for name in ("level", "replicates", "method", "domains", "ece_bins")}
    try:
        settings = Settings(metrics=tuple(args.metrics.split(",")) if args.metrics else DEFAULT_METRICS, **given)
        sides = compare(args, settings)
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    print(caption(sides, settings))
    for side in sides[1:]:
        print(f"\n{side}:\n\n{as_text(make_table(side.lines, level=settings.level), markdown=args.markdown)}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(as_json(sides, settings))


if __name__ == "__main__":
    main()

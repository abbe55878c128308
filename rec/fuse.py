"""What a ranking score out of several tasks buys and costs: `python -m rec.fuse --runs RUN --weights click=0.95 buy=0.05`.

Reads the predictions that `rec.evaluate predictions=true` leaves in a run folder, or a folder of `rec.predict` with labels,
ranks their rows by each fusion of `rec.fusion` and by each task alone, and measures how well every task's label is ranked.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from statistics import mean

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit
from tqdm import tqdm

from rec import storage
from rec.curves import Array, auc, exact_curve, group_auc
from rec.fusion import FusionConfig, FusionKind, combine, contributions, fuse, term_values, variance_shares
from rec.intervals import TaskRows
from rec.paired import Predictions, read_predictions, shared_tasks
from rec.report import as_text, cell
from rec.schema import ConfigError

SWEEP = (0.01, 0.03, 0.1, 0.3, 1.0)  # weights of the swept term
UNSEEN = 0.01  # share of the variance below which a term hardly moves any row
Lines = dict[str, dict[str, float | None]]  # name of a ranking -> column -> value, None without meaning


# ---- what is ranked


def preds_of(run: Predictions, tasks: Sequence[str]) -> dict[str, Array]:
    """Probabilities [R] float64 by task, of a regression the predictions; `ConfigError` where one is not finite."""
    preds = {}
    for task in tasks:
        logits = run.rows_of(task).scores
        wrong = np.flatnonzero(~np.isfinite(logits))
        if wrong.size:
            row = run.column("row", np.int64)[wrong[0]]
            where = f"{run.run}: {task}.logit is {logits[wrong[0]]:g} in row {row} ({wrong.size:,} such rows)"
            raise ConfigError(f"{where}, and every row has to be ranked; make them anew: {run.command}")
        preds[task] = expit(logits) if run.tasks[task] == "binary" else logits
    return preds


def groups_of(run: Predictions) -> Array | None:
    """Groups [R] int64, None where the data set has none."""
    return run.column("group", np.int64) if run.grouped else None


def on_every_row(rows: Mapping[str, TaskRows], task: str) -> TaskRows | None:
    """Rows of a conditional task with those outside its condition as negatives; None for a task without a condition.

    Predictions do not name conditions, but they show them: a task is conditional on those whose labels are positive in all
    rows that count for it. A row outside weighs what it weighs for the condition; one whose label is unknown weighs 0.

    Args:
        rows: all rows of the binary tasks.
        task: one of them.
    """
    own, counts = rows[task], rows[task].weights > 0
    conditions = [
        other
        for name, other in rows.items()
        if name != task and counts.any() and ((other.labels > 0) & (other.weights > 0))[counts].all()
    ]
    outside = np.max([other.weights * (other.labels == 0) for other in conditions], axis=0, initial=0)
    if not outside.any():
        return None
    labels, weights = np.where(counts, own.labels, 0), np.where(counts, own.weights, outside)
    return replace(own, labels=labels, weights=weights)


# ---- measuring


@dataclass(frozen=True)
class Measured:
    """What the rankings of one run come to, each a line a ranking."""

    own: Lines  # on the rows that count for each task
    every: Lines  # on every row, of conditional tasks
    shares: Lines  # of the variance within groups, by term; of fusions only


@dataclass(frozen=True)
class Ranking:
    """Rows of a run in an order of their own."""

    name: str
    scores: Array  # [R] float64
    shares: dict[str, float | None]  # of the variance within groups, by term; empty of a term alone


def rankings_of(
    preds: Mapping[str, Array], fusions: Mapping[str, FusionConfig], *, group_id: Array | None
) -> Iterator[Ranking]:
    """Each of the `fusions`, then every task and every term of a fusion alone; one at a time is in memory."""
    for name, config in fusions.items():
        parts = contributions(preds, config, group_id=group_id)
        yield Ranking(name, combine(parts, config.kind), variance_shares(parts, group_id))
    for term in dict.fromkeys([*preds, *(term for config in fusions.values() for term in config.weights)]):
        yield Ranking(f"{term} alone", term_values(preds, term), {})


def measure(run: Predictions, fusions: Mapping[str, FusionConfig], *, tasks: Sequence[str]) -> Measured:
    """How well each fusion, and each task alone, ranks the labels of the binary ones of `tasks`."""
    own = {task: run.rows_of(task) for task in tasks if run.tasks[task] == "binary"}
    every = {task: rows for task in own if (rows := on_every_row(own, task)) is not None}
    measured = Measured(own={}, every={}, shares={})
    rankings = rankings_of(preds_of(run, tasks), fusions, group_id=groups_of(run))
    for ranking in tqdm(rankings, unit=" rankings", leave=False, disable=None):
        measured.own[ranking.name] = _line(ranking.scores, own)
        measured.every[ranking.name] = _line(ranking.scores, every)
        if ranking.shares:
            measured.shares[ranking.name] = ranking.shares
    return measured


def _line(scores: Array, rows: Mapping[str, TaskRows]) -> dict[str, float | None]:
    """The metrics of every task under one ranking, by column."""
    of_tasks = {task: ranking_metrics(scores, of_task) for task, of_task in rows.items()}
    return {f"{task} {metric}": value for task, values in of_tasks.items() for metric, value in values.items()}


def ranking_metrics(scores: Array, rows: TaskRows) -> dict[str, float | None]:
    """How well `scores` [R] rank the labels of the rows of weight above 0: `auc` and, where there are groups, `gauc`."""
    counts = rows.weights > 0
    scores, labels, weights = scores[counts], rows.labels[counts], rows.weights[counts]
    values = {"auc": auc(exact_curve(scores, labels=labels, weights=weights))}
    if rows.groups is not None:
        values["gauc"] = group_auc(rows.groups[counts], scores=scores, labels=labels, weights=weights)[0]
    return values


# ---- the command


def parse_weights(words: Sequence[str]) -> dict[str, float]:
    """Weights by term.

    >>> parse_weights(["click=0.95", "click*buy=0.05"])
    {'click': 0.95, 'click*buy': 0.05}
    """
    weights: dict[str, float] = {}
    for word in words:
        term, _, number = word.rpartition("=")
        try:
            weight = float(number)
        except ValueError as error:
            raise ConfigError(f"--weights has '{word}', expected TASK=NUMBER, as click=0.95") from error
        if not term or term in weights:
            found = f"names '{term}' twice" if term else f"has '{word}' without a task"
            raise ConfigError(f"--weights {found}, expected TASK=NUMBER once a task")
        weights[term] = weight
    return weights


def fusions_of(args: argparse.Namespace) -> dict[str, FusionConfig]:
    """The fusions to measure, by name; `ConfigError` where the options contradict each other."""
    weights, kinds = parse_weights(args.weights), [FusionKind[name] for name in dict.fromkeys(args.kinds)]
    if args.out and (len(kinds) > 1 or len(args.runs) > 1 or args.sweep):
        found = f"{len(args.runs)} runs, {len(kinds)} kinds{' and a sweep' if args.sweep else ''}"
        raise ConfigError(
            f"--out holds one score, and there are {found}: give one of --runs, one of --kinds, no --sweep"
        )
    if args.out and args.out.is_dir():
        raise ConfigError(f"--out {args.out} is a folder, expected a file to write, as {args.out / 'scores.parquet'}")
    if not args.sweep:
        return {kind.name: FusionConfig(kind, weights) for kind in kinds}
    swept = [(kind, weight) for kind in kinds for weight in SWEEP]
    return {f"{k.name}, {args.sweep}={w:g}": FusionConfig(k, weights | {args.sweep: w}) for k, w in swept}


def make_table(head: str, lines: Sequence[Lines]) -> list[list[str]]:
    """Cells of the table, its head first: mean and deviation over the runs' `lines`."""
    columns = list(dict.fromkeys(column for of_run in lines for line in of_run.values() for column in line))
    rows = [[name, *(cell([of_run[name].get(c) for of_run in lines]) for c in columns)] for name in lines[0]]
    return [[head, *columns], *rows]


def caption(runs: Sequence[Predictions], weights: Sequence[str]) -> str:
    """What was ranked."""
    rows = " + ".join(f"{len(run.table):,}" for run in runs)
    over = f"mean ± sample standard deviation over n = {len(runs)} runs" if len(runs) > 1 else str(runs[0].run)
    text = [f"Split {runs[0].split}, {rows} rows; {over}. Weights {' '.join(weights)}."]
    if all(run.grouped for run in runs):
        text.append("Ranks are within groups, so that scores of `rank` compare rows of one group: see gauc.")
    else:
        text.append("Ranks are among all rows where a data set has no groups.")
    if left_out := [task for task in shared_tasks(runs) if runs[0].tasks[task] == "regression"]:
        text.append(f"A regression has no AUC: {', '.join(left_out)}.")
    return "\n".join(text)


def hints(shares: Sequence[Lines], fusions: Mapping[str, FusionConfig]) -> list[str]:
    """A sentence for each weighted sum in which a term of some weight hardly moves any row."""
    said = []
    for name, config in fusions.items():
        if config.kind is not FusionKind.weighted_sum:
            continue
        unseen = []
        for term in (term for term, weight in config.weights.items() if weight):
            known = [share for of_run in shares if (share := of_run[name][term]) is not None]
            unseen += [term] if known and abs(mean(known)) < UNSEEN else []
        if unseen:
            found = f"{name}: {', '.join(unseen)} brings less than {100 * UNSEEN:g} % of the variance"
            said.append(f"{found}, so its weight changes next to nothing; compare rank, or --sweep {quote(unseen[0])}.")
    return said


def report(runs: Sequence[Predictions], fusions: Mapping[str, FusionConfig], args: argparse.Namespace) -> str:
    """All that is printed."""
    tasks = shared_tasks(runs)
    measured = [measure(run, fusions, tasks=tasks) for run in runs]
    blocks = [caption(runs, args.weights)]
    parts = {
        "On the rows that count for each task:": [m.own for m in measured],
        "On every row, those outside a task's condition as negatives:": [m.every for m in measured],
        "Share of the score's variance within groups (product: of its logarithm):": [m.shares for m in measured],
    }
    for title, lines in parts.items():
        if any(line for of_run in lines for line in of_run.values()):
            blocks += [title, as_text(make_table("ranking", lines), markdown=args.markdown)]
    said = [] if args.sweep else hints([m.shares for m in measured], fusions)
    return "\n\n".join([*blocks, *said])


def write_scores(file: Path, run: Predictions, config: FusionConfig) -> None:
    """Write `row` int64 and `score` float64 of every row, by row; a file that was there goes when this one is whole."""
    scores = fuse(preds_of(run, list(run.tasks)), config, group_id=groups_of(run))
    about = {"run": str(run.run), "split": run.split, "step": run.step, "calibrated": run.calibrated}
    about |= {"kind": config.kind.name, "weights": config.weights}
    table = pa.table({"row": run.column("row", np.int64), "score": scores}, metadata={"rec": json.dumps(about)})
    draft = file.with_name(f".writing_{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, draft)
        draft.replace(file)
    except OSError as error:
        raise ConfigError(f"--out {file} cannot be written: {error}") from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m rec.fuse",
        description="Rank rows by one score out of several tasks, and measure how well each task's label is ranked.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  torchrun --standalone --nproc-per-node 1 -m rec.evaluate run_dir=RUN split=test predictions=true
  python -m rec.fuse --runs RUN --weights click=0.95 purchase=0.05
  python -m rec.fuse --runs RUN --weights click=0.95 'click*purchase=0.05'      pCTCVR, of a purchase given a click
  python -m rec.fuse --runs RUN --weights click=1 purchase=1 --sweep purchase   what each weight buys and costs
  python -m rec.fuse --runs RUN --weights click=1 purchase=0.3 --kinds product --out scores.parquet

kinds:
  weighted_sum  sum of weight * probability
  product       product of probability ^ weight; weights of 0 or more
  rank          sum of weight * rank within the group (the request), 0 to 1""",
    )
    kinds = [kind.name for kind in FusionKind]
    p.add_argument(
        "--runs", type=storage.path, nargs="+", required=True, metavar="RUN", help="folders with predictions"
    )
    p.add_argument("--split", default="test", help="default: %(default)s")
    p.add_argument("--weights", nargs="+", required=True, metavar="TASK=W", help="of a task, or of tasks joined by *")
    p.add_argument("--kinds", nargs="+", choices=kinds, default=kinds, help="default: all")
    p.add_argument("--sweep", metavar="TASK", help=f"give this one the weights {', '.join(f'{w:g}' for w in SWEEP)}")
    p.add_argument("--out", type=Path, metavar="FILE", help="Parquet of row and score, of one run and one kind")
    p.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    try:
        fusions = fusions_of(args)
        runs = [read_predictions(run, split=args.split) for run in args.runs]
        text = report(runs, fusions, args)
        if args.out:
            write_scores(args.out, runs[0], next(iter(fusions.values())))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    print(text)
    if args.out:
        print(f"\n{len(runs[0].table):,} rows: {args.out}")


if __name__ == "__main__":
    main()

"""What runs reached, as one table: `python -m rec.report RUN [RUN ...]`, a line a task, mean and deviation over runs.

Reads `metrics.jsonl` of each run folder (`rec.logs` describes it) and, to compare with, the JSON files of `rec.baseline`.
Of each run the last `eval` event of the split counts.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rec import storage
from rec.schema import ConfigError, nearest

COLUMNS: tuple[str, ...] = ("auc", "pr_auc", "logloss", "ne", "calibration", "ece", "field_ece", "gauc", "gap_closed")
COLUMNS += ("log_mae", "mae", "rmse")
Lines = dict[str, dict[str, Any]]  # "task" or "task / domain" -> name of a metric -> its value, None without meaning


def read_evaluation(run: Path, *, split: str | None = None) -> dict[str, Any]:
    """The last `eval` event of a run; of `split`, by default test if there is one, else any. `ConfigError` without one."""
    file = run / "metrics.jsonl"
    with storage.named(run):
        if not storage.is_file(file):
            raise ConfigError(f"{run}: no metrics.jsonl, so no run folder; name the run_dir of rec.train")
        lines = file.read_text(encoding="utf-8").splitlines()
    evaluated: dict[str, Any] = {}
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError:  # a killed run leaves half a line
            print(f"{file}: line {number} is no JSON, passed over", file=sys.stderr)
            continue
        if event["event"] == "eval":
            evaluated.pop(event["split"], None)  # so that the newest is the last
            evaluated[event["split"]] = event
    chosen = split or ("test" if "test" in evaluated else next(reversed(evaluated), "test"))
    if chosen not in evaluated:
        fix = f"make one: torchrun --standalone --nproc-per-node 1 -m rec.evaluate run_dir={run} split={chosen}"
        raise ConfigError(f"{run}: no evaluation of split '{chosen}'; {nearest(chosen, evaluated)}; or {fix}")
    return evaluated[chosen]


def read_baseline(file: Path) -> Lines:
    """Task -> metrics, as `python -m rec.baseline --json FILE` writes them; `ConfigError` where it does not hold that."""
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        return {task: {"auc": values["auc"], "rows": values["rows"]} for task, values in scores.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--baseline {file}: {error!r}; make it with rec.baseline --json {file}") from error


def lines_of(event: dict[str, Any], *, domains: bool = False) -> Lines:
    """Metrics by line of the table: a line a task and, if asked and there are several, one a domain below it."""
    lines: Lines = {}
    for task, values in event["metrics"].items():
        lines[task] = values
        if domains and len(event["domains"][task]) > 1:
            lines |= {f"{task} / {domain}": inner for domain, inner in event["domains"][task].items()}
    return lines


def check_alike(runs: Sequence[Path], events: Sequence[dict[str, Any]]) -> None:
    """Raise `ConfigError` where a run was evaluated on another split, or has other tasks, than the first."""
    found = [f"split '{event['split']}' for {', '.join(sorted(event['metrics']))}" for event in events]
    for run, measured in zip(runs, found, strict=True):
        if measured != found[0]:
            fix = "choose one --split, and runs of one data set"
            raise ConfigError(f"{run} was evaluated on {measured}; {runs[0]} on {found[0]}; {fix}")


def make_table(runs: Sequence[Lines], baselines: Sequence[Lines]) -> list[list[str]]:
    """Cells of the table, its head first. Columns in which no line has a value are left out."""
    shown = [column for column in COLUMNS if any(m.get(column) is not None for lines in runs for m in lines.values())]
    table = [["task", *shown, *(["baseline auc", "difference"] if baselines else [])]]
    for name in dict.fromkeys(name for lines in runs for name in lines):
        values = {column: [lines.get(name, {}).get(column) for lines in runs] for column in (*shown, "auc")}
        theirs = [lines.get(name, {}).get("auc") for lines in baselines]
        compared = [cell(theirs), difference(values["auc"], theirs)] if baselines else []
        table.append([name, *(cell(values[column]) for column in shown), *compared])
    return table


def group_table(groups: dict[str, Sequence[Lines]], *, main: str, metric: str = "auc") -> list[list[str]]:
    """Cells of a table of groups of runs, its head first: of the main task the best run and the mean, of others mean and at the best.

    As the MMoE paper reports its census study (Ma et al., KDD 2018, tables 1 and 2).

    Args:
        groups: name -> runs.
        main: the task that says which run is best.
        metric: one of `COLUMNS`; higher is better.

    Raises:
        ConfigError: a run without the main task or without its metric.
    """
    others = list(dict.fromkeys(task for runs in groups.values() for lines in runs for task in lines if task != main))
    head = ["", f"{main}, best", "mean", *(cell for task in others for cell in (f"{task}, mean", "at the best"))]
    table = [head]
    for name, runs in groups.items():
        found = [lines.get(main, {}).get(metric) for lines in runs]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            raise ConfigError(f"a run of group '{name}' has no {metric} of task '{main}'; {nearest(main, runs[0])}")
        best = values.index(max(values))
        row = [name, cell([values[best]]), cell(values)]
        for task in others:
            theirs = [lines.get(task, {}).get(metric) for lines in runs]
            row += [cell(theirs), cell([theirs[best]])]
        table.append(row)
    return table


def cell(values: Sequence[float | None]) -> str:
    """Mean and, from two on, sample standard deviation of the values with a meaning; over how many, if not all.

    >>> cell([0.7, 0.72]), cell([0.5, None]), cell([None])
    ('0.7100 ± 0.0141', '0.5000 (n = 1)', '-')
    """
    known = [value for value in values if value is not None]
    spread = f" ± {stdev(known):.4f}" if len(known) > 1 else ""
    fewer = f" (n = {len(known)})" if len(known) < len(values) else ""
    return f"{mean(known):.4f}{spread}{fewer}" if known else "-"


def difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> str:
    """Difference of the means of the values with a meaning."""
    known = [[value for value in values if value is not None] for values in (ours, theirs)]
    return f"{mean(known[0]) - mean(known[1]):+.4f}" if all(known) else "-"


def caption(runs: Sequence[Path], events: Sequence[dict[str, Any]], baselines: Sequence[Lines]) -> str:
    """What the table shows, over how many runs, and of which tasks not all were measured on the first run's rows."""
    steps = " or ".join(f"{step:,}" for step in sorted({event["step"] for event in events}))
    over = f"; mean ± sample standard deviation over n = {len(runs)} runs" if len(runs) > 1 else f", {runs[0]}"
    trees = f"; baseline: n = {len(baselines)}" if baselines else ""
    rows = [{t: m["rows"] for t, m in lines.items()} for lines in (*(e["metrics"] for e in events), *baselines)]
    unlike = [task for task in rows[0] if len({count[task] for count in rows if task in count}) > 1]
    note = f"\nNot all were measured on the same number of rows: {', '.join(unlike)}." if unlike else ""
    return f"Split {events[0]['split']} after {steps} steps{over}{trees}.{note}"


def as_text(table: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """The cells, aligned for a terminal or as a Markdown table."""
    if markdown:
        rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
        return "\n".join([rows[0], "|:--" + "|--:" * (len(table[0]) - 1) + "|", *rows[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    form = "  ".join([f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])])
    return "\n".join(form.format(*row) for row in table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    about = "Print what runs reached on a split: a line a task, mean and standard deviation over runs."
    p = argparse.ArgumentParser(prog="python -m rec.report", description=about)
    p.add_argument("runs", nargs="*", metavar="RUN", help="folder of a run, the run_dir of rec.train")
    p.add_argument(
        "--group", nargs="+", action="append", default=[], metavar=("NAME", "RUN"), help="several seeds of one setting"
    )
    p.add_argument("--main", metavar="TASK", help="with --group: the task whose AUC says which run is best")
    p.add_argument("--split", help="default: test if it was evaluated, else the last that was")
    p.add_argument("--baseline", action="append", default=[], metavar="FILE", help="of rec.baseline --json")
    p.add_argument("--markdown", action="store_true", help="print a Markdown table")
    p.add_argument("--domains", action="store_true", help="also a line for each domain")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_intermixed_args(argv)
    try:
        if args.group:
            return print(_grouped(args))
        if not args.runs:
            raise ConfigError("no run is named; expected folders of runs, or --group NAME RUN ... --main TASK")
        runs = [storage.path(run) for run in args.runs]
        events = [read_evaluation(run, split=args.split) for run in runs]
        check_alike(runs, events)
        baselines = [read_baseline(storage.path(file)) for file in args.baseline]
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    table = make_table([lines_of(event, domains=args.domains) for event in events], baselines)
    print(caption(runs, events, baselines), as_text(table, markdown=args.markdown), sep="\n\n")


def _grouped(args: argparse.Namespace) -> str:
    """The table of groups, and what it shows."""
    if args.runs or not args.main:
        raise ConfigError("--group NAME RUN ... needs --main TASK, and every run belongs to a group")
    groups: dict[str, Sequence[Lines]] = {}
    counts = set()
    for name, *named in args.group:
        runs = [storage.path(run) for run in named]
        events = [read_evaluation(run, split=args.split) for run in runs]
        check_alike(runs, events)
        groups[name] = [lines_of(event, domains=False) for event in events]
        counts.add(len(runs))
    over = " or ".join(map(str, sorted(counts)))
    said = f"AUC on {events[0]['split']}: best of {over} runs, mean ± sample standard deviation; best by {args.main}."
    return f"{said}\n\n{as_text(group_table(groups, main=args.main), markdown=args.markdown)}"


if __name__ == "__main__":
    main()

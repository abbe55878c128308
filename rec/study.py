"""Published claims, tried in small worlds with known probabilities: `python -m rec.study NAME`.

`rec/claims.py` holds the studies. Each trains some networks (its arms) in several worlds, on batches made in memory. In a
world all arms see the same rows and start from the same seed, so they are compared in pairs, world by world: the worlds
differ from each other ten times as much as the arms do.

  the MMoE paper (Ma et al., KDD 2018) and Etsy
    experts       shared bottom, OMoE, MMoE and mixed experts with as many parameters *
    collapse      gates that start collapsed: temperature against expert dropout
    auxiliary     a third task that is akin to purchases, unrelated or opposed *
    platt         a model that does not know placements: no calibration, one Platt scaling, one a placement
    mmoe_paper    the synthetic regressions of the MMoE paper, of cosine p

  Taobao's channel "Lying Flat"
    linear        linear features in the deep part, by the five routes beside it, or nowhere *
    history       mean, DIN and a transformer, where a history matters by the candidate and where it does not
    hops          three hops, each learned where the one before took place, or as products on all rows *
    loss_weight   the weight of the second hop, from .1 to 10: what one hop gains and the other loses *
    depth         five layers against three *

  AppS
    fm            factorisation machines beside a deep network, with and without a linear part *
    entire_space  clicked rows alone, all rows, products (ESMM) and debiased losses (ESCM2): later hops without a click *

  Pinterest's MTMD (AdKDD 2025)
    domains       one network of all domains, of several kinds, against one each
    alignment     a loss that holds predictions to the teacher's, by its weight
    unseen_domain a domain that training left out: as it is, and added

* also with --sparse, on few rows, seen several times.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rec import claims, claims_domains, claims_features
from rec.arms import Lines, build, num_parameters, run_arm
from rec.intervals import paired_t
from rec.report import as_text, cell
from rec.schema import ConfigError, check_range

STUDIES = claims.STUDIES | claims_features.STUDIES | claims_domains.STUDIES
SPARSE = [name.removesuffix("_sparse") for name in STUDIES if name.endswith("_sparse")]


@dataclass(frozen=True)
class Job:
    """One arm in one world."""

    study: str
    arm: str
    world: int
    steps: int


@dataclass
class Result:
    """What a study found: line -> measure -> a value a world, in the order of the worlds."""

    study: str
    steps: int
    num_worlds: int
    seconds: float = 0.0
    parameters: dict[str, int] = field(default_factory=dict)  # of every arm
    lines: dict[str, dict[str, list[float]]] = field(default_factory=dict)


def run_job(job: Job) -> Lines:
    """Train the arm and score it: line -> measure -> value."""
    return run_arm(STUDIES[job.study], job.arm, world=job.world, steps=job.steps)


def run_study(name: str, *, num_worlds: int | None = None, steps: int | None = None, processes: int = 1) -> Result:
    """Run the study `name` of `STUDIES`; its own numbers by default. With one process, in this one."""
    study, start = STUDIES[name], time.perf_counter()
    arms = study.arms()
    result = Result(name, steps or study.steps, num_worlds or study.num_worlds)
    result.parameters = {arm: num_parameters(build(of, of.world(0))) for arm, of in arms.items()}
    jobs = [Job(name, arm, world, result.steps) for world in range(result.num_worlds) for arm in arms]
    found = dict(_run_jobs(jobs, processes))
    for job in sorted(jobs, key=lambda job: list(arms).index(job.arm)):
        for line, scores in found[job].items():
            for measure, value in scores.items():
                result.lines.setdefault(line, {}).setdefault(measure, []).append(value)
    result.seconds = time.perf_counter() - start
    return result


def _run_jobs(jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Lines]]:
    if processes == 1:
        yield from ((job, run_job(job)) for job in tqdm(jobs, unit="job", disable=None))
        return
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit torch's locks without its threads
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(run_job, job): job for job in jobs}
        try:
            for future in tqdm(as_completed(futures), total=len(jobs), unit="job", disable=None):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error in one job the others do not start


# ---- a table


def make_table(result: Result) -> list[list[str]]:
    """Cells, the head first: means and deviations, and of the compared measures paired differences with 95 % intervals."""
    study = STUDIES[result.study]
    measures = list(dict.fromkeys(m for scores in result.lines.values() for m in scores))
    table = [[""]]
    for measure in measures:
        extra = ["lowest"] * study.lowest + ["difference", "better"] if measure in study.compared else []
        table[0] += [measure, *extra]
    references: dict[str, str] = {}
    for line in result.lines:
        reference = references.setdefault(line.rpartition(" / ")[0], line)
        table.append([line, *(c for m in measures for c in _cells(result, line, reference, m))])
    return table


def _cells(result: Result, line: str, reference: str, measure: str) -> list[str]:
    study, values = STUDIES[result.study], result.lines[line].get(measure, [])
    if measure not in study.compared:
        return [f"{np.mean(values):.3f}" if values else "-"]
    lowest = [f"{min(values):.4f}"] * study.lowest
    if line == reference:
        return [cell(values), *lowest, "", ""]
    differences = np.subtract(values, result.lines[reference][measure])
    interval = paired_t(differences.tolist())
    spread = f" [{interval.low:+.4f}, {interval.high:+.4f}]" if interval else ""
    better = int((differences < 0 if measure in study.lower_is_better else differences > 0).sum())
    return [cell(values), *lowest, f"{differences.mean():+.4f}{spread}", f"{better} of {len(values)}"]


def caption(result: Result) -> str:
    """What the table shows."""
    study = STUDIES[result.study]
    rows = f"rows out of the same {study.train_rows:,}" if study.train_rows else "fresh rows"
    worlds = f"{result.num_worlds} world{'s' * (result.num_worlds > 1)}"
    sizes = ", ".join(f"{name} {num:,}" for name, num in result.parameters.items())
    return (
        f"{result.study}: mean ± sample standard deviation over {worlds} after {result.steps:,} steps of"
        f" {study.batch_size:,} {rows}; difference to the first line of the group in the same world, with its 95 % interval.\n"
        f"Parameters: {sizes}. {result.seconds:.0f} seconds."
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, studies = (__doc__ or "").partition("\n\n")
    p = argparse.ArgumentParser(
        prog="python -m rec.study",
        description=summary,
        epilog=studies,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("study", choices=[name for name in STUDIES if not name.endswith("_sparse")])
    p.add_argument("--sparse", action="store_true", help=f"few rows, seen several times: {', '.join(SPARSE)}")
    p.add_argument("--worlds", type=int, help="how many; default: the study's own")
    p.add_argument("--steps", type=int, help="of training; default: the study's")
    p.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1), help="that share the jobs; default 2")
    p.add_argument("--json", type=Path, metavar="FILE", help="write every value")
    p.add_argument("--markdown", action="store_true", help="print a Markdown table")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    args = parser().parse_args(argv)
    try:
        if args.sparse and args.study not in SPARSE:
            raise ConfigError(f"--sparse belongs to {', '.join(SPARSE)}, not to {args.study}; leave it out")
        for name in ("worlds", "steps", "processes"):
            check_range(f"--{name}", getattr(args, name), 1, 1_000_000)
        if args.json and not args.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {args.json}: its folder does not exist; make it first")
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from error
    torch.set_num_threads(1)
    name = f"{args.study}_sparse" if args.sparse else args.study
    result = run_study(name, num_worlds=args.worlds, steps=args.steps, processes=args.processes)
    print(caption(result), as_text(make_table(result), markdown=args.markdown), sep="\n\n")
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

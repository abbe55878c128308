"""Sweeps: a torchrun job for every combination of comma-separated values, one after another, each in its own folder."""

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import product
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from rec.schema import ConfigError


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of swept values, with Hydra's grammar: `a=1,2`, `b=range(1,3)`, `c=choice(x,y)`.

    >>> expand(["seed=1,2", "experts=mmoe"])
    [['seed=1', 'experts=mmoe'], ['seed=2', 'experts=mmoe']]

    Raises:
        ConfigError: overrides outside the grammar, or a sweep without a list of values (`glob`, `interval`).
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {error}") from error
    return [list(job) for job in product(*map(_values, parsed))]


def _values(override: Override) -> list[str]:
    """The overrides that one stands for: itself, as it was written, unless it is swept."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    try:
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ConfigError(
            f"'{override.input_line}' cannot be swept ({error}); list the values: {override.key_or_group}=a,b"
        ) from error


def sweep(overrides: Sequence[str], *, config_dir: str | None = None) -> None:
    """Check every job's configuration, then run them; ranks a job: NPROC, or one a GPU, or 2.

    Raises:
        ConfigError: some job's configuration cannot be run (none is started), or a job failed (the others ran).
    """
    from rec.config import compose

    if "RANK" in os.environ:
        raise ConfigError(
            "--multirun starts torchrun itself: run `python -m rec.train --multirun ...` without torchrun"
        )
    folder = Path(
        next(
            (o.partition("=")[2] for o in overrides if o.startswith("run_dir=")),
            f"runs/sweep_{datetime.now():%Y-%m-%d_%H-%M-%S}",
        )
    )
    jobs = expand([o for o in overrides if not o.startswith("run_dir=")])
    jobs = [[*job, f"run_dir={folder / str(number)}"] for number, job in enumerate(jobs)]
    for job in jobs:
        try:
            compose(job, config_dir=config_dir)
        except ConfigError as error:
            raise ConfigError(f"no job was started, for one cannot be run: {' '.join(job)}: {error}") from error
    extra = ["--config-dir", config_dir] if config_dir else []
    failed = []
    for number, job in enumerate(jobs):
        print(f"[{number + 1}/{len(jobs)}] {' '.join(job)}", flush=True)
        code = subprocess.run([*torchrun(), "-m", "rec.train", *extra, *job]).returncode
        failed += [str(folder / str(number))] if code else []
    if failed:
        raise ConfigError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")


def torchrun() -> list[str]:
    """The command that starts one job's ranks on this host."""
    ranks = os.environ.get("NPROC") or str(torch.cuda.device_count() or 2)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]

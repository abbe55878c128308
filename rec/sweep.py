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
from hydra.errors import HydraException

from rec.schema import ConfigError


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of swept values, with Hydra's grammar: `a=1,2`, `b=range(1,3)`, `c=choice(x,y)`, `d=glob(*)` not.

    >>> expand(["seed=1,2", "experts=mmoe"])
    [['seed=1', 'experts=mmoe'], ['seed=2', 'experts=mmoe']]
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {error}") from error
    choices = []
    for override in parsed:
        key = override.get_key_element()
        values = (
            override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        )
        choices.append([f"{key}={value}" for value in values])
    return [list(job) for job in product(*choices)]


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
    for job in jobs:
        compose(job, config_dir=config_dir)
    extra = ["--config-dir", config_dir] if config_dir else []
    failed = []
    for number, job in enumerate(jobs):
        run_dir = folder / str(number)
        print(f"[{number + 1}/{len(jobs)}] {' '.join(job)} run_dir={run_dir}", flush=True)
        code = subprocess.run([*torchrun(), "-m", "rec.train", *extra, *job, f"run_dir={run_dir}"]).returncode
        failed += [str(run_dir)] if code else []
    if failed:
        raise ConfigError(f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}")


def torchrun() -> list[str]:
    """The command that starts one job's ranks on this host."""
    ranks = os.environ.get("NPROC") or str(torch.cuda.device_count() or 2)
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]

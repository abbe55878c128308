"""Trains jobs one after the other under torch's elastic agent, restarting ranks that die: `elastic_worker.py JSON`.

A job is {"ranks": N, "restarts": N, "folder": DIR, "overrides": [...], "hook": [RANK, METHOD, COUNT, WHAT]}; the
last has something happen to a rank when it comes to a method of the trainer for the COUNT-th time in its first life: terminate (SIGTERM),
freeze (SIGSTOP), stand_still or block (for some seconds), fail. This is what torchrun does, but ranks are forked from a process that
has imported everything, so that a start takes a second. Each rank leaves its process id in DIR/pids/ATTEMPT-RANK, and appends to
DIR/rows-RANK.txt a line a step that it learns from: the step, then the rows.
"""

import ctypes
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from rec.config import Config, compose
from rec.distributed import run_entry
from rec.features import Batch
from rec.train import run
from rec.trainer import Trainer


def keep_account(folder: Path) -> None:
    rank, attempt = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / "pids" / f"{attempt}-{rank}").write_text(str(os.getpid()))
    ledger = (folder / f"rows-{rank}.txt").open("a", buffering=1)
    learn = Trainer.train_step

    def train_step(trainer: Trainer, batch: Batch) -> bool:
        rows = batch.row_id[: batch.num_rows].tolist()
        ledger.write(" ".join(map(str, [trainer.info.step, *rows])) + "\n")
        return learn(trainer, batch)

    Trainer.train_step = train_step


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def freeze() -> None:
    subprocess.Popen(["sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def stand_still() -> None:
    time.sleep(9)


def block() -> None:
    ctypes.PyDLL(None).sleep(9)  # unlike time.sleep it keeps all other threads from running


def fail() -> None:
    raise RuntimeError("the disk is on fire")


WHAT = {f.__name__: f for f in (terminate, freeze, stand_still, block, fail)}


def hook(rank: int, name: str, count: int, what: str) -> None:
    if os.environ["RANK"] != str(rank) or os.environ["TORCHELASTIC_RESTART_COUNT"] != "0":
        return
    method, calls = getattr(Trainer, name), itertools.count(1)

    def called(trainer: Trainer, *rest: object) -> object:
        if next(calls) == count:
            WHAT[what]()
        return method(trainer, *rest)

    setattr(Trainer, name, called)


def rank_main(config: Config, folder: Path, hooked: list | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork has the agent's
    keep_account(folder)
    if hooked:
        hook(*hooked)
    run_entry(lambda: run(config))


def one_machine(ranks: int, *, restarts: int = 0) -> LaunchConfig:
    """What torchrun makes of `--standalone --nproc-per-node RANKS --max-restarts RESTARTS`, but that ranks are forked."""
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.05,
        start_method="fork",
    )


def launch(job: dict) -> None:
    folder = Path(job["folder"])
    (folder / "pids").mkdir(parents=True, exist_ok=True)
    config = compose([*job["overrides"], f"run_dir={folder}/run"], config_dir="tests/conf")
    agent = one_machine(job["ranks"], restarts=job.get("restarts", 0))
    elastic_launch(agent, rank_main)(config, folder, job.get("hook"))


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        launch(one)

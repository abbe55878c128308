"""Runs with something wrong in the middle, on two ranks: `torchrun ... trouble_worker.py DATA FOLDER`. Prints what came of each as JSON."""

import json
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from rec.config import compose
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.train import train
from rec.trainer import Trainer
from tests.conftest import toy_overrides

LAST = ["trainer.max_steps=9", "trainer.log_every_steps=1", "trainer.eval_split=null"]


@contextmanager
def at_step(number: int, spoil, *, rank: int):
    """Have `spoil(batch)` done to the batch of a step, on one rank."""
    make = Reader._batch

    def spoilt(reader: Reader, step: int, *rest: object):
        batch = make(reader, step, *rest)
        if step == number and dist.get_rank() == rank:
            spoil(batch)
        return batch

    Reader._batch = spoilt
    try:
        yield
    finally:
        Reader._batch = make


def overflow(batch) -> None:
    batch.dense[0, 0] = 3e38  # finite, as the reader demands


def impossible(batch) -> None:
    batch.labels[:, 2] = 1e6  # a regression's: its loss becomes a trillion


@contextmanager
def nan_in_table(rank: Rank):
    """Every fifth row of rank 1's part of a table is spoilt before the fourth step."""
    learn = Trainer.train_step

    def spoilt(trainer: Trainer, batch) -> bool:
        if trainer.info.step == 3 and rank.rank == 1:
            table = trainer.model.module.embeddings.state_dict()["tables.embedding_bags.item.weight"]
            table.local_shards()[0].tensor[::5] = float("nan")
        return learn(trainer, batch)

    Trainer.train_step = spoilt
    try:
        yield
    finally:
        Trainer.train_step = learn


def outcome(data: Path, folder: Path, name: str, rank: Rank, *more: str) -> str:
    config = compose(toy_overrides(data, f"run_dir={folder}/{name}", *LAST, *more), config_dir="tests/conf")
    try:
        train(config, rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "trained"


def main() -> None:
    data, folder = map(Path, sys.argv[1:])
    with process_group(timeout_s=60) as rank:
        said = {}
        with at_step(4, overflow, rank=1):
            said["stop"] = outcome(data, folder, "stop", rank)
            said["skip"] = outcome(data, folder, "skip", rank, "trainer.guard.not_finite=skip")
        with at_step(7, impossible, rank=0):
            spike = ["trainer.guard.spike_factor=50", "trainer.guard.spike_window=10"]
            said["spike"] = outcome(data, folder, "spike", rank, *spike)
            said["no_spike"] = outcome(data, folder, "no_spike", rank, *spike, "trainer.guard.spike_factor=null")
        with nan_in_table(rank):
            said["table"] = outcome(data, folder, "table", rank, "sharding.default=row_wise")
        every = [None] * rank.world_size
        dist.all_gather_object(every, said)
        if rank.is_main:
            print("SAID " + json.dumps(every))


if __name__ == "__main__":
    run_entry(main)

"""Every experiment, small, in one process group: `torchrun ... experiments_worker.py CONFIGS`, a pickled list of them.

Compared with the one-device network, trained, then cut back to its checkpoint of step `CUT` and gone on with.
"""

import pickle
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from rec.config import Config, compose
from rec.distributed import Rank, process_group, run_entry
from rec.train import train
from tests.workers.sharding_worker import compare

NUM_STEPS, CUT, BATCH = 4, 2, 35  # of two ranks, one serves 17 rows of a step and the other 18
MAX_IDS = 300  # rows of a table


def small(name: str, folder: Path) -> Config:
    """The experiment as it is, but for `NUM_STEPS` steps and on tables of at most `MAX_IDS` rows; its data and run in `folder`."""
    config = compose(
        [
            f"experiment={name}",
            f"data.path={folder}/data/{name}",
            f"run_dir={folder}/{name}",
            f"reader.global_batch_size={BATCH}",
            "trainer.num_epochs=2",
            f"trainer.max_steps={NUM_STEPS}",
            "trainer.log_every_steps=1",
            f"checkpoint.every_steps={CUT}",
            # Adam and Adagrad divide by what is nearly zero in rows seen once: keep that from magnifying rounding
            "optim.sparse.eps=1e-3",
            "optim.dense.eps=1e-3",
        ]
    )
    for table in config.data.tables.values():
        table.num_embeddings = min(table.num_embeddings, MAX_IDS)
    return config


def train_and_resume(config: Config, rank: Rank) -> None:
    """Move the last checkpoint of a run that went through to whole/, and leave in its place that of one resumed at step `CUT`."""
    train(config, rank)
    run_dir = Path(str(config.run_dir))
    if rank.is_main:
        whole = run_dir / "whole" / "checkpoints"
        whole.mkdir(parents=True)
        shutil.move(run_dir / "checkpoints" / f"step_{NUM_STEPS:09d}", whole)
    dist.barrier()
    train(replace(config, trainer=replace(config.trainer, eval_split=None)), rank)


def check(config: Config, rank: Rank) -> None:
    try:
        compare(config, rank)
        train_and_resume(config, rank)
    except Exception as error:
        error.add_note(f"in {config.run_dir}")
        raise


def main() -> None:
    with process_group(timeout_s=60) as rank:
        for config in pickle.loads(Path(sys.argv[1]).read_bytes()):
            check(config, rank)


if __name__ == "__main__":
    run_entry(main)

"""Every experiment, small, in one process group: `torchrun ... experiments_worker.py CONFIGS`, a pickled list of them.

Compared with the one-device network, trained, and trained again from the checkpoint of step `CUT`.
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


def resumed(config: Config) -> str:
    """Folder of the run that goes on from step `CUT` of the run that `config` describes."""
    return f"{config.run_dir}-resumed"


def train_and_resume(config: Config, rank: Rank) -> None:
    """Train, and go on from step `CUT` in a folder beside that of the run."""
    train(config, rank)
    again = replace(config, run_dir=resumed(config), trainer=replace(config.trainer, eval_split=None))
    if rank.is_main:
        kept = f"checkpoints/step_{CUT:09d}"
        shutil.copytree(f"{config.run_dir}/{kept}", f"{again.run_dir}/{kept}")
    dist.barrier()
    train(again, rank)


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

"""Every experiment, small, in one process group: `torchrun ... experiments_worker.py FOLDER NAME...`.

Compared with the one-device network, trained, then cut back to its first checkpoint and gone on with.
"""

import shutil
import sys
from pathlib import Path

import torch.distributed as dist

from rec.config import Config, compose
from rec.distributed import Rank, process_group, run_entry
from rec.train import train
from tests.workers.sharding_worker import compare

NUM_STEPS, CUT, BATCH = 4, 2, 35  # ranks of a pair serve 17 and 18 rows of a step
MAX_IDS = 300  # rows of a table


def small(name: str, data: Path, run_dir: Path) -> Config:
    """The experiment as it is, on tables of at most `MAX_IDS` rows and for `NUM_STEPS` steps, with `CUT` steps kept."""
    config = compose(
        [
            f"experiment={name}",
            f"data.path={data}",
            f"run_dir={run_dir}",
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
    """Leave the last checkpoint of a run that went through in `whole`, and of one that went on from step `CUT` in its place."""
    train(config, rank)
    run_dir = Path(str(config.run_dir))
    if rank.is_main:
        (run_dir / "whole").mkdir()
        last = f"step_{NUM_STEPS:09d}"
        shutil.move(run_dir / "checkpoints" / last, run_dir / "whole" / "checkpoints" / last)
    dist.barrier()
    train(config, rank)


def check(name: str, folder: Path, rank: Rank) -> None:
    try:
        config = small(name, folder / "data" / name, folder / name)
        compare(config, rank)
        train_and_resume(config, rank)
    except Exception as error:
        error.add_note(f"in experiment={name}")
        raise


def main() -> None:
    with process_group(timeout_s=60) as rank:
        for name in sys.argv[2:]:
            check(name, Path(sys.argv[1]), rank)


if __name__ == "__main__":
    run_entry(main)

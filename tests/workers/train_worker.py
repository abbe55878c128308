"""Trains several configurations in one process group: `torchrun ... train_worker.py JSON`, a list of lists of overrides."""

import json
import sys

from rec.config import compose
from rec.distributed import process_group, run_entry
from rec.train import train


def main() -> None:
    with process_group(timeout_s=60) as rank:
        for overrides in json.loads(sys.argv[1]):
            train(compose(overrides, config_dir="tests/conf"), rank)


if __name__ == "__main__":
    run_entry(main)

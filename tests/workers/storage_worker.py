"""Trains and evaluates in one process group: `torchrun ... storage_worker.py JSON`, a list of steps.

A step is a list of overrides, which trains, or a dict with the arguments of one of the commands: {"evaluate": ["run_dir=DIR"]}.
"""

import json
import sys

from rec import calibrate, evaluate, predict
from rec.config import compose
from rec.distributed import Rank, process_group, run_entry
from rec.train import train


def run(step: list[str] | dict[str, list[str]], rank: Rank) -> None:
    if isinstance(step, list):
        train(compose(step, config_dir="tests/conf"), rank)
        return
    ((name, arguments),) = step.items()
    module = {"evaluate": evaluate, "predict": predict, "calibrate": calibrate}[name]
    command = module.command_of(arguments)
    if name == "evaluate":
        evaluate.evaluate_run(command, command.config(), rank)
    elif name == "predict":
        predict.predict_run(command, command.config(), rank)
    else:
        calibrate.calibrate(command.config(), rank, command=command, settings=calibrate.settings_of(command))


def main() -> None:
    with process_group(timeout_s=60) as rank:
        for step in json.loads(sys.argv[1]):
            run(step, rank)


if __name__ == "__main__":
    run_entry(main)

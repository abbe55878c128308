"""Write every row's predictions as Parquet. `torchrun --standalone --nproc-per-node 2 -m rec.predict run_dir=DIR`"""

import sys
from collections.abc import Sequence

from rec import storage
from rec.config import Config
from rec.distributed import Rank, process_group, run_entry
from rec.evaluate import Command, calibrators_of, find_checkpoint, restore, split_reader, wants_help
from rec.features import DataError
from rec.predictions import About, PredictionWriter, predict
from rec.schema import ConfigError

ABOUT = """Write every row's predictions of a run's checkpoint as Parquet, a file a rank; auxiliary tasks are left out.

    torchrun --standalone --nproc-per-node 2 -m rec.predict run_dir=DIR [split=test] [out=DIR] [labels=false] [key=value ...]

split        one of the data set's splits; default test
checkpoint   latest, best, or a step
out          folder for the files, replaced as a whole; default DIR/predictions/<split> of the run
labels       false leaves out labels, weights and true probabilities, and the files need not have them; default true
calibrated   false leaves out the calibrators that rec.calibrate kept with the checkpoint; default: they are applied
key=value    changes the run's configuration, e.g. data.path=DIR

rec/predictions.py says what the columns are."""


def predict_run(command: Command, config: Config, rank: Rank) -> None:
    """A split through a checkpoint's network, into files."""
    data, split, labels = config.data, command.own["split"], command.flag("labels")
    folder = storage.path(command.own["out"] or command.run_dir / "predictions" / split)
    reader = split_reader(config, rank, split, labels=labels)
    path = find_checkpoint(config, command.run_dir, command.own["checkpoint"])
    calibrators = calibrators_of(path, data, rank, wanted=command.own["calibrated"])
    restored = restore(config, rank, path, local_batch_size=reader.local_batch_size)
    about = About(
        step=restored.info.step, split=split, calibrated=calibrators is not None, labels=labels, auxiliary=False
    )
    with PredictionWriter(folder, data=data, rank=rank, about=about) as writer:
        for predicted in predict(restored.model, reader, device=rank.device, calibrators=calibrators):
            writer.write(predicted.batch, predicted.logits)
    if rank.is_main:
        state = f"calibrated on {calibrators.fitted_on_.split}" if calibrators else "not calibrated"
        print(f"{path.name} on {split}, {reader.num_rows:,} rows, {state}: {folder}", flush=True)


def command_of(arguments: Sequence[str]) -> Command:
    """The command line of a prediction, its own values checked."""
    defaults = {"split": "test", "checkpoint": "latest", "out": "", "labels": "true", "calibrated": "auto"}
    command = Command.parse(arguments, defaults=defaults, purpose="predict with")
    command.flag("labels")
    return command


def run(arguments: list[str]) -> None:
    """Read the run's configuration, join the ranks, predict."""
    if wants_help(arguments):
        print(ABOUT)
        return
    command = command_of(arguments)
    config = command.config()
    with process_group(timeout_s=config.trainer.timeout_s) as rank:
        predict_run(command, config, rank)


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()

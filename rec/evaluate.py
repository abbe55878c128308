"""Evaluate a run's checkpoint on a split. `torchrun --standalone --nproc-per-node 2 -m rec.evaluate run_dir=DIR`"""

import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn

from rec import config as configuration
from rec import storage
from rec.calibration import FILE, Calibrators
from rec.checkpoint import Checkpoints, Info
from rec.config import Config
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.evaluation import evaluate
from rec.features import DataError
from rec.health import ExpertHealth, advice, table_of_health
from rec.logs import RunLog, table_of
from rec.metrics import MultitaskMetrics
from rec.mixtures import GatedConfig
from rec.predictions import About, PredictionWriter
from rec.schema import ConfigError, DataConfig
from rec.train import build_model

ABOUT = """Evaluate a run's checkpoint on a split: prints a table and appends an `eval` event to the run's metrics.jsonl.

    torchrun --standalone --nproc-per-node 2 -m rec.evaluate run_dir=DIR [split=test] [checkpoint=latest] [key=value ...]

split        one of the data set's splits; default test
checkpoint   latest, best, or a step
calibrated   false leaves out the calibrators that rec.calibrate kept with the checkpoint; default: they are applied
predictions  true also writes every row's predictions to DIR/predictions/<split>, which replaces those that are there
key=value    changes the run's configuration, e.g. data.path=DIR or metrics.exact=true"""


@dataclass
class Command:
    """What a command line asks for: a run, the values of the command's own names, changes of the run's configuration."""

    run_dir: Path
    own: dict[str, str]
    changes: list[str]

    @classmethod
    def parse(cls, arguments: Sequence[str], *, defaults: dict[str, str], purpose: str) -> "Command":
        """Read `key=value` arguments; a name that is not in `defaults` belongs to the run's configuration.

        >>> Command.parse(["run_dir=runs/a", "split=valid", "seed=1"], defaults={"split": "test"}, purpose="evaluate")
        Command(run_dir=PosixPath('runs/a'), own={'split': 'valid'}, changes=['seed=1'])
        """
        for argument in arguments:
            if not re.match("[^=-][^=]*=", argument):
                raise ConfigError(f"'{argument}': expected key=value; --help says which")
        given = dict(argument.partition("=")[::2] for argument in arguments)
        if "run_dir" not in given:
            raise ConfigError(f"run_dir=DIR is missing: the folder of the run to {purpose}")
        run_dir, own = (
            storage.path(given.pop("run_dir")),
            {name: given.pop(name, value) for name, value in defaults.items()},
        )
        return cls(run_dir, own, [f"{key}={value}" for key, value in given.items()])

    def flag(self, name: str) -> bool:
        """The value of a name that is `true` or `false`."""
        if self.own[name] not in ("true", "false"):
            raise ConfigError(f"{name} is '{self.own[name]}', expected true or false")
        return self.own[name] == "true"

    def config(self) -> Config:
        """The run's configuration, changed as asked."""
        return configuration.load(self.run_dir / "config.yaml", self.changes)


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks what the command does."""
    return not arguments or bool({"-h", "--help"} & set(arguments))


def split_reader(config: Config, rank: Rank, split: str, *, labels: bool = True) -> Reader:
    """This rank's rows of a split, once and in evaluation mode."""
    ranks = {"rank": rank.rank, "world_size": rank.world_size}
    return Reader(config.data, config.reader, split=split, training=False, truth=labels, labels=labels, **ranks)


def find_checkpoint(config: Config, run_dir: Path, which: str) -> Path:
    """The folder of a run's checkpoint.

    Raises:
        ConfigError: there is none, or not that one.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    path = checkpoints.find(which)
    if path is None:
        raise ConfigError(f"no checkpoint in {checkpoints.folder}; train first: rec.train run_dir={run_dir}")
    return path


@dataclass
class Restored:
    """The sharded network of a checkpoint, and how far it was trained."""

    model: nn.Module
    info: Info


def restore(config: Config, rank: Rank, path: Path, *, local_batch_size: int) -> Restored:
    """The network of the checkpoint `path`, under whatever world size and plan this is. Ranks wait for each other here."""
    model, _ = build_model(config, rank, local_batch_size)
    state = {"model": model.state_dict()}
    info = Checkpoints(path.parent, config.checkpoint).load(path, state)
    model.load_state_dict(state["model"])
    return Restored(model, info)


def calibrators_of(path: Path, data: DataConfig, rank: Rank, *, wanted: str) -> Calibrators | None:
    """The calibrators kept with the checkpoint `path`; None if there are none or they are not `wanted` (true, false, auto).

    Raises:
        ConfigError: they are wanted and there are none, or they do not fit the tasks.
    """
    if wanted not in ("true", "false", "auto"):
        raise ConfigError(f"calibrated is '{wanted}', expected true or false, or nothing for what is there")
    found = None if wanted == "false" else Calibrators.load(path, data.tasks, domains=data.domains)
    if wanted == "true" and found is None:
        raise ConfigError(
            f"calibrated=true, and {path} has no {FILE}; fit calibrators first: rec.calibrate run_dir={path.parents[1]}"
        )
    return found.to(rank.device) if found else None


def evaluate_run(command: Command, config: Config, rank: Rank) -> None:
    """Load a checkpoint under whatever world size and plan this is, and measure it."""
    data, split = config.data, command.own["split"]
    reader = split_reader(config, rank, split)
    path = find_checkpoint(config, command.run_dir, command.own["checkpoint"])
    calibrators = calibrators_of(path, data, rank, wanted=command.own["calibrated"])
    restored = restore(config, rank, path, local_batch_size=reader.local_batch_size)
    info, calibrated = restored.info, calibrators is not None
    metrics = MultitaskMetrics(data.tasks, domains=data.domains, config=config.metrics, grouped=data.group is not None)
    about = About(step=info.step, split=split, calibrated=calibrated)
    folder = command.run_dir / "predictions" / split
    kept = PredictionWriter(folder, data=data, rank=rank, about=about) if command.flag("predictions") else nullcontext()
    gated = isinstance(config.model.experts, GatedConfig)
    health = ExpertHealth(list(data.tasks)).to(rank.device) if gated else None
    started = time.monotonic()
    with kept as predictions:
        result = evaluate(
            restored.model,
            reader,
            metrics.to(rank.device),
            device=rank.device,
            calibrators=calibrators,
            predictions=predictions,
            health=health,
        )
    experts = health.compute() if health else None
    log = RunLog(command.run_dir, active=rank.is_main)
    log.event(
        "eval",
        step=info.step,
        rows=info.rows,
        split=split,
        metrics=result.metrics,
        domains=result.domains,
        experts=asdict(experts) if experts else None,
        seconds=time.monotonic() - started,
        calibrated=calibrated,
    )
    state = f", calibrated on {calibrators.fitted_on_.split}," if calibrators else ""
    log.say(f"{path.name}{state} on {split}, {reader.num_rows:,} rows:\n{table_of(result, domains=True)}")
    if experts:
        log.say("\n".join(["", table_of_health(experts), *advice(experts)]))
    if predictions:
        log.say(f"predictions are in {folder}")
    log.close()


def command_of(arguments: Sequence[str]) -> Command:
    """The command line of an evaluation, its own values checked."""
    defaults = {"split": "test", "checkpoint": "latest", "calibrated": "auto", "predictions": "false"}
    command = Command.parse(arguments, defaults=defaults, purpose="evaluate")
    command.flag("predictions")
    return command


def run(arguments: list[str]) -> None:
    """Read the run's configuration, join the ranks, evaluate."""
    if wants_help(arguments):
        print(ABOUT)
        return
    command = command_of(arguments)
    config = command.config()
    with process_group(timeout_s=config.trainer.timeout_s) as rank:
        evaluate_run(command, config, rank)


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()

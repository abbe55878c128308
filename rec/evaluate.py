"""Evaluate a run's checkpoint on a split. `torchrun --standalone --nproc-per-node 2 -m rec.evaluate run_dir=DIR`"""

import re
import sys
import time
from pathlib import Path

from rec import config as configuration
from rec.checkpoint import Checkpoints
from rec.config import Config
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.features import DataError
from rec.logs import RunLog, table_of
from rec.metrics import MultitaskMetrics
from rec.schema import ConfigError
from rec.train import build_model
from rec.trainer import evaluate

ABOUT = """Evaluate a run's checkpoint on a split: prints a table and appends an `eval` event to the run's metrics.jsonl.

    torchrun --standalone --nproc-per-node 2 -m rec.evaluate run_dir=DIR [split=test] [checkpoint=latest] [key=value ...]

split        one of the data set's splits; default test
checkpoint   latest, best, or a step
key=value    changes the run's configuration, e.g. data.path=DIR or metrics.exact=true"""


def evaluate_run(config: Config, rank: Rank, *, run_dir: Path, split: str, which: str) -> None:
    """Load a checkpoint under whatever world size and plan this is, and measure it."""
    data = config.data
    reader = Reader(
        data, config.reader, split=split, rank=rank.rank, world_size=rank.world_size, training=False, truth=True
    )
    checkpoints = Checkpoints(run_dir / "checkpoints", config.checkpoint)
    path = checkpoints.find(which)
    if path is None:
        raise ConfigError(f"no checkpoint in {checkpoints.folder}; train first: rec.train run_dir={run_dir}")
    model, _ = build_model(config, rank, reader.local_batch_size)
    state = {"model": model.state_dict()}
    info = checkpoints.load(path, state)
    model.load_state_dict(state["model"])
    metrics = MultitaskMetrics(data.tasks, domains=data.domains, config=config.metrics, grouped=data.group is not None)
    started = time.monotonic()
    result = evaluate(model, reader, metrics.to(rank.device), device=rank.device)
    log = RunLog(run_dir, active=rank.is_main)
    seconds = time.monotonic() - started
    log.event(
        "eval",
        step=info.step,
        rows=info.rows,
        split=split,
        metrics=result.metrics,
        domains=result.domains,
        seconds=seconds,
    )
    log.say(f"{path.name} on {split}, {reader.num_rows:,} rows:\n{table_of(result, domains=True)}")
    log.close()


def run(arguments: list[str]) -> None:
    """Read the run's configuration, join the ranks, evaluate."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(ABOUT)
        return
    for argument in arguments:
        if not re.match("[^=-][^=]*=", argument):
            raise ConfigError(f"'{argument}': expected key=value; --help says which")
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if "run_dir" not in given:
        raise ConfigError("run_dir=DIR is missing: the folder of the run to evaluate")
    run_dir, split, which = Path(given.pop("run_dir")), given.pop("split", "test"), given.pop("checkpoint", "latest")
    config = configuration.load(run_dir / "config.yaml", [f"{key}={value}" for key, value in given.items()])
    with process_group(timeout_s=config.trainer.timeout_s) as rank:
        evaluate_run(config, rank, run_dir=run_dir, split=split, which=which)


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()

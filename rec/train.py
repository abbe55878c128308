"""Train a ranker. `torchrun --standalone --nproc-per-node 2 -m rec.train experiment=quickstart trainer.max_steps=100`"""

import json
import os
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from rec import config as configuration
from rec import storage
from rec.checkpoint import Checkpoints, Resume, SaveError
from rec.config import Config
from rec.data import Reader
from rec.distributed import Rank, from_main, process_group, run_entry
from rec.features import DataError
from rec.guard import TroubleError
from rec.health import ExpertHealth
from rec.interrupts import StoppedError, forget_stop, tell_launcher
from rec.logs import RunLog
from rec.metrics import MultitaskMetrics
from rec.mixtures import GatedConfig
from rec.model import Ranker
from rec.optim import Optimizers, freeze, set_own_rates
from rec.schema import ConfigError
from rec.sharding import describe_plan, shard
from rec.trainer import Trainer
from rec.warm_start import warm_start
from rec.weighting import TaskWeighting, build_weighting

ABOUT = """Train a multitask ranker, on one rank or under torchrun on many.

    torchrun --standalone --nproc-per-node 2 -m rec.train experiment=quickstart trainer.max_steps=100
    torchrun --standalone --nproc-per-node 2 -m rec.train data=kuairand data.path=DIR experts=mmoe seed=1
    python -m rec.train --multirun seed=0,1,2 optim.dense.lr=0.001,0.003"""


def build(config: Config, rank: Rank, log: RunLog) -> Trainer:
    """Readers, sharded model, optimizers and the loop around them. Ranks wait for each other here."""
    data = config.data
    ranks: dict[str, Any] = {"seed": config.seed, "rank": rank.rank, "world_size": rank.world_size}
    reader = Reader(data, config.reader, split="train", **ranks)
    eval_split = config.trainer.eval_split
    eval_reader = (
        Reader(data, config.reader, split=eval_split, training=False, truth=True, **ranks) if eval_split else None
    )
    if eval_reader:
        reader.check_like(eval_reader)
    weighting = build_weighting(config.weighting, data.tasks).to(rank.device)
    model, optimizers = build_model(config, rank, reader.local_batch_size, weighting=weighting)
    metrics = MultitaskMetrics(data.tasks, domains=data.domains, config=config.metrics, grouped=data.group is not None)
    run_dir = storage.path(config.run_dir or "")
    folder, plan = run_dir / "checkpoints", describe_plan(model)
    gated = config.model.experts if isinstance(config.model.experts, GatedConfig) else None
    return Trainer(
        config.trainer,
        rank=rank,
        model=model,
        optimizers=optimizers,
        weighting=weighting,
        balance_loss=gated.balance_loss if gated else 0.0,
        tasks=data.tasks,
        reader=reader,
        eval_reader=eval_reader,
        metrics=metrics.to(rank.device),
        health=ExpertHealth(list(data.tasks)).to(rank.device) if gated else None,
        checkpoints=Checkpoints(
            folder, config.checkpoint, settings=configuration.to_yaml(config), plan=json.dumps(plan)
        ),
        log=log,
        run_dir=run_dir,
    )


def build_model(
    config: Config, rank: Rank, local_batch_size: int, *, weighting: TaskWeighting | None = None
) -> tuple[torch.nn.Module, Optimizers]:
    """The sharded network and its optimizers; weights depend on the seed alone. Ranks wait for each other here."""
    torch.manual_seed(config.seed)
    model = Ranker(config.model, config.data, device=torch.device("meta"))
    freeze(model, config.optim.freeze)
    set_own_rates(model, config.optim.sparse)
    sharded = shard(
        model,
        config.sharding,
        sparse=config.optim.sparse,
        device=rank.device,
        local_batch_size=local_batch_size,
        seed=config.seed,
    )
    learned = dict(weighting.named_parameters(prefix="weighting")) if weighting else {}
    return sharded, Optimizers(sharded, config.optim, more=learned)


def train(config: Config, rank: Rank) -> int | None:
    """One run, from its configuration to its last checkpoint; the saved step if it was told to stop before its end, else None."""
    with closing(RunLog(storage.path(config.run_dir or ""), active=rank.is_main)) as log:
        trainer = build(config, rank, log)
        with trainer.checkpoints:
            _train(config, rank, trainer)
        return trainer.info.step if trainer.told_to_stop else None


def _train(config: Config, rank: Rank, trainer: Trainer) -> None:
    run_dir, log = storage.path(config.run_dir or ""), trainer.log
    resumed_from = _resume(config, trainer)
    for path, why in trainer.checkpoints.damaged().items():
        trainer.event("warning", message=f"{path} is damaged ({why}) and passed over")
        log.say(f"{path} is damaged ({why}) and passed over")
    if config.checkpoint.warm_start and not resumed_from:
        taken = warm_start(trainer.model, config, storage.path(config.checkpoint.warm_start))
        said = f"{len(taken.whole)} weights taken from {config.checkpoint.warm_start}"
        for state, names in (("grown", taken.grown), ("new", taken.new)):
            said += f"; {state}: {', '.join(names)}" if names else ""
        log.say(said)
        trainer.event("warm_start", path=config.checkpoint.warm_start, grown=taken.grown, new=taken.new)
    if rank.is_main:  # not before: what is refused leaves the folder's configuration as it was
        configuration.save(config, run_dir / "config.yaml")
    _announce(config, rank, trainer, resumed_from)
    started = time.monotonic()
    reason = "was done already" if trainer.finished else None
    if not reason:
        trainer.train()
        reason = "told to stop" if trainer.told_to_stop else trainer.finished
    for repair, count in trainer.reader.encoder.repairs.items():
        trainer.event("warning", message=f"{repair}: {count} values on rank 0")
    if trainer.reader.split.attempts.failed:
        trainer.event(
            "warning", message=f"{trainer.reader.split.attempts.failed} reads failed on rank 0 and were tried again"
        )
    trainer.event("end", reason=reason, seconds=time.monotonic() - started)
    log.say(f"\n{reason} at step {trainer.info.step:,}; logs, checkpoints and configuration are in {run_dir}")


def _resume(config: Config, trainer: Trainer) -> str | None:
    if config.checkpoint.resume is Resume.auto:
        return trainer.resume()
    if trainer.checkpoints.find("latest"):
        raise ConfigError(
            f"{config.run_dir} has checkpoints and checkpoint.resume=never; choose another run_dir, or checkpoint.resume=auto to go on"
        )
    return None


def _announce(config: Config, rank: Rank, trainer: Trainer, resumed_from: str | None) -> None:
    tables = describe_plan(trainer.model)
    dense = sum(parameter.numel() for parameter in trainer.optimizers.dense_parameters.values())
    configs = trainer.model.module.embeddings.configs.values()
    sparse = sum(table.num_embeddings * table.embedding_dim for table in configs)
    trainer.event(
        "start",
        world_size=rank.world_size,
        device=str(rank.device.type),
        config=configuration.plain(config),
        parameters={"dense": dense, "sparse": sparse},
        tables=tables,
        steps=trainer.total_steps,
        resumed_from=resumed_from,
    )
    kinds = ", ".join(sorted({str(table["sharding"]) for table in tables.values()}))
    trainer.log.say(
        f"{config.data.name}: {trainer.reader.num_rows:,} rows in {len(trainer.reader.split.files)} files; "
        f"{trainer.total_steps:,} steps of {config.reader.global_batch_size:,} rows on {rank.world_size} {rank.device.type} ranks\n"
        f"{len(tables)} tables with {sparse:,} weights ({kinds}), dense part {dense:,} weights; run folder {config.run_dir}"
        + (f"\ngoing on from {resumed_from}" if resumed_from else "")
    )


def run_folder(configured: str | None) -> str:
    """The run's folder: as configured, or runs/<time>_<id of the launch>, which a restart of the same launch finds again."""
    if configured:
        return configured
    launch = os.environ.get("TORCHELASTIC_RUN_ID", str(os.getpid()))
    known = sorted(path for path in Path("runs").glob(f"*_{launch}") if path.name[20:] == launch)
    return str(known[-1]) if known else f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}_{launch}"


def run(config: Config) -> None:
    """Join the ranks, agree on the folder, train.

    Raises:
        StoppedError: told to stop by SIGTERM; the state is saved.
    """
    forget_stop()
    with process_group(timeout_s=config.trainer.timeout_s) as rank:
        config.run_dir = str(from_main(run_folder(config.run_dir)))
        stopped_at = train(config, rank)
    if stopped_at is not None:
        tell_launcher(stopped_at)
        raise StoppedError(f"told to stop; saved at step {stopped_at:,} of {config.run_dir}, start again to go on")


def main() -> None:
    """The command line."""
    run_entry(lambda: configuration.main(run, about=ABOUT), quiet=(ConfigError, DataError, TroubleError, SaveError))


if __name__ == "__main__":
    main()

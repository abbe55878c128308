"""The training loop."""

import resource
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from tqdm import tqdm

from rec.checkpoint import Checkpoints, Info
from rec.data import Reader
from rec.distributed import Rank, sum_over_ranks
from rec.features import Batch
from rec.health import ExpertHealth, HealthResult, advice, table_of_health
from rec.logs import RunLog, table_of
from rec.losses import Losses, MultitaskLoss
from rec.metrics import EvalResult, MultitaskMetrics
from rec.model import Outputs
from rec.optim import Optimizers
from rec.predictions import Correction, PredictionWriter, predict
from rec.schema import ConfigError, TaskConfig, TaskKind, check_range, nearest
from rec.sharding import table_statistics
from rec.weighting import TaskWeighting, balance_loss

_HIGHER = {"auc": 1, "pr_auc": 1, "gauc": 1, "logloss": -1, "ne": -1, "ece": -1}


@dataclass
class TrainerConfig:
    """How long to train, and when to look up from it."""

    num_epochs: int = 1  # passes over the training split, at least 1
    max_steps: int | None = None  # steps; ends sooner than num_epochs would
    log_every_steps: int = 20  # steps between `train` events
    eval_every_steps: int | None = None  # steps between evaluations; besides, there is one at the end; null: only that
    eval_split: str | None = "valid"  # what is evaluated meanwhile; null: nothing
    eval_steps: int | None = None  # steps of an evaluation at most; null: the whole split
    monitor: str = "auc"  # the metric that says which checkpoint is best, averaged over `monitor_tasks`
    monitor_tasks: list[str] | None = None  # default: all binary tasks that are not auxiliary
    early_stop_evals: int | None = None  # stop after so many evaluations without a new best; null: never
    timeout_s: float = 600  # seconds that a rank waits for the others before it gives up

    def __post_init__(self) -> None:
        for name in (
            "num_epochs",
            "max_steps",
            "log_every_steps",
            "eval_every_steps",
            "eval_steps",
            "early_stop_evals",
        ):
            check_range(f"trainer.{name}", getattr(self, name), 1, 1e12)
        check_range("trainer.timeout_s", self.timeout_s, 1, 1e6)
        if self.monitor not in _HIGHER:
            raise ConfigError(f"trainer.monitor is '{self.monitor}'; {nearest(self.monitor, _HIGHER)}")

    def score(self, result: EvalResult, tasks: dict[str, TaskConfig]) -> float | None:
        """The monitored metric, higher is better; None where no task has it."""
        served = [name for name, task in tasks.items() if task.kind is TaskKind.binary and not task.auxiliary]
        names = self.monitor_tasks or served
        values = [result.metrics[name].get(self.monitor) for name in names]
        known = [value for value in values if value is not None]
        return _HIGHER[self.monitor] * sum(known) / len(known) if known else None


class Trainer:
    """Trains one model on one split, evaluates it on another.

    Args:
        config: how long, and when to look up.
        rank: this process among its peers.
        model: the sharded network.
        optimizers: of its tables and of the rest.
        weighting: how the tasks count against each other.
        balance_loss: weight of `weighting.balance_loss` in the loss, 0 or more.
        tasks: what it predicts.
        reader: training batches.
        eval_reader: evaluation batches; None evaluates nothing.
        metrics: what is measured on them.
        health: diagnostics of gates and experts; None where there are none.
        checkpoints: where states are kept.
        log: where events go.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        rank: Rank,
        model: DistributedModelParallel,
        optimizers: Optimizers,
        weighting: TaskWeighting,
        balance_loss: float,
        tasks: dict[str, TaskConfig],
        reader: Reader,
        eval_reader: Reader | None,
        metrics: MultitaskMetrics,
        health: ExpertHealth | None,
        checkpoints: Checkpoints,
        log: RunLog,
    ) -> None:
        self.config = config
        self.rank = rank
        self.model = model
        self.optimizers = optimizers
        self.weighting = weighting
        self.balance_loss = balance_loss
        self.tasks = tasks
        self.reader = reader
        self.eval_reader = eval_reader
        self.metrics = metrics
        self.health = health
        self.checkpoints = checkpoints
        self.log = log
        self.loss = MultitaskLoss(tasks).to(rank.device)
        self.total_steps = reader.steps_per_epoch * config.num_epochs
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.info = Info(step=0, rows=0)
        self._window = _Window(len(tasks), rank.device)

    def train(self) -> None:
        """Train from where the state stands until `finished`. Ranks stay in step throughout."""
        self.model.train()
        with self._progress() as progress:
            for batch in self.reader.batches(self.info.step, self.total_steps):
                losses, grad_norm = self.train_step(batch)
                self._count(batch, losses, progress)
                last = self.info.step == self.total_steps
                if last or self._due(self.config.log_every_steps):
                    self._log_train(grad_norm, progress)
                if last or self._due(self.config.eval_every_steps):
                    self._evaluate()
                if self.finished or self._is_best or self._due(self.checkpoints.config.every_steps):
                    self._save()
                if self.finished:
                    break

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to train, or None."""
        patience, stale = self.config.early_stop_evals, self.info.stale_evals
        if patience is not None and stale >= patience:
            return f"no better {self.config.monitor} in {stale} evaluations"
        return "all steps done" if self.info.step >= self.total_steps else None

    @property
    def _is_best(self) -> bool:
        """Whether this step was evaluated, is the best so far, and best checkpoints are kept."""
        return self.checkpoints.config.keep_best > 0 and self.info.score is not None and self.info.stale_evals == 0

    def train_step(self, batch: Batch) -> tuple[Losses, torch.Tensor]:
        """One step of all ranks: their batches together are one batch, and the loss is its mean."""
        batch = batch.to(self.rank.device, non_blocking=True)
        weights = self.loss.sampled(batch.labels, batch.weights, batch.draws)
        own_weights = weights.sum(dim=0)
        global_weights = sum_over_ranks(own_weights.clone())
        self.optimizers.set_lr(self.lr_factor)
        self.optimizers.zero_grad()
        outputs = self.model(batch)
        losses = self.loss(outputs.logits, batch.labels, weights, global_weights, towers=outputs.towers)
        losses.total = self._total(losses, outputs, batch, own_weights / global_weights.clamp(min=1e-30))
        (losses.total * self.rank.world_size).backward()  # TorchRec and DDP average gradients over ranks
        self.weighting.sync_gradients()
        return losses, self.optimizers.step()

    def _total(self, losses: Losses, outputs: Outputs, batch: Batch, shares: torch.Tensor) -> torch.Tensor:
        """What is differentiated: the tasks' losses as weighed, and what gates, rows and weights are charged beside them."""
        total = self.weighting(losses.weighted, shares=shares, shared=outputs.shared, step=self.info.step)
        if self.balance_loss and outputs.gate_weights is not None:
            total = total + self.balance_loss * balance_loss(outputs.gate_weights, batch.row_id >= 0)
        if outputs.penalty is not None:
            total = total + outputs.penalty / self.rank.world_size
        if outputs.row_penalty is not None:
            counts = (batch.row_id >= 0).float()
            rows = sum_over_ranks(counts.sum())
            total = total + (outputs.row_penalty * counts).sum() / rows
        return total

    @property
    def lr_factor(self) -> float:
        """What the schedule multiplies learning rates by in this step."""
        return self.optimizers.config.schedule.factor(self.info.step, self.total_steps)

    def state(self) -> dict[str, Any]:
        """Tensors of a checkpoint."""
        state = {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict()}
        weighting = self.weighting.state_dict()
        return state | ({"weighting": weighting} if weighting else {})

    def resume(self) -> str | None:
        """Go on from the newest checkpoint, if there is one; gives its path. Ranks wait for each other here."""
        path = self.checkpoints.find("latest")
        if path is None:
            return None
        self.optimizers.init_state()  # Adam's state exists only after a first step, and only what exists is loaded
        state = self.state()
        self.info = self.checkpoints.load(path, state)
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.weighting.load_state_dict(state.get("weighting", {}))
        return str(path)

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.total_steps * self.reader.config.global_batch_size,
            initial=self.info.step * self.reader.config.global_batch_size,
            unit=" rows",
            unit_scale=True,
            disable=None if self.rank.is_main else True,  # None: off where there is no terminal
            dynamic_ncols=True,
        )

    def _count(self, batch: Batch, losses: Losses, progress: tqdm) -> None:
        size = self.reader.config.global_batch_size
        epoch, step = divmod(self.info.step, self.reader.steps_per_epoch)
        self.info.step += 1
        self.info.score = None  # belongs to the step in which it was measured
        self.info.rows = epoch * self.reader.num_rows + min((step + 1) * size, self.reader.num_rows)
        self._window.add(losses)
        progress.update(size)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.info.step % every == 0

    def event(self, event: str, **values: Any) -> None:
        """Log an event at the current step."""
        self.log.event(event, step=self.info.step, rows=self.info.rows, **values)

    def _log_train(self, grad_norm: torch.Tensor, progress: tqdm) -> None:
        total, by_task, rows_per_second = self._window.close(self.info.rows)
        memory = torch.tensor([_memory_mib(self.rank.device)])
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        factor = self.optimizers.config.schedule.factor(self.info.step - 1, self.total_steps)
        sparse = self.optimizers.config.sparse
        self.event(
            "train",
            loss=total,
            losses=dict(zip(self.tasks, by_task, strict=True)),
            rows_per_second=rows_per_second,
            lr=self.optimizers.config.dense.lr * factor,
            lr_sparse=sparse.lr * (factor if sparse.scheduled else 1.0),
            grad_norm=grad_norm.item(),
            **self.weighting.describe(),
            memory_mib=round(memory.item()),
        )
        progress.set_postfix(loss=f"{total:.4f}", refresh=False)

    def _evaluate(self) -> None:
        if self.eval_reader is None:
            return
        started = time.monotonic()
        result = evaluate(
            self.model,
            self.eval_reader,
            self.metrics,
            device=self.rank.device,
            max_steps=self.config.eval_steps,
            health=self.health,
        )
        experts = self.health.compute() if self.health else None
        self.model.train()
        self.event(
            "eval",
            split=self.eval_reader.split.name,
            metrics=result.metrics,
            domains=result.domains,
            experts=asdict(experts) if experts else None,
            seconds=time.monotonic() - started,
        )
        self.event("tables", tables=table_statistics(self.model, self.optimizers.fused))
        self._judge(self.config.score(result, self.tasks))
        self.log.say(
            f"\nstep {self.info.step:,} of {self.total_steps:,}, {self.eval_reader.split.name}:\n{table_of(result)}"
        )
        if experts:
            self._report_health(experts)
        self._window.restart(self.info.rows)

    def _report_health(self, experts: HealthResult) -> None:
        self.log.say(f"\n{table_of_health(experts)}")
        for sentence in advice(experts):
            self.log.say(sentence)
            self.event("warning", message=sentence)

    def _judge(self, score: float | None) -> None:
        self.info.score = score
        if score is None:
            return
        if self.info.best_score is None or score > self.info.best_score:
            self.info.best_score, self.info.stale_evals = score, 0
        else:
            self.info.stale_evals += 1

    def _save(self) -> None:
        path = self.checkpoints.save(self.state(), self.info)
        self.event("checkpoint", path=str(path), score=self.info.score)
        self._window.restart(self.info.rows)


class _Window:
    """Losses and speed since the last `train` event."""

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_tasks + 1, dtype=torch.float64, device=device)
        self.steps = 0
        self.rows = 0
        self.started = time.monotonic()

    def add(self, losses: Losses) -> None:
        self.sums[0] += losses.total.detach()
        self.sums[1:] += losses.by_task
        self.steps += 1

    def close(self, rows: int) -> tuple[float, list[float], float]:
        """Mean loss, mean loss of each task, and rows a second. Ranks wait for each other here."""
        total, *by_task = (sum_over_ranks(self.sums) / max(1, self.steps)).tolist()
        speed = (rows - self.rows) / max(1e-9, time.monotonic() - self.started)
        self.sums.zero_()
        self.steps = 0
        self.restart(rows)
        return total, by_task, speed

    def restart(self, rows: int) -> None:
        """Leave the time since out of the speed: it went into something other than training."""
        self.rows, self.started = rows, time.monotonic()


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Reader,
    metrics: MultitaskMetrics,
    *,
    device: torch.device,
    max_steps: int | None = None,
    calibrators: Correction | None = None,
    predictions: PredictionWriter | None = None,
    health: ExpertHealth | None = None,
) -> EvalResult:
    """Metrics of a split over all ranks, the same on each. Ranks stay in step throughout.

    Args:
        model: the sharded network.
        reader: batches of the split.
        metrics: reset, filled and computed here.
        device: where the model lives.
        max_steps: steps at most; None for the whole split.
        calibrators: applied to the logits; None leaves them as they are.
        predictions: also gets the rows; None keeps none.
        health: reset and filled here, where the network has gates; None where it has none.
    """
    metrics.reset()
    if health is not None:
        health.reset()
    predicting = predict(model, reader, device=device, max_steps=max_steps, calibrators=calibrators)
    for step, predicted in enumerate(predicting):
        batch, logits, gates = predicted.batch, predicted.logits, predicted.outputs.gate_weights
        experts = predicted.outputs.expert_outputs
        if health is not None and gates is not None and experts is not None:
            rows_before = step * reader.config.global_batch_size
            health.update(gates, experts, batch.row_id >= 0, rows_before=rows_before)
        metrics.update(logits, batch.labels, batch.weights, batch.domain_id, batch.group_id, batch.truth)
        if predictions is not None:
            predictions.write(batch, logits)
    return metrics.compute()


def _memory_mib(device: torch.device) -> float:
    """Peak memory of this rank so far: on the GPU if it has one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

"""The training loop."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from tqdm import tqdm

from rec.checkpoint import Checkpoints, Info, SaveError, Written
from rec.data import Reader
from rec.distributed import Rank, sum_over_ranks
from rec.evaluation import evaluate
from rec.features import Batch
from rec.guard import Guard, GuardConfig, Trouble, TroubleError, Verdict, find_suspects
from rec.health import ExpertHealth, HealthResult, advice, table_of_health
from rec.interrupts import StoppedError, StopSignal
from rec.logs import RunLog, table_of
from rec.losses import Losses, MultitaskLoss
from rec.metrics import EvalResult, MultitaskMetrics
from rec.model import Outputs
from rec.optim import Optimizers
from rec.schema import ConfigError, TaskConfig, TaskKind, check_range, nearest
from rec.sharding import table_statistics
from rec.train_state import TrainState
from rec.watch import Watch
from rec.weighting import TaskWeighting, balance_loss
from rec.window import Window

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
    stall_s: float = 60  # seconds without movement after which a rank is reported; less than timeout_s
    guard: GuardConfig = field(default_factory=GuardConfig)

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
        check_range("trainer.stall_s", self.stall_s, 0.5, 1e6)
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
        run_dir: the run's folder, for the stacks of a rank that stands still.
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
        run_dir: Path,
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
        self.guard = Guard(config.guard, list(tasks))
        self.window = Window(len(tasks), rank.device)
        self.state = TrainState(model, optimizers, weighting, self.window, self.guard)
        self.told_to_stop = False  # agreed by all ranks
        self._signal = StopSignal()
        stall_s = min(config.stall_s, config.timeout_s / 2)
        self._watch = Watch(rank, run_dir, stall_s=stall_s, report=partial(self._warn, from_any=True), told=self._told)
        self._grad_norm = torch.zeros(())

    def _told(self) -> bool:
        return self._signal.requested

    @property
    def info(self) -> Info:
        """Steps done, rows seen, scores."""
        return self.state.info

    def train(self) -> None:
        """Train from where the state stands until `finished` or told to stop. Ranks stay in step throughout.

        Raises:
            TroubleError: a step that must not be learned from.
            SaveError: the last checkpoint could not be written.
        """
        self.model.train()
        self.window.restart(self.info.rows)
        with self._progress() as progress, self._signal, self._watch:
            if self.info.owes_eval:
                self._evaluate_and_save()
            if not self._ended:
                for batch in self.window.waiting_for_data(self._batches()):
                    self._step(batch, progress)
                    if self._ended:
                        break
                    self._watch.moving("waiting for data", step=self.info.step)
            self._finish_saving()

    def _batches(self) -> Iterator[Batch]:
        return self.reader.batches(self.info.step, self.total_steps)

    def _step(self, batch: Batch, progress: tqdm) -> None:
        """Learn from one batch, then do what is due after it."""
        self.told_to_stop = self.train_step(batch)
        self._count(progress)
        last = self.info.step == self.total_steps
        if last or self._due(self.config.log_every_steps):
            self._log_train(progress)
        self.info.owes_eval = last or self._due(self.config.eval_every_steps)
        self._tell(self.checkpoints.poll())
        self._evaluate_and_save()

    def _evaluate_and_save(self) -> None:
        if self.info.owes_eval and not self.told_to_stop:
            self._evaluate()
        if self._ended or self._is_best or self._due(self.checkpoints.config.every_steps):
            self._save()

    @property
    def _ended(self) -> bool:
        return self.told_to_stop or self.finished is not None

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to train, or None."""
        patience, stale = self.config.early_stop_evals, self.info.stale_evals
        if self.info.owes_eval:
            return None
        if patience is not None and stale >= patience:
            return f"no better {self.config.monitor} in {stale} evaluations"
        return "all steps done" if self.info.step >= self.total_steps else None

    @property
    def _is_best(self) -> bool:
        """Whether this step was evaluated, is the best so far, and best checkpoints are kept."""
        return self.checkpoints.config.keep_best > 0 and self.info.score is not None and self.info.stale_evals == 0

    def train_step(self, batch: Batch) -> bool:
        """One step of all ranks: their batches together are one batch, and the loss is its mean.

        Returns:
            Whether SIGTERM has come to any rank.
        """
        with self._waiting_for("the other ranks"):
            batch = batch.to(self.rank.device, non_blocking=True)
            weights = self.loss.sampled(batch.labels, batch.weights, batch.draws)
            own_weights = weights.sum(dim=0)
            global_weights = sum_over_ranks(own_weights.clone())
        self.optimizers.set_lr(self.lr_factor)
        self.optimizers.zero_grad()
        outputs = self.model(batch)
        losses = self.loss(outputs.logits, batch.labels, weights, global_weights, towers=outputs.towers)
        losses.total = self._total(losses, outputs, batch, own_weights / global_weights.clamp(min=1e-30))
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize(self.rank.device)  # what the GPU has still to do is no waiting for other ranks
        with self._waiting_for("the other ranks' losses"):
            verdict = self.guard.judge(losses.total, losses.by_task, told=self._signal.requested)
        if verdict.trouble is None:
            (losses.total * self.rank.world_size).backward()  # TorchRec and DDP average gradients over ranks
            self.weighting.after_backward()
            self._grad_norm = self.optimizers.step()
            self.guard.note_gradient(self._grad_norm)
            self.window.add(losses)
        else:
            self._handle(verdict, batch, outputs)
        return verdict.told

    @contextmanager
    def _waiting_for(self, whom: str) -> Iterator[None]:
        """Within it this rank waits in a collective; after it, it computes."""
        self._watch.moving(f"waiting for {whom}", step=self.info.step)
        with self.window.spending("peers"):
            yield
        self._watch.moving("computing", step=self.info.step)

    def _handle(self, verdict: Verdict, batch: Batch, outputs: Outputs) -> None:
        """Say what is wrong with a step, and stop unless it is to be skipped. Ranks wait for each other here."""
        epoch, step = divmod(self.info.step, self.reader.steps_per_epoch)
        suspects = find_suspects(self.model, batch, outputs.logits, self.reader)
        text = f"step {self.info.step + 1} (epoch {epoch}, its step {step}): {verdict.why}{suspects}"
        if verdict.trouble is Trouble.stop:
            self._tell(self.checkpoints.finish())
            raise TroubleError(
                f"{text}. Nothing was learned from this step, and the newest checkpoint is older; mend the data or the settings "
                "(optim.dense.clip_grad_norm, learning rates), or leave such steps out with trainer.guard.not_finite=skip"
            )
        self._warn(f"{text}; skipped, {self.guard.skipped} so far")

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

    def resume(self) -> str | None:
        """Go on from the newest checkpoint, if there is one; gives its path. Ranks wait for each other here."""
        path = self.state.resume(self.checkpoints)
        return str(path) if path else None

    def _progress(self) -> tqdm:
        return tqdm(
            total=self.total_steps * self.reader.config.global_batch_size,
            initial=self.info.step * self.reader.config.global_batch_size,
            unit=" rows",
            unit_scale=True,
            disable=None if self.rank.is_main else True,  # None: off where there is no terminal
            dynamic_ncols=True,
        )

    def _count(self, progress: tqdm) -> None:
        size = self.reader.config.global_batch_size
        epoch, step = divmod(self.info.step, self.reader.steps_per_epoch)
        self.info.step += 1
        self.info.score = None  # belongs to the step in which it was measured
        self.info.rows = epoch * self.reader.num_rows + min((step + 1) * size, self.reader.num_rows)
        progress.update(size)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.info.step % every == 0

    def event(self, event: str, **values: Any) -> None:
        """Log an event at the current step."""
        self.log.event(event, step=self.info.step, rows=self.info.rows, **values)

    def _warn(self, message: str, *, from_any: bool = False) -> None:
        """Log a warning, and print it on rank 0, or where it comes from."""
        self.event("warning", message=message)
        if self.rank.is_main or from_any:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def _log_train(self, progress: tqdm) -> None:
        stretch = self.window.close(self.info.rows)
        factor = self.optimizers.config.schedule.factor(self.info.step - 1, self.total_steps)
        sparse = self.optimizers.config.sparse
        self.event(
            "train",
            loss=stretch.loss,
            losses=dict(zip(self.tasks, stretch.by_task, strict=True)),
            rows_per_second=stretch.rows_per_second,
            seconds_per_step=stretch.seconds,
            lr=self.optimizers.config.dense.lr * factor,
            lr_sparse=sparse.lr * (factor if sparse.scheduled else 1.0),
            grad_norm=self._grad_norm.item(),
            skipped_steps=self.guard.skipped,
            **self.weighting.describe(),
            memory_mib=round(stretch.memory_mib),
        )
        progress.set_postfix(loss=f"{stretch.loss:.4f}", refresh=False)

    def _evaluate(self) -> None:
        self.info.owes_eval = False
        if self.eval_reader is None:
            return
        started = time.monotonic()
        try:
            result = evaluate(
                self.model,
                self.eval_reader,
                self.metrics,
                device=self.rank.device,
                max_steps=self.config.eval_steps,
                health=self.health,
                before_each=self._heed_signal,
            )
        except StoppedError:
            self.told_to_stop = self.info.owes_eval = True
            return
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
        self.window.restart(self.info.rows)

    def _heed_signal(self) -> None:
        """Break an evaluation off on all ranks when one was told to stop. Ranks wait for each other here."""
        self._watch.moving("evaluating", step=self.info.step)
        told = torch.tensor(float(self._signal.requested), device=self.rank.device)
        if sum_over_ranks(told).item():
            raise StoppedError

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
        if not self.guard.healthy:
            if self._ended:
                raise TroubleError(f"step {self.info.step}: its gradient is not finite, and what it did is not saved")
            return  # the next step says why
        self._watch.moving("saving", step=self.info.step)
        self._tell(self.checkpoints.finish())
        self.checkpoints.save(self.state.tensors(), self.info)
        self.window.restart(self.info.rows)

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written; it must not fail, since nothing would be saved after it."""
        self._watch.moving("saving", step=self.info.step)
        written = self.checkpoints.finish()
        self._tell(written)
        if written is not None and written.error:
            raise SaveError(written.error)

    def _tell(self, written: Written | None) -> None:
        if written is None:
            return
        if written.error:
            self._warn(f"{written.error}; training goes on, checkpoints before it stay")
            return
        values = {"path": str(written.path), "score": written.info.score, "seconds": written.seconds}
        self.log.event("checkpoint", step=written.info.step, rows=written.info.rows, **values)

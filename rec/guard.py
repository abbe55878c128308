"""A loss that is not a number, or far above those before: noticed on all ranks in the same step, before it is learned from.

The tables are updated within the backward, so a step has to be judged between forward and backward. For that its losses are summed
over ranks and looked at, which makes the host wait for the forward once a step.
"""

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from enum import Enum
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from rec.data import Reader
from rec.distributed import sum_over_ranks
from rec.features import Batch
from rec.schema import check_range
from rec.sharding import local_parts

_SHOWN = 5  # rows, columns, parameters that a message names
_LARGE = 1e6  # a dense value above this is worth a word beside a loss that is not finite


class Trouble(Enum):
    """What is done about a step that should not be learned from."""

    stop = "stop"  # end the run with an error that says where it comes from
    skip = "skip"  # leave the step out, count it, go on


@dataclass
class GuardConfig:
    """When a step is not learned from."""

    not_finite: Trouble = Trouble.stop  # a loss that is NaN or infinite
    spike_factor: float | None = None  # > 1; a loss above so many times the median of the steps before; null: never
    spike: Trouble = Trouble.skip
    spike_window: int = 100  # steps before, 10 at least; until half of them have been seen no loss is a spike
    max_skipped: int = 100  # steps that may be skipped in a run, at least 1; one more stops it

    def __post_init__(self) -> None:
        check_range("trainer.guard.spike_factor", self.spike_factor, 1, 1e12)
        check_range("trainer.guard.spike_window", self.spike_window, 10, 1e6)
        check_range("trainer.guard.max_skipped", self.max_skipped, 1, 1e12)


class TroubleError(RuntimeError):
    """Training does not go on; the message says at which step, and names rows, tasks, columns and tables."""


@dataclass
class Verdict:
    """What all ranks agree on in a step.

    Attributes:
        trouble: what is to be done instead of learning from it; None: nothing, learn.
        why: the reason, in words.
        told: SIGTERM has come to a rank: save and end.
    """

    trouble: Trouble | None = None
    why: str = ""
    told: bool = False


class Guard:
    """Judges every step of a run.

    Args:
        config: what is looked for.
        tasks: their names, in the order of the losses.
    """

    def __init__(self, config: GuardConfig, tasks: list[str]) -> None:
        self.config = config
        self.tasks = tasks
        self.skipped = 0  # steps
        self._recent: deque[float] = deque(maxlen=config.spike_window)
        self._gradient = torch.zeros(())  # norm in the step before, the same on all ranks

    def judge(self, total: Tensor, by_task: Tensor, *, told: bool) -> Verdict:
        """Look at a step before its backward. Ranks wait for each other here.

        Args:
            total: scalar, this rank's share of the loss.
            by_task: [T], this rank's shares of the tasks' losses.
            told: whether SIGTERM has come to this rank.
        """
        shares = torch.cat([total.detach().reshape(1), by_task.detach(), total.new_tensor([float(told)])])
        before = self._gradient.to(shares).reshape(1)
        gradient, loss, *losses, stops = torch.cat([before, sum_over_ranks(shares)]).tolist()  # one wait for the device
        verdict = Verdict(told=stops > 0)
        if not math.isfinite(gradient):
            verdict.trouble = Trouble.stop
            verdict.why = (
                f"the gradient of the step before had the norm {gradient}, and the tables have learned from it"
            )
        elif not all(math.isfinite(x) for x in (loss, *losses)):
            bad = [task for task, x in zip(self.tasks, losses, strict=True) if not math.isfinite(x)]
            verdict.trouble = self.config.not_finite
            verdict.why = f"the loss is {loss}" + (f", that of {', '.join(bad)}" if bad else "")
        elif self._is_spike(loss):
            verdict.trouble, typical = self.config.spike, self._typical
            verdict.why = f"the loss is {loss:.4g}, the median of the {len(self._recent)} steps before {typical:.4g}"
        else:
            self._recent.append(loss)
        self.skipped += verdict.trouble is Trouble.skip
        if self.skipped > self.config.max_skipped:
            verdict.trouble = Trouble.stop
            verdict.why += f"; {self.config.max_skipped} steps were skipped before, as trainer.guard.max_skipped allows"
        return verdict

    def note_gradient(self, norm: Tensor) -> None:
        """Remember a step's gradient norm: the next `judge` looks at it, without making the host wait here."""
        self._gradient = norm.detach()

    @property
    def healthy(self) -> bool:
        """Whether the last gradient was finite; what was learned from another is not worth a checkpoint."""
        return math.isfinite(self._gradient.item())

    @property
    def _typical(self) -> float:
        return median(self._recent)

    def _is_spike(self, loss: float) -> bool:
        factor = self.config.spike_factor
        if factor is None or 2 * len(self._recent) < self.config.spike_window:
            return False
        return loss > factor * self._typical

    def state(self) -> Tensor:
        """The count and the losses of the last steps, [1 + spike_window] float64, infinite where there are fewer."""
        missing = [math.inf] * (self.config.spike_window - len(self._recent))
        return torch.tensor([float(self.skipped), *self._recent, *missing], dtype=torch.float64)

    def load(self, state: Tensor) -> None:
        """Go on from a `state`, also of another window."""
        skipped, *recent = state.tolist()
        self.skipped = int(skipped)
        self._recent.clear()
        self._recent.extend(x for x in recent if math.isfinite(x))


@dataclass
class Suspects:
    """What a rank finds in its own part of a step that should not be learned from.

    Attributes:
        rows: where the first rows lie whose logits are not finite, or else those with the largest.
        columns: dense columns with values that are not finite or above a million.
        tables: tables with weights that are not finite, and how many rows of them.
        parameters: the same of the dense part.
    """

    rows: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)


@torch.no_grad()
def find_suspects(model: DistributedModelParallel, batch: Batch, logits: Tensor, reader: Reader) -> str:
    """Rows, columns, tables and parameters that may be at fault, of all ranks, in words. Ranks wait for each other here.

    Args:
        model: the sharded network.
        batch: this rank's rows of the step.
        logits: [B, T] of them.
        reader: what they came from.
    """
    own = Suspects(
        rows=_rows(batch, logits, reader),
        columns=_columns(batch.dense, reader.encoder.data.dense_columns),
        tables=_tables(model),
        parameters=[
            name
            for name, p in model.named_parameters()
            if not name.startswith("embeddings.") and not torch.isfinite(p).all()
        ],
    )
    every: list[dict[str, list[str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(every, asdict(own))
    return "".join(_sentence(what, [name for of in every for name in of[what]]) for what in asdict(own))


def _rows(batch: Batch, logits: Tensor, reader: Reader) -> list[str]:
    worst = logits.abs().nan_to_num(nan=math.inf).amax(dim=1).masked_fill(batch.row_id < 0, -1.0)
    bad = (worst == math.inf).nonzero().flatten()[:_SHOWN]
    return [reader.locate(int(batch.row_id[i])) for i in (bad if len(bad) else worst.argmax().reshape(1))]


def _columns(dense: Tensor, columns: dict[str, list[int]]) -> list[str]:
    largest = dense.abs().nan_to_num(nan=math.inf).amax(dim=0) if len(dense) else dense.new_zeros(dense.shape[1])
    found = {name: largest[places].max().item() for name, places in columns.items() if places}
    return [f"{name} (up to {value:.3g})" for name, value in found.items() if value > _LARGE]


def _tables(model: DistributedModelParallel) -> list[str]:
    found = []
    for key, weight in model.module.embeddings.state_dict().items():
        rows = sum(int((~torch.isfinite(part)).any(dim=1).sum()) for part, _ in local_parts(weight))
        found += [f"{key.split('.')[-2]} ({rows} rows)"] if rows else []
    return found


def _sentence(what: str, names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    if not unique:
        return ""
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return f"; {what}: {', '.join(unique[:_SHOWN])}{more}"

"""What a stretch of training steps came to: losses, speed, and where the time went on every rank."""

import resource
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from rec.distributed import sum_over_ranks
from rec.losses import Losses

T = TypeVar("T")

SPENT = ("data", "peers", "rest")


@dataclass
class Stretch:
    """What a closed window says, the same on all ranks.

    Attributes:
        loss: mean over the steps.
        by_task: mean loss of each task.
        rows_per_second: over all ranks.
        seconds: what a step spends on `data` (waiting for the reader), on `peers` (waiting for the slowest rank, where the step begins
            and where its loss is known) and on the `rest` (computing, and the exchanges within forward and backward): mean over
            ranks, the most of any rank, and which rank that is. A rank that is slow has little of `peers`, all others have much.
        memory_mib: the most that a rank has used so far: on its GPU if it has one, else resident.
    """

    loss: float
    by_task: list[float]
    rows_per_second: float
    seconds: dict[str, dict[str, float]]
    memory_mib: float


class Window:
    """Sums since the last `train` event.

    Args:
        num_tasks: T.
        device: where losses lie.
    """

    def __init__(self, num_tasks: int, device: torch.device) -> None:
        self.sums = torch.zeros(num_tasks + 1, dtype=torch.float64, device=device)
        self.steps = 0
        self.restart(0)

    def add(self, losses: Losses) -> None:
        """Count a step."""
        self.sums[0] += losses.total.detach()
        self.sums[1:] += losses.by_task
        self.steps += 1

    def waiting_for_data(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; the time that each takes to come counts as `data`."""
        iterator = iter(batches)
        while True:
            with self.spending("data"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    @contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Time spent within counts as `data` or `peers`."""
        started = time.monotonic()
        yield
        self.spent[what] += time.monotonic() - started

    def close(self, rows: int) -> Stretch:
        """What came together since the window was opened at another count of `rows`. Ranks wait for each other here."""
        steps, seconds = max(1, self.steps), time.monotonic() - self.started
        total, *by_task = (sum_over_ranks(self.sums) / steps).tolist()
        speed = (rows - self.rows) / max(1e-9, seconds)
        self.spent["rest"] = seconds - sum(self.spent.values())
        memory = _memory_mib(self.sums.device)
        by_rank = _by_rank([*(self.spent[what] / steps for what in SPENT), memory])  # [ranks, 4]
        self.sums.zero_()
        self.steps = 0
        self.restart(rows)
        spent = {what: _brief(by_rank[:, i]) for i, what in enumerate(SPENT)}
        return Stretch(total, by_task, speed, spent, by_rank[:, -1].max().item())

    def restart(self, rows: int) -> None:
        """Leave the time since out of the speed: it went into something other than training."""
        self.rows, self.started = rows, time.monotonic()
        self.spent = dict.fromkeys(SPENT, 0.0)

    def state(self) -> torch.Tensor:
        """Sums of all ranks and the number of steps, [T + 2] float64. Ranks wait for each other here."""
        return torch.cat([sum_over_ranks(self.sums.clone()), self.sums.new_tensor([self.steps])]).cpu()

    def load(self, state: torch.Tensor) -> None:
        """Go on from a `state`: rank 0 takes what all had, so that sums over ranks stay the same."""
        self.sums.copy_(state[:-1] if dist.get_rank() == 0 else torch.zeros_like(state[:-1]))
        self.steps = int(state[-1])


def _by_rank(values: list[float]) -> torch.Tensor:
    """[ranks, n] float64, every rank's `values` [n]."""
    out = torch.zeros(dist.get_world_size(), len(values), dtype=torch.float64)
    out[dist.get_rank()] = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(out)
    return out


def _brief(seconds: torch.Tensor) -> dict[str, float]:
    slowest = int(seconds.argmax())
    return {"mean": seconds.mean().item(), "max": seconds[slowest].item(), "rank": slowest}


def _memory_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

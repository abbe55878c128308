"""Everything that a run needs to go on as if it had never been interrupted, as tensors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from rec.checkpoint import Checkpoints, Info
from rec.guard import Guard
from rec.optim import Optimizers
from rec.rng import rng_state, set_rng_state
from rec.tensor_files import sizes
from rec.weighting import TaskWeighting
from rec.window import Window


@dataclass
class TrainState:
    """The parts of a run that change while it trains.

    Attributes:
        model: the sharded network.
        optimizers: of its tables and of the rest.
        weighting: how the tasks count against each other.
        window: sums since the last `train` event.
        guard: what it remembers of the last steps.
        info: steps done, rows seen, scores. The place in the data is the number of steps.
    """

    model: DistributedModelParallel
    optimizers: Optimizers
    weighting: TaskWeighting
    window: Window
    guard: Guard
    info: Info = field(default_factory=lambda: Info(step=0, rows=0))

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds. Ranks wait for each other here."""
        loop = {"window": self.window.state(), "guard": self.guard.state()}
        return self._of_model() | {"loop": loop, "rng": {str(dist.get_rank()): rng_state()}}

    def _of_model(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizers": self.optimizers.state_dict()}
        weighting = self.weighting.state_dict()
        return state | ({"weighting": weighting} if weighting else {})

    def resume(self, checkpoints: Checkpoints) -> Path | None:
        """Go on from the newest whole checkpoint, if there is one; gives its folder. Ranks wait for each other here.

        The state of the loop and of random numbers is taken where the checkpoint has it; random numbers are those of the same rank,
        and start anew where the number of ranks has changed.
        """
        path = checkpoints.newest()
        if path is None:
            return None
        self.optimizers.init_state()  # Adam's state exists only after a first step, and only what exists is loaded
        saved = sizes(path)
        of_rank = f"rng.{dist.get_rank()}." if Info.read(path).world_size == dist.get_world_size() else "\0"
        loop = _room_for(saved, "loop.", torch.float64)
        rng = _room_for(saved, of_rank, torch.uint8)
        state = self._of_model()
        wanted = state | ({"loop": loop} if loop else {}) | ({"rng": {str(dist.get_rank()): rng}} if rng else {})
        self.info = checkpoints.load(path, wanted, checked=True)
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.weighting.load_state_dict(state.get("weighting", {}))
        if loop:
            self.window.load(loop["window"])
            self.guard.load(loop["guard"])
        set_rng_state(rng)
        return path


def _room_for(saved: dict[str, tuple[int, ...]], prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Empty tensors for what a checkpoint has under `prefix`."""
    return {
        name.removeprefix(prefix): torch.empty(size, dtype=dtype)
        for name, size in saved.items()
        if name.startswith(prefix)
    }

"""Two optimizers: one fused into the backward of the tables, one for the dense part, and one schedule over both."""

import fnmatch
import math
import warnings
from dataclasses import dataclass, field
from enum import Enum

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from rec.model import Ranker
from rec.schema import ConfigError, check_range, nearest


class SparseOptimizer(Enum):
    """Optimizers that FBGEMM fuses into the backward of the tables."""

    rowwise_adagrad = "rowwise_adagrad"  # one accumulator a row
    adagrad = "adagrad"
    adam = "adam"
    sgd = "sgd"


_FBGEMM = {
    SparseOptimizer.rowwise_adagrad: EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    SparseOptimizer.adagrad: EmbOptimType.EXACT_ADAGRAD,
    SparseOptimizer.adam: EmbOptimType.ADAM,
    SparseOptimizer.sgd: EmbOptimType.EXACT_SGD,
}
_ON_CPU = (SparseOptimizer.rowwise_adagrad, SparseOptimizer.adagrad, SparseOptimizer.sgd)


class DenseOptimizer(Enum):
    """Optimizers of everything that is not a table."""

    adam = "adam"
    adamw = "adamw"
    sgd = "sgd"


class Decay(Enum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass
class SparseConfig:
    """The tables' optimizer."""

    kind: SparseOptimizer = SparseOptimizer.rowwise_adagrad
    lr: float = 0.02  # > 0
    eps: float = 1e-8  # > 0
    scheduled: bool = True  # whether the schedule applies to the tables too

    def __post_init__(self) -> None:
        check_range("optim.sparse.lr", self.lr, 1e-12, 1e3)
        check_range("optim.sparse.eps", self.eps, 1e-30, 1e3)


@dataclass
class DenseConfig:
    """The dense part's optimizer."""

    kind: DenseOptimizer = DenseOptimizer.adam
    lr: float = 1e-3  # > 0
    weight_decay: float = 0.0  # >= 0; decoupled with adamw, else added to the gradient
    eps: float = 1e-8  # > 0; adam and adamw
    clip_grad_norm: float | None = None  # > 0; the dense gradients' global 2-norm is cut to this

    def __post_init__(self) -> None:
        check_range("optim.dense.lr", self.lr, 1e-12, 1e3)
        check_range("optim.dense.eps", self.eps, 1e-30, 1e3)
        check_range("optim.dense.weight_decay", self.weight_decay, 0, 1e3)
        check_range("optim.dense.clip_grad_norm", self.clip_grad_norm, 1e-12, 1e12)


@dataclass
class ScheduleConfig:
    """Learning rates are multiplied by a factor: up from 0 during warm-up, then down to `final_factor` at the last step."""

    warmup_steps: int = 0  # steps, >= 0
    decay: Decay = Decay.constant
    final_factor: float = 0.0  # 0 to 1

    def __post_init__(self) -> None:
        check_range("optim.schedule.warmup_steps", self.warmup_steps, 0, 1e12)
        check_range("optim.schedule.final_factor", self.final_factor, 0, 1)

    def factor(self, step: int, total_steps: int) -> float:
        """Factor of the learning rates at `step` of `total_steps`, both counted from 0.

        >>> [ScheduleConfig(warmup_steps=2, decay=Decay.linear).factor(step, 6) for step in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        if self.decay is Decay.constant:
            return 1.0
        shape = 1 - progress if self.decay is Decay.linear else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_factor + (1 - self.final_factor) * shape


@dataclass
class OptimConfig:
    """Both optimizers and their schedule."""

    sparse: SparseConfig = field(default_factory=SparseConfig)
    dense: DenseConfig = field(default_factory=DenseConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    freeze: list[str] = field(default_factory=list)  # patterns of parameters that are not trained, e.g. experts.shared*


def fused_params(config: SparseConfig, device: torch.device) -> dict:
    """Parameters of the fused optimizer, for TorchRec's sharders.

    Raises:
        ConfigError: an optimizer that FBGEMM does not have on this device.
    """
    if device.type == "cpu" and config.kind not in _ON_CPU:
        names = ", ".join(kind.name for kind in _ON_CPU)
        raise ConfigError(f"optim.sparse.kind={config.kind.name} needs a GPU; on CPU FBGEMM has {names}")
    return {"optimizer": _FBGEMM[config.kind], "learning_rate": config.lr, "eps": config.eps}


_PER_TABLE: dict[SparseOptimizer, type[torch.optim.Optimizer]] = {
    SparseOptimizer.rowwise_adagrad: RowWiseAdagrad,
    SparseOptimizer.adagrad: torch.optim.Adagrad,
    SparseOptimizer.adam: torch.optim.Adam,
    SparseOptimizer.sgd: torch.optim.SGD,
}


def set_own_rates(model: Ranker, config: SparseConfig) -> None:
    """Give tables with an `lr_factor` fused optimizers of their own, before the model is spread over ranks.

    TorchRec reads a table's optimizer off its parameter, and puts tables with the same one into one kernel.
    """
    for name, parameter in model.embeddings.named_parameters():
        factor = model.embeddings.configs[name.split(".")[-2]].lr_factor
        if factor != 1:
            settings = {"lr": config.lr * factor} | ({} if config.kind is SparseOptimizer.sgd else {"eps": config.eps})
            with warnings.catch_warnings():  # importing this warns of something else
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.distributed.optim import _apply_optimizer_in_backward
            _apply_optimizer_in_backward(_PER_TABLE[config.kind], [parameter], settings)


TABLES = "embeddings.*"  # the pattern of all tables, which are frozen together or not at all


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Mark the parameters that `patterns` match as not to be trained, before the model is spread over ranks.

    Raises:
        ConfigError: a pattern that matches nothing, or some tables and not all.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if pattern != TABLES and not fnmatch.filter(names, pattern):
            parts = {name.rpartition(".")[0] + ".*" for name in names if not name.startswith("embeddings.")} | {TABLES}
            raise ConfigError(f"optim.freeze has '{pattern}', which matches no parameter; {nearest(pattern, parts)}")
        if pattern != TABLES and any(name.startswith("embeddings.") for name in fnmatch.filter(names, pattern)):
            raise ConfigError(
                f"optim.freeze has '{pattern}', which matches tables; all at once are '{TABLES}', one is data.tables.NAME.lr_factor=0"
            )
    for name, parameter in model.named_parameters():
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns if pattern != TABLES):
            parameter.requires_grad_(False)


class Optimizers:
    """The fused and the dense optimizer behind one interface.

    Args:
        model: the sharded model; its fused optimizer is found in it.
        config: both optimizers' settings.
        more: further parameters of the dense optimizer, by name.
    """

    def __init__(
        self, model: DistributedModelParallel, config: OptimConfig, *, more: dict[str, nn.Parameter] | None = None
    ) -> None:
        self.config = config
        trained = {name: p for name, p in in_backward_optimizer_filter(model.named_parameters()) if p.requires_grad}
        self.dense_parameters = trained | (more or {})
        self.fused = model.fused_optimizer
        names = {id(parameter): name for name, parameter in self.fused.params.items()}
        tables = model.module.embeddings.configs
        self._factors = [  # of each group of tables
            tables[names[id(group["params"][0])].split(".")[-2]].lr_factor for group in self.fused.param_groups
        ]
        self.dense = KeyedOptimizerWrapper(self.dense_parameters, self._make_dense)
        self.combined = CombinedOptimizer([("sparse", self.fused), ("dense", self.dense)])

    def _make_dense(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config.dense
        if config.kind is DenseOptimizer.sgd:
            return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
        kind = torch.optim.AdamW if config.kind is DenseOptimizer.adamw else torch.optim.Adam
        return kind(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)

    def set_lr(self, factor: float) -> None:
        """Multiply the configured learning rates by `factor` from the next step on."""
        for group in self.dense.param_groups:
            group["lr"] = self.config.dense.lr * factor
        trained = 0.0 if TABLES in self.config.freeze else 1.0
        for group, own in zip(self.fused.param_groups, self._factors, strict=True):
            group["lr"] = self.config.sparse.lr * (factor if self.config.sparse.scheduled else 1.0) * trained * own

    def zero_grad(self) -> None:
        """Forget the dense gradients, and hand the tables' learning rate to their fused backward."""
        self.combined.zero_grad()

    def step(self) -> torch.Tensor:
        """Update the dense part (the tables were updated in the backward) and return its gradient's 2-norm before clipping."""
        limit = self.config.dense.clip_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.dense_parameters.values(), limit)
        self.combined.step()
        return norm

    def state_dict(self) -> dict:
        """State of both, sharded as the tables are."""
        return self.combined.state_dict()

    def init_state(self) -> None:
        """Make the state that the dense optimizer would only make in its first step, so that there is something to load into."""
        self.dense.init_state()
        self.dense.zero_grad(set_to_none=True)

    def load_state_dict(self, state: dict) -> None:
        """Take over a state of `state_dict`'s shape."""
        self.combined.load_state_dict(state)

"""The whole network, from tables to logits, for one device. `sharding.py` spreads it over ranks."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rec.embeddings import Embedded, Embeddings
from rec.experts import build_experts
from rec.features import Batch
from rec.funnel import Funnel, needed_towers, tower_of
from rec.histories import HistoryConfig
from rec.inputs import Inputs, check_histories
from rec.interaction import FM, FMConfig, InteractionConfig, build_interaction
from rec.linear import Linear, LinearConfig, Route
from rec.mixtures import ExpertInputs, ExpertsConfig, Sizes
from rec.schema import DataConfig
from rec.towers import TowersConfig, build_towers


@dataclass
class ModelConfig:
    """The stages of the network; most are groups of choices below `conf/`."""

    histories: list[HistoryConfig] = field(default_factory=list)  # sequences that are summarised for a candidate
    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    fm: FMConfig = field(default_factory=FMConfig)
    bf16: bool = False  # run the dense part in bfloat16 (weights stay float32); the tables are always float32

    def check(self, data: DataConfig) -> None:
        """Raise `ConfigError` where a part does not fit the data set, or has the item tower read more than the item."""
        check_histories(self.histories, data)
        self.linear.check(data)
        crossing = [h.feature for h in self.histories if {h.feature, h.candidate} & {*self.towers.item}]
        self.towers.check(data, crossing=crossing + self.linear.used + self.fm.fields(data))


@dataclass
class Outputs:
    """What the network says of B rows.

    Attributes:
        logits: [B, T] float32; of a regression, predictions. Outside training they are corrected for sampled negatives
            and for positive weights.
        towers: [B, towers] float32, of each tower alone, before the funnel composes them.
        shared: [B, d], what experts and gates read.
        gate_weights: [B, T, N] float32 or None.
        expert_outputs: [B, N, H] or None.
        row_penalty: [B], a loss of each row beside the tasks' own, or None.
        penalty: scalar, a loss of the weights alone, the same on every rank, or None.
    """

    logits: Tensor
    towers: Tensor
    shared: Tensor
    gate_weights: Tensor | None = None
    expert_outputs: Tensor | None = None
    row_penalty: Tensor | None = None
    penalty: Tensor | None = None


class Ranker(nn.Module):
    """Embeddings and dense columns -> crosses -> experts -> a tower a task.

    Args:
        config: the stages.
        data: description of the data set.
        device: where the tables are made; `meta` leaves them to the sharder.
    """

    def __init__(self, config: ModelConfig, data: DataConfig, *, device: torch.device | None = None) -> None:
        super().__init__()
        config.check(data)
        self.bf16 = config.bf16
        attended = [history.feature for history in config.histories]
        self.embeddings = Embeddings(data, linear=config.linear.used, attended=attended, device=device)
        apart = {*config.linear.hidden, *config.towers.item}
        self.inputs = Inputs(data, [name for name in data.features if name not in apart], histories=config.histories)
        self.item_inputs = Inputs(data, config.towers.item) if config.towers.item else None
        self.linear, self.fm = Linear(config.linear, data), FM(config.fm, data)
        self.interaction = build_interaction(config.interaction, self.inputs.out_features)
        sizes = Sizes(
            in_features=self.inputs.out_features + self.linear.width(Route.experts),
            gate_features=self.inputs.out_features + self.linear.width(Route.gates),
            num_tasks=len(data.tasks),
            num_domains=len(data.domains),
        )
        self.experts = build_experts(config.experts, sizes)
        self.towers = build_towers(
            config.towers,
            in_features=config.experts.layer_sizes[-1] + self.linear.width(Route.towers),
            item_features=self.item_inputs.out_features if self.item_inputs else 0,
            tower_of=tower_of(data.tasks),
            num_domains=len(data.domains),
        )
        self.funnel = Funnel(data.tasks)

    def forward(self, batch: Batch) -> Outputs:
        """B rows of columns -> B rows of logits."""
        embedded = self.embeddings(batch.sparse_features)
        items = self.items(embedded, batch.dense) if self.item_inputs else None
        return self.score(embedded, batch.dense, items=items, domain_id=batch.domain_id, draws=batch.draws)

    def items(self, embedded: Embedded, dense: Tensor) -> Tensor:
        """The items' vectors [B, r], which depend on the features of the item alone."""
        assert self.item_inputs is not None, "only two towers have vectors of items"
        with self._precision(dense.device):
            return self.towers.items(self.item_inputs(embedded, dense))

    def score(
        self, embedded: Embedded, dense: Tensor, *, items: Tensor | None, domain_id: Tensor, draws: Tensor
    ) -> Outputs:
        """The same of rows whose ids are embedded, and, with two towers, of items whose vectors are known."""
        linear = self.linear(embedded, dense)  # [B, l], logits [B, T]
        with self._precision(dense.device):
            x = self.interaction(self.inputs(embedded, dense))  # [B, d]
            mixture = self.experts(
                ExpertInputs(
                    linear.joined(x, Route.experts), draws, gate_x=linear.joined(x, Route.gates), domain_id=domain_id
                )
            )  # [B, T, H], gates [B, T, N]
            towers = self.towers(linear.joined(mixture.values, Route.towers), items, domain_id)  # [B, towers]
        towers = towers.float()
        for logits in (linear.logits, self.fm(embedded)):  # [B, T]
            towers = towers if logits is None else towers + logits[:, self.towers.tower_of]
        logits = self.funnel(towers)  # [B, T]
        penalty = self.experts.penalty() if self.training else None
        return Outputs(logits, towers, x, mixture.gate_weights, mixture.expert_outputs, mixture.row_penalty, penalty)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def prune(self, data: DataConfig) -> None:
        """Leave only what the logits of `data.served_tasks` need, in that order; a task that one is composed of keeps its tower."""
        served = data.served_tasks
        needed = {name for task in served for name in data.funnel(task)}
        tasks = [t for t, name in enumerate(data.tasks) if name in needed]
        self.towers.prune(tasks, towers=needed_towers(data.tasks, list(needed)))
        for part in (self.experts, self.linear, self.fm):
            part.prune(tasks)
        funnel = Funnel({name: task for name, task in data.tasks.items() if name in needed}, outputs=served)
        self.funnel = funnel.to(self.funnel.correction.device).train(self.training)

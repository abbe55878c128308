"""The whole network, from tables to logits, for one device. `sharding.py` spreads it over ranks."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rec.embeddings import Embeddings
from rec.experts import build_experts
from rec.features import Batch
from rec.funnel import Funnel, tower_of
from rec.interaction import InteractionConfig, build_interaction
from rec.mixtures import ExpertInputs, ExpertsConfig, Sizes
from rec.schema import DataConfig
from rec.towers import TaskTowers, TowersConfig


@dataclass
class ModelConfig:
    """The stages of the network; each is a group of choices below `conf/`."""

    interaction: InteractionConfig = field(default_factory=InteractionConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    towers: TowersConfig = field(default_factory=TowersConfig)
    bf16: bool = False  # run the dense part in bfloat16 (weights stay float32); the tables are always float32


@dataclass
class Outputs:
    """What the network says of B rows.

    Attributes:
        logits: [B, T] float32; of a regression, predictions. Outside training they are corrected for sampled negatives
            and for positive weights.
        shared: [B, d], what experts and gates read.
        gate_weights: [B, T, N] float32 or None.
        expert_outputs: [B, N, H] or None.
    """

    logits: Tensor
    shared: Tensor
    gate_weights: Tensor | None
    expert_outputs: Tensor | None


class Ranker(nn.Module):
    """Embeddings and dense columns -> crosses -> experts -> a tower a task.

    Args:
        config: the stages.
        data: description of the data set.
        device: where the tables are made; `meta` leaves them to the sharder.
    """

    def __init__(self, config: ModelConfig, data: DataConfig, *, device: torch.device | None = None) -> None:
        super().__init__()
        self.bf16 = config.bf16
        num_tasks = len(data.tasks)
        self.embeddings = Embeddings(data, device=device)
        width = self.embeddings.out_features + data.num_dense
        self.interaction = build_interaction(config.interaction, width)
        self.experts = build_experts(
            config.experts, Sizes(in_features=width, num_tasks=num_tasks, num_domains=len(data.domains))
        )
        self.towers = TaskTowers(
            config.towers, in_features=config.experts.layer_sizes[-1], tower_of=tower_of(data.tasks)
        )
        self.funnel = Funnel(data.tasks)

    def forward(self, batch: Batch) -> Outputs:
        """B rows of columns -> B rows of logits."""
        pooled = self.embeddings(batch.sparse_features)  # [B, sum of D]
        x = torch.cat([pooled, batch.dense], dim=1)  # [B, d]
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            x = self.interaction(x)  # [B, d]
            mixture = self.experts(
                ExpertInputs(x, batch.draws, domain_id=batch.domain_id)
            )  # [B, T, H], gates [B, T, N]
            towers = self.towers(mixture.values)  # [B, towers]
        logits = self.funnel(towers.float())  # [B, T]
        return Outputs(logits, x, mixture.gate_weights, mixture.expert_outputs)

    def prune(self, data: DataConfig) -> None:
        """Leave only what the logits of `data.served_tasks` need, in that order; a task that one is composed of keeps its tower."""
        served = data.served_tasks
        needed = {name for task in served for name in data.funnel(task)}
        tasks = [t for t, name in enumerate(data.tasks) if name in needed]
        self.experts.prune(tasks)
        self.towers.prune(tasks)
        funnel = Funnel({name: task for name, task in data.tasks.items() if name in needed}, outputs=served)
        self.funnel = funnel.to(self.funnel.correction.device).train(self.training)

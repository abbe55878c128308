"""A small world of domains that share much and not all, labelled with the probabilities of a teacher: for two towers.

After MTMD (AdKDD 2025, arXiv 2510.09857), a light ranker of many surfaces and tasks, which learns what heavy rankers say. The
paper gives no equations; what the domains share here is this project's.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rec.features import Batch
from rec.schema import ConfigError, DataConfig, DomainConfig, FeatureConfig, FeatureKind, TaskConfig, nearest
from rec.worlds import CALIBRATION_ROWS, World, find_intercept, make_batch, make_generator

DOMAINS = {"home": 0.70, "search": 0.20, "related": 0.08, "shopping": 0.02}  # shares of the traffic
RATES = {"click": 0.2, "conversion": 0.05}  # mean chances over the traffic, of every row
QUERY_SIZE = 24
ITEM_SIZE = 24
RANK = 8  # of the vectors whose inner product is taken
NUM_HIDDEN = 8  # of each tanh network


@dataclass(frozen=True)
class Shares:
    """How much of a logit is common to all domains and tasks, of the domain and of the task; only ratios matter.

    Attributes:
        common, domain, task: standard deviations of the parts, relative to each other.
        spread: standard deviation of the logits, but for the biases.
        bias: standard deviation of the bias of a domain and task.
    """

    common: float = 1.0
    domain: float = 0.8
    task: float = 0.6
    spread: float = 1.4
    bias: float = 0.4


class DomainWorld(World):
    """Domains of 70, 20, 8 and 2 % of the traffic, and two tasks, which an oracle teaches: labels are the chances.

    logit_{d,t} = <common(q) + domain_d(q) + task_t(q), item(v)> + bias_{d,t}, each of the four a random tanh network into
    `RANK` dimensions. q and v are standard normal: dense [B, 24 + 24], the features `query` and `item`. So a model of two
    towers can tell everything, and every domain can be learned from the others in part.

    Args:
        seed: of the functions and of all rows, >= 0.
        shares: of the logit's parts.
        exists: task -> the domains in which it exists, in others it weighs 0; by default, all of them.
        domain_input: a further feature `domain_one_hot`, for networks that know domains by their inputs alone.

    Raises:
        ConfigError: an unknown task or domain in `exists`.
    """

    def __init__(
        self,
        seed: int,
        *,
        shares: Shares = Shares(),
        exists: Mapping[str, Sequence[str]] | None = None,
        domain_input: bool = False,
    ) -> None:
        exists = exists or {}
        _check_exists(exists)
        self.seed, self.domain_input = seed, domain_input
        self.data = _domain_data(exists, domain_input)
        self.traffic = torch.tensor(list(DOMAINS.values()))
        where = [[domain in exists.get(task, DOMAINS) for task in RATES] for domain in DOMAINS]
        self.exists = torch.tensor(where).float()  # [D, T]
        self.common, self.domains, self.tasks, self.item = (
            _Networks(make_generator(seed, 0, part), num=num, size=size)
            for part, (num, size) in enumerate(
                [(1, QUERY_SIZE), (len(DOMAINS), QUERY_SIZE), (len(RATES), QUERY_SIZE), (1, ITEM_SIZE)]
            )
        )
        self.scale = torch.tensor([shares.common, shares.domain, shares.task], dtype=torch.float32)
        self.bias = torch.zeros(len(DOMAINS), len(RATES))
        self._calibrate(shares)

    def balanced(self) -> "DomainWorld":
        """The same world, whose domains get equally many rows."""
        world = copy.copy(self)
        world.traffic = torch.full((len(DOMAINS),), 1 / len(DOMAINS))
        return world

    def logits(self, dense: Tensor, domain_id: Tensor) -> Tensor:
        """True logits [B, T] of rows [B, F] in the domains `domain_id` [B]."""
        query, item = dense[:, :QUERY_SIZE], dense[:, QUERY_SIZE : QUERY_SIZE + ITEM_SIZE]
        common, domain, task = self.scale
        of_domain = self.domains(query)[torch.arange(len(dense)), domain_id].unsqueeze(1)
        vectors = common * self.common(query) + domain * of_domain + task * self.tasks(query)  # [B, T, RANK]
        return (vectors * self.item(item)).sum(dim=2) + self.bias[domain_id]

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows whose labels are `truth` [B, T], and whose weights are 0 where a task does not exist."""
        dense, domain_id = self._inputs(num_rows, generator)
        truth = torch.sigmoid(self.logits(dense, domain_id))
        if self.domain_input:
            dense = torch.cat([dense, F.one_hot(domain_id, len(DOMAINS)).float()], dim=1)
        weights = self.exists[domain_id]
        return make_batch(
            generator, dense=dense, labels=truth.clone(), weights=weights, domain_id=domain_id, truth=truth
        )

    def _inputs(self, num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dense = torch.randn(num_rows, QUERY_SIZE + ITEM_SIZE, generator=generator)
        domain_id = torch.bucketize(torch.rand(num_rows, generator=generator), self.traffic.cumsum(0)[:-1])
        return dense, domain_id

    def _calibrate(self, shares: Shares) -> None:
        """Give the logits the spread, and choose biases that give the rates."""
        dense, domain_id = self._inputs(CALIBRATION_ROWS, make_generator(self.seed, 0))
        self.scale *= shares.spread / self.logits(dense, domain_id).std()
        self.bias = shares.bias * torch.randn(self.bias.shape, generator=make_generator(self.seed, 0, 4))
        logits, weights = self.logits(dense, domain_id).double().numpy(), self.exists[domain_id].double().numpy()
        for t, rate in enumerate(RATES.values()):
            self.bias[:, t] += find_intercept(logits[:, t], rate=rate, weights=weights[:, t])


class _Networks:
    """Random tanh networks: [B, size] -> [B, num, RANK], of mean 0 and standard deviation 1 in every column."""

    def __init__(self, generator: torch.Generator, *, num: int, size: int) -> None:
        # steep enough to bend
        self.hidden = torch.randn(size, num * NUM_HIDDEN, generator=generator) * (1.5 / math.sqrt(size))
        self.readout = torch.randn(num, NUM_HIDDEN, RANK, generator=generator)
        self.mean, self.deviation = torch.zeros(num, RANK), torch.ones(num, RANK)
        values = self(torch.randn(CALIBRATION_ROWS, size, generator=generator))
        self.mean, self.deviation = values.mean(dim=0), values.std(dim=0)

    def __call__(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.hidden).unflatten(1, self.readout.shape[:2])
        return (torch.einsum("bnh,nhr->bnr", hidden, self.readout) - self.mean) / self.deviation


def _check_exists(exists: Mapping[str, Sequence[str]]) -> None:
    for task, domains in exists.items():
        if task not in RATES:
            raise ConfigError(f"exists of a DomainWorld holds task '{task}'; {nearest(task, RATES)}")
        for domain in domains:
            if domain not in DOMAINS:
                raise ConfigError(f"exists of a DomainWorld has domain '{domain}'; {nearest(domain, DOMAINS)}")
        if not domains:
            raise ConfigError(f"exists of a DomainWorld has no domain for task '{task}'; expected at least one")


def _domain_data(exists: Mapping[str, Sequence[str]], domain_input: bool) -> DataConfig:
    sizes = {"query": QUERY_SIZE, "item": ITEM_SIZE} | ({"domain_one_hot": len(DOMAINS)} if domain_input else {})
    tasks = {
        task: TaskConfig(
            label=f"true_{task}",
            truth=f"true_{task}",
            teacher=True,
            domains=list(exists[task]) if task in exists else None,
        )
        for task in RATES
    }
    return DataConfig(
        name="domains",
        path="",
        features={name: FeatureConfig(kind=FeatureKind.vector, size=size) for name, size in sizes.items()},
        tasks=tasks,
        domain=DomainConfig(column="domain", names=list(DOMAINS)),
    )

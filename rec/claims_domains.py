"""The studies of Pinterest's MTMD (AdKDD 2025, arXiv 2510.09857): one model of all domains against a model each.

All networks are of two towers, in `rec.domain_world`, and learn 60,000 rows of a teacher's probabilities ten times over. They are
scored by LogMAE, the mean of |log p - log p_teacher|, on as many rows of every domain.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rec.arms import (
    EVALUATION,
    TRAIN,
    Arm,
    Lines,
    Scores,
    Study,
    Trained,
    build,
    measure,
    num_parameters,
    outputs_of,
    train,
)
from rec.domain_experts import Adaptation, MTMDConfig, PEPNetConfig, StarConfig
from rec.domain_world import DOMAINS, ITEM_SIZE, QUERY_SIZE, RATES, DomainWorld
from rec.experts import EXPERTS, MMoEConfig, SharedBottom, SharedBottomConfig
from rec.features import Batch
from rec.intervals import TaskRows
from rec.losses import MultitaskLoss
from rec.mixtures import ExpertInputs, Experts, ExpertsConfig, Mixture, Sizes
from rec.model import Ranker
from rec.optim import freeze
from rec.schema import ConfigError
from rec.towers import DotTowers, DotTowersConfig, TowersConfig
from rec.widen import closest_width
from rec.worlds import World, make_generator, take

WIDTH = 32  # of the experts
LR = 1e-2  # the best of 0.003, 0.01 and 0.02 in world 0, for separate models, MMoE and MTMD alike
NEW = len(DOMAINS) - 1  # the domain that `unseen_domain` leaves out, and adds
NEW_STREAM = 3  # of its rows that are trained on
NEW_ROWS = (300, 1200, 5000)
NEW_EPOCHS, NEW_BATCH = 20, 64
APART = -30.0  # logit with which the others read the new domain's experts, as in `rec.warm_start`
# what is not of a domain, as in conf/experiment/mtmd_new_domain.yaml
FROZEN = [
    "experts.shared*",
    "experts.task*",
    "experts.fallback*",
    "towers.bias",
    "towers.towers.*",
    "towers.item_tower.*",
]


# ---- worlds


class Lessons(DomainWorld):
    """A `DomainWorld` whose stream `TRAIN` has the traffic's shares of domains; in other streams all have equally many rows.

    Args:
        seed: of the functions and of all rows, >= 0.
        domain_input: a further feature `domain_one_hot`.
        align: weight of the alignment in the loss.
        drawn: labels are 0 or 1, drawn with the teacher's probabilities, instead of these themselves.
        unseen: the last domain is unknown; its rows have domain_id -1 and no one-hot, and weigh nothing.
    """

    def __init__(
        self, seed: int, *, domain_input: bool = False, align: float = 0.0, drawn: bool = False, unseen: bool = False
    ) -> None:
        super().__init__(seed, domain_input=domain_input)
        self.drawn, self.unseen = drawn, unseen
        tasks = {name: replace(task, teacher=not drawn, align=align) for name, task in self.data.tasks.items()}
        assert self.data.domain is not None
        domain = replace(self.data.domain, names=list(DOMAINS)[: len(DOMAINS) - unseen])
        self.data = replace(self.data, tasks=tasks, domain=domain)

    def batches(self, num_batches: int, *, batch_size: int, stream: int = TRAIN) -> Iterator[Batch]:
        """See `World.batches`."""
        world = self if stream == TRAIN else self.balanced()
        return World.batches(world, num_batches, batch_size=batch_size, stream=stream)

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows, the same for every choice of labels and of what is known."""
        rows = super().draw(num_rows, generator)
        if self.drawn:
            rows.labels = torch.bernoulli(rows.labels, generator=generator)
        if self.unseen:
            last = rows.domain_id == len(DOMAINS) - 1
            rows.dense[last, QUERY_SIZE + ITEM_SIZE :] = 0
            rows.weights[last] = 0
            rows.domain_id[last] = -1
        return rows


# ---- separate models


def two_towers() -> DotTowersConfig:
    """Towers of all networks."""
    return DotTowersConfig(layer_sizes=[], item_features=["item"], item_layer_sizes=[32, 8])


@dataclass
class SeparateConfig(ExpertsConfig):
    """Two towers for every domain, which have nothing in common. They give a number a domain, whatever `layer_sizes` says."""

    kind: str = "separate"
    layer_sizes: list[int] = field(default_factory=lambda: [len(DOMAINS)])
    width: int = WIDTH  # of the query towers' hidden layer


class TwoTowers(nn.Module):
    """A shared bottom and two towers, which know one domain."""

    def __init__(self, width: int, num_tasks: int) -> None:
        super().__init__()
        sizes = Sizes(in_features=QUERY_SIZE, num_tasks=num_tasks)
        self.bottom = SharedBottom(SharedBottomConfig(layer_sizes=[width]), sizes)
        self.towers = DotTowers(
            two_towers(), in_features=width, item_features=ITEM_SIZE, tower_of=[*range(num_tasks)], num_domains=1
        )

    def forward(self, inputs: ExpertInputs) -> Tensor:
        """Logits [B, T]."""
        query, item = inputs.x.split([QUERY_SIZE, ITEM_SIZE], dim=1)
        values = self.bottom(ExpertInputs(query, inputs.draws)).values
        return self.towers(values, self.towers.items(item), torch.zeros_like(inputs.domains))


class Separate(Experts):
    """`TwoTowers` for each domain, of which a row reads its own.

    Task t's value is their logit at place d, and 0 elsewhere, [B, T, D]. A tower of no hidden layer behind it scales each place,
    and so the domains share nothing but that tower's bias.
    """

    def __init__(self, config: SeparateConfig, sizes: Sizes) -> None:
        super().__init__()
        self.models = nn.ModuleList(TwoTowers(config.width, sizes.num_tasks) for _ in range(sizes.num_domains))

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, D]."""
        logits = torch.stack([model(inputs) for model in self.models], dim=2)
        return Mixture(logits * F.one_hot(inputs.domains, len(self.models)).unsqueeze(1))

    def prune(self, tasks: list[int]) -> None:
        """Raises ConfigError: a study serves nothing."""
        raise ConfigError("separate models are for studies and are not served; train one run a domain (rec.select)")


EXPERTS[SeparateConfig] = Separate


# ---- scores


def log_maes(logits: Tensor, rows: Batch) -> Tensor:
    """LogMAE [D, T] of every domain and task; the domain -1 is the last."""
    assert rows.truth is not None
    found = torch.zeros(len(DOMAINS), len(RATES))
    domain_id = (rows.domain_id % len(DOMAINS)).numpy()
    for t in range(len(RATES)):
        scores, labels = logits[:, t].double().numpy(), rows.truth[:, t].double().numpy()
        whole = TaskRows(scores, labels, np.ones(len(scores)), domain_id)
        for d in range(len(DOMAINS)):
            found[d, t] = measure(whole.select(domain_id == d), "log_mae")["log_mae"]
    return found


def score_domains(trained: Trained) -> Lines:
    """LogMAE: its mean over domains and tasks, that with the traffic's weights, and each."""
    found = log_maes(trained.outputs.logits, trained.rows)
    traffic = torch.tensor(list(DOMAINS.values())) @ found.mean(dim=1)
    values = {"mean": float(found.mean()), "traffic": float(traffic)}
    values |= {domain: float(of_one) for domain, of_one in zip(DOMAINS, found.mean(dim=1), strict=True)}
    of_pairs = {
        f"{domain} {task}": float(found[d, t]) for d, domain in enumerate(DOMAINS) for t, task in enumerate(RATES)
    }
    return {trained.name: values | of_pairs}


def score_unseen(trained: Trained) -> Lines:
    """LogMAE in the domain left out and in the others; of MTMD, also when that domain is added with few rows of its own."""
    lines = {trained.name: _unseen_scores(trained.model, trained.rows)}
    if trained.name != "MTMD":
        return lines
    world = Lessons(trained.world.seed)
    rows = world.rows(len(trained.rows.labels), stream=EVALUATION)
    few = _new_rows(world)
    for num in NEW_ROWS:
        grown = add_domain(trained.model, world, take(few, slice(num)))
        lines[f"MTMD, then {num:,} rows"] = _unseen_scores(grown, rows, before=trained.model)
    free = add_domain(trained.model, world, take(few, slice(NEW_ROWS[1])), frozen=[])
    lines[f"MTMD, then {NEW_ROWS[1]:,} rows, nothing frozen"] = _unseen_scores(free, rows, before=trained.model)
    return lines


def add_domain(model: Ranker, world: Lessons, rows: Batch, *, frozen: Sequence[str] = FROZEN) -> Ranker:
    """A network of one domain more, whose own parameters are trained on `rows` of it; all that the others read stays.

    Args:
        model: MTMD of all domains but the last, which stays as it is.
        world: of all domains.
        rows: of the last one.
        frozen: patterns of the parameters that stay, but for those that only other domains read.
    """
    grown = build(_mtmd_arm(Lessons), world, seed=world.seed)
    state = grown.state_dict()
    state["experts.adaptation"][:NEW, NEW:] = APART
    for name, old in model.state_dict().items():
        state[name][tuple(slice(size) for size in old.shape)] = old  # domains come first, and the new one last
    freeze(grown, [*frozen])
    train(grown, _epochs(rows, world.seed), loss=MultitaskLoss(world.data.tasks), lr=LR)
    return grown


def _unseen_scores(model: Ranker, rows: Batch, *, before: Ranker | None = None) -> Scores:
    """LogMAE in the new domain and in the others, and how far the items' vectors have moved from those `before`."""
    found = log_maes(outputs_of(model, rows).logits, rows)
    new, known = found[NEW], found[:NEW]
    of_tasks = {f"new {task}": float(new[t]) for t, task in enumerate(RATES)}
    moved = 0.0 if before is None else float((_items(model, rows) - _items(before, rows)).abs().max())
    return {"new": float(new.mean()), "known": float(known.mean()), **of_tasks, "items moved": moved}


@torch.no_grad()
def _items(model: Ranker, rows: Batch) -> Tensor:
    return model.items(model.embeddings(rows.sparse_features), rows.dense)


def _new_rows(world: Lessons) -> Batch:
    rows = world.rows(len(DOMAINS) * 2 * NEW_ROWS[-1], stream=NEW_STREAM)
    return take(rows, (rows.domain_id == NEW).nonzero().flatten())


def _epochs(rows: Batch, seed: int) -> Iterator[Batch]:
    generator = make_generator(seed, NEW_STREAM)
    for _ in range(NEW_EPOCHS):
        for chosen in torch.randperm(rows.num_rows, generator=generator).split(NEW_BATCH):
            yield take(rows, chosen)


# ---- arms


def _arm(world: Callable[[int], Lessons], experts: ExpertsConfig) -> Arm:
    return Arm(world, experts, parts={"towers": two_towers()})


def _mtmd_arm(world: Callable[[int], Lessons], *, unknown_share: float = 0.05, **config: Any) -> Arm:
    return _arm(world, MTMDConfig(layer_sizes=[WIDTH], unknown_share=unknown_share, **config))


def _count(arm: Arm, world: Lessons) -> int:
    with torch.device("meta"):
        return num_parameters(build(arm, world))


def _matched_arm(world: Callable[[int], Lessons], experts: Callable[[int], ExpertsConfig], *, like: Arm) -> Arm:
    """An arm as wide as makes its parameters as many as those of `like`."""
    one, target = world(0), num_parameters(build(like, like.world(0)))
    return _arm(world, experts(closest_width(lambda width: _count(_arm(world, experts(width)), one), target)))


def _bottom(width: int) -> ExpertsConfig:
    return SharedBottomConfig(layer_sizes=[width])


def _mmoe(width: int) -> ExpertsConfig:
    return MMoEConfig(layer_sizes=[width], num_experts=8)


def _star(width: int) -> ExpertsConfig:
    return StarConfig(layer_sizes=[width])


def _pepnet(width: int) -> ExpertsConfig:
    return PEPNetConfig(layer_sizes=[width], gate_size=16, domain_dim=8)


@cache
def _domains_arms() -> dict[str, Arm]:
    known = partial(Lessons, domain_input=True)
    mtmd = partial(_mtmd_arm, Lessons, unknown_share=0.0)
    matched = partial(_matched_arm, like=mtmd())
    return {
        "separate models": Arm(Lessons, SeparateConfig(), parts={"towers": TowersConfig(layer_sizes=[])}),
        "pooled, one-hot": matched(known, _bottom),
        "MMoE, one-hot": matched(known, _mmoe),
        "STAR": matched(Lessons, _star),
        "PEPNet": matched(Lessons, _pepnet),
        "MTMD, no adaptation": mtmd(adaptation=Adaptation.none),
        "MTMD": mtmd(),
        "MTMD, full adaptation": mtmd(adaptation=Adaptation.full),
        "MTMD, adversarial": mtmd(adversarial_loss=0.1),
        "MTMD, fallback": _mtmd_arm(Lessons),
    }


@cache
def _alignment_arms() -> dict[str, Arm]:
    aligned = {f"KL, align {align:g}": partial(Lessons, align=align) for align in (0.0, 0.1, 0.3, 1.0)}
    return {name: _mtmd_arm(world) for name, world in {**aligned, "drawn labels": partial(Lessons, drawn=True)}.items()}


@cache
def _unseen_arms() -> dict[str, Arm]:
    unseen = partial(Lessons, unseen=True)
    matched = partial(_matched_arm, like=_mtmd_arm(unseen))
    return {
        "pooled": matched(unseen, _bottom),
        "MMoE": matched(unseen, _mmoe),
        "MMoE, one-hot": matched(partial(unseen, domain_input=True), _mmoe),
        "STAR": matched(unseen, _star),
        "PEPNet": matched(unseen, _pepnet),
        "MTMD": _mtmd_arm(unseen),
        "MTMD, with it from the start": _mtmd_arm(Lessons),
    }


_TAUGHT = partial(Study, steps=2350, batch_size=256, num_worlds=4, lr=LR, train_rows=60_000)  # ten times over
STUDIES = {
    "domains": _TAUGHT(
        _domains_arms, score_domains, ("mean", list(DOMAINS)[-1]), lower_is_better=("mean", list(DOMAINS)[-1])
    ),
    "alignment": _TAUGHT(_alignment_arms, score_domains, ("mean",), lower_is_better=("mean",)),
    "unseen_domain": _TAUGHT(_unseen_arms, score_unseen, ("new", "known"), lower_is_better=("new", "known")),
}

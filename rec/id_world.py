"""Small worlds of ids with known probabilities, in which every hop needs the one before: click, second click, order.

`IdWorld` has eight id fields whose pairs matter, and linear features beside deep ones: for linear paths and factorisation
machines, and for products along the hops. `HistoryWorld` has a candidate and the items of a history: for attention.
"""

import math
from abc import abstractmethod
from dataclasses import astuple, dataclass
from enum import Enum

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from rec.features import Batch
from rec.schema import ConfigError, DataConfig, Debias, FeatureConfig, FeatureKind, TableConfig, TaskConfig, check_range
from rec.worlds import CALIBRATION_ROWS, World, find_intercept, make_batch, make_generator

HOPS = ("click", "second_click", "order")
EMBEDDING_DIM = 8  # of every table


class TaskForm(Enum):
    """What a task after the first hop predicts. Labels are alike in all forms; weights and truths are not."""

    conditional = "conditional"  # its chance given the hop before, on the rows that got there
    entire = "entire"  # the chance of it and all hops before, a product, on every row (ESMM, Ma et al., SIGIR 2018)
    direct = "direct"  # the same chance on every row, without a product


@dataclass(frozen=True)
class Hops:
    """The hops of a world and the tasks on them.

    Attributes:
        num: how many of `HOPS`, 1 to 3.
        form: of the tasks after the first.
        rates: mean chance of a hop given the one before, above 0 and below 1; those beyond `num` are left aside.
        alike: correlation, 0 to 1, of what a later hop depends on with what the click depends on.
        loss_weights: of the tasks; those beyond `num` are left aside.
        debias: of the tasks after the first, which must not be direct.
    """

    num: int = 2
    form: TaskForm = TaskForm.conditional
    rates: tuple[float, ...] = (0.2, 0.3, 0.3)
    alike: float = 0.6
    loss_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    debias: Debias = Debias.none

    def __post_init__(self) -> None:
        check_range("num of a world's hops", self.num, 1, len(HOPS))
        check_range("alike of a world's hops", self.alike, 0, 1)
        for name, values in (("rates", self.rates), ("loss_weights", self.loss_weights)):
            if len(values) < self.num:
                raise ConfigError(f"{name} of a world's hops are {values}, expected one for each of {self.num} hops")
        check_range("the lowest rate of a world's hops", min(self.rates), 1e-6, 1)
        check_range("the highest rate of a world's hops", max(self.rates), 0, 1 - 1e-6)

    def tasks(self) -> dict[str, TaskConfig]:
        """A task a hop."""
        return {name: self._task(hop) for hop, name in enumerate(HOPS[: self.num])}

    def _task(self, hop: int) -> TaskConfig:
        before = HOPS[hop - 1] if hop else None
        steps = HOPS[: hop + 1] if self.form is TaskForm.direct else HOPS[hop : hop + 1]
        return TaskConfig(
            label=HOPS[hop],
            truth=" * ".join(f"true_{step}" for step in steps),
            loss_weight=self.loss_weights[hop],
            condition=before if self.form is TaskForm.conditional else None,
            product=before if self.form is TaskForm.entire else None,
            debias=self.debias if hop else Debias.none,
        )

    def mix(self, effects: Tensor) -> Tensor:
        """[B, HOPS], uncorrelated functions -> [B, num], those after the first correlated with it."""
        own = math.sqrt(1 - self.alike**2) * effects[:, 1 : self.num]
        return torch.cat([effects[:, :1], self.alike * effects[:, :1] + own], dim=1)


@dataclass(frozen=True)
class Inputs:
    """What the network may see of B rows: ids of every sparse feature, dense [B, F] float32."""

    sparse_features: KeyedJaggedTensor
    dense: Tensor


class HopWorld(World):
    """Rows whose hops follow each other. A subclass gives `inputs` and `signal`, and ends its constructor with `set_rates`.

    `truth` of its batches holds, as a data set's would, the chances of a conditional task given the hop before, and of an
    entire or a direct one that of it and all hops before. Labels are 1 where that hop and all before it took place.
    """

    hops: Hops
    intercept: Tensor  # [T]

    @abstractmethod
    def inputs(self, num_rows: int, generator: torch.Generator) -> Inputs:
        """Fresh rows."""

    @abstractmethod
    def signal(self, inputs: Inputs) -> Tensor:
        """[B, T] logits of every hop given the one before, but for the intercept."""

    def step_truth(self, batch: Batch | Inputs) -> Tensor:
        """[B, T] every hop's chance given the hop before, on all rows, also on those that did not get there."""
        return torch.sigmoid(self.intercept + self.signal(Inputs(batch.sparse_features, batch.dense)))

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows, the same whatever the number of hops and the form of tasks."""
        inputs = self.inputs(num_rows, generator)
        steps = self.step_truth(inputs)
        chances = torch.rand(num_rows, len(HOPS), generator=generator)[:, : self.hops.num]
        labels = (chances < steps).float().cumprod(dim=1)
        conditional = self.hops.form is TaskForm.conditional
        return make_batch(
            generator,
            sparse_features=inputs.sparse_features,
            dense=inputs.dense,
            labels=labels,
            weights=F.pad(labels[:, :-1], (1, 0), value=1.0) if conditional else torch.ones_like(labels),
            truth=steps if conditional else steps.cumprod(dim=1),
        )

    def set_rates(self) -> None:
        """Choose the intercepts that give the rates."""
        signal = self.signal(self.calibration_inputs()).double().numpy()
        weights, found = np.ones(len(signal)), []
        for hop in range(self.hops.num):
            found.append(find_intercept(signal[:, hop], rate=self.hops.rates[hop], weights=weights))
            weights = weights * expit(found[hop] + signal[:, hop])
        self.intercept = torch.tensor(found)

    def calibration_inputs(self) -> Inputs:
        """Rows by which functions are standardised and rates set."""
        return self.inputs(CALIBRATION_ROWS, make_generator(self.seed, 0))


# ---- fields and their pairs, linear and deep features

NUM_FIELDS = 8
NUM_LINEAR = 10
NUM_DEEP = 16
NUM_FACTORS = 4  # of the latent vector of an id
NUM_HIDDEN = 4  # of the tanh network in the deep functions


@dataclass(frozen=True)
class Strengths:
    """Standard deviations of the parts of a logit.

    Attributes:
        main: effects of single ids.
        pairwise: inner products of the latent vectors of every two fields' ids.
        linear: a linear form of the linear features.
        crossed: another, times a function of the deep features.
        deep: a function of the deep features.
    """

    main: float = 0.6
    pairwise: float = 0.7
    linear: float = 0.7
    crossed: float = 0.6
    deep: float = 0.4


class IdWorld(HopWorld):
    """Eight id fields, ten linear and sixteen deep features, the parts of whose logits are named in `Strengths`.

    All five parts have mean 0 and are uncorrelated: without its pairwise part a world is additive in its ids, and nothing
    additive explains any of the pairwise part. Ids are drawn independently by field, id i in proportion to (i + 1)^-zipf.
    Dense columns are standard normal: linear [B, 10], then deep [B, 16].

    Args:
        seed: of the functions and of all rows, >= 0.
        num_ids: of every field, at least 2.
        zipf: 0 or more; 0 draws all ids alike.
        hops: and the tasks on them.
        strengths: of the logit's parts.
        derived: the linear features are linear forms of the deep ones, so that they tell nothing new.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self,
        seed: int,
        *,
        num_ids: int = 50,
        zipf: float = 0.0,
        hops: Hops = Hops(),
        strengths: Strengths = Strengths(),
        derived: bool = False,
    ) -> None:
        check_range("num_ids of an IdWorld", num_ids, 2, 1_000_000)
        check_range("zipf of an IdWorld", zipf, 0, 10)
        self.seed, self.hops = seed, hops
        self.data = _id_data(num_ids, hops)
        self.share = F.normalize(torch.arange(1.0, num_ids + 1) ** -zipf, p=1, dim=0)  # [ids]
        basis, _ = torch.linalg.qr(torch.randn(NUM_DEEP, NUM_LINEAR, generator=make_generator(seed, 0)))
        self.basis = basis if derived else None  # [deep, linear]
        self.functions = [_Parts(make_generator(seed, 0, 1 + hop), share=self.share) for hop in range(len(HOPS))]
        self._standardise(torch.tensor(astuple(strengths)))
        self.set_rates()

    def inputs(self, num_rows: int, generator: torch.Generator) -> Inputs:
        """Fresh rows, an id a field."""
        ids = torch.bucketize(torch.rand(num_rows, NUM_FIELDS, generator=generator), self.share.cumsum(0)[:-1])
        dense = torch.randn(num_rows, NUM_LINEAR + NUM_DEEP, generator=generator)
        if self.basis is not None:
            dense[:, :NUM_LINEAR] = dense[:, NUM_LINEAR:] @ self.basis
        ones = torch.ones(ids.numel(), dtype=torch.int32)
        keys = list(self.data.sparse_features)
        return Inputs(KeyedJaggedTensor(keys=keys, values=ids.T.flatten(), lengths=ones, stride=num_rows), dense)

    def parts(self, batch: Batch | Inputs) -> Tensor:
        """[B, T, 5] what every part named in `Strengths` adds to the logit of a hop."""
        return self.hops.mix(torch.einsum("bhp,pgh->bgp", self._raw(batch) - self.mean, self.unmix))

    def signal(self, inputs: Inputs) -> Tensor:
        """[B, T], see `HopWorld`."""
        return self.parts(inputs).sum(dim=2)

    def _raw(self, batch: Batch | Inputs) -> Tensor:
        """[B, HOPS, 5] parts as they were drawn."""
        ids = batch.sparse_features.values().view(NUM_FIELDS, -1).T
        return torch.stack([function(ids, batch.dense) for function in self.functions], dim=1)

    def _standardise(self, strengths: Tensor) -> None:
        """Make each part of the hops uncorrelated, in their order, of mean 0 and of the strength [5] as deviation."""
        raw = self._raw(self.calibration_inputs()).double()
        roots = torch.stack([torch.linalg.cholesky(raw[:, :, part].T.cov()) for part in range(len(strengths))])
        self.mean, self.unmix = raw.mean(dim=0).float(), strengths[:, None, None] * torch.linalg.inv(roots).float()


class _Parts:
    """Five random functions of ids and dense columns. [B, fields], [B, 26] -> [B, 5], as in `Strengths`."""

    def __init__(self, generator: torch.Generator, *, share: Tensor) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.forms = normal(NUM_LINEAR, 2)
        self.hidden = normal(NUM_DEEP, NUM_HIDDEN) * (1.5 / math.sqrt(NUM_DEEP))  # steep enough to bend
        self.readout = normal(NUM_HIDDEN, 2)
        # of every id its effect and its latent vector, of mean 0 in every field: so pairs have no main effects
        table = normal(NUM_FIELDS, len(share), 1 + NUM_FACTORS)
        self.table = table - torch.einsum("fnk,n->fk", table, share).unsqueeze(1)

    def __call__(self, ids: Tensor, dense: Tensor) -> Tensor:
        found = self.table[torch.arange(NUM_FIELDS), ids]  # [B, fields, 1 + factors]
        main, factors = found[..., 0].sum(dim=1), found[..., 1:]
        # the sum over all pairs (Rendle, ICDM 2010)
        pairwise = (factors.sum(dim=1).square() - factors.square().sum(dim=1)).sum(dim=1) / 2
        linear, other = (dense[:, :NUM_LINEAR] @ self.forms).unbind(dim=1)
        crossing, deep = (torch.tanh(dense[:, NUM_LINEAR:] @ self.hidden) @ self.readout).unbind(dim=1)
        return torch.stack([main, pairwise, linear, other * crossing, deep], dim=1)


def _id_data(num_ids: int, hops: Hops) -> DataConfig:
    tables = {f"field_{f}": TableConfig(num_embeddings=num_ids, embedding_dim=EMBEDDING_DIM) for f in range(NUM_FIELDS)}
    features = {field: FeatureConfig(kind=FeatureKind.id) for field in tables}
    features["linear"] = FeatureConfig(kind=FeatureKind.vector, size=NUM_LINEAR)
    features["deep"] = FeatureConfig(kind=FeatureKind.vector, size=NUM_DEEP)
    return DataConfig(name="ids", path="", features=features, tables=tables, tasks=hops.tasks())


# ---- a candidate and a history

NUM_SEGMENTS = 10
NUM_CATEGORIES = 20
ITEMS_PER_CATEGORY = 5  # few, so that a million rows teach which items lie beside each other
NUM_INTERESTS = 6  # categories that a row's history comes from, drawn anew for every row
SPACE = 8  # dimensions of the space in which items lie
SCATTER = 0.3  # of a category's items around it, in radii of the sphere


@dataclass(frozen=True)
class HistoryStrengths:
    """Standard deviations of the parts of a logit: of the history's relevance (where there is one), the item, the segment."""

    relevance: float = 1.4
    item: float = 0.3
    segment: float = 0.3


class HistoryWorld(HopWorld):
    """A candidate item, a history of items and a user segment: a hop is likelier the nearer some item of the history is.

    Items lie on a sphere, those of a category beside each other. The relevance of a history to a candidate is the largest
    cosine of one of its items with the candidate. Its items come from `NUM_INTERESTS` categories; so does every second
    candidate, the others come from any. So a history's mean says little of whether the candidate is near any of its items.
    As a control, `candidate_dependent=False` has the projection of the history's mean on one direction instead,
    whatever the candidate. An empty history has relevance 0, which is its mean.

    Args:
        seed: of the functions and of all rows, >= 0.
        hops: and the tasks on them.
        strengths: of the logit's parts. Relevance is the same in all hops; effects of items and segments correlate by `hops.alike`.
        candidate_dependent: the relevance depends on the candidate.
        max_length: items of the longest history, at least 1; other lengths are as likely.
        empty: share of rows without a history, 0 to 0.99.

    Raises:
        ConfigError: a number out of its range.
    """

    def __init__(
        self,
        seed: int,
        *,
        hops: Hops = Hops(),
        strengths: HistoryStrengths = HistoryStrengths(),
        candidate_dependent: bool = True,
        max_length: int = 8,
        empty: float = 0.1,
    ) -> None:
        check_range("max_length of a HistoryWorld", max_length, 1, 10_000)
        check_range("empty of a HistoryWorld", empty, 0, 0.99)
        self.seed, self.hops, self.max_length, self.empty = seed, hops, max_length, empty
        self.candidate_dependent, self.strength = candidate_dependent, strengths.relevance
        self.data = _history_data(max_length, hops)
        generator = make_generator(seed, 0)
        centres = F.normalize(torch.randn(NUM_CATEGORIES, 1, SPACE, generator=generator), dim=2)
        around = torch.randn(NUM_CATEGORIES, ITEMS_PER_CATEGORY, SPACE, generator=generator) / math.sqrt(SPACE)
        self.positions = F.normalize((centres + SCATTER * around).view(-1, SPACE), dim=1)  # [items, SPACE]
        self.direction = F.normalize(torch.randn(SPACE, generator=generator), dim=0)
        self.items = strengths.item * _effects(len(self.positions), generator)
        self.segments = strengths.segment * _effects(NUM_SEGMENTS, generator)
        ids = self.calibration_inputs().sparse_features
        relevance = self.relevance(ids["item"].values(), ids["history"])[ids["history"].lengths() > 0]
        self.centre, self.scale = relevance.mean(), relevance.std()
        self.set_rates()

    def inputs(self, num_rows: int, generator: torch.Generator) -> Inputs:
        """Fresh rows, without dense columns."""

        def below(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (num_rows, *shape), generator=generator)

        categories = below(NUM_CATEGORIES, NUM_INTERESTS).gather(1, below(NUM_INTERESTS, 1 + self.max_length))
        elsewhere = below(2) > 0
        categories[elsewhere, 0] = below(NUM_CATEGORIES)[elsewhere]
        items = categories * ITEMS_PER_CATEGORY + below(ITEMS_PER_CATEGORY, 1 + self.max_length)
        has_history = torch.rand(num_rows, generator=generator) >= self.empty
        lengths = (1 + below(self.max_length)) * has_history
        history = items[:, 1:][torch.arange(self.max_length) < lengths.unsqueeze(1)]
        ones = torch.ones(num_rows, dtype=torch.int32)
        ids = KeyedJaggedTensor(
            keys=list(self.data.sparse_features),
            values=torch.cat([items[:, 0], history, below(NUM_SEGMENTS)]),
            lengths=torch.cat([ones, lengths.int(), ones]),
            stride=num_rows,
        )
        return Inputs(ids, torch.zeros(num_rows, 0))

    def relevance(self, item: Tensor, history: JaggedTensor) -> Tensor:
        """[B] items and their histories -> [B] relevance before it is standardised; 0 of an empty history."""
        lengths, positions = history.lengths().long(), self.positions[history.values()]
        if self.candidate_dependent:
            candidates = self.positions[item].repeat_interleave(lengths, dim=0)
            values, reduce = (positions * candidates).sum(dim=1), "max"
        else:
            values, reduce = positions @ self.direction, "mean"
        return torch.segment_reduce(values, reduce, lengths=lengths).where(lengths > 0, 0.0)

    def signal(self, inputs: Inputs) -> Tensor:
        """[B, T], see `HopWorld`."""
        ids = inputs.sparse_features
        item, segment = ids["item"].values(), ids["segment"].values()
        relevance = (self.relevance(item, ids["history"]) - self.centre) / self.scale
        relevance = relevance.where(ids["history"].lengths() > 0, 0.0)
        return self.hops.mix(self.items[item] + self.segments[segment]) + self.strength * relevance.unsqueeze(1)


def _effects(num: int, generator: torch.Generator) -> Tensor:
    """[num, HOPS] of mean 0 and standard deviation 1 in every column."""
    effects = torch.randn(num, len(HOPS), generator=generator)
    return (effects - effects.mean(dim=0)) / effects.std(dim=0, correction=0)


def _history_data(max_length: int, hops: Hops) -> DataConfig:
    features = {
        "item": FeatureConfig(kind=FeatureKind.id),
        "history": FeatureConfig(kind=FeatureKind.sequence, table="item", max_length=max_length),
        "segment": FeatureConfig(kind=FeatureKind.id),
    }
    sizes = {"item": NUM_CATEGORIES * ITEMS_PER_CATEGORY, "segment": NUM_SEGMENTS}
    tables = {name: TableConfig(num_embeddings=num, embedding_dim=EMBEDDING_DIM) for name, num in sizes.items()}
    return DataConfig(name="histories", path="", features=features, tables=tables, tasks=hops.tasks())

"""Small worlds whose probabilities are known: a seed -> batches made in memory, for the studies of `rec.study`.

`SegmentWorld` has tasks that conflict, as clicks and purchases do; `TaskPair` is the synthetic data of the MMoE paper. Both
feed the network one vector and no ids, so that an experiment takes minutes on a CPU. Worlds with ids are in `rec.id_world`,
one of many domains is in `rec.domain_world`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from rec.features import Batch
from rec.schema import ConfigError, DataConfig, DomainConfig, FeatureConfig, FeatureKind, TaskConfig, TaskKind, nearest

BLOCK_ROWS = 8192  # rows drawn at a time, so that small batches cost little


class World(ABC):
    """Rows without end, a function of `seed` alone. A subclass sets `data` and gives `draw`."""

    seed: int
    data: DataConfig

    @abstractmethod
    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows from the generator."""

    def batches(self, num_batches: int, *, batch_size: int, stream: int = 0) -> Iterator[Batch]:
        """Fresh batches; another `stream` of one world gives other rows of the same probabilities."""
        generator, start = make_generator(self.seed, 1 + stream), 0
        sparse = None if self.data.sparse_features else no_ids(batch_size)  # batches share it: making one takes long
        at_once = max(1, BLOCK_ROWS // batch_size)
        for first in range(0, num_batches, at_once):
            block = self.draw(batch_size * min(at_once, num_batches - first), generator)
            block.row_id += start
            steps = torch.randint(-(2**63), 2**63 - 1, (block.num_rows // batch_size,), generator=generator)
            block.draws[:, 1] = steps.repeat_interleave(batch_size)
            start += block.num_rows
            for low in range(0, block.num_rows, batch_size):
                yield take(block, slice(low, low + batch_size), sparse)

    def rows(self, num_rows: int, *, stream: int) -> Batch:
        """`num_rows` rows as one batch."""
        return next(self.batches(1, batch_size=num_rows, stream=stream))


def take(batch: Batch, rows: slice | Tensor, sparse_features: KeyedJaggedTensor | None = None) -> Batch:
    """The chosen rows of a batch, in the order in which they are chosen; every one of them counts as a row, not as padding.

    Args:
        batch: of B rows.
        rows: places in the batch, int64.
        sparse_features: the ids of the chosen rows; taken from the batch by default.
    """
    parts = {f.name: getattr(batch, f.name) for f in fields(batch)}
    chosen = {name: part[rows] if isinstance(part, Tensor) else part for name, part in parts.items()}
    if sparse_features is None:
        places = rows if isinstance(rows, Tensor) else torch.arange(len(batch.row_id))[rows]
        sparse_features = take_ids(batch.sparse_features, places)
    return Batch(**{**chosen, "sparse_features": sparse_features, "num_rows": len(chosen["row_id"])})


def take_ids(ids: KeyedJaggedTensor, rows: Tensor) -> KeyedJaggedTensor:
    """The ids of the chosen rows, of every key; fbgemm's own selection has no kernel for CPUs.

    Args:
        ids: of B rows and any number of keys, without weights, on a CPU.
        rows: [R] int64, places 0 to B - 1, in any order and as often as one likes.

    >>> ids = KeyedJaggedTensor(keys=["a"], values=torch.tensor([5, 6, 7]), lengths=torch.tensor([2, 0, 1]))
    >>> take_ids(ids, torch.tensor([2, 0])).values()
    tensor([7, 5, 6])
    """
    shape = (len(ids.keys()), ids.stride())
    lengths = ids.lengths().view(shape)[:, rows].flatten()
    first = ids.offsets()[:-1].view(shape)[:, rows].flatten()
    shift = first - (lengths.cumsum(0) - lengths)  # from a list's place among the taken ids to where it was
    places = torch.repeat_interleave(shift, lengths)
    values = ids.values()[places + torch.arange(len(places))]
    return KeyedJaggedTensor(keys=ids.keys(), values=values, lengths=lengths, stride=len(rows))


# ---- click and purchase, which conflict

NUM_SEGMENTS = 4
NUM_INPUTS = 44  # beside the one-hot segment
SEGMENT_SCALE = 3.0
NUM_HIDDEN = 4  # of the tanh network in each base function
CALIBRATION_ROWS = 1 << 15  # rows on which functions are standardised and rates set


@dataclass(frozen=True)
class Label:
    """How the label of a task comes about.

    Attributes:
        rate: chance of a positive: of a click per row, of the others per click.
        spread: standard deviation of the logit.
        correlation: of the latent with the purchase's; None: a base function of the world (click, purchase).
    """

    rate: float
    spread: float
    correlation: float | None = None


LABELS = {
    "click": Label(rate=0.2, spread=1.1),
    "purchase": Label(rate=0.2, spread=1.5),
    "add_to_cart": Label(rate=0.4, spread=1.5, correlation=0.9),
    "favourite": Label(rate=0.4, spread=1.5, correlation=0.0),
    "anti_favourite": Label(rate=0.4, spread=1.5, correlation=-0.6),
}


@dataclass(frozen=True)
class Placement:
    """A share of the traffic, 0 to 1; a logit z becomes slope * z + offset there."""

    share: float
    slope: float
    offset: float


_PLACE = {task: place for place, task in enumerate(LABELS)}

EVERYWHERE = {"all": Placement(1.0, 1.0, 0.0)}
PLACEMENTS = {
    "top": Placement(0.70, 1.0, 0.0),
    "side": Placement(0.22, 0.6, -0.1),
    "foot": Placement(0.08, 1.5, 1.8),
}


class SegmentWorld(World):
    """Click, purchase and other labels after a click, whose taste depends on a row's segment.

    With 4 base functions f_0 .. f_3 of the inputs, orthonormal over rows, the latent of a click in segment s is f_s, and that
    of a purchase given a click is f_(s+1 mod 4). A task of correlation c has c f_(s+1) + sqrt(1 - c^2) f', with an f' of its
    own in every segment. The logit is intercept + spread * latent, the intercept such that the mean chance is `rate`.

    A row is `NUM_INPUTS` standard normal inputs and the one-hot segment times `SEGMENT_SCALE`: dense [B, 48]. Labels are
    drawn, `truth` holds the chances; those of a task other than click are given a click, and its weight is 0 without one.

    Args:
        seed: of the functions and of all rows, >= 0.
        tasks: names in `LABELS`, click first.
        rates: task -> chance of a positive, instead of `Label.rate`.
        loss_weights: task -> weight in the loss, 1 by default.
        placements: name -> where rows are shown; `PLACEMENTS` has three. The placement is no input.

    Raises:
        ConfigError: an unknown task, or click not the first.
    """

    def __init__(
        self,
        seed: int,
        *,
        tasks: Sequence[str] = ("click", "purchase"),
        rates: dict[str, float] | None = None,
        loss_weights: dict[str, float] | None = None,
        placements: dict[str, Placement] = EVERYWHERE,
    ) -> None:
        _check_tasks(tasks)
        self.seed, self.tasks, self.placements = seed, list(tasks), placements
        self.data = _segment_data(tasks, loss_weights or {}, placements)
        self.mix = _mix(tasks)  # [segments, T, functions]
        self.functions = _Functions(seed, groups=[0] + [_PLACE[t] for t in tasks if LABELS[t].correlation is not None])
        self.spread = torch.tensor([LABELS[task].spread for task in tasks])
        self.intercept = torch.zeros(len(tasks))
        self._set_rates([(rates or {}).get(task, LABELS[task].rate) for task in tasks])

    def latents(self, dense: Tensor) -> Tensor:
        """[B, 48] -> [B, T], of mean 0 and variance 1 in every segment."""
        values = self.functions(dense[:, :NUM_INPUTS])
        return torch.einsum("bj,btj->bt", values, self.mix[dense[:, NUM_INPUTS:].argmax(1)])

    def logits(self, dense: Tensor, domain_id: Tensor) -> Tensor:
        """True logits [B, T] of rows shown in the placements `domain_id` [B]."""
        slope, offset = (torch.tensor([getattr(p, n) for p in self.placements.values()]) for n in ("slope", "offset"))
        logits = self.intercept + self.spread * self.latents(dense)
        if len(self.placements) == 1:
            return logits * slope + offset
        return logits * slope[domain_id, None] + offset[domain_id, None]

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows, `truth` [B, T] being the chances that their labels were drawn from."""
        dense, domain_id = self._inputs(num_rows, generator)
        truth = torch.sigmoid(self.logits(dense, domain_id))
        # a column for every task there is, so that rows are the same whichever of them are asked for
        chances = torch.rand(num_rows, len(LABELS), generator=generator)[:, [_PLACE[task] for task in self.tasks]]
        labels = (chances < truth).float()
        labels[:, 1:] *= labels[:, :1]
        weights = labels[:, :1].expand_as(labels).clone()
        weights[:, 0] = 1
        return make_batch(generator, dense=dense, labels=labels, weights=weights, domain_id=domain_id, truth=truth)

    def _inputs(self, num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dense = torch.zeros(num_rows, NUM_INPUTS + NUM_SEGMENTS)
        dense[:, :NUM_INPUTS] = torch.randn(num_rows, NUM_INPUTS, generator=generator)
        segment = torch.randint(NUM_SEGMENTS, (num_rows, 1), generator=generator)
        dense[:, NUM_INPUTS:].scatter_(1, segment, SEGMENT_SCALE)
        ends = torch.tensor([p.share for p in self.placements.values()]).cumsum(0)
        return dense, torch.bucketize(torch.rand(num_rows, generator=generator), ends[:-1])

    def _set_rates(self, rates: Sequence[float]) -> None:
        """Choose the intercepts that give the `rates` before placements shift them; a click's chance weighs the others."""
        dense, _ = self._inputs(CALIBRATION_ROWS, make_generator(self.seed, 0))
        steep = (self.spread * self.latents(dense)).double().numpy()
        weights = np.ones(len(steep))
        for task, rate in enumerate(rates):
            self.intercept[task] = find_intercept(steep[:, task], rate=rate, weights=weights)
            if task == 0:
                weights = expit(float(self.intercept[0]) + steep[:, 0])


class _Functions:
    """Random functions of the inputs, linear + a small tanh network + bilinear, made orthonormal over rows in their order.

    Args:
        seed: of the world.
        groups: numbers, each of which stands for NUM_SEGMENTS functions, the same whatever the other groups are, but for
            being made orthogonal to those before them.
    """

    def __init__(self, seed: int, *, groups: Sequence[int]) -> None:
        self.num = NUM_SEGMENTS * len(groups)
        generators = [make_generator(seed, 0, group) for group in groups]
        # of every function: a linear form, two whose product is taken, and the hidden units, steep enough to bend
        kinds = [(1, 1.0), (1, 0.7), (1, 1.0), (NUM_HIDDEN, 1.5)]
        self.forms = torch.cat([self._normal(NUM_INPUTS * k, generators).view(NUM_INPUTS, -1) * s for k, s in kinds], 1)
        self.forms /= math.sqrt(NUM_INPUTS)
        self.readout = self._normal(NUM_HIDDEN, generators) * (1.5 / math.sqrt(NUM_HIDDEN))
        self.mean, self.unmix = torch.zeros(self.num), torch.eye(self.num)
        values = self(torch.randn(CALIBRATION_ROWS, NUM_INPUTS, generator=make_generator(seed, 0))).double()
        root = torch.linalg.cholesky(values.T.cov())
        self.mean, self.unmix = values.mean(0).float(), torch.linalg.inv(root).T.float()

    def _normal(self, num: int, generators: Sequence[torch.Generator]) -> Tensor:
        """[num, J] standard normal numbers."""
        return torch.cat([torch.randn(num, NUM_SEGMENTS, generator=generator) for generator in generators], dim=1)

    def __call__(self, x: Tensor) -> Tensor:
        """[B, NUM_INPUTS] -> [B, J]."""
        linear, first, second, hidden = (x @ self.forms).split([self.num] * 3 + [self.num * NUM_HIDDEN], dim=1)
        bent = (torch.tanh(hidden).view(-1, NUM_HIDDEN, self.num) * self.readout).sum(1)
        return (linear + bent + first * second - self.mean) @ self.unmix


def _mix(tasks: Sequence[str]) -> Tensor:
    """[segments, T, J]: the weight of every function in the latent of a task in a segment."""
    others = [task for task in tasks if LABELS[task].correlation is not None]
    mix = torch.zeros(NUM_SEGMENTS, len(tasks), NUM_SEGMENTS * (1 + len(others)))
    for place, task in enumerate(tasks):
        for s in range(NUM_SEGMENTS):
            base = s if task == "click" else (s + 1) % NUM_SEGMENTS
            correlation = LABELS[task].correlation
            mix[s, place, base] = 1.0 if correlation is None else correlation
            if correlation is not None:
                mix[s, place, NUM_SEGMENTS * (1 + others.index(task)) + s] = math.sqrt(1 - correlation**2)
    return mix


def _check_tasks(tasks: Sequence[str]) -> None:
    unknown = [task for task in tasks if task not in LABELS]
    if unknown:
        raise ConfigError(f"tasks of a SegmentWorld hold '{unknown[0]}'; {nearest(unknown[0], LABELS)}")
    if list(tasks[:1]) != ["click"]:
        raise ConfigError(f"tasks of a SegmentWorld are {list(tasks)}, expected click first")


def _segment_data(tasks: Sequence[str], loss_weights: dict[str, float], placements: dict[str, Placement]) -> DataConfig:
    configs = {
        task: TaskConfig(
            label=task,
            condition=None if task == "click" else "click",
            truth=f"true_{task}",
            auxiliary=LABELS[task].correlation is not None,
            loss_weight=loss_weights.get(task, 1.0),
        )
        for task in tasks
    }
    domain = DomainConfig(column="placement", names=list(placements)) if len(placements) > 1 else None
    features = {"inputs": FeatureConfig(kind=FeatureKind.vector, size=NUM_INPUTS + NUM_SEGMENTS)}
    return DataConfig(name="segments", path="", features=features, tasks=configs, domain=domain)


# ---- the MMoE paper's pair of regressions


class TaskPair(World):
    """Two regressions whose weights have cosine `p` (Ma et al., KDD 2018, section 3.2).

    u_1, u_2 orthonormal; w_1 = c u_1, w_2 = c (p u_1 + sqrt(1 - p^2) u_2); x ~ N(0, I_d);
    y_k = w_k x + sum_i sin(alpha_i w_k x + beta_i) + noise, with the alpha and beta of both tasks alike. The paper leaves open c,
    the number of sines, alpha and beta: here c = 1, and 10 sines of alpha, beta ~ N(0, 1), as in the PLE paper.

    Args:
        seed: of weights and rows, >= 0.
        p: cosine of the weights, -1 to 1.
        num_inputs: d.
        num_sines: how many.
        noise: standard deviation of the noise.
    """

    def __init__(self, seed: int, *, p: float, num_inputs: int = 100, num_sines: int = 10, noise: float = 0.1) -> None:
        self.seed, self.noise = seed, noise
        generator = make_generator(seed, 0)
        basis, _ = torch.linalg.qr(torch.randn(num_inputs, 2, generator=generator))
        self.weights = basis @ torch.tensor([[1.0, p], [0.0, math.sqrt(1 - p**2)]])  # [d, 2]
        self.alpha, self.beta = torch.randn(2, num_sines, generator=generator)
        tasks = {f"task_{k}": TaskConfig(label=f"y_{k}", kind=TaskKind.regression) for k in (1, 2)}
        features = {"inputs": FeatureConfig(kind=FeatureKind.vector, size=num_inputs)}
        self.data = DataConfig(name="task_pair", path="", features=features, tasks=tasks)

    def signal(self, dense: Tensor) -> Tensor:
        """[B, d] -> labels without noise [B, 2]."""
        linear = dense @ self.weights
        return linear + torch.sin(linear.unsqueeze(-1) * self.alpha + self.beta).sum(-1)

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows, both tasks of weight 1."""
        dense = torch.randn(num_rows, len(self.weights), generator=generator)
        signal = self.signal(dense)
        labels = signal + self.noise * torch.randn(signal.shape, generator=generator)
        return make_batch(generator, dense=dense, labels=labels, weights=torch.ones_like(labels))


# ---- what worlds are made with


def make_batch(
    generator: torch.Generator,
    *,
    dense: Tensor,
    labels: Tensor,
    weights: Tensor,
    sparse_features: KeyedJaggedTensor | None = None,
    domain_id: Tensor | None = None,
    truth: Tensor | None = None,
) -> Batch:
    """Rows numbered from 0 with fresh draws, no group, and by default no ids and one domain; see `Batch`."""
    size = len(dense)
    return Batch(
        sparse_features=no_ids(size) if sparse_features is None else sparse_features,
        dense=dense,
        labels=labels,
        weights=weights,
        domain_id=torch.zeros(size, dtype=torch.int64) if domain_id is None else domain_id,
        group_id=torch.zeros(size, dtype=torch.int64),
        row_id=torch.arange(size),
        draws=torch.randint(-(2**63), 2**63 - 1, (size, 2), generator=generator),
        truth=truth,
        num_rows=size,
    )


def no_ids(size: int) -> KeyedJaggedTensor:
    """`size` rows without keys."""
    empty = torch.zeros(0, dtype=torch.int64)
    return KeyedJaggedTensor(keys=[], values=empty, lengths=empty.int(), stride=size)


def make_generator(*seeds: int) -> torch.Generator:
    """Numbers that are a function of all the `seeds`, >= 0, and unlike those of any others."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1))


def find_intercept(logits: np.ndarray, *, rate: float, weights: np.ndarray) -> float:
    """What to add to `logits` [R] for a mean chance of `rate`, 0 to 1, over rows of `weights` [R]."""
    return brentq(lambda z: np.average(expit(z + logits), weights=weights) - rate, -30, 30)

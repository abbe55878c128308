"""The networks and worlds that the studies of `rec.study` compare, how one of them is trained, and what is measured.

Streams of a world keep apart the rows that are trained on, that are scored, and that calibrators are fitted on. Binary tasks
are scored with the true probability as the label: with it, an AUC is what endless labels would come to, without their noise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice

import numpy as np
import torch
from torch import nn

from rec.calibration import CalibrationConfig, Calibrators
from rec.curves import auc, exact_curve
from rec.experts import MMoE, MMoEConfig, SharedBottomConfig
from rec.features import Batch
from rec.health import ExpertHealth
from rec.intervals import BinaryMeasure, TaskRows
from rec.losses import MultitaskLoss
from rec.mixtures import ExpertConfig, ExpertKind, ExpertsConfig
from rec.model import ModelConfig, Outputs, Ranker
from rec.predictions import Rows
from rec.towers import TowersConfig
from rec.widen import closest_width
from rec.worlds import PLACEMENTS, SegmentWorld, TaskPair, World, take

TRAIN, EVALUATION, HELD_OUT = 0, 1, 2  # streams of a world
EVALUATION_ROWS = 50_000
Scores = dict[str, float]  # measure -> value
Lines = dict[str, Scores]  # line of the table -> its scores; "group / name" is compared with the first of its group


@dataclass(frozen=True)
class Arm:
    """A network, and the world that it learns, a function of the world's seed."""

    world: Callable[[int], World]
    experts: ExpertsConfig
    tower_sizes: tuple[int, ...] = (16,)
    gate_bias: float = 0.0  # standard deviation of the gates' first biases; large ones start collapsed


@dataclass(frozen=True)
class Trained:
    """What an arm came to: its name, its network and what this says of `rows`, which it has not seen."""

    name: str
    world: World
    model: Ranker
    rows: Batch
    outputs: Outputs


@dataclass(frozen=True)
class Study:
    """Arms by name, how they are trained, and what is measured."""

    arms: Callable[[], dict[str, Arm]]
    score: Callable[[Trained], Lines]
    compared: tuple[str, ...]  # measures shown with differences, in pairs, to the first line of the group
    steps: int
    batch_size: int = 2048
    num_worlds: int = 5
    lr: float = 3e-3  # of Adam
    train_rows: int | None = None  # epochs over as many rows; None: fresh rows in every step
    lower_is_better: bool = False
    lowest: bool = False  # also show the lowest value over worlds


# ---- one arm in one world


def run_arm(study: Study, name: str, *, world: int, steps: int) -> Lines:
    """Train the arm `name` of a study for `steps` in the world of that seed, and score it."""
    arm = study.arms()[name]
    there = arm.world(world)
    model = build(arm, there, seed=world)
    train(model, islice(_batches(study, there, steps), steps), lr=study.lr, loss=MultitaskLoss(there.data.tasks))
    rows = there.rows(EVALUATION_ROWS, stream=EVALUATION)
    return study.score(Trained(name, there, model, rows, outputs_of(model, rows)))


def build(arm: Arm, world: World, *, seed: int = 0) -> Ranker:
    """The network of an arm: the inputs go to the experts as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = ModelConfig(experts=arm.experts, towers=TowersConfig(layer_sizes=list(arm.tower_sizes)))
        model = Ranker(config, world.data)
        if arm.gate_bias and isinstance(model.experts, MMoE):
            torch.manual_seed(seed)
            nn.init.normal_(model.experts.gates.logits.biases[-1], std=arm.gate_bias)
    return model


def train(model: Ranker, batches: Iterable[Batch], *, loss: MultitaskLoss, lr: float) -> None:
    """One step of Adam a batch, at a constant learning rate."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    model.train()
    for batch in batches:
        weights = batch.weights
        losses = loss(model(batch).logits, batch.labels, weights, weights.sum(dim=0))
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def outputs_of(model: Ranker, rows: Batch) -> Outputs:
    """What a network says outside training."""
    return model.eval()(rows)


def _batches(study: Study, world: World, steps: int) -> Iterator[Batch]:
    if study.train_rows is None:
        yield from world.batches(steps, batch_size=study.batch_size, stream=TRAIN)
        return
    rows = world.rows(study.train_rows, stream=TRAIN)
    generator = torch.Generator().manual_seed(world.seed)
    while True:
        for chosen in torch.randperm(rows.num_rows, generator=generator).split(study.batch_size):
            yield take(rows, chosen)


# ---- measures


def expected_aucs(trained: Trained) -> Scores:
    """AUC of click and purchase with true probabilities as labels; of a task given a click, rows weigh their chance of one."""
    return {task: _expected_auc(rows) for task, rows in _soft_rows(trained, trained.outputs.logits.numpy()).items()}


def gate_measures(trained: Trained) -> Scores:
    """Effective experts and largest weight of the main tasks' mean gates, and the overlap of the two; nothing without gates."""
    gates, outputs = trained.outputs.gate_weights, trained.outputs.expert_outputs
    if gates is None or outputs is None:
        return {}
    health = ExpertHealth(list(trained.world.data.tasks)[:2])
    health.update(gates[:, :2], outputs, torch.ones(len(gates), dtype=torch.bool), rows_before=health.cka_rows)
    found = health.compute()
    assert found is not None
    effective = {f"experts {task}": values.effective_experts for task, values in found.tasks.items()}
    largest = {f"largest {task}": values.largest for task, values in found.tasks.items()}
    return effective | largest | {"overlap": next(iter(found.overlap.values()))}


def score_ranking(trained: Trained) -> Lines:
    """Expected AUCs, and what the gates do."""
    return {trained.name: expected_aucs(trained) | gate_measures(trained)}


def score_regression(trained: Trained) -> Lines:
    """Mean over the tasks of squared error over the variance of the label, 0 to about 1."""
    errors = (trained.outputs.logits - trained.rows.labels).square().mean(dim=0)
    return {trained.name: {"mse": float((errors / trained.rows.labels.var(dim=0)).mean())}}


def score_platt(trained: Trained) -> Lines:
    """Each task without calibration, with one Platt scaling and with one a placement, all fitted on fresh rows."""
    data, rows = trained.world.data, trained.world.rows(EVALUATION_ROWS * 2, stream=HELD_OUT)
    logits = outputs_of(trained.model, rows).logits
    held_out = Rows(logits, rows.labels, rows.weights, rows.domain_id, rows.group_id)
    lines: dict[str, Lines] = {"raw": _calibration_lines(trained, trained.outputs.logits.numpy())}
    for name, per_domain in (("one Platt scaling", False), ("one a placement", True)):
        config = CalibrationConfig(per_domain=per_domain)
        calibrators = Calibrators(data.tasks, domains=data.domains, config=config).fit(held_out)
        calibrated = calibrators(trained.outputs.logits, trained.rows.domain_id).detach().numpy()
        lines[name] = _calibration_lines(trained, calibrated)
    return {f"{task} / {name}": lines[name][task] for task in data.tasks for name in lines}


def _calibration_lines(trained: Trained, logits: np.ndarray) -> Lines:
    return {task: _calibration(rows, trained.world.data.domains) for task, rows in _soft_rows(trained, logits).items()}


def _calibration(rows: TaskRows, domains: Sequence[str]) -> Scores:
    names = ("logloss", "ece", "field_ece")
    values = _measure(rows, *names)
    for place, domain in enumerate(domains):
        within = rows.select(rows.domain_id == place)
        values |= {f"calibration {domain}": _measure(within, "calibration")["calibration"]}
        values |= {f"auc {domain}": _expected_auc(within)}
    return values


def _measure(rows: TaskRows, *metrics: str) -> Scores:
    values = BinaryMeasure(rows, metrics=metrics)(np.ones(len(rows.scores)))
    return {name: float("nan") if value is None else value for name, value in zip(metrics, values, strict=True)}


def _expected_auc(rows: TaskRows) -> float:
    area = auc(exact_curve(rows.scores, labels=rows.labels, weights=rows.weights))
    return float("nan") if area is None else area


def _soft_rows(trained: Trained, logits: np.ndarray) -> dict[str, TaskRows]:
    """Rows of each task that is not auxiliary, labelled with true probabilities, so that scores have no noise of labels."""
    tasks, truth = trained.world.data.tasks, trained.rows.truth
    assert truth is not None
    chances = truth.double().numpy()
    domain_id = trained.rows.domain_id.numpy()
    return {
        name: TaskRows(
            scores=logits[:, t].astype(np.float64),
            labels=chances[:, t],
            weights=chances[:, list(tasks).index(task.condition)] if task.condition else np.ones(len(chances)),
            domain_id=domain_id,
        )
        for t, (name, task) in enumerate(tasks.items())
        if not task.auxiliary
    }


# ---- the studies


def num_parameters(module: nn.Module) -> int:
    """Trained numbers of a network."""
    return sum(parameter.numel() for parameter in module.parameters())


MIXED = [ExpertConfig(kind=ExpertKind.cross, num=4, low_rank=4), ExpertConfig(kind=ExpertKind.mlp, num=4)]
FEW_CLICKS = {"click": 0.05, "purchase": 0.035}  # 700 purchases in 400,000 rows


def _shared(width: int) -> ExpertsConfig:
    return SharedBottomConfig(layer_sizes=[width])


def _omoe(width: int) -> ExpertsConfig:
    return MMoEConfig(layer_sizes=[width], num_experts=8, shared_gate=True)


def _mmoe(width: int) -> ExpertsConfig:
    return MMoEConfig(layer_sizes=[width], num_experts=8)


def _mixed(width: int) -> ExpertsConfig:
    return MMoEConfig(layer_sizes=[width], mixed=MIXED)


def _matched(world: Callable[[int], World], experts: Callable[[int], ExpertsConfig], *, like: ExpertsConfig) -> Arm:
    """An arm as wide as makes its parameters as many as those of the experts `like`."""
    one = world(0)

    def count(config: ExpertsConfig) -> int:
        with torch.device("meta"):
            return num_parameters(build(Arm(world, config), one))

    return Arm(world, experts(closest_width(lambda width: count(experts(width)), count(like))))


@cache
def _experts_arms(sparse: bool = False) -> dict[str, Arm]:
    world = partial(SegmentWorld, rates=FEW_CLICKS) if sparse else SegmentWorld
    kinds = {"shared bottom": _shared, "OMoE": _omoe, "MMoE": _mmoe, "mixed experts": _mixed}
    return {name: _matched(world, make, like=_mmoe(16)) for name, make in kinds.items()}


@cache
def _collapse_arms() -> dict[str, Arm]:
    def gated(temperature: float = 1.0, dropout: float = 0.0) -> Arm:
        experts = MMoEConfig(layer_sizes=[16], num_experts=8, temperature=temperature, expert_dropout=dropout)
        return Arm(SegmentWorld, experts, gate_bias=6.0)

    warm = {f"temperature {t:g}": gated(temperature=t) for t in (1.0, 2.0, 4.0, 8.0)}
    dropped = {f"dropout {p:g}": gated(dropout=p) for p in (0.1, 0.3)}
    return {**warm, **dropped, "shared bottom": _matched(SegmentWorld, _shared, like=_mmoe(16))}


@cache
def _auxiliary_arms(sparse: bool = False) -> dict[str, Arm]:
    segments = partial(SegmentWorld, rates=FEW_CLICKS) if sparse else SegmentWorld
    bottom = _matched(SegmentWorld, _shared, like=_mmoe(16)).experts
    arms = {}
    for group, experts in (("shared bottom", bottom), ("MMoE", _mmoe(16))):
        arms[f"{group} / none"] = Arm(segments, experts)
        for task in ("add_to_cart", "favourite", "anti_favourite"):
            for weight in (0.3, 1.0):
                tasks = ("click", "purchase", task)
                world = partial(segments, tasks=tasks, loss_weights={task: weight})
                arms[f"{group} / {task} x {weight:g}"] = Arm(world, experts)
    return arms


@cache
def _platt_arms() -> dict[str, Arm]:
    return {"MMoE": Arm(partial(SegmentWorld, placements=PLACEMENTS), _mmoe(16))}


@cache
def _paper_arms() -> dict[str, Arm]:
    kinds = {"shared bottom": _shared(113), "OMoE": _omoe(16), "MMoE": _mmoe(16)}
    return {
        f"p = {p:g} / {name}": Arm(partial(TaskPair, p=p), experts, tower_sizes=(8,))
        for p in (1.0, 0.9, 0.5, 0.0)
        for name, experts in kinds.items()
    }


_RANKED = ("click", "purchase")
STUDIES = {
    "experts": Study(_experts_arms, score_ranking, _RANKED, steps=4000),
    "experts_sparse": Study(partial(_experts_arms, True), score_ranking, _RANKED, steps=588, train_rows=400_000),
    "collapse": Study(_collapse_arms, score_ranking, _RANKED, steps=2000),
    "auxiliary": Study(_auxiliary_arms, score_ranking, _RANKED, steps=1500),
    "auxiliary_sparse": Study(partial(_auxiliary_arms, True), score_ranking, _RANKED, steps=588, train_rows=400_000),
    "platt": Study(_platt_arms, score_platt, ("logloss", "ece", "field_ece"), steps=2000, lower_is_better=True),
    "mmoe_paper": Study(
        _paper_arms,
        score_regression,
        ("mse",),
        steps=4000,
        batch_size=128,
        lr=1e-3,
        num_worlds=10,
        lower_is_better=True,
        lowest=True,
    ),
}

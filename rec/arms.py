"""What a study compares: arms, each a network in a world, how one is trained, and what is measured.

Streams of a world keep apart the rows that are trained on, that are scored, and that calibrators are fitted on. Binary tasks
are scored with the true probability as the label: with it, an AUC is what endless labels would come to, without their noise.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from rec.calibration import CalibrationConfig, Calibrators
from rec.curves import auc, exact_curve
from rec.experts import MMoE
from rec.features import Batch
from rec.health import ExpertHealth
from rec.intervals import BinaryMeasure, TaskRows
from rec.losses import MultitaskLoss
from rec.mixtures import ExpertsConfig
from rec.model import ModelConfig, Outputs, Ranker
from rec.predictions import Rows
from rec.sharding import ShardingConfig, init_tables
from rec.towers import TowersConfig
from rec.worlds import World, take

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
    parts: Mapping[str, Any] = field(default_factory=dict)  # further stages: fields of ModelConfig


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
    lower_is_better: tuple[str, ...] = ()  # measures of which less is better
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
    """The network of an arm; without further parts the inputs go to the experts as they are."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages = {"towers": TowersConfig(layer_sizes=list(arm.tower_sizes)), **arm.parts}
        model = Ranker(ModelConfig(experts=arm.experts, **stages), world.data)
        init_tables(model.embeddings, ShardingConfig(), seed=seed)
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
        outputs = model(batch)
        losses = loss(outputs.logits, batch.labels, weights, weights.sum(dim=0), towers=outputs.towers)
        total = losses.total if outputs.penalty is None else losses.total + outputs.penalty
        optimizer.zero_grad()
        (total if outputs.row_penalty is None else total + outputs.row_penalty.mean()).backward()
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
    return {task: expected_auc(rows) for task, rows in _soft_rows(trained, trained.outputs.logits.numpy()).items()}


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
    values = measure(rows, *names)
    for place, domain in enumerate(domains):
        within = rows.select(rows.domain_id == place)
        values |= {f"calibration {domain}": measure(within, "calibration")["calibration"]}
        values |= {f"auc {domain}": expected_auc(within)}
    return values


def measure(rows: TaskRows, *metrics: str) -> Scores:
    """Metrics of `rec.curves` by name; NaN where one has no meaning."""
    values = BinaryMeasure(rows, metrics=metrics)(np.ones(len(rows.scores)))
    return {name: float("nan") if value is None else value for name, value in zip(metrics, values, strict=True)}


def expected_auc(rows: TaskRows) -> float:
    """AUC with the labels, true probabilities, as shares of positives; NaN where it has no meaning."""
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


def num_parameters(module: nn.Module) -> int:
    """Trained numbers of a network."""
    return sum(parameter.numel() for parameter in module.parameters())

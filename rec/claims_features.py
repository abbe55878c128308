"""The studies of Taobao's and AppS's rankers: which ways of using features, and of learning later hops, are compared.

All but `history` are in `rec.id_world.IdWorld`; names that end in `_sparse` have few rows and many ids, which are seen twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rec.arms import Arm, Lines, Scores, Study, Trained, expected_auc, expected_aucs, measure
from rec.experts import MMoEConfig
from rec.features import Batch
from rec.funnel import log_complement
from rec.histories import HistoryConfig, HistoryKind
from rec.id_world import HOPS, NUM_FIELDS, NUM_LINEAR, HistoryWorld, Hops, HopWorld, IdWorld, TaskForm
from rec.interaction import FMConfig, FMKind
from rec.intervals import TaskRows
from rec.linear import LinearConfig, Route
from rec.schema import Debias
from rec.worlds import World

Parts = Mapping[str, Any]  # of an Arm

TAOBAO = MMoEConfig(layer_sizes=[32], num_experts=4)
APPS = MMoEConfig(layer_sizes=[32], num_experts=2)
NUM_IDS = {False: 50, True: 200}  # of a field, by whether rows are few
ROUTES = {
    "v1": [Route.logits],
    "v2": [Route.towers],
    "v3": [Route.experts, Route.gates],
    "v4": [Route.experts, Route.gates, Route.logits],
    "v5": [Route.towers, Route.logits],
}


# ---- scores


@dataclass(frozen=True)
class HopLogits:
    """What a network says of the hops of B rows, in float64.

    Attributes:
        steps: [B, T] logits of every hop given the one before.
        log_chances: [B, T] logarithms of the chances of every hop and all before it.
    """

    steps: Tensor
    log_chances: Tensor


def hop_logits(trained: Trained) -> HopLogits:
    """The same two of all forms of tasks. A direct task's step is a ratio of two predictions, taken as no more than 1 - 1e-6."""
    hops = hop_world(trained).hops
    log_p = logsigmoid(trained.outputs.towers[:, : hops.num].double())
    if hops.form is not TaskForm.direct:
        return HopLogits(trained.outputs.towers[:, : hops.num].double(), log_p.cumsum(dim=1))
    ratios = torch.cat([log_p[:, :1], log_p.diff(dim=1)], dim=1).clamp(max=-1e-6)
    return HopLogits(ratios - log_complement(ratios), log_p)


def score_aucs(trained: Trained) -> Lines:
    """Expected AUC of every task."""
    return {trained.name: expected_aucs(trained)}


def score_hops(trained: Trained) -> Lines:
    """Expected AUCs of hops, and how well the second is known where there was no click (`unclicked_scores`).

    `click`, `second_click`, `order`: given the hop before, rows weighing their chance of it. `... of all`: of the hop and all
    before it, on all rows.
    """
    said, steps = hop_logits(trained), hop_world(trained).step_truth(trained.rows).double()
    chances, values = steps.cumprod(dim=1), {}
    for hop, name in enumerate(trained.world.data.tasks):
        before = chances[:, hop - 1] if hop else torch.ones(len(steps))
        values[name] = expected_auc(_rows(said.steps[:, hop], labels=steps[:, hop], weights=before))
        if hop:
            whole = _rows(said.log_chances[:, hop], labels=chances[:, hop], weights=torch.ones(len(steps)))
            values[f"{name} of all"] = expected_auc(whole)
    return {trained.name: values | unclicked_scores(said, steps)}


def unclicked_scores(said: HopLogits, steps: Tensor) -> Scores:
    """The second hop's step where there is no click: rows weigh their chance of none, labels are the true chances.

    `logloss` and `calibration` are those of `rec.curves`; `bias` is how far the calibration is from 1; `above click` is the share of
    all rows whose chance of both hops is said to be above that of the first.

    Args:
        said: of B rows.
        steps: [B, T] true chances of every hop given the one before, float64.
    """
    rows = _rows(said.steps[:, 1], labels=steps[:, 1], weights=1 - steps[:, 0])
    values = measure(rows, "logloss", "calibration")
    above = (said.log_chances[:, 1] > said.log_chances[:, 0]).double().mean().item()
    return {
        "unclicked logloss": values["logloss"],
        "unclicked bias": abs(values["calibration"] - 1),
        "unclicked calibration": values["calibration"],
        "above click": above,
    }


def hop_world(trained: Trained) -> HopWorld:
    """The world of an arm of a study of hops."""
    assert isinstance(trained.world, HopWorld)
    return trained.world


def _rows(scores: Tensor, *, labels: Tensor, weights: Tensor) -> TaskRows:
    columns = {"scores": scores, "labels": labels, "weights": weights}
    domain_id = np.zeros(len(scores), dtype=np.int64)
    return TaskRows(**{name: column.double().numpy() for name, column in columns.items()}, domain_id=domain_id)


# ---- arms


class UnseenLinear(IdWorld):
    """The same rows, whose linear features the network does not see: they are 0."""

    def draw(self, num_rows: int, generator: torch.Generator) -> Batch:
        """Fresh rows; `step_truth` of them is not their chances, `truth` is."""
        rows = super().draw(num_rows, generator)
        rows.dense[:, :NUM_LINEAR] = 0
        return rows


def _ids(sparse: bool, kind: type[IdWorld] = IdWorld, **options: Any) -> Callable[[int], World]:
    return partial(kind, num_ids=NUM_IDS[sparse], **options)


def _linear(route: str, *, exclusive: bool = False, ids: bool = False) -> Parts:
    fields = [f"field_{f}" for f in range(NUM_FIELDS)] if ids else []
    return {"linear": LinearConfig(features=[*fields, "linear"], to=ROUTES[route], exclusive=exclusive)}


def _linear_arms(sparse: bool = False) -> dict[str, Arm]:
    """The deep part reads the linear features only in arms named after it. Derived ones are linear forms of what it reads."""
    new, derived = _ids(sparse), _ids(sparse, derived=True)
    return {
        "new / deep part": Arm(new, TAOBAO),
        "new / none": Arm(_ids(sparse, UnseenLinear), TAOBAO),
        **{f"new / {v}": Arm(new, TAOBAO, parts=_linear(v, exclusive=True)) for v in ROUTES},
        "new / v1 and deep part": Arm(new, TAOBAO, parts=_linear("v1")),
        "derived / none": Arm(_ids(sparse, UnseenLinear, derived=True), TAOBAO),
        **{f"derived / {v}": Arm(derived, TAOBAO, parts=_linear(v, exclusive=True)) for v in ("v1", "v4")},
    }


def _history_arms() -> dict[str, Arm]:
    def attended(**config: Any) -> Parts:
        return {"histories": [HistoryConfig(feature="history", candidate="item", layer_sizes=[32, 16], **config)]}

    kinds = {
        "mean": attended(kind=HistoryKind.mean),
        "DIN": attended(kind=HistoryKind.din),
        "DIN, softmax": attended(kind=HistoryKind.din, softmax=True),
        "transformer": attended(kind=HistoryKind.transformer, feedforward_size=32),
    }
    worlds: dict[str, Callable[[int], World]] = {
        "candidate": HistoryWorld,
        "control": partial(HistoryWorld, candidate_dependent=False),
    }
    return {
        f"{group} / {name}": Arm(world, TAOBAO, parts=parts)
        for group, world in worlds.items()
        for name, parts in kinds.items()
    }


def _hops_arms(sparse: bool = False) -> dict[str, Arm]:
    forms = {"condition": TaskForm.conditional, "product": TaskForm.entire}
    return {name: Arm(_ids(sparse, hops=Hops(num=3, form=form)), TAOBAO) for name, form in forms.items()}


def _loss_weight_arms(sparse: bool = False) -> dict[str, Arm]:
    hops = {f"second click x {w:g}": Hops(loss_weights=(1.0, w)) for w in (1.0, 0.1, 0.3, 3.0, 10.0)}
    return {name: Arm(_ids(sparse, hops=of), TAOBAO) for name, of in hops.items()}


def _depth_arms(sparse: bool = False) -> dict[str, Arm]:
    sizes = {"5 layers": [64, 48, 32], "3 layers": [32]}  # with the two of a tower
    return {name: Arm(_ids(sparse), MMoEConfig(layer_sizes=size, num_experts=4)) for name, size in sizes.items()}


def _fm_arms(sparse: bool = False) -> dict[str, Arm]:
    """The deep part reads everything; the linear part has weights of the ids, too, as a machine's first order."""
    world = _ids(sparse, hops=Hops(form=TaskForm.direct, loss_weights=(0.95, 0.05)))
    linear: dict[str, Parts] = {"no linear part": {}} | {v: _linear(v, ids=True) for v in ("v1", "v4")}
    machines = {
        "none": FMConfig(),
        "shared": FMConfig(FMKind.shared),
        "shared, scale": FMConfig(FMKind.shared, scale=True),
        "per task": FMConfig(FMKind.per_task),
    }
    return {
        f"{group} / {name}": Arm(world, APPS, parts={**parts, "fm": fm})
        for group, parts in linear.items()
        for name, fm in machines.items()
    }


def _entire_space_arms(sparse: bool = False) -> dict[str, Arm]:
    forms = {"condition": TaskForm.conditional, "direct": TaskForm.direct, "product": TaskForm.entire}
    hops = {name: Hops(form=form) for name, form in forms.items()}
    for name in ("condition", "product"):
        hops |= {f"{name}, {d.name}": Hops(form=forms[name], debias=d) for d in (Debias.ips, Debias.dr)}
    return {name: Arm(_ids(sparse, hops=of), APPS) for name, of in hops.items()}


_TWO = ("click", "second_click")
_UNCLICKED = ("unclicked logloss", "unclicked bias")


def _both(name: str, arms: Callable[[bool], dict[str, Arm]], **options: Any) -> dict[str, Study]:
    """A study with a million fresh rows, and the same with few."""
    return {
        name: Study(partial(arms, False), steps=500, **options),
        f"{name}_sparse": Study(partial(arms, True), steps=196, train_rows=200_000, **options),
    }


# learning rates were chosen among .003 and .01 in world 0, for the first arms
STUDIES = {
    **_both("linear", _linear_arms, score=score_aucs, compared=_TWO),
    "history": Study(_history_arms, score_aucs, _TWO, steps=800, lr=1e-2),
    **_both(
        "hops", _hops_arms, score=score_hops, compared=(*HOPS, "order of all", *_UNCLICKED), lower_is_better=_UNCLICKED
    ),
    **_both("loss_weight", _loss_weight_arms, score=score_aucs, compared=_TWO),
    **_both("depth", _depth_arms, score=score_aucs, compared=_TWO),
    **_both("fm", _fm_arms, score=score_aucs, compared=_TWO, lr=1e-2),
    **_both(
        "entire_space",
        _entire_space_arms,
        score=score_hops,
        compared=("second_click of all", *_UNCLICKED),
        lower_is_better=_UNCLICKED,
    ),
}

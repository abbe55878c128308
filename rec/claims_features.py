"""The studies of Taobao's and AppS's rankers: which ways of using features, and of learning later hops, are compared.

All but `history` are in `rec.id_world.IdWorld`; names that end in `_sparse` have few rows and many ids, which are seen twice.
"""

from collections.abc import Mapping
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

TAOBAO = MMoEConfig(layer_sizes=[32], num_experts=4)
APPS = MMoEConfig(layer_sizes=[32], num_experts=2)
MANY_IDS = 200  # of a field, for 200,000 rows; with plenty of rows there are 50
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
        """Fresh rows."""
        rows = super().draw(num_rows, generator)
        rows.dense[:, :NUM_LINEAR] = 0
        return rows


def _sizes(sparse: bool) -> Mapping[str, Any]:
    return {"num_ids": MANY_IDS} if sparse else {}


def _linear(route: str, *, exclusive: bool = False, ids: bool = False) -> dict[str, LinearConfig]:
    fields = [f"field_{f}" for f in range(NUM_FIELDS)] if ids else []
    return {"linear": LinearConfig(features=[*fields, "linear"], to=ROUTES[route], exclusive=exclusive)}


def _linear_arms(sparse: bool = False) -> dict[str, Arm]:
    world, unseen = (partial(kind, **_sizes(sparse)) for kind in (IdWorld, UnseenLinear))
    derived = [partial(kind, **_sizes(sparse), derived=True) for kind in (IdWorld, UnseenLinear)]
    return {
        "new / deep part": Arm(world, TAOBAO),
        "new / none": Arm(unseen, TAOBAO),
        **{f"new / {v}": Arm(world, TAOBAO, parts=_linear(v, exclusive=True)) for v in ROUTES},
        "new / v1 and deep part": Arm(world, TAOBAO, parts=_linear("v1")),
        "derived / none": Arm(derived[1], TAOBAO),
        **{f"derived / {v}": Arm(derived[0], TAOBAO, parts=_linear(v, exclusive=True)) for v in ("v1", "v4")},
    }


def _history_arms() -> dict[str, Arm]:
    def attended(**config: Any) -> dict[str, list[HistoryConfig]]:
        return {"histories": [HistoryConfig(feature="history", candidate="item", layer_sizes=[32, 16], **config)]}

    kinds = {
        "mean": attended(kind=HistoryKind.mean),
        "DIN": attended(kind=HistoryKind.din),
        "DIN, softmax": attended(kind=HistoryKind.din, softmax=True),
        "transformer": attended(kind=HistoryKind.transformer, feedforward_size=32),
    }
    worlds = {"candidate": HistoryWorld, "control": partial(HistoryWorld, candidate_dependent=False)}
    return {
        f"{group} / {name}": Arm(world, TAOBAO, parts=parts)
        for group, world in worlds.items()
        for name, parts in kinds.items()
    }


def _hops_arms(sparse: bool = False) -> dict[str, Arm]:
    forms = {"condition": TaskForm.conditional, "product": TaskForm.entire}
    return {
        name: Arm(partial(IdWorld, **_sizes(sparse), hops=Hops(num=3, form=form)), TAOBAO)
        for name, form in forms.items()
    }


def _loss_weight_arms(sparse: bool = False) -> dict[str, Arm]:
    return {
        f"second click x {weight:g}": Arm(
            partial(IdWorld, **_sizes(sparse), hops=Hops(loss_weights=(1.0, weight))), TAOBAO
        )
        for weight in (1.0, 0.1, 0.3, 3.0, 10.0)
    }


def _depth_arms(sparse: bool = False) -> dict[str, Arm]:
    sizes = {"5 layers": [64, 48, 32], "3 layers": [32]}  # with the towers' two
    world = partial(IdWorld, **_sizes(sparse))
    return {name: Arm(world, MMoEConfig(layer_sizes=size, num_experts=4)) for name, size in sizes.items()}


def _fm_arms(sparse: bool = False) -> dict[str, Arm]:
    world = partial(IdWorld, **_sizes(sparse), hops=Hops(form=TaskForm.direct, loss_weights=(0.95, 0.05)))
    linear: dict[str, Mapping[str, Any]] = {
        "no linear part": {},
        "v1": _linear("v1", ids=True),
        "v4": _linear("v4", ids=True),
    }
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
    hops = {name: Hops(form=form) for name, form in forms.items()} | {
        f"{name}, {debias.name}": Hops(form=forms[name], debias=debias)
        for name in ("condition", "product")
        for debias in (Debias.ips, Debias.dr)
    }
    return {name: Arm(partial(IdWorld, **_sizes(sparse), hops=of), APPS) for name, of in hops.items()}


_TWO = ("click", "second_click")
_STEP = ("unclicked logloss", "unclicked bias")
_PLENTY = partial(Study, steps=1000)
_FEW = partial(Study, steps=196, train_rows=200_000)  # twice over
STUDIES = {
    "linear": _PLENTY(_linear_arms, score_aucs, _TWO),
    "linear_sparse": _FEW(partial(_linear_arms, True), score_aucs, _TWO),
    "history": Study(_history_arms, score_aucs, _TWO, steps=1500),
    "hops": _PLENTY(_hops_arms, score_hops, (*HOPS, "order of all", *_STEP), lower_is_better=_STEP),
    "hops_sparse": _FEW(partial(_hops_arms, True), score_hops, (*HOPS, "order of all", *_STEP), lower_is_better=_STEP),
    "loss_weight": _PLENTY(_loss_weight_arms, score_aucs, _TWO),
    "loss_weight_sparse": _FEW(partial(_loss_weight_arms, True), score_aucs, _TWO),
    "depth": _PLENTY(_depth_arms, score_aucs, _TWO),
    "depth_sparse": _FEW(partial(_depth_arms, True), score_aucs, _TWO),
    "fm": _PLENTY(_fm_arms, score_aucs, _TWO),
    "fm_sparse": _FEW(partial(_fm_arms, True), score_aucs, _TWO),
    "entire_space": _PLENTY(_entire_space_arms, score_hops, ("second_click of all", *_STEP), lower_is_better=_STEP),
    "entire_space_sparse": _FEW(
        partial(_entire_space_arms, True), score_hops, ("second_click of all", *_STEP), lower_is_better=_STEP
    ),
}

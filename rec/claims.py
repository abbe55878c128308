"""The studies of the MMoE paper and of Etsy's ranker: which networks and worlds are compared."""

from collections.abc import Callable
from functools import cache, partial

import torch

from rec.arms import Arm, Study, build, num_parameters, score_platt, score_ranking, score_regression
from rec.experts import MMoEConfig, SharedBottomConfig
from rec.mixtures import ExpertConfig, ExpertKind, ExpertsConfig
from rec.widen import closest_width
from rec.worlds import PLACEMENTS, SegmentWorld, TaskPair, World

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
_CALIBRATED = ("logloss", "ece", "field_ece")
STUDIES = {
    "experts": Study(_experts_arms, score_ranking, _RANKED, steps=4000),
    "experts_sparse": Study(partial(_experts_arms, True), score_ranking, _RANKED, steps=588, train_rows=400_000),
    "collapse": Study(_collapse_arms, score_ranking, _RANKED, steps=2000),
    "auxiliary": Study(_auxiliary_arms, score_ranking, _RANKED, steps=1500),
    "auxiliary_sparse": Study(partial(_auxiliary_arms, True), score_ranking, _RANKED, steps=588, train_rows=400_000),
    "platt": Study(_platt_arms, score_platt, _CALIBRATED, steps=2000, lower_is_better=_CALIBRATED),
    "mmoe_paper": Study(
        _paper_arms,
        score_regression,
        ("mse",),
        steps=4000,
        batch_size=128,
        lr=1e-3,
        num_worlds=10,
        lower_is_better=("mse",),
        lowest=True,
    ),
}

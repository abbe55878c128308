import pytest
import torch

from rec import arms
from rec.arms import build, num_parameters, run_arm
from rec.claims import MIXED, STUDIES
from rec.worlds import SegmentWorld, TaskPair


@pytest.mark.parametrize("study", ["experts", "experts_sparse"])
def test_networks_of_the_experts_study_are_of_one_size(study: str) -> None:
    sizes = {name: num_parameters(build(arm, arm.world(0))) for name, arm in STUDIES[study].arms().items()}
    assert len(sizes) == 4 and max(sizes.values()) < 1.01 * min(sizes.values())
    assert sum(expert.num for expert in MIXED) == 8


def test_paper_s_networks_have_the_paper_s_size() -> None:
    arms = STUDIES["mmoe_paper"].arms()
    assert len(arms) == 12
    bottom = build(arms["p = 0.5 / shared bottom"], TaskPair(0, p=0.5))
    mixture = build(arms["p = 0.5 / MMoE"], TaskPair(0, p=0.5))
    weights = 100 * 16 * 8 + 16 * 8 * 2  # as the paper counts: experts' and towers' first layer, no biases
    assert round(weights / (100 + 8 * 2)) == 113 == bottom.experts.bottom.weights[0].shape[-1]
    stack = mixture.experts.experts.stacks[0]
    assert stack.weights[0].numel() + mixture.towers.towers.weights[0].numel() == weights


def test_collapse_starts_from_the_same_steep_gates_in_every_arm() -> None:
    arms, world = STUDIES["collapse"].arms(), SegmentWorld(0)
    gated = [build(arm, world, seed=7) for name, arm in arms.items() if name != "shared bottom"]
    biases = [model.experts.gates.logits.biases[-1] for model in gated]
    assert len(biases) == 6 and all(torch.equal(bias, biases[0]) for bias in biases)
    many = [build(arms["temperature 1"], world, seed=seed).experts.gates.logits.biases[-1] for seed in range(40)]
    assert torch.cat(many).std().item() == pytest.approx(6.0, rel=0.15)
    assert not torch.equal(many[0], many[1])


def test_one_platt_scaling_hides_what_one_a_placement_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "EVALUATION_ROWS", 20_000)
    lines = run_arm(STUDIES["platt"], "MMoE", world=0, steps=60)
    raw, one, own = (lines[f"click / {name}"] for name in ("raw", "one Platt scaling", "one a placement"))
    assert own["field_ece"] < 0.4 * one["field_ece"] and own["logloss"] < one["logloss"]
    assert one["ece"] < 0.5 * one["field_ece"] and abs(one["calibration foot"] - 1) > 0.2
    for place in ("top", "side", "foot"):
        assert abs(own[f"calibration {place}"] - 1) < 0.07
        assert raw[f"auc {place}"] == pytest.approx(own[f"auc {place}"], abs=1e-6)  # the order within is kept

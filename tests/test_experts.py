import numpy as np
import pytest
import torch

from rec.experts import (
    PLE,
    MMoE,
    MMoEConfig,
    PLEConfig,
    SharedBottomConfig,
    build_experts,
)
from rec.mixtures import DropoutUnit, ExpertConfig, ExpertInputs, ExpertKind, ExpertStack, GatedConfig, Sizes
from rec.schema import ConfigError
from tests.test_mixtures import draws
from tests.test_stacked import cross, mlp, randomise_biases

MIXED = [ExpertConfig(num=2), ExpertConfig(kind=ExpertKind.cross, num=2, low_rank=3), ExpertConfig(layer_sizes=[6, 4])]


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def outputs_of(row: np.ndarray, stack: ExpertStack, repeat: int = 0) -> list[np.ndarray]:
    """What the experts of a stack's `repeat`-th list say of one row, one after another."""
    found = []
    for num, group in zip(stack.nums, stack.stacks, strict=True):
        one = mlp if hasattr(group, "weights") else cross
        found += [one(row, group, repeat * num + i) for i in range(num)]
    return found


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("mixed", "hidden"), [([], []), (MIXED, []), (MIXED, [3])])
@pytest.mark.parametrize("shared_gate", [False, True])
def test_mmoe_is_the_paper_s_sum_over_experts(
    batch: int, temperature: float, mixed: list[ExpertConfig], hidden: list[int], shared_gate: bool
) -> None:
    config = MMoEConfig(
        layer_sizes=[5, 4],
        num_experts=3,
        mixed=mixed,
        gate_layer_sizes=hidden,
        temperature=temperature,
        shared_gate=shared_gate,
    )
    module = build_experts(config, Sizes(in_features=7, num_tasks=2))
    assert isinstance(module, MMoE)
    randomise_biases(module)
    z = torch.randn(batch, 7)
    mixture = module(ExpertInputs(z, draws(batch)))
    num = 5 if mixed else 3
    assert mixture.values.shape == (batch, 2, 4) and mixture.gate_weights.shape == (batch, 2, num)
    for b, row in enumerate(z.numpy()):
        outputs = outputs_of(row, module.experts)
        np.testing.assert_allclose(mixture.expert_outputs[b].detach().numpy(), outputs, rtol=1e-3, atol=1e-5)
        for t in range(2):
            weights = softmax(mlp(row, module.gates.logits, 0 if shared_gate else t) / temperature)
            np.testing.assert_allclose(mixture.gate_weights[b, t].detach().numpy(), weights, rtol=1e-4)
            expected = sum(w * output for w, output in zip(weights, outputs, strict=True))
            np.testing.assert_allclose(mixture.values[b, t].detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def ple_by_loops(module: PLE, row: np.ndarray, num_tasks: int) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Tang et al. 2020, equations 1 to 6, on one row: what the towers read, and the last level's gates by expert."""
    inputs = [row] * (num_tasks + 1)
    gates: list[dict[str, np.ndarray]] = []
    for number, level in enumerate(module.levels):
        own = [outputs_of(inputs[t], level.task_experts, t) for t in range(num_tasks)]
        shared = outputs_of(inputs[-1], level.shared_experts)
        named = {f"{t}.{i}": o for t in range(num_tasks) for i, o in enumerate(own[t])}
        named |= {f"s.{i}": o for i, o in enumerate(shared)}
        last = number + 1 == len(module.levels)
        outputs, gates = [], []
        for k in range(num_tasks if last else num_tasks + 1):
            scores = mlp(inputs[k], level.gates.logits, k)
            reach = {
                name: scores[i] for i, name in enumerate(named) if k == num_tasks or name.startswith(("s.", f"{k}."))
            }
            weights = dict(zip(reach, softmax(np.array(list(reach.values()))), strict=True))
            gates.append(weights)
            outputs.append(sum(w * named[name] for name, w in weights.items()))
        inputs = outputs
    return inputs, gates


@pytest.mark.parametrize(("levels", "mixed"), [(1, False), (2, False), (3, True)])
def test_ple_is_its_equations(levels: int, mixed: bool) -> None:
    config = PLEConfig(
        layer_sizes=[5, 4],
        num_levels=levels,
        num_shared_experts=3,
        num_task_experts=2,
        mixed_task=MIXED if mixed else [],
    )
    module = build_experts(config, Sizes(in_features=7, num_tasks=2))
    randomise_biases(module)
    z = torch.randn(4, 7)
    mixture = module(ExpertInputs(z, draws(4)))
    num_own = 5 if mixed else 2
    assert mixture.values.shape == (4, 2, 4) and mixture.gate_weights.shape == (4, 2, 2 * num_own + 3)
    names = [f"{t}.{i}" for t in range(2) for i in range(num_own)] + [f"s.{i}" for i in range(3)]
    for b, row in enumerate(z.numpy()):
        values, gates = ple_by_loops(module, row, 2)
        np.testing.assert_allclose(mixture.values[b].detach().numpy(), values, rtol=1e-3, atol=1e-5)
        for t in range(2):
            expected = [gates[t].get(name, 0.0) for name in names]
            np.testing.assert_allclose(mixture.gate_weights[b, t].detach().numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "config",
    [
        MMoEConfig(layer_sizes=[5], mixed=[ExpertConfig(), ExpertConfig(kind=ExpertKind.cross)]),
        PLEConfig(layer_sizes=[5]),
    ],
)
def test_everything_learns_and_experts_start_different(config: GatedConfig) -> None:
    module = build_experts(config, Sizes(in_features=7, num_tasks=2))
    module(ExpertInputs(torch.randn(64, 7), draws(64))).values.square().sum().backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    twins = (
        MMoE(MMoEConfig(layer_sizes=[5], num_experts=2), Sizes(in_features=7, num_tasks=2)).experts.stacks[0].weights[0]
    )
    assert not torch.equal(twins[0], twins[1])


def test_gates_start_near_even() -> None:
    module = build_experts(MMoEConfig(layer_sizes=[5], num_experts=8), Sizes(in_features=100, num_tasks=2))
    weights = module(ExpertInputs(torch.randn(500, 100), draws(500))).gate_weights
    assert weights.mean(dim=0).max().item() < 0.2


def test_expert_dropout_leaves_a_gate_of_ple_one_of_its_own() -> None:
    config = PLEConfig(expert_dropout=0.9, layer_sizes=[4], expert_dropout_per=DropoutUnit.row)
    weights = (
        build_experts(config, Sizes(in_features=3, num_tasks=2))
        .train()(ExpertInputs(torch.randn(500, 3), draws(500)))
        .gate_weights
    )
    torch.testing.assert_close(weights.sum(-1), torch.ones(500, 2))
    assert not weights[:, 0, 2:4].any() and not weights[:, 1, 0:2].any()


def test_shared_bottom_gives_every_task_the_same() -> None:
    module = build_experts(SharedBottomConfig(layer_sizes=[5, 4]), Sizes(in_features=7, num_tasks=3))
    randomise_biases(module)
    z = torch.randn(2, 7)
    mixture = module(ExpertInputs(z, draws(2)))
    assert mixture.gate_weights is None
    for b, row in enumerate(z.numpy()):
        for t in range(3):
            expected = mlp(row, module.bottom, 0)
            np.testing.assert_allclose(mixture.values[b, t].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MMoEConfig(layer_sizes=[]), r"layer_sizes is \[\]"),
        (lambda: MMoEConfig(temperature=0), r"temperature is 0, expected a value from 0.001"),
        (lambda: MMoEConfig(expert_dropout=1.0), r"expert_dropout is 1.0, expected a value from 0 to 0.99"),
        (lambda: MMoEConfig(gate_layer_sizes=[0]), r"gate_layer_sizes is \[0\]"),
        (lambda: PLEConfig(num_levels=0), "num_levels is 0"),
        (lambda: ExpertConfig(num=0), "num is 0"),
        (
            lambda: MMoEConfig(layer_sizes=[8, 4], mixed=[ExpertConfig(layer_sizes=[8])]),
            r"mixed has an expert of layer_sizes \[8\], expected the last to be 4",
        ),
    ],
)
def test_bad_settings_are_refused(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()

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
from rec.mixtures import DropoutUnit, ExpertConfig, ExpertInputs, ExpertKind, ExpertStack, GatedConfig, Gates, Sizes
from rec.schema import ConfigError
from tests.test_stacked import cross, mlp, randomise_biases

MIXED = [ExpertConfig(num=2), ExpertConfig(kind=ExpertKind.cross, num=2, low_rank=3), ExpertConfig(layer_sizes=[6, 4])]


def draws(rows: int, *, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    of_rows = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return torch.stack([of_rows, of_rows[:1].expand(rows)], dim=1)


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


class TestExpertDropout:
    def gates(self, share: float, unit: DropoutUnit, num: int = 5) -> Gates:
        config = MMoEConfig(expert_dropout=share, expert_dropout_per=unit)
        return Gates(config, 3, allowed=torch.ones(2, num, dtype=torch.bool))

    def test_leaves_out_whole_experts_at_its_rate_and_renormalises(self) -> None:
        gates, x = self.gates(0.3, DropoutUnit.row), torch.randn(4000, 3)
        whole = gates.eval()(x, draws(4000))
        left = gates.train()(x, draws(4000))
        out = left == 0
        assert torch.equal(out[:, 0], out[:, 1])  # an expert is out for all tasks
        assert out.float().mean().item() == pytest.approx(0.3, abs=0.01)
        expected = whole * ~out / (whole * ~out).sum(-1, keepdim=True)
        torch.testing.assert_close(left, expected)
        torch.testing.assert_close(left.sum(-1), torch.ones(4000, 2))

    def test_per_step_takes_the_same_from_all_rows_and_others_in_other_steps(self) -> None:
        gates, x = self.gates(0.5, DropoutUnit.step).train(), torch.randn(40, 3)
        patterns = []
        for step in range(30):
            out = gates(x, draws(40, step=step)) == 0
            assert (out == out[:1]).all()
            patterns.append(tuple(out[0, 0].tolist()))
        assert len(set(patterns)) > 10

    def test_never_takes_all(self) -> None:
        gates = self.gates(0.9, DropoutUnit.row, num=2).train()
        x = torch.randn(2000, 3)
        left = gates(x, draws(2000))
        torch.testing.assert_close(left.sum(-1), torch.ones(2000, 2))
        both = (left > 0).all(-1).all(-1)  # spared since both had been drawn
        assert both.float().mean().item() == pytest.approx(0.81 + 0.01, abs=0.03)

    def test_a_gate_of_ple_keeps_one_of_its_own(self) -> None:
        config = PLEConfig(expert_dropout=0.9, layer_sizes=[4], expert_dropout_per=DropoutUnit.row)
        weights = (
            build_experts(config, Sizes(in_features=3, num_tasks=2))
            .train()(ExpertInputs(torch.randn(500, 3), draws(500)))
            .gate_weights
        )
        torch.testing.assert_close(weights.sum(-1), torch.ones(500, 2))
        assert not weights[:, 0, 2:4].any() and not weights[:, 1, 0:2].any()

    def test_is_off_outside_training_and_does_not_see_how_rows_are_spread(self) -> None:
        gates, x, bits = self.gates(0.5, DropoutUnit.row), torch.randn(10, 3), draws(10)
        torch.testing.assert_close(gates.eval()(x, bits), self.plain(gates)(x, bits))
        whole = gates.train()(x, bits)
        torch.testing.assert_close(torch.cat([gates(x[:3], bits[:3]), gates(x[3:], bits[3:])]), whole)

    def plain(self, gates: Gates) -> Gates:
        same = Gates(MMoEConfig(), 3, allowed=gates.allowed)
        same.load_state_dict(gates.state_dict())
        return same


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

import copy
import math
from typing import cast

import numpy as np
import pytest
import torch

from rec.mixtures import ExpertInputs, Experts, ExpertsConfig, Sizes
from rec.schema import ConfigError
from rec.task_networks import (
    AITM,
    TASK_NETWORK_KINDS,
    TASK_NETWORKS,
    AITMConfig,
    CrossStitch,
    CrossStitchConfig,
    Separate,
    SeparateConfig,
    Transfer,
)
from tests.test_stacked import mlp, randomise_biases

KINDS = sorted(TASK_NETWORK_KINDS)


def build(config: ExpertsConfig, *, num_tasks: int = 3, in_features: int = 7) -> Experts:
    """Of random biases, and stitches that are far from where they start."""
    module = TASK_NETWORKS[type(config)](config, Sizes(in_features=in_features, num_tasks=num_tasks))
    randomise_biases(module)
    for stitch in getattr(module, "stitches", []):
        torch.nn.init.normal_(stitch)
    return module


def values_of(module: Experts, x: torch.Tensor) -> torch.Tensor:
    mixture = module(ExpertInputs(x, torch.zeros(len(x), 2, dtype=torch.int64)))
    assert mixture.gate_weights is None and mixture.expert_outputs is None and mixture.row_penalty is None
    return mixture.values


def numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def separate_by_loops(module: Experts, row: np.ndarray, num_tasks: int) -> list[np.ndarray]:
    return [mlp(row, cast(Separate, module).networks, t) for t in range(num_tasks)]


def cross_stitch_by_loops(module: Experts, row: np.ndarray, num_tasks: int) -> list[np.ndarray]:
    """Misra et al. 2016, equation 1: each unit of each layer of a task is a sum over the tasks' same unit."""
    assert isinstance(module, CrossStitch)
    inputs = [row] * num_tasks
    for layer, stitch in zip(module.layers, module.stitches, strict=True):
        before = [mlp(inputs[t], layer, t) for t in range(num_tasks)]
        inputs = [np.zeros_like(before[0]) for _ in range(num_tasks)]
        for t in range(num_tasks):
            for u in range(num_tasks):
                inputs[t] = inputs[t] + stitch[t, u].item() * before[u]
    return inputs


def transfer_by_loops(transfer: Transfer, z: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The equations of Xi et al. 2021 between two tasks on one row: z_t, and the weights of p and q."""
    width = len(z)
    h1, h2, h3 = (numbers(transfer.projections.weight)[i * width : (i + 1) * width] for i in range(3))
    pair = [mlp(z, transfer.hand_on, 0), q]
    scores = [sum((h2 @ u)[i] * (h3 @ u)[i] for i in range(width)) / math.sqrt(width) for u in pair]
    total = sum(math.exp(score) for score in scores)
    weights = np.array([math.exp(score) / total for score in scores])
    return weights[0] * (h1 @ pair[0]) + weights[1] * (h1 @ pair[1]), weights


def aitm_by_loops(module: Experts, row: np.ndarray, num_tasks: int) -> list[np.ndarray]:
    assert isinstance(module, AITM)
    chain = [mlp(row, module.networks, 0)]
    for t in range(1, num_tasks):
        chain.append(transfer_by_loops(module.transfers[t - 1], chain[-1], mlp(row, module.networks, t))[0])
    return chain


BY_LOOPS = {"separate": separate_by_loops, "cross_stitch": cross_stitch_by_loops, "aitm": aitm_by_loops}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("num_tasks", [1, 2, 3])
@pytest.mark.parametrize("layer_sizes", [[4], [5, 6, 4]])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_its_equations(
    kind: str, layer_sizes: list[int], num_tasks: int, batch: int, training: bool
) -> None:
    module = build(TASK_NETWORK_KINDS[kind](layer_sizes=layer_sizes), num_tasks=num_tasks).train(training)
    x = torch.randn(batch, 7)
    values = values_of(module, x)
    assert values.shape == (batch, num_tasks, 4)
    for b, row in enumerate(x.numpy()):
        expected = BY_LOOPS[kind](module, row, num_tasks)
        np.testing.assert_allclose(numbers(values[b]), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_learns_and_networks_start_different(kind: str) -> None:
    config = TASK_NETWORK_KINDS[kind](layer_sizes=[6, 5])
    module = TASK_NETWORKS[type(config)](config, Sizes(in_features=7, num_tasks=3))
    values_of(module, torch.randn(64, 7)).square().sum().backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    first = next(p for name, p in module.named_parameters() if "weights" in name)
    assert len(first) == 3 and not torch.equal(first[0], first[1])


class TestPrune:
    @pytest.mark.parametrize("tasks", [[0], [3], [1, 3], [2, 0], [0, 1, 2, 3]])
    @pytest.mark.parametrize("kind", KINDS)
    def test_what_stays_keeps_every_bit(self, kind: str, tasks: list[int]) -> None:
        for layer_sizes in ([256, 128], [33, 17]):
            config = TASK_NETWORK_KINDS[kind](layer_sizes=layer_sizes)
            whole = build(config, num_tasks=4, in_features=45).eval()
            pruned = copy.deepcopy(whole)
            pruned.prune(tasks)
            for rows in (1, 7, 50, 256):
                x = torch.randn(rows, 45)
                expected = values_of(whole, x)[:, tasks]
                assert expected.abs().amax(dim=(0, 2)).min() > 0
                assert torch.equal(values_of(pruned, x), expected), (rows, layer_sizes)

    @pytest.mark.parametrize("kind", KINDS)
    def test_twice_counts_in_what_is_left(self, kind: str) -> None:
        whole = build(TASK_NETWORK_KINDS[kind](layer_sizes=[5, 4]), num_tasks=4).eval()
        twice = copy.deepcopy(whole)
        twice.prune([0, 1, 3])
        twice.prune([1, 2])
        x = torch.randn(5, 7)
        assert torch.equal(values_of(twice, x), values_of(whole, x)[:, [1, 3]])

    def test_leaves_what_the_tasks_need_and_no_more(self) -> None:
        separate, stitched, chain = (
            build(TASK_NETWORK_KINDS[kind](layer_sizes=[5, 4]), num_tasks=4)
            for kind in ("separate", "cross_stitch", "aitm")
        )
        for module in (separate, stitched, chain):
            module.prune([0, 2])
        assert {len(p) for p in separate.parameters()} == {2}
        shapes = {name: tuple(p.shape) for name, p in stitched.named_parameters()}
        assert shapes["stitches.0"] == (4, 4) and shapes["stitches.1"] == (2, 4)
        assert {shape[0] for name, shape in shapes.items() if name.startswith("layers")} == {4}
        assert {len(p) for name, p in chain.named_parameters() if name.startswith("networks")} == {3}
        assert isinstance(chain, AITM) and len(chain.transfers) == 2
        assert not any(name.startswith("transfers.2") for name in chain.state_dict())

    def test_pruned_networks_still_learn(self) -> None:
        for kind in KINDS:
            module = build(TASK_NETWORK_KINDS[kind](layer_sizes=[5, 4]), num_tasks=4)
            module.prune([0, 2])
            values_of(module, torch.randn(64, 7)).square().sum().backward()
            assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


class TestSeparate:
    @pytest.mark.parametrize("num_tasks", [1, 2, 3])
    def test_penalty_is_the_sum_over_pairs_of_tasks(self, num_tasks: int) -> None:
        module = build(SeparateConfig(layer_sizes=[5, 4], l2_constraint=0.3), num_tasks=num_tasks)
        thetas = [np.concatenate([numbers(p[t]).ravel() for p in module.parameters()]) for t in range(num_tasks)]
        assert len(thetas[0]) == 7 * 5 + 5 + 5 * 4 + 4
        expected = 0.0
        for t in range(num_tasks):
            for u in range(t + 1, num_tasks):
                for a, b in zip(thetas[t], thetas[u], strict=True):
                    expected += 0.3 * (float(a) - float(b)) ** 2
        penalty = module.penalty()
        assert penalty is not None and penalty.shape == ()
        assert penalty.item() == pytest.approx(expected, rel=1e-5, abs=1e-7)

    def test_penalty_draws_networks_together(self) -> None:
        module = build(SeparateConfig(layer_sizes=[5, 4], l2_constraint=0.5))
        penalty = module.penalty()
        assert penalty is not None
        penalty.backward()
        for p in module.parameters():  # d/d theta_t of the sum over pairs is 2 a sum_u (theta_t - theta_u)
            expected = [sum((p[t] - p[u]).detach() for u in range(3)) for t in range(3)]
            torch.testing.assert_close(p.grad, torch.stack([torch.as_tensor(e) for e in expected]))

    @pytest.mark.parametrize("kind", KINDS)
    def test_no_penalty_unless_asked_for(self, kind: str) -> None:
        assert build(TASK_NETWORK_KINDS[kind](layer_sizes=[4])).penalty() is None

    def test_a_task_learns_nothing_from_another(self) -> None:
        module = build(SeparateConfig(layer_sizes=[5, 4]))
        values_of(module, torch.randn(64, 7))[:, 1].square().sum().backward()
        for p in module.parameters():
            assert p.grad is not None and p.grad[1].any() and not p.grad[[0, 2]].any()


class TestCrossStitch:
    @pytest.mark.parametrize(
        ("num_tasks", "own_share", "expected"),
        [
            (1, 0.9, [[1.0]]),
            (2, 0.9, [[0.9, 0.1], [0.1, 0.9]]),
            (3, 0.5, [[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]),
        ],
    )
    def test_starts_with_the_own_share(self, num_tasks: int, own_share: float, expected: list[list[float]]) -> None:
        config = CrossStitchConfig(layer_sizes=[5, 4], own_share=own_share)
        module = CrossStitch(config, Sizes(in_features=7, num_tasks=num_tasks))
        assert len(module.stitches) == 2
        for stitch in module.stitches:
            np.testing.assert_allclose(numbers(stitch), expected, rtol=1e-6)

    def test_an_own_share_of_one_starts_as_separate_networks(self) -> None:
        stitched = CrossStitch(CrossStitchConfig(layer_sizes=[5, 4], own_share=1.0), Sizes(in_features=7, num_tasks=3))
        randomise_biases(stitched)
        x = torch.randn(6, 7)
        for t in range(3):
            row = x[2].numpy()
            for layer in stitched.layers:
                row = mlp(row, layer, t)
            np.testing.assert_allclose(numbers(values_of(stitched, x)[2, t]), row, rtol=1e-4, atol=1e-6)


class TestAITM:
    def test_weights_are_those_of_the_equations_and_sum_to_one(self) -> None:
        transfer = Transfer(4)
        randomise_biases(transfer)
        z, q = torch.randn(50, 4), torch.randn(50, 4)
        given = transfer(z, q)
        assert given.values.shape == (50, 4) and given.weights.shape == (50, 2)
        torch.testing.assert_close(given.weights.sum(dim=1), torch.ones(50))
        assert given.weights.std(dim=0).min() > 0.01  # rows differ
        for b in range(50):
            values, weights = transfer_by_loops(transfer, z[b].numpy(), q[b].numpy())
            np.testing.assert_allclose(numbers(given.weights[b]), weights, rtol=1e-4)
            np.testing.assert_allclose(numbers(given.values[b]), values, rtol=1e-3, atol=1e-5)

    def test_a_task_depends_on_those_before_it_and_on_none_after_it(self) -> None:
        module = build(AITMConfig(layer_sizes=[5, 8]))
        x = torch.randn(64, 7)
        for t in range(3):
            module.zero_grad()
            values_of(module, x)[:, t].square().sum().backward()
            for name, p in module.named_parameters():
                assert p.grad is not None or name.startswith("transfers")
                if name.startswith("networks"):
                    reached = [bool(of_task.any()) for of_task in p.grad]
                    assert reached == [u <= t for u in range(3)], name
                else:
                    of_task = int(name.split(".")[1]) + 1
                    assert (p.grad is not None and bool(p.grad.any())) == (of_task <= t), name

    def test_later_tasks_change_no_value_of_earlier_ones(self) -> None:
        module = build(AITMConfig(layer_sizes=[5, 4])).eval()
        x = torch.randn(6, 7)
        before = values_of(module, x)
        with torch.no_grad():
            for name, p in module.named_parameters():
                if name.startswith("networks"):
                    p[2].add_(1)
                elif name.startswith("transfers.1"):
                    p.add_(1)
        after = values_of(module, x)
        assert torch.equal(after[:, :2], before[:, :2])
        assert not torch.isclose(after[:, 2], before[:, 2]).any(dim=1).all()

    def test_a_long_chain_of_wide_networks_starts_neither_fading_nor_polarised(self) -> None:
        module = AITM(AITMConfig(layer_sizes=[256]), Sizes(in_features=100, num_tasks=6))
        own = module.networks(torch.randn(500, 100))
        z = own[0]
        for transfer, q in zip(module.transfers, own[1:], strict=True):
            given = transfer(z, q)
            z = given.values
            assert 0.6 < (z.square().mean() / q.square().mean()).sqrt().item() < 1.1
            assert given.weights.amax(dim=1).mean().item() < 0.85


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_close_to_float32(kind: str) -> None:
    module = build(TASK_NETWORK_KINDS[kind](layer_sizes=[16, 8]))
    x = torch.randn(32, 7)
    for training in (True, False):
        expected = values_of(module.train(training), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = values_of(module, x)
        assert (values.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: SeparateConfig(l2_constraint=-1), "l2_constraint is -1, expected a value from 0"),
        (lambda: CrossStitchConfig(own_share=1.5), "own_share is 1.5, expected a value from 0 to 1"),
        (lambda: AITMConfig(layer_sizes=[]), r"layer_sizes is \[\]"),
    ],
)
def test_bad_settings_are_refused(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()

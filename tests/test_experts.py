import numpy as np
import pytest
import torch

from rec.experts import MMoE, MMoEConfig, SharedBottomConfig, StackedMLP, build_experts
from rec.schema import ConfigError


def mlp(x: np.ndarray, stacked: StackedMLP, index: int) -> np.ndarray:
    """One network of a stack on one row, layer by layer."""
    layers = list(zip(stacked.weights, stacked.biases, strict=True))
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight[index].detach().numpy() + bias[index, 0].detach().numpy()
        if stacked.activate_last or i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def randomise_biases(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mmoe_is_the_paper_s_sum_over_experts(batch: int, temperature: float) -> None:
    module = build_experts(
        MMoEConfig(layer_sizes=[5, 4], num_experts=3, temperature=temperature), in_features=7, num_tasks=2
    )
    assert isinstance(module, MMoE)
    randomise_biases(module)
    z = torch.randn(batch, 7)
    mixture = module(z)
    assert mixture.values.shape == (batch, 2, 4) and mixture.gate_weights.shape == (batch, 2, 3)
    gates, bias = module.gates.weight.detach().numpy(), module.gates.bias.detach().numpy()
    for b, row in enumerate(z.numpy()):
        outputs = [mlp(row, module.experts, i) for i in range(3)]
        for t in range(2):
            scores = [(gates[t * 3 + i] @ row + bias[t * 3 + i]) / temperature for i in range(3)]
            weights = np.exp(scores) / np.exp(scores).sum()
            np.testing.assert_allclose(mixture.gate_weights[b, t].detach().numpy(), weights, rtol=1e-5)
            expected = sum(w * output for w, output in zip(weights, outputs, strict=True))
            np.testing.assert_allclose(mixture.values[b, t].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_experts_start_different_and_all_learn() -> None:
    module = build_experts(MMoEConfig(layer_sizes=[5], num_experts=3), in_features=7, num_tasks=2)
    module(torch.randn(8, 7)).values.square().sum().backward()
    weight = module.experts.weights[0]
    assert not torch.equal(weight[0], weight[1])
    assert (weight.grad.flatten(1).abs().sum(1) > 0).all() and (module.gates.weight.grad.abs().sum() > 0)


def test_weights_start_at_the_scale_that_keeps_variance() -> None:
    weight = StackedMLP(4, 300, [200]).weights[0]
    assert weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)  # He et al. 2015


def test_shared_bottom_gives_every_task_the_same() -> None:
    module = build_experts(SharedBottomConfig(layer_sizes=[5, 4]), in_features=7, num_tasks=3)
    randomise_biases(module)
    z = torch.randn(2, 7)
    mixture = module(z)
    assert mixture.gate_weights is None
    for b, row in enumerate(z.numpy()):
        for t in range(3):
            expected = mlp(row, module.bottom, 0)
            np.testing.assert_allclose(mixture.values[b, t].detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer_sizes is \\[\\]"):
        MMoEConfig(layer_sizes=[])
    with pytest.raises(ConfigError, match=r"temperature is 0, expected a value from 0.001"):
        MMoEConfig(temperature=0)

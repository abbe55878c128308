import numpy as np
import pytest
import torch

from rec.stacked import StackedCross, StackedMLP


def mlp(x: np.ndarray, stacked: StackedMLP, index: int) -> np.ndarray:
    """One network of a stack on one row, layer by layer."""
    layers = list(zip(stacked.weights, stacked.biases, strict=True))
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight[index].detach().numpy() + bias[index, 0].detach().numpy()
        if stacked.activate_last or i + 1 < len(layers):
            x = np.maximum(x, 0)
    return x


def cross(x: np.ndarray, stacked: StackedCross, index: int) -> np.ndarray:
    """One cross network of a stack on one row, element by element of each layer's matrix."""
    start = x
    for layer, bias in enumerate(stacked.biases):
        factors = [factor[index].detach().numpy() for factor in stacked.factors[layer].parameters()]
        matrix = factors[0] if len(factors) == 1 else factors[0] @ factors[1]
        crossed = np.array([sum(x[i] * matrix[i, j] for i in range(len(x))) for j in range(len(x))])
        x = start * (crossed + bias[index, 0].detach().numpy()) + x
    return mlp(x, stacked.projection, index)


def randomise_biases(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter)


@pytest.mark.parametrize("low_rank", [None, 2, 99])
@pytest.mark.parametrize("own_inputs", [True, False])
def test_cross_networks_are_their_equations(low_rank: int | None, own_inputs: bool) -> None:
    module = StackedCross(3, 5, num_layers=2, low_rank=low_rank, out_features=4)
    randomise_biases(module)
    x = torch.randn(3, 6, 5) if own_inputs else torch.randn(6, 5)
    out = module(x)
    assert out.shape == (3, 6, 4)
    for n in range(3):
        for b in range(6):
            row = (x[n, b] if own_inputs else x[b]).numpy()
            np.testing.assert_allclose(out[n, b].detach().numpy(), cross(row, module, n), rtol=1e-4, atol=1e-5)


def test_mlps_are_loops_and_take_one_input_or_one_each() -> None:
    module = StackedMLP(3, 5, [6, 4])
    randomise_biases(module)
    x = torch.randn(3, 2, 5)
    for n in range(3):
        np.testing.assert_allclose(
            module(x)[n, 1].detach().numpy(), mlp(x[n, 1].numpy(), module, n), rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(module(x[0]), module(x[0].expand(3, -1, -1)))


def test_weights_start_at_the_scale_that_keeps_variance() -> None:
    weight = StackedMLP(4, 300, [200]).weights[0]
    assert weight.std().item() == pytest.approx((2 / 300) ** 0.5, rel=0.02)  # He et al. 2015

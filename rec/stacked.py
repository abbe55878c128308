"""Networks of one shape, each with its own weights, run as one batched product a layer and not as a loop of small ones.

Outside training each network has a product of its own. A batched one chooses its kernel, and with it the order of its sums, by
the number of networks, so that what one of them says would change in the last bits when another is pruned for serving.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


class StackedMLP(nn.Module):
    """N multilayer perceptrons of one shape, each with its own weights, run as one batched product a layer.

    Args:
        num: N.
        in_features: width of the input.
        layer_sizes: widths of the layers, ReLU after each.
        activate_last: whether the last layer has its ReLU.
    """

    def __init__(self, num: int, in_features: int, layer_sizes: list[int], *, activate_last: bool = True) -> None:
        super().__init__()
        widths = [in_features, *layer_sizes]
        self.activate_last = activate_last
        self.weights = nn.ParameterList([torch.empty(num, i, o) for i, o in pairwise(widths)])
        self.biases = nn.ParameterList([torch.zeros(num, 1, o) for o in widths[1:]])
        for weight in self.weights:
            for one in weight:
                nn.init.kaiming_uniform_(
                    one, mode="fan_out", nonlinearity="relu"
                )  # stored [in, out]: fan_out is the input

    def forward(self, x: Tensor) -> Tensor:
        """[N, B, in] or [B, in] (the same for all) -> [N, B, out]."""
        x = x.expand(len(self.weights[0]), *x.shape[-2:])
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight) if self.training else _apart(torch.addmm, bias, x, weight)
            if self.activate_last or i + 1 < len(self.weights):
                x = torch.relu(x)
        return x


class StackedCross(nn.Module):
    """N cross networks of one shape, each projected: relu(A x_L + c), x_{l+1} = x_0 * (W_l x_l + b_l) + x_l.

    W_l is [d, d], or of rank r (Wang et al., WWW 2021, equations 1 and 2).
    """

    def __init__(self, num: int, in_features: int, *, num_layers: int, low_rank: int | None, out_features: int) -> None:
        super().__init__()
        rank = None if low_rank is None else min(low_rank, in_features)
        widths = [in_features, in_features] if rank is None else [in_features, rank, in_features]
        shapes = [[torch.empty(num, i, o) for i, o in pairwise(widths)] for _ in range(num_layers)]
        self.factors = nn.ModuleList(nn.ParameterList(factors) for factors in shapes)  # of each layer's W
        self.biases = nn.ParameterList([torch.zeros(num, 1, in_features) for _ in range(num_layers)])
        for weight in self.factors.parameters():
            for one in weight:
                nn.init.xavier_normal_(one)  # as TorchRec's cross layers
        self.projection = StackedMLP(num, in_features, [out_features])

    def forward(self, x: Tensor) -> Tensor:
        """[N, B, in] or [B, in] (the same for all) -> [N, B, out]."""
        start = x = x.expand(len(self.biases[0]), *x.shape[-2:])
        for layer, bias in enumerate(self.biases):
            inner = x
            for factor in self.factors[layer].parameters():
                inner = torch.bmm(inner, factor) if self.training else _apart(torch.mm, inner, factor)
            x = torch.addcmul(x, start, inner + bias)
        return self.projection(x)


def _apart(product: Callable[..., Tensor], *stacked: Tensor) -> Tensor:
    return torch.stack([product(*parts) for parts in zip(*stacked, strict=True)])


def prune_stack(stack: nn.Module, kept: list[int]) -> None:
    """Leave only the networks numbered `kept` of a stack, in that order."""
    for parameter in stack.parameters():
        parameter.data = parameter.data[kept]

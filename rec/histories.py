"""A user's history, summarised for one candidate: a mean, DIN's local activation unit, or a small transformer.

All kinds are modules of `forward(history, mask, candidate) -> summary`:

    history    [B, L, D], embeddings of the ids in each row's history, oldest first; what `mask` leaves out is never read
    mask       [B, L] bool, the places that are filled
    candidate  [B, D], embedding of what the history is compared with, from the same table
    summary    [B, D], in the type of `history`; exactly zero where a row's history is empty

More padding, on either side, changes no summary, and gradients of places left out are exactly zero. No kind looks from one row at
another, so training does not depend on how rows are spread over ranks.
"""

from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.nn import functional as F

from rec.schema import ConfigError, check_range


class HistoryKind(Enum):
    """How a history becomes one vector."""

    mean = "mean"  # its mean, the same for every candidate
    din = "din"  # a sum weighed by a network of each place and the candidate
    transformer = "transformer"  # attention among its places and the candidate


class DINActivation(Enum):
    """What follows each hidden layer of DIN's unit."""

    sigmoid = "sigmoid"
    prelu = "prelu"
    dice = "dice"  # PReLU with a soft step, placed by the mean and spread of a place's own hidden units


@dataclass
class HistoryConfig:
    """One feature of kind sequence that is summarised for a candidate."""

    feature: str = MISSING  # the sequence; it has a max_length
    kind: HistoryKind = HistoryKind.din
    candidate: str = MISSING  # the id feature that the history is compared with; it reads the same table
    layer_sizes: list[int] = field(default_factory=lambda: [80, 40])  # din: widths of the hidden layers; may be empty
    activation: DINActivation = DINActivation.sigmoid  # din
    softmax: bool = False  # din: weights of a row sum to 1; else their sum tells how much of the history is relevant
    num_layers: int = 1  # transformer: at least 1
    num_heads: int = 2  # transformer: at least 1; divides the table's embedding_dim
    feedforward_size: int = 64  # transformer: width of each layer's hidden layer, at least 1

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.layer_sizes):
            raise ConfigError(f"model.histories: layer_sizes is {self.layer_sizes}, expected positive widths")
        check_range("model.histories: num_layers", self.num_layers, 1, 100)
        check_range("model.histories: num_heads", self.num_heads, 1, 1024)
        check_range("model.histories: feedforward_size", self.feedforward_size, 1, 100_000)


def build_history(config: HistoryConfig, *, embedding_dim: int, max_length: int) -> nn.Module:
    """The module that `config` describes.

    Args:
        config: its kind and sizes.
        embedding_dim: D, of the table that history and candidate read.
        max_length: places that a history has at most, at least 1.

    Raises:
        ConfigError: heads that do not divide D, or a length below 1.

    >>> module = build_history(HistoryConfig(candidate="listing"), embedding_dim=8, max_length=20)
    >>> module(torch.randn(2, 3, 8), torch.tensor([[True, True, False], [False] * 3]), torch.randn(2, 8))[1].tolist()
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    check_range("model.histories: the history's max_length", max_length, 1, 1_000_000)
    if config.kind is HistoryKind.mean:
        return MeanPooling()
    if config.kind is HistoryKind.din:
        return DIN(config, embedding_dim=embedding_dim)
    return TransformerEncoder(config, embedding_dim=embedding_dim, max_length=max_length)


class MeanPooling(nn.Module):
    """The mean of a history's places, which no candidate changes: what DIN is to be compared with."""

    def forward(self, history: Tensor, mask: Tensor, candidate: Tensor) -> Tensor:
        """[B, L, D], [B, L], [B, D] -> [B, D]."""
        return _filled(history, mask).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)


# ---- DIN


class DIN(nn.Module):
    """v_U = sum_j a(e_j, v) e_j, with a = MLP([v, e_j, v - e_j, v * e_j]) (Zhou et al., KDD 2018, equation 3).

    The unit's input is that of the paper's own code: both vectors, their difference and their product by element. With `softmax`,
    a_j becomes exp(a_j) / sum_k exp(a_k) over the filled places, which the paper leaves out on purpose: the sum of the
    weights is to tell how strong an interest is.

    Args:
        config: hidden layers, activation, softmax.
        embedding_dim: D.
    """

    def __init__(self, config: HistoryConfig, *, embedding_dim: int) -> None:
        super().__init__()
        self.softmax = config.softmax
        sizes = [*config.layer_sizes, 1]
        self.compare = nn.Linear(4 * embedding_dim, sizes[0])
        later = [(_activation(config.activation, i), nn.Linear(i, o)) for i, o in pairwise(sizes)]
        self.later = nn.Sequential(*(module for pair in later for module in pair))

    def forward(self, history: Tensor, mask: Tensor, candidate: Tensor) -> Tensor:
        """[B, L, D], [B, L], [B, D] -> [B, D]."""
        history = _filled(history, mask)  # so what a place that is not filled weighs does not matter
        weights = self.later(self._compare(history, candidate.unsqueeze(1))).squeeze(-1)
        if self.softmax:  # the lowest number and not -inf: without any place a row's would be 0 / 0
            weights = weights.float()
            weights = weights.masked_fill(~mask, torch.finfo(weights.dtype).min).softmax(dim=-1)
        return (weights.unsqueeze(1) @ history).squeeze(1).to(history.dtype)

    def _compare(self, e: Tensor, v: Tensor) -> Tensor:
        """The first layer, on [v, e, v - e, v * e]: [B, L, D] and [B, 1, D] -> [B, L, width].

        What depends on v alone is computed once a row and not at every place, which halves the largest product.
        """
        of_v, of_e, of_difference, of_product = self.compare.weight.chunk(4, dim=1)
        once = F.linear(v, of_v + of_difference, self.compare.bias)
        return once + F.linear(torch.cat([e, v * e], dim=-1), torch.cat([of_e - of_difference, of_product], dim=1))


class PReLU(nn.Module):
    """x where it is positive, else alpha x, with an alpha a unit (He et al. 2015): `nn.PReLU` for units in the last dimension."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((size,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        return torch.where(x > 0, x, self.alpha * x)


class Dice(nn.Module):
    """p x + (1 - p) alpha x, with p = sigmoid((x - E[x]) / sqrt(Var[x] + 1e-5)) and an alpha a unit (Zhou et al. 2018, equation 9).

    The paper takes E and Var over the batch, unit by unit. Then a row's summary would depend on which other rows its rank has
    beside it, padding included, and serving would need moving averages. Here both are taken over the units of one place, as layer
    normalisation does; so it is not the paper's Dice, and its results are not the paper's.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> the same."""
        p = F.layer_norm(x, x.shape[-1:]).sigmoid()
        return (p + (1 - p) * self.alpha) * x


def _activation(kind: DINActivation, size: int) -> nn.Module:
    if kind is DINActivation.sigmoid:
        return nn.Sigmoid()
    return PReLU(size) if kind is DINActivation.prelu else Dice(size)


# ---- transformer


class TransformerEncoder(nn.Module):
    """What the candidate sees of the history, after layers of attention among both (BST, Chen et al. 2019).

    The candidate is the last of the tokens, and its place in the last layer, normalised, is the summary: BST concatenates all places,
    which would tie the width to the length. Each token has a learned position added, its distance from the candidate: 0 is the
    candidate, 1 the newest place, and what is further than `max_length` shares the last one. Layers normalise before attention and
    before the feed-forward part (pre-norm), without dropout. The last layer computes the candidate's place only.

    Args:
        config: layers, heads, feed-forward width.
        embedding_dim: D.
        max_length: number of positions beside the candidate's.

    Raises:
        ConfigError: heads that do not divide D.
    """

    def __init__(self, config: HistoryConfig, *, embedding_dim: int, max_length: int) -> None:
        super().__init__()
        if embedding_dim % config.num_heads:
            raise ConfigError(
                f"model.histories: num_heads is {config.num_heads}, expected a divisor of the table's embedding_dim {embedding_dim}"
            )
        self.positions = nn.Parameter(torch.zeros(max_length + 1, embedding_dim))  # starts without an order
        self.layers = nn.ModuleList(TransformerLayer(config, embedding_dim) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(embedding_dim)

    def forward(self, history: Tensor, mask: Tensor, candidate: Tensor) -> Tensor:
        """[B, L, D], [B, L], [B, D] -> [B, D]."""
        newer = mask.flip(1).cumsum(1).flip(1).clamp(max=len(self.positions) - 1)  # 1 at the newest place
        tokens = torch.cat([_filled(history, mask), candidate.unsqueeze(1)], dim=1)
        tokens = tokens + F.embedding(F.pad(newer, (0, 1)), self.positions)
        seen = F.pad(mask, (0, 1), value=True)  # always the candidate, so attention never has nothing to look at
        for layer in self.layers[:-1]:
            tokens = layer(tokens, tokens, seen)
        summary = self.norm(self.layers[-1](tokens[:, -1:], tokens, seen)).squeeze(1)
        return summary.masked_fill(~mask.any(dim=1, keepdim=True), 0).to(history.dtype)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)) (Vaswani et al. 2017, equation 1; Xiong et al. 2020 for the order).

    Attention is written out: the fused kernels choose by shape and mask, and not all of them add in a fixed order in the backward.
    """

    def __init__(self, config: HistoryConfig, embedding_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(embedding_dim), nn.LayerNorm(embedding_dim)
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.key = nn.Linear(
            embedding_dim, embedding_dim, bias=False
        )  # one would add the same to all of a query's scores
        self.value = nn.Linear(embedding_dim, embedding_dim)
        self.out = nn.Linear(embedding_dim, embedding_dim)
        self.feedforward = nn.Sequential(
            nn.Linear(embedding_dim, config.feedforward_size),
            nn.ReLU(),
            nn.Linear(config.feedforward_size, embedding_dim),
        )

    def forward(self, x: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """New values of `x` [B, Q, D], which are among the tokens.

        Args:
            x: [B, Q, D].
            tokens: [B, K, D], what attention looks at.
            seen: [B, K] bool, those of them that there are; at least one a row.
        """
        x = x + self.out(self._attend(self.attention_norm(x), self.attention_norm(tokens), seen))
        return x + self.feedforward(self.feedforward_norm(x))

    def _attend(self, x: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        query, key, value = self._heads(self.query(x)), self._heads(self.key(tokens)), self._heads(self.value(tokens))
        scores = (query @ key.transpose(-1, -2)).float() * query.shape[-1] ** -0.5  # [B, heads, Q, K]
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1)
        return (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, heads, L, D / heads]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _filled(history: Tensor, mask: Tensor) -> Tensor:
    """The history with zeros where no place is filled, whatever stood there, NaN too."""
    return history.masked_fill(~mask.unsqueeze(-1), 0)

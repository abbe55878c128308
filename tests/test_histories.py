import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, ValidationError
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from rec.histories import DIN, DINActivation, HistoryConfig, HistoryKind, TransformerEncoder, build_history
from rec.schema import ConfigError

SIZE, LENGTH = 8, 6  # D, max_length
DICE, PRELU = DINActivation.dice, DINActivation.prelu
MEAN = HistoryConfig(feature="clicked", candidate="listing", kind=HistoryKind.mean)
PLAIN = replace(MEAN, kind=HistoryKind.din, layer_sizes=[7, 5])
ATTENTION = replace(MEAN, kind=HistoryKind.transformer, feedforward_size=9)
CONFIGS = {
    "mean": MEAN,
    "din": PLAIN,
    "din of no hidden layer": replace(PLAIN, layer_sizes=[]),
    "din, softmax": replace(PLAIN, softmax=True),
    "din, prelu": replace(PLAIN, activation=PRELU),
    "din, dice": replace(PLAIN, activation=DICE),
    "din, dice of one unit, softmax": replace(PLAIN, activation=DICE, layer_sizes=[1], softmax=True),
    "transformer": ATTENTION,
    "transformer of three layers and four heads": replace(ATTENTION, num_layers=3, num_heads=4),
}
every_kind = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def build(config: HistoryConfig, *, max_length: int = LENGTH) -> nn.Module:
    """The module with weights that are far from those it starts with, so that every term of a formula counts."""
    module = build_history(config, embedding_dim=SIZE, max_length=max_length)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = 0.7 * torch.randn(parameter.shape, generator=generator)
    return module


def rows(lengths: list[int], *, length: int = LENGTH, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.tensor(lengths).unsqueeze(1)
    history = torch.randn(len(lengths), length, SIZE, generator=generator)
    return history, mask, torch.randn(len(lengths), SIZE, generator=generator)


# ---- the formulas, over rows and places


def weight_of(linear: nn.Linear) -> tuple[np.ndarray, np.ndarray | float]:
    bias = 0.0 if linear.bias is None else linear.bias.detach().double().numpy()
    return linear.weight.detach().double().numpy(), bias


def affine(linear: nn.Linear, x: np.ndarray) -> np.ndarray:
    weight, bias = weight_of(linear)
    return weight @ x + bias


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def activate(kind: DINActivation, module: nn.Module, x: np.ndarray) -> np.ndarray:
    if kind is DINActivation.sigmoid:
        return sigmoid(x)
    alpha = module.alpha.detach().double().numpy()
    if kind is PRELU:
        return np.array([s if s > 0 else a * s for s, a in zip(x, alpha, strict=True)])
    p = sigmoid((x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean() + 1e-5))
    return p * x + (1 - p) * alpha * x


def din_of_row(module: DIN, config: HistoryConfig, places: list[np.ndarray], v: np.ndarray) -> np.ndarray:
    weights = []
    for e in places:
        x = affine(module.compare, np.concatenate([v, e, v - e, v * e]))
        for activation, linear in zip(module.later[::2], module.later[1::2], strict=True):
            x = affine(linear, activate(config.activation, activation, x))
        weights.append(x[0])
    if config.softmax:
        weights = [math.exp(a) / sum(math.exp(b) for b in weights) for a in weights]
    return sum(a * e for a, e in zip(weights, places, strict=True))


def norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    scaled = (x - x.mean()) / np.sqrt(x.var() + layer.eps)
    return scaled * layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()


def attend(layer: nn.Module, tokens: list[np.ndarray], place: int) -> np.ndarray:
    normed = [norm(layer.attention_norm, token) for token in tokens]
    query = affine(layer.query, normed[place])
    out, width = [], len(query) // layer.num_heads
    for h in range(layer.num_heads):
        part = slice(h * width, (h + 1) * width)
        scores = [math.exp(query[part] @ affine(layer.key, x)[part] / math.sqrt(width)) for x in normed]
        out.append(sum(s * affine(layer.value, x)[part] for s, x in zip(scores, normed, strict=True)) / sum(scores))
    return affine(layer.out, np.concatenate(out))


def transformer_of_row(module: TransformerEncoder, places: list[np.ndarray], v: np.ndarray) -> np.ndarray:
    positions = module.positions.detach().double().numpy()
    tokens = [x + positions[min(len(places) - i, len(positions) - 1)] for i, x in enumerate([*places, v])]
    for layer in module.layers:
        tokens = [token + attend(layer, tokens, i) for i, token in enumerate(tokens)]
        inner = [affine(layer.feedforward[0], norm(layer.feedforward_norm, token)) for token in tokens]
        tokens = [t + affine(layer.feedforward[2], np.maximum(x, 0)) for t, x in zip(tokens, inner, strict=True)]
    return norm(module.norm, tokens[-1])


def by_loops(
    module: nn.Module, config: HistoryConfig, history: Tensor, mask: Tensor, candidate: Tensor
) -> list[np.ndarray]:
    found = []
    for row in range(len(history)):
        v = candidate[row].double().numpy()
        places = [history[row, j].double().numpy() for j in range(history.shape[1]) if mask[row, j]]
        if not places:
            found.append(np.zeros(SIZE))
        elif config.kind is HistoryKind.mean:
            found.append(sum(places) / len(places))
        elif config.kind is HistoryKind.din:
            found.append(din_of_row(module, config, places, v))
        else:
            found.append(transformer_of_row(module, places, v))
    return found


@every_kind
@pytest.mark.parametrize("lengths", [[3, 0, 6, 1, 5], [1], [0, 0]])
def test_summaries_are_their_formulas(config: HistoryConfig, lengths: list[int]) -> None:
    module, inputs = build(config), rows(lengths)
    np.testing.assert_allclose(
        module(*inputs).detach().numpy(), by_loops(module, config, *inputs), rtol=2e-4, atol=2e-5
    )


@every_kind
def test_one_place_is_enough(config: HistoryConfig) -> None:
    module, inputs = build(config, max_length=1), rows([1, 0, 1], length=1)
    np.testing.assert_allclose(
        module(*inputs).detach().numpy(), by_loops(module, config, *inputs), rtol=2e-4, atol=2e-5
    )


def test_places_beyond_the_last_position_share_it() -> None:
    module, inputs = build(ATTENTION, max_length=2), rows([6, 3])
    np.testing.assert_allclose(
        module(*inputs).detach().numpy(), by_loops(module, ATTENTION, *inputs), rtol=2e-4, atol=2e-5
    )


# ---- what holds for every kind


@every_kind
@pytest.mark.parametrize("side", ["end", "start"])
def test_padding_does_not_matter_whatever_stands_there(config: HistoryConfig, side: str) -> None:
    module, (history, mask, candidate) = build(config), rows([4, 0, 6, 1])
    more = (0, 5) if side == "end" else (5, 0)
    longer = F.pad(history, (0, 0, *more), value=torch.nan)
    padded = module(longer, F.pad(mask, more), candidate)
    torch.testing.assert_close(padded, module(history, mask, candidate), rtol=2e-6, atol=2e-6)


@every_kind
def test_empty_histories_are_exactly_zero_in_values_and_gradients(config: HistoryConfig) -> None:
    module, (history, mask, candidate) = build(config), rows([0, 0, 0])
    candidate.requires_grad_()
    history = torch.full_like(history, torch.nan).requires_grad_()
    summary = module(history, mask, candidate)
    assert torch.equal(summary, torch.zeros(3, SIZE))
    (summary.sum() + candidate.sum() * 0).backward()
    for tensor in (history, candidate, *module.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


@every_kind
def test_gradients_reach_the_filled_places_and_no_others(config: HistoryConfig) -> None:
    module, (history, mask, candidate) = build(config), rows([3, 0, 6, 1])
    history.requires_grad_(), candidate.requires_grad_()
    upstream = torch.randn(4, SIZE, generator=torch.Generator().manual_seed(3))
    (module(history, mask, candidate) * upstream).sum().backward()
    assert torch.equal(history.grad.ne(0).any(-1), mask)
    if config.kind is not HistoryKind.mean:
        reached = [True, False, True, config.softmax is False]  # one place alone has weight 1, whatever the candidate
        assert candidate.grad.ne(0).any(-1).tolist() == reached
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())  # DDP waits for each


@every_kind
def test_only_the_transformer_knows_the_order(config: HistoryConfig) -> None:
    module, (history, mask, candidate) = build(config), rows([6, 6])
    shuffled = module(history[:, [3, 0, 5, 1, 4, 2]], mask, candidate)
    same = torch.allclose(shuffled, module(history, mask, candidate), rtol=1e-4, atol=1e-5)
    assert same is (config.kind is not HistoryKind.transformer)


@every_kind
def test_rows_do_not_depend_on_each_other(config: HistoryConfig) -> None:
    module, inputs = build(config), rows([4, 0, 6, 1])
    alone = torch.cat([module(*(x[row : row + 1] for x in inputs)) for row in range(4)])
    torch.testing.assert_close(module(*inputs), alone, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(module.eval()(*inputs), alone, rtol=2e-6, atol=2e-6)  # training or not


@every_kind
def test_the_dense_part_may_run_in_bfloat16(config: HistoryConfig) -> None:
    module, (history, mask, candidate) = build(config), rows([3, 0, 6, 1])
    exact = module(history, mask, candidate)
    history.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        summary = module(history, mask, candidate)
    assert summary.dtype is torch.float32 and torch.equal(summary[1], torch.zeros(SIZE))
    assert (summary - exact).norm() < 0.05 * exact.norm()
    summary.square().sum().backward()
    assert history.grad.isfinite().all() and torch.equal(history.grad.ne(0).any(-1), mask)


@every_kind
def test_programs_take_any_number_of_rows(config: HistoryConfig) -> None:
    module = build(config).eval()
    batch = Dim("batch", min=1)
    program = torch.export.export(module, rows([4, 0, 6]), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for lengths in ([2], [0], [6, 0, 1, 3, 5]):
        inputs = rows(lengths, seed=5)
        torch.testing.assert_close(program.module()(*inputs), module(*inputs), rtol=1e-6, atol=1e-6)


# ---- DIN


def test_without_softmax_a_place_seen_twice_counts_twice() -> None:
    history, _, candidate = rows([6])
    twice, once = torch.tensor([[True, True, *[False] * 4]]), torch.tensor([[True, *[False] * 5]])
    history[:, 1] = history[:, 0]
    plain, softmax = build(PLAIN), build(replace(PLAIN, softmax=True))
    torch.testing.assert_close(plain(history, twice, candidate), 2 * plain(history, once, candidate))
    torch.testing.assert_close(softmax(history, twice, candidate), history[:, 0])


def test_softmax_survives_scores_that_overflow_exp() -> None:
    module = build(replace(PLAIN, softmax=True, layer_sizes=[]))
    module.compare.weight.data *= 1e4
    assert module(*rows([6, 0, 2])).isfinite().all()


def test_din_finds_what_a_mean_cannot() -> None:
    """Relevance depends on the candidate: is any place of the candidate's category, of 12 in 4 dimensions?"""
    auc = {}
    for name, config in (("mean", MEAN), ("din", replace(PLAIN, layer_sizes=[80, 40]))):
        torch.manual_seed(0)
        centres = torch.randn(12, 4)
        history = build_history(config, embedding_dim=4, max_length=10)
        top = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
        optimizer = torch.optim.Adam([*history.parameters(), *top.parameters()], lr=0.01)
        for _ in range(200):
            labels, logits = _impressions(256, centres, history, top)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(logits, labels).backward()
            optimizer.step()
        labels, logits = _impressions(4000, centres, history, top)
        auc[name] = roc_auc_score(labels, logits.detach())
    assert auc["din"] > 0.96 and auc["mean"] < 0.9


def _impressions(num_rows: int, centres: Tensor, history: nn.Module, top: nn.Module) -> tuple[Tensor, Tensor]:
    places, candidate = torch.randint(len(centres), (num_rows, 10)), torch.randint(len(centres), (num_rows,))
    mask = torch.arange(10) < torch.randint(11, (num_rows, 1))
    labels = ((places == candidate.unsqueeze(1)) & mask).any(1).float()
    summary = history(centres[places], mask, centres[candidate])
    return labels, top(torch.cat([summary, centres[candidate]], dim=1)).squeeze(1)


# ---- configuration


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layer_sizes": [80, 0]}, r"model.histories: layer_sizes is \[80, 0\]"),
        ({"num_layers": 0}, "model.histories: num_layers is 0"),
        ({"num_heads": 0}, "model.histories: num_heads is 0"),
        ({"feedforward_size": 0}, "model.histories: feedforward_size is 0"),
    ],
)
def test_values_out_of_range_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(PLAIN, **wrong)


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="model.histories: num_heads is 3, expected a divisor .* embedding_dim 8"):
        build_history(replace(ATTENTION, num_heads=3), embedding_dim=8, max_length=4)
    with pytest.raises(ConfigError, match="model.histories: the history's max_length is 0"):
        build_history(PLAIN, embedding_dim=8, max_length=0)


def test_yaml_is_checked_against_the_schema() -> None:
    schema = OmegaConf.structured(HistoryConfig)
    values = {"feature": "clicked", "candidate": "listing", "kind": "transformer", "feedforward_size": 9}
    assert OmegaConf.to_object(OmegaConf.merge(schema, values)) == ATTENTION
    with pytest.raises(MissingMandatoryValue):
        OmegaConf.to_object(schema)
    with pytest.raises(ValidationError):
        OmegaConf.merge(schema, {"activation": "relu"})

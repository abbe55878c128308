import numpy as np
import pytest
import torch

from rec.embeddings import Embedded
from rec.linear import Linear, LinearConfig, Route
from rec.schema import ConfigError, DataConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig

DATA = DataConfig(
    name="rows",
    path="",
    features={
        "price": FeatureConfig(kind=FeatureKind.dense),
        "user": FeatureConfig(kind=FeatureKind.id),
        "item": FeatureConfig(kind=FeatureKind.id),
        "text": FeatureConfig(kind=FeatureKind.vector, size=3),
    },
    tables={name: TableConfig(num_embeddings=9) for name in ("user", "item")},
    tasks={name: TaskConfig(label=name) for name in ("click", "cart", "buy")},
)


def linear(*to: Route, features: tuple[str, ...] = ("text", "user", "item")) -> Linear:
    module = Linear(LinearConfig(features=list(features), to=list(to)), DATA)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def rows(num: int = 4) -> tuple[Embedded, torch.Tensor]:
    return Embedded({}, linear={name: torch.randn(num, 4) for name in ("user", "item")}), torch.randn(num, 4)


def test_logits_are_a_sum_of_weights_a_task() -> None:
    module, (embedded, dense) = linear(Route.logits), rows()
    found = module(embedded, dense).logits
    assert module.columns == [1, 2, 3]  # of `text`, behind `price`
    for b in range(4):
        for t in range(3):
            weights, bias = module.dense.weight[t].detach().numpy(), module.dense.bias[t].item()
            expected = float(weights @ dense[b, 1:].numpy()) + bias
            expected += embedded.linear["user"][b, t].item() + embedded.linear["item"][b, t].item()
            assert found[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    module.prune([2, 0])
    assert torch.equal(module(embedded, dense).logits, found[:, [2, 0]])


@pytest.mark.parametrize("to", [(), *((route,) for route in Route), (Route.experts, Route.gates), tuple(Route)])
def test_features_go_where_they_are_routed_and_nowhere_else(to: tuple[Route, ...]) -> None:
    module, (embedded, dense) = linear(*to), rows()
    found = module(embedded, dense)
    assert (found.logits is not None) == (Route.logits in to)
    values = torch.cat([embedded.linear["user"], embedded.linear["item"], dense[:, 1:]], dim=1)
    x, mixtures = torch.randn(4, 5), torch.randn(4, 3, 5)
    for route in (Route.experts, Route.gates):
        wanted = torch.cat([x, values], dim=1) if route in to else x
        assert torch.equal(found.joined(x, route), wanted)
        assert module.width(route) == wanted.shape[1] - 5
    joined = found.joined(mixtures, Route.towers)
    if Route.towers in to:
        assert all(torch.equal(joined[:, t], torch.cat([mixtures[:, t], values], dim=1)) for t in range(3))
    else:
        assert joined is mixtures


def test_it_starts_as_nothing() -> None:
    module = Linear(LinearConfig(features=["price"], to=[Route.logits]), DATA)
    assert not np.any(module(*rows()).logits.detach().numpy())


def test_features_must_be_named_and_known() -> None:
    with pytest.raises(ConfigError, match=r"features is empty; name the features"):
        LinearConfig(to=[Route.logits])
    with pytest.raises(ConfigError, match=r"has 'usr'; did you mean 'user'"):
        LinearConfig(features=["usr"]).check(DATA)

import numpy as np
import pytest
import torch

from rec.schema import ConfigError
from rec.towers import DotTowers, DotTowersConfig, TaskTowers, TowersConfig, build_towers
from tests.test_stacked import mlp, randomise_biases


@pytest.mark.parametrize("sizes", [[], [6]])
def test_each_tower_reads_its_own_mixture(sizes: list[int]) -> None:
    module = TaskTowers(TowersConfig(layer_sizes=sizes), in_features=4, tower_of=[0, 1, 2, 1])
    randomise_biases(module)
    values = torch.randn(1, 3, 4)
    logits = module(values)
    assert logits.shape == (1, 4)
    for t, task in enumerate(module.tower_of):
        expected = mlp(values[0, task].numpy(), module.towers, t)[0]
        assert logits[0, t].item() == pytest.approx(expected, rel=1e-4)


def dot_towers() -> DotTowers:
    config = DotTowersConfig(layer_sizes=[6], item_features=["item"], item_layer_sizes=[5, 3])
    module = build_towers(config, in_features=4, item_features=7, tower_of=[0, 1, 0], num_domains=2)
    assert isinstance(module, DotTowers)
    randomise_biases(module)
    return module


def test_two_towers_are_a_product_and_biases_of_task_and_domain() -> None:
    module, values, item = dot_towers(), torch.randn(3, 2, 4), torch.randn(3, 7)
    items = module.items(item)
    logits = module(values, items, torch.tensor([1, 0, -1]))
    assert items.shape == logits.shape == (3, 3)
    for b, domain in enumerate((1, 0, None)):
        vector = mlp(item[b].numpy(), module.item_tower, 0)
        np.testing.assert_allclose(items[b].detach().numpy(), vector, rtol=1e-4, atol=1e-5)
        for t, task in enumerate(module.tower_of):
            own = mlp(values[b, task].numpy(), module.towers, t)
            bias = module.bias[t].item() + (0 if domain is None else module.domain_bias[domain, t].item())
            assert logits[b, t].item() == pytest.approx(float(own @ vector) + bias, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("tasks", "towers"), [([0], [0, 2]), ([1], [1]), ([1, 0], [0, 1])])
def test_pruned_towers_say_the_same_of_what_is_left(tasks: list[int], towers: list[int]) -> None:
    module, values, items = dot_towers().eval(), torch.randn(9, 2, 4), torch.randn(9, 3)
    domains = torch.arange(9) % 2
    before = module(values, items, domains)
    module.prune(tasks, towers=towers)
    assert torch.equal(module(values[:, tasks], items, domains), before[:, towers])


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="towers.layer_sizes"):
        TowersConfig(layer_sizes=[0])
    with pytest.raises(ConfigError, match="item_layer_sizes is"):
        DotTowersConfig(item_layer_sizes=[])

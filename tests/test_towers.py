import pytest
import torch

from rec.schema import ConfigError
from rec.towers import TaskTowers, TowersConfig
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


def test_bad_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="towers.layer_sizes"):
        TowersConfig(layer_sizes=[0])

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from rec.optim import Decay, ScheduleConfig, SparseConfig, SparseOptimizer, freeze, fused_params
from rec.schema import ConfigError


def test_cosine_falls_from_one_to_the_final_factor() -> None:
    schedule = ScheduleConfig(warmup_steps=10, decay=Decay.cosine, final_factor=0.1)
    factors = [schedule.factor(step, 110) for step in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == factors[10] == 1
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert factors[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[10:]))


def test_constant_stays_and_nothing_grows_past_the_end() -> None:
    assert [ScheduleConfig().factor(step, 5) for step in (0, 4, 99)] == [1, 1, 1]
    assert ScheduleConfig(decay=Decay.linear).factor(99, 5) == 0


def test_an_optimizer_that_the_cpu_lacks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"optim.sparse.kind=adam needs a GPU; on CPU FBGEMM has rowwise_adagrad, adagrad, sgd"
    ):
        fused_params(SparseConfig(kind=SparseOptimizer.adam), torch.device("cpu"))
    assert fused_params(SparseConfig(kind=SparseOptimizer.adam), torch.device("cuda"))["learning_rate"] == 0.02


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.experts, self.towers = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)


def test_patterns_freeze_what_they_match() -> None:
    model = Small()
    freeze(model, ["embeddings.*", "towers.b*"])
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["towers.bias"]  # the tables are frozen by their learning rate


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("expert.*", r"has 'expert.\*', which matches no parameter; did you mean 'experts.\*'"),
        ("embeddings.w*", r"matches tables; all at once are 'embeddings.\*', one is data.tables.NAME.lr_factor=0"),
    ],
)
def test_patterns_that_match_nothing_or_some_tables_are_refused(pattern: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        freeze(Small(), [pattern])

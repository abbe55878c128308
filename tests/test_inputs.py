import pytest
import torch

from rec.embeddings import Embedded, padded
from rec.histories import HistoryConfig, HistoryKind
from rec.inputs import Inputs, check_histories
from rec.schema import ConfigError, DataConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig

DATA = DataConfig(
    name="rows",
    path="",
    features={
        "user": FeatureConfig(kind=FeatureKind.id),
        "price": FeatureConfig(kind=FeatureKind.dense),
        "item": FeatureConfig(kind=FeatureKind.id),
        "viewed": FeatureConfig(kind=FeatureKind.sequence, table="item", max_length=3),
        "bought": FeatureConfig(kind=FeatureKind.sequence, table="item"),
        "text": FeatureConfig(kind=FeatureKind.vector, size=2),
    },
    tables={
        "user": TableConfig(num_embeddings=9, embedding_dim=4),
        "item": TableConfig(num_embeddings=9, embedding_dim=8),
    },
    tasks={"click": TaskConfig(label="click")},
)
VIEWED = HistoryConfig(feature="viewed", candidate="item", kind=HistoryKind.mean)


def embedded() -> tuple[Embedded, torch.Tensor]:
    pooled = {name: torch.randn(2, dim) for name, dim in (("user", 4), ("item", 8), ("viewed", 8), ("bought", 8))}
    history = padded(torch.randn(3, 8), torch.tensor([3, 0]), max_length=3)
    return Embedded(pooled, {"viewed": history}), torch.randn(2, 3)


def test_features_stand_side_by_side_in_the_order_of_the_configuration() -> None:
    rows, dense = embedded()
    parts = [rows.pooled[name] for name in ("user", "item", "viewed", "bought")]
    everything = Inputs(DATA, list(DATA.features))
    assert torch.equal(everything(rows, dense), torch.cat([*parts, dense], dim=1))
    assert everything.out_features == 4 + 3 * 8 + 3
    some = Inputs(DATA, ["text", "item"])
    assert torch.equal(some(rows, dense), torch.cat([rows.pooled["item"], dense[:, 1:]], dim=1))


def test_an_attended_history_takes_the_place_of_its_mean() -> None:
    rows, dense = embedded()
    found = Inputs(DATA, ["item", "viewed"], histories=[VIEWED])(rows, dense)
    mean = rows.histories["viewed"].values[0].mean(0)
    torch.testing.assert_close(found[:, 8:16], torch.stack([mean, torch.zeros(8)]))


@pytest.mark.parametrize(
    ("histories", "said"),
    [
        ([HistoryConfig(feature="user", candidate="item")], r"'user': expected a sequence feature.*valid: viewed"),
        (
            [HistoryConfig(feature="bought", candidate="item")],
            r"'bought': expected a sequence feature with a max_length",
        ),
        ([HistoryConfig(feature="viewed", candidate="user")], r"candidate is 'user'.*table 'item'; .*valid: item"),
        ([VIEWED, VIEWED], r"has 'viewed' 2 times"),
    ],
)
def test_histories_that_do_not_fit_are_refused(histories: list[HistoryConfig], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_histories(histories, DATA)

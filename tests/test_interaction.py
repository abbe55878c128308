import numpy as np
import pytest
import torch

from rec.embeddings import Embedded
from rec.interaction import (
    FM,
    DCNv2Config,
    FMConfig,
    FMKind,
    InteractionConfig,
    LowRankDCNv2Config,
    build_interaction,
)
from rec.schema import ConfigError, DataConfig, FeatureConfig, FeatureKind, TableConfig, TaskConfig


def test_full_dcn_v2_is_the_formula() -> None:
    module = build_interaction(DCNv2Config(num_layers=3), 7)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    x0 = torch.randn(5, 7)
    rows = []
    for row in x0.numpy():
        x = row
        for layer in range(3):
            w, b = (parameters[f"{key}.{layer}"].detach().numpy() for key in ("kernels", "bias"))
            x = row * (w @ x + b[:, 0]) + x
        rows.append(x)
    np.testing.assert_allclose(module(x0).detach().numpy(), np.stack(rows), rtol=1e-5, atol=1e-6)


def test_low_rank_dcn_v2_is_the_formula() -> None:
    module = build_interaction(LowRankDCNv2Config(num_layers=2, low_rank=3), 7)
    parameters = dict(module.named_parameters())
    for name, parameter in parameters.items():
        if "bias" in name:
            torch.nn.init.normal_(parameter)
    assert parameters["W_kernels.0"].shape == (7, 3) and parameters["V_kernels.0"].shape == (3, 7)
    x0 = torch.randn(5, 7)
    rows = []
    for row in x0.numpy():
        x = row
        for layer in range(2):
            u, v, b = (parameters[f"{key}.{layer}"].detach().numpy() for key in ("W_kernels", "V_kernels", "bias"))
            x = row * (u @ (v @ x) + b.reshape(-1)) + x
        rows.append(x)
    np.testing.assert_allclose(module(x0).detach().numpy(), np.stack(rows), rtol=1e-5, atol=1e-6)


def test_rank_is_capped_at_the_width_and_none_passes_through() -> None:
    assert dict(build_interaction(LowRankDCNv2Config(low_rank=64), 4).named_parameters())["V_kernels.0"].shape == (4, 4)
    x = torch.randn(2, 4)
    assert torch.equal(build_interaction(InteractionConfig(), 4)(x), x)


def fields_data(**dims: int) -> DataConfig:
    return DataConfig(
        name="fields",
        path="",
        features={name: FeatureConfig(kind=FeatureKind.id) for name in dims},
        tables={name: TableConfig(num_embeddings=9, embedding_dim=dim) for name, dim in dims.items()},
        tasks={"click": TaskConfig(label="click"), "download": TaskConfig(label="download")},
    )


@pytest.mark.parametrize("kind", [FMKind.shared, FMKind.per_task])
@pytest.mark.parametrize("scale", [False, True])
def test_a_factorisation_machine_is_the_sum_over_pairs(kind: FMKind, scale: bool) -> None:
    data = fields_data(user=8, item=8, shop=8, other=4)
    module = FM(FMConfig(kind=kind, features=["user", "item", "shop"], scale=scale), data)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    pooled = {name: torch.randn(5, 8, dtype=torch.float64) for name in ("user", "item", "shop")}
    found = module.double()(Embedded(pooled | {"other": torch.randn(5, 4)}))
    for b in range(5):
        vectors = [pooled[name][b].numpy() for name in ("user", "item", "shop")]
        for t in range(2):
            weights = np.ones(8) if module.weights is None else module.weights[t].detach().numpy()
            factor = 1.0 if module.scale is None else module.scale[t].item()
            pairs = sum((weights * vectors[i] * vectors[j]).sum() for i in range(3) for j in range(i))
            assert found[b, t].item() == pytest.approx(factor * pairs, abs=1e-9)
    module.prune([1])
    assert torch.equal(module(Embedded(pooled)), found[:, 1:])


def test_a_factorisation_machine_starts_as_one_for_all_tasks() -> None:
    data = fields_data(user=8, item=8)
    pooled = Embedded({name: torch.randn(3, 8) for name in ("user", "item")})
    shared = FM(FMConfig(kind=FMKind.shared), data)(pooled)
    torch.testing.assert_close(FM(FMConfig(kind=FMKind.per_task, scale=True), data)(pooled), shared)
    assert FM(FMConfig(), data)(pooled) is None


@pytest.mark.parametrize(
    ("features", "said"),
    [
        (["user", "itm"], r"has 'itm'.*did you mean 'item'"),
        (["user"], r"multiplies 1 features of embedding_dim \[8\]"),
        (None, r"multiplies 3 features of embedding_dim \[4, 8\]"),
    ],
)
def test_fields_that_cannot_be_multiplied_are_refused(features: list[str] | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FMConfig(kind=FMKind.shared, features=features).fields(fields_data(user=8, item=8, other=4))

import numpy as np
import torch

from rec.interaction import DCNv2Config, InteractionConfig, LowRankDCNv2Config, build_interaction


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

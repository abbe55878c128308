import pytest
import torch

from rec.experts import MMoEConfig
from rec.mixtures import DropoutUnit, ExpertInputs, Gates, Sizes, mix_experts


def draws(rows: int, *, step: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    of_rows = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return torch.stack([of_rows, of_rows[:1].expand(rows)], dim=1)


class TestExpertDropout:
    def gates(self, share: float, unit: DropoutUnit, num: int = 5) -> Gates:
        config = MMoEConfig(expert_dropout=share, expert_dropout_per=unit)
        return Gates(config, 3, allowed=torch.ones(2, num, dtype=torch.bool))

    def test_leaves_out_whole_experts_at_its_rate_and_renormalises(self) -> None:
        gates, x = self.gates(0.3, DropoutUnit.row), torch.randn(4000, 3)
        whole = gates.eval()(x, draws(4000))
        left = gates.train()(x, draws(4000))
        out = left == 0
        assert torch.equal(out[:, 0], out[:, 1])  # an expert is out for all tasks
        assert out.float().mean().item() == pytest.approx(0.3, abs=0.01)
        expected = whole * ~out / (whole * ~out).sum(-1, keepdim=True)
        torch.testing.assert_close(left, expected)
        torch.testing.assert_close(left.sum(-1), torch.ones(4000, 2))

    def test_per_step_takes_the_same_from_all_rows_and_others_in_other_steps(self) -> None:
        gates, x = self.gates(0.5, DropoutUnit.step).train(), torch.randn(40, 3)
        patterns = []
        for step in range(30):
            out = gates(x, draws(40, step=step)) == 0
            assert (out == out[:1]).all()
            patterns.append(tuple(out[0, 0].tolist()))
        assert len(set(patterns)) > 10

    def test_never_takes_all(self) -> None:
        gates = self.gates(0.9, DropoutUnit.row, num=2).train()
        x = torch.randn(2000, 3)
        left = gates(x, draws(2000))
        torch.testing.assert_close(left.sum(-1), torch.ones(2000, 2))
        both = (left > 0).all(-1).all(-1)  # spared since both had been drawn
        assert both.float().mean().item() == pytest.approx(0.81 + 0.01, abs=0.03)

    def test_is_off_outside_training_and_does_not_see_how_rows_are_spread(self) -> None:
        gates, x, bits = self.gates(0.5, DropoutUnit.row), torch.randn(10, 3), draws(10)
        torch.testing.assert_close(gates.eval()(x, bits), self.plain(gates)(x, bits))
        whole = gates.train()(x, bits)
        torch.testing.assert_close(torch.cat([gates(x[:3], bits[:3]), gates(x[3:], bits[3:])]), whole)

    def plain(self, gates: Gates) -> Gates:
        same = Gates(MMoEConfig(), 3, allowed=gates.allowed)
        same.load_state_dict(gates.state_dict())
        return same


def test_mixing_apart_is_mixing_together() -> None:
    gates, experts = torch.rand(6, 3, 4), torch.randn(6, 4, 5)
    expected = torch.einsum("bgn,bnh->bgh", gates, experts)
    for apart in (True, False):
        torch.testing.assert_close(mix_experts(gates, experts, apart=apart), expected)


def test_gates_read_their_own_inputs_and_rows_have_a_domain() -> None:
    x, gate_x = torch.randn(3, 2), torch.randn(3, 4)
    plain = ExpertInputs(x, draws(3))
    assert plain.gates is x and plain.domains.tolist() == [0, 0, 0]
    own = ExpertInputs(x, draws(3), gate_x=gate_x, domain_id=torch.tensor([1, 0, -1]))
    assert own.gates is gate_x and own.domains.tolist() == [1, 0, -1]
    assert Sizes(in_features=2, num_tasks=1).gates == 2
    assert Sizes(in_features=2, num_tasks=1, gate_features=4).gates == 4

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rec.config import compose
from rec.distributed import process_group
from rec.schema import ConfigError, TaskConfig, TaskKind
from rec.weighting import (
    GradNorm,
    PCGrad,
    UncertaintyWeighting,
    Weighting,
    WeightingConfig,
    balance_loss,
    build_weighting,
    project,
)
from tests.conftest import CONF, start_ranks, toy_overrides
from tests.test_checkpoint import one_process, train
from tests.test_train import events, weights

TASKS = {"click": TaskConfig(label="click"), "dwell": TaskConfig(label="dwell", kind=TaskKind.regression)}
THREE = {name: TaskConfig(label=name) for name in "abc"}


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process group of this process alone, but for tests that start ranks themselves."""
    torch.manual_seed(0)
    with contextlib.nullcontext() if "rank_runs" in request.fixturenames else group_of_one():
        yield


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    with one_process(), process_group():
        yield


def shared(rows: int = 6, width: int = 5) -> torch.Tensor:
    return torch.randn(rows, width, requires_grad=True) * 1.0


def test_uncertainty_reaches_its_closed_form_optimum() -> None:
    weighting = UncertaintyWeighting(WeightingConfig(), TASKS)
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.3)
    losses = torch.tensor([0.2, 3.0])
    for step in range(300):
        optimizer.zero_grad()
        weighting(losses, shares=torch.ones(2), shared=shared(), step=step).backward()
        optimizer.step()
    # d/ds of c L exp(-s) + s / 2 is 0 at s = log(2 c L): sigma^2 = 2 L of a probability, L of a regression
    expected = [math.log(2 * 0.2), math.log(3.0)]
    assert weighting.log_variances.tolist() == pytest.approx(expected, abs=1e-4)
    said = weighting.describe()["task_weights"]
    assert said == pytest.approx({"click": 1 / 0.4, "dwell": 0.5 / 3.0}, rel=1e-3)


def test_uncertainty_leaves_a_task_without_rows_alone() -> None:
    weighting = UncertaintyWeighting(WeightingConfig(), TASKS)
    weighting(torch.tensor([0.3, 0.0]), shares=torch.tensor([1.0, 0.0]), shared=shared(), step=0).backward()
    assert weighting.log_variances.grad[1] == 0 and weighting.log_variances.grad[0] != 0


class TestGradNorm:
    def test_one_step_is_the_paper_s(self) -> None:
        """Against autograd through the paper's own expression, gradients at z."""
        weighting = GradNorm(WeightingConfig(gradnorm_alpha=0.7, gradnorm_lr=0.05), THREE)
        z = shared()
        heads = [0.3 * torch.randn(5) for _ in THREE]
        factors = [3.0, 1.0, 0.2]
        first = torch.stack([f * (z @ h).square().mean() for f, h in zip(factors, heads, strict=True)])
        weighting(first, shares=torch.ones(3), shared=z, step=0)
        weighting.after_backward()
        weighting.weights.copy_(torch.tensor([0.5, 1.5, 1.0]))
        z2 = shared()
        losses = torch.stack([f * (z2 @ h).square().mean() for f, h in zip(factors, heads, strict=True)])
        total = weighting(losses, shares=torch.ones(3), shared=z2, step=1)
        assert total.item() == pytest.approx(float(torch.tensor([0.5, 1.5, 1.0]) @ losses.detach()), rel=1e-5)
        weighting.after_backward()

        w = torch.tensor([0.5, 1.5, 1.0], requires_grad=True)
        norms = torch.stack([torch.autograd.grad(loss, z2, retain_graph=True)[0].norm() for loss in losses])
        pace = (losses / first).detach()
        goal = ((w * norms).mean() * (pace / pace.mean()) ** 0.7).detach()
        (w * norms - goal).abs().sum().backward()
        moved = (w - 0.05 * w.grad).detach()
        torch.testing.assert_close(weighting.weights, moved * 3 / moved.sum())

    def test_evens_out_the_norms_of_tasks_of_one_pace(self) -> None:
        weighting, scales = GradNorm(WeightingConfig(gradnorm_lr=0.01), THREE), torch.tensor([4.0, 1.0, 0.5])
        late = torch.zeros(3)
        for step in range(2000):
            z = shared(4, 2)
            losses = scales * z.sum(dim=1).sigmoid().mean()
            weighting(losses, shares=torch.ones(3), shared=z, step=step)
            weighting.after_backward()
            late += weighting.weights if step >= 1500 else 0
        norms = (late / 500 * scales).tolist()
        assert max(norms) / min(norms) < 1.1
        assert weighting.weights.sum().item() == pytest.approx(3)

    def test_leaves_a_task_without_rows_alone(self) -> None:
        weighting = GradNorm(WeightingConfig(), THREE)
        z = shared()
        losses = torch.stack([z.square().mean(), z.mean() ** 2, z.sum() * 0])
        weighting(losses, shares=torch.tensor([1.0, 1.0, 0.0]), shared=z, step=0)
        weighting.after_backward()
        assert torch.isfinite(weighting.weights).all() and weighting.first_losses[2] == 0

    def test_a_step_that_is_not_learned_from_leaves_no_trace(self) -> None:
        weighting, z = GradNorm(WeightingConfig(), THREE), shared()
        weighting(torch.stack([z.mean() * torch.nan, z.mean() ** 2, z.sum()]), shares=torch.ones(3), shared=z, step=0)
        assert weighting.weights.tolist() == [1, 1, 1] and weighting.first_losses.tolist() == [0, 0, 0]


def project_by_loops(gradients: np.ndarray, order: list[list[int]]) -> np.ndarray:
    """Algorithm 1 of the paper on whole vectors."""
    out = []
    for i, gradient in enumerate(gradients):
        g = gradient.copy()
        for j in order[i]:
            if j != i and g @ gradients[j] < 0:
                g = g - (g @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        out.append(g)
    return np.stack(out)


class TestPCGrad:
    @pytest.mark.parametrize("num_tasks", [2, 3, 5])
    def test_coefficients_give_the_algorithm_s_gradients(self, num_tasks: int) -> None:
        for seed in range(20):
            gradients = np.random.default_rng(seed).normal(size=(num_tasks, 4))
            generator = torch.Generator().manual_seed(seed)
            order = [torch.randperm(num_tasks, generator=generator).tolist() for _ in range(num_tasks)]
            coefficients = project(torch.from_numpy(gradients @ gradients.T), seed=seed).numpy()
            np.testing.assert_allclose(coefficients @ gradients, project_by_loops(gradients, order), atol=1e-10)

    def test_leaves_no_conflicting_pair_of_two(self) -> None:
        met = 0
        for seed in range(50):
            gradients = np.random.default_rng(seed).normal(size=(2, 3))
            met += gradients[0] @ gradients[1] < 0
            freed = project(torch.from_numpy(gradients @ gradients.T), seed=seed).numpy() @ gradients
            assert freed[0] @ gradients[1] > -1e-12 and freed[1] @ gradients[0] > -1e-12
            assert freed[0] @ freed[1] > -1e-12
        assert met > 10

    def test_the_backward_carries_it_below_z_and_the_plain_sum_above(self) -> None:
        weighting = PCGrad(WeightingConfig(), THREE)
        below = torch.randn(6, 5, requires_grad=True)
        z = below * 2.0
        heads = [torch.randn(5, requires_grad=True) for _ in THREE]
        losses = torch.stack([(z @ head).mean() for head in heads])
        gradients = np.stack([torch.autograd.grad(loss, z, retain_graph=True)[0].numpy().ravel() for loss in losses])
        weighting(losses, shares=torch.ones(3), shared=z, step=7).backward()
        generator = torch.Generator().manual_seed(7)
        order = [torch.randperm(3, generator=generator).tolist() for _ in range(3)]
        expected = project_by_loops(gradients, order).sum(axis=0).reshape(6, 5) * 2
        np.testing.assert_allclose(below.grad.numpy(), expected, atol=1e-5)
        for head in heads:
            torch.testing.assert_close(head.grad, z.detach().mean(dim=0))
        signs = (gradients @ gradients.T)[np.triu_indices(3, 1)] < 0
        assert weighting.describe() == {"conflicts": pytest.approx(signs.mean())}

    def test_a_task_without_gradient_changes_nothing(self) -> None:
        products = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
        assert torch.isfinite(project(products, seed=0)).all()
        assert project(products, seed=0)[2].tolist() == [0, 0, 1]

    def test_needs_something_below_the_experts(self) -> None:
        with pytest.raises(ConfigError, match=r"below the experts nothing is trained: .*interaction=dcn_v2"):
            PCGrad(WeightingConfig(), THREE)(torch.ones(3), shares=torch.ones(3), shared=torch.ones(2, 2), step=0)


def test_balance_loss_is_the_distance_from_even_use_and_its_gradient() -> None:
    logits = torch.randn(50, 2, 4, requires_grad=True)
    counts = torch.arange(50) < 40
    logits.data[40:] = 1e3 * torch.randn(10, 2, 4)  # padding is not looked at
    found = balance_loss(logits.softmax(-1), counts)
    (gradient,) = torch.autograd.grad(found, logits)
    mean = logits[:40].softmax(-1).mean(dim=0)
    expected = (math.log(4) + (mean * mean.log()).sum(dim=1)).sum()
    (wanted,) = torch.autograd.grad(expected, logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)
    even = torch.full((5, 2, 4), 0.25)
    assert balance_loss(even, torch.ones(5, dtype=torch.bool)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", list(Weighting))
def test_every_kind_is_built_and_goes_through_a_checkpoint(kind: Weighting) -> None:
    weighting = build_weighting(WeightingConfig(kind=kind), THREE)
    z = shared()
    weighting(torch.stack([z.square().mean()] * 3), shares=torch.ones(3), shared=z, step=0)
    again = build_weighting(WeightingConfig(kind=kind), THREE)
    again.load_state_dict(weighting.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(weighting.state_dict().values(), again.state_dict().values(), strict=True)
    )


# Everything whose outcome could depend on who serves a row: tasks' weights, dropped experts, sampled negatives, means of gates.
RANK_JOBS = {
    "uncertainty": ["experts=mixed", "model.experts.expert_dropout=0.3", "model.experts.expert_dropout_per=row"],
    "gradnorm": ["experts=ple", "model.experts.expert_dropout=0.3", "model.experts.balance_loss=0.1"],
    "pcgrad": [
        "model.experts.gate_layer_sizes=[6]",
        "data.tasks.click.negatives_kept=0.5",
        "data.tasks.click.positive_weight=2",
    ],
    "fixed": ["experts=omoe", "data.tasks.purchase.condition=null", "data.tasks.purchase.product=click"],
}


def rank_job(toy: Path, folder: Path, kind: str, *more: str) -> list[str]:
    steady = ["optim.sparse.eps=1e-3", "optim.dense.eps=1e-3", "trainer.log_every_steps=1"]
    return toy_overrides(toy, f"run_dir={folder}/{kind}", f"weighting.kind={kind}", *RANK_JOBS[kind], *steady, *more)


@pytest.fixture(scope="module")
def rank_runs(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighting")
    for ranks in (1, 3):
        jobs = [rank_job(toy, folder / str(ranks), kind) for kind in RANK_JOBS]
        start_ranks("tests/workers/train_worker.py", json.dumps(jobs), ranks=ranks)
    return folder


@pytest.mark.parametrize("kind", RANK_JOBS)
def test_three_ranks_end_where_one_does(rank_runs: Path, kind: str) -> None:
    one, three = (weights(rank_runs / str(ranks) / kind) for ranks in (1, 3))
    assert one.keys() == three.keys()
    for key, value in one.items():
        np.testing.assert_allclose(three[key].numpy(), value.numpy(), rtol=1e-3, atol=2e-5, err_msg=key)
    curves = [[event["loss"] for event in events(rank_runs / str(ranks) / kind, "train")] for ranks in (1, 3)]
    assert len(curves[0]) == 21
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def test_what_was_found_is_logged_and_moves(rank_runs: Path) -> None:
    first, last = (events(rank_runs / "3" / "uncertainty", "train")[i]["task_weights"] for i in (0, -1))
    assert first.keys() == {"click", "purchase", "dwell"} and first != last
    norms = events(rank_runs / "3" / "gradnorm", "train")[-1]["task_weights"]
    assert sum(norms.values()) == pytest.approx(3) and len(set(norms.values())) == 3
    conflicts = [event["conflicts"] for event in events(rank_runs / "3" / "pcgrad", "train")]
    assert 0 < max(conflicts) <= 1 and min(conflicts) >= 0
    assert "task_weights" not in events(rank_runs / "3" / "fixed", "train")[-1]


@pytest.mark.parametrize("kind", ["uncertainty", "gradnorm", "pcgrad"])
def test_going_on_from_a_checkpoint_ends_where_an_uncut_run_ends(
    rank_runs: Path, toy: Path, tmp_path: Path, kind: str
) -> None:
    for steps in (8, 21):
        train(compose(rank_job(toy, tmp_path, kind, f"trainer.max_steps={steps}"), config_dir=str(CONF)))
    uncut, cut = weights(rank_runs / "1" / kind), weights(tmp_path / kind)
    for key, value in uncut.items():
        np.testing.assert_allclose(cut[key].numpy(), value.numpy(), rtol=1e-5, atol=1e-7, err_msg=key)

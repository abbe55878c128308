import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from rec import health as module
from rec.health import ExpertHealth, HealthResult, TaskHealth, advice, table_of_health
from rec.schema import ConfigError
from tests.conftest import ROOT, start_ranks

TASKS = ["click", "cart", "purchase"]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate_weights, expert_outputs, counts


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads of several test runs on one machine wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_rows(num_rows: int, *, num_experts: int = 5, width: int = 4, seed: int = 0) -> Rows:
    """Gates of which each task prefers other experts, experts that are partly alike and far from 0, NaN in padding.

    Gates are float64, since scipy makes their sum 1, which float32 misses by 1e-7.
    """
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, 3, num_experts)) + 2 * rng.normal(size=(3, num_experts))
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    gates[:, 2, 0] = 0  # out of reach, as in PLE
    gates /= gates.sum(-1, keepdims=True)
    common = rng.normal(size=(num_rows, 1, width))
    outputs = 30 + common * np.arange(num_experts)[:, None] + rng.normal(size=(num_rows, num_experts, width))
    counts = rng.random(num_rows) < 0.9
    gates[~counts], outputs[~counts] = np.nan, np.inf
    return torch.tensor(gates), torch.tensor(outputs).float(), torch.tensor(counts)


def diagnose(rows: Rows, *, tasks: list[str] = TASKS, batch_size: int = 10**9, cka_rows: int = 10**6) -> HealthResult:
    health = ExpertHealth(tasks, cka_rows=cka_rows)
    for start in range(0, len(rows[2]), batch_size):
        health.update(*(x[start : start + batch_size] for x in rows), rows_before=start)
    return health.compute()


def diagnose_gates(gates: Any, *, outputs: torch.Tensor | None = None) -> HealthResult:
    """The same gates [T, N] in each of 200 rows; experts that have nothing in common, unless given."""
    gates = torch.as_tensor(gates, dtype=torch.float32).expand(200, -1, -1)
    if outputs is None:
        outputs = torch.randn(200, gates.shape[2], 4, generator=torch.Generator().manual_seed(0))
    return diagnose((gates, outputs, torch.ones(200, dtype=torch.bool)), tasks=TASKS[: gates.shape[1]])


def textbook_cka(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), HSIC = tr(K H L H) / (n - 1)^2 (Kornblith et al. 2019, equations 3 and 4)."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ centre @ b @ centre) / (len(x) - 1) ** 2

    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def reference(rows: Rows, *, compared: slice = slice(None)) -> dict[str, Any]:
    """All numbers, row by row and pair by pair, from all rows at once."""
    counts = rows[2].numpy()
    gates, outputs = rows[0].double().numpy()[counts], rows[1].double().numpy()[compared][counts[compared]]
    num_experts = gates.shape[2]
    means = {
        task: [float(np.mean([row[t][i] for row in gates])) for i in range(num_experts)] for t, task in enumerate(TASKS)
    }
    result: dict[str, Any] = {"rows": len(gates), "num_experts": num_experts, "tasks": {}, "overlap": {}}
    result |= {"overlap_per_row": {}, "js": {}, "constant": []}
    for t, (task, mean) in enumerate(means.items()):
        ranking = sorted(range(num_experts), key=lambda i: -mean[i])
        result["tasks"][task] = {
            "gate_weights": mean,
            "effective_experts": math.exp(entropy(mean)),
            "effective_experts_per_row": math.exp(np.mean([entropy(row[t]) for row in gates])),
            "largest": mean[ranking[0]],
            "primary": ranking[0],
            "secondary": ranking[1],
        }
    for (a, first), (b, second) in combinations(enumerate(TASKS), 2):
        pair = f"{first}/{second}"
        result["overlap"][pair] = sum(min(x, y) for x, y in zip(means[first], means[second], strict=True))
        per_row = [sum(min(row[a][i], row[b][i]) for i in range(num_experts)) for row in gates]
        result["overlap_per_row"][pair] = float(np.mean(per_row))
        result["js"][pair] = float(jensenshannon(means[first], means[second]) ** 2)
    cka = [textbook_cka(outputs[:, i], outputs[:, j]) for i, j in combinations(range(num_experts), 2)]
    result["specialisation"] = 1 - float(np.mean(cka))
    result["dead"] = [i for i in range(num_experts) if max(mean[i] for mean in means.values()) < 0.1 / num_experts]
    result["polarised"] = [task for task, mean in means.items() if max(mean) > 0.9]
    return result


def assert_close(a: Any, b: Any, *, rel: float = 1e-9) -> None:
    """Equal numbers at equal keys."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], rel=rel)
    else:
        numbers = isinstance(b, float) or (isinstance(b, list) and all(isinstance(item, float) for item in b))
        assert a == (pytest.approx(b, rel=rel, abs=1e-12) if numbers else b)


# ---- against loops


def test_equals_loops_over_all_rows() -> None:
    rows = make_rows(300)
    result, expected = asdict(diagnose(rows)), reference(rows)
    polarised = expected.pop("polarised")
    assert result.pop("polarised") == polarised
    assert_close(result, expected)
    assert 0.05 < result["specialisation"] < 0.95, "experts all alike or all different would prove little"
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize(("least", "most"), [(0.019, 0.91), (0.021, 0.89)])
def test_dead_and_polarised_equal_loops(least: float, most: float) -> None:
    gates, outputs, counts = make_rows(300)
    gates[..., 4] = 0
    gates = gates / gates.sum(-1, keepdim=True)
    gates[:, 1] = torch.tensor([0, most, 1 - most - least, 0, least])
    result, expected = diagnose((gates, outputs, counts)), reference((gates, outputs, counts))
    assert (result.dead, result.polarised) == (expected["dead"], expected["polarised"])
    assert (4 in result.dead) == (least < 0.02), "of 5 experts"
    assert ("cart" in result.polarised) == (most > 0.9)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_batches_do_not_matter(batch_size: int) -> None:
    rows = make_rows(230)
    assert_close(asdict(diagnose(rows, batch_size=batch_size)), asdict(diagnose(rows)), rel=1e-10)


def test_padding_does_not_matter() -> None:
    rows = make_rows(230)
    without: Rows = tuple(x[rows[2]] for x in rows)  # type: ignore[assignment]
    assert_close(asdict(diagnose(rows)), asdict(diagnose(without)), rel=1e-10)


def test_experts_are_compared_on_the_first_steps_until_enough_rows() -> None:
    rows = make_rows(200)
    found = diagnose(rows, batch_size=20, cka_rows=70).specialisation
    assert found == pytest.approx(reference(rows, compared=slice(0, 80))["specialisation"], rel=1e-9)
    assert found != pytest.approx(diagnose(rows).specialisation, rel=1e-4)


def test_of_many_units_the_first_of_each_expert_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    gates, outputs, counts = make_rows(100, width=8)
    monkeypatch.setattr(module, "_CKA_COLUMNS", 17)  # 3 of each of 5 experts
    few = diagnose((gates, outputs[..., :3], counts)).specialisation
    assert diagnose((gates, outputs, counts)).specialisation == pytest.approx(few, rel=1e-12)


def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    cases = {}
    for name, num_rows, share, cka_rows in (("uneven", 500, 13, 70), ("padding alone", 120, 40, 10**6)):
        steps = list(zip(*(x.split(40) for x in make_rows(num_rows, seed=3)), strict=True))
        cases[name] = {"tasks": TASKS, "cka_rows": cka_rows, "share": share, "steps": steps}
    torch.save(cases, tmp_path / "steps.pt")
    start_ranks(str(ROOT / "tests/workers/health_worker.py"), str(tmp_path / "steps.pt"), str(tmp_path / "out.json"))
    for results in json.loads((tmp_path / "out.json").read_text()):
        assert_close(results["uneven"], asdict(diagnose(make_rows(500, seed=3), batch_size=40, cka_rows=70)))
        assert_close(results["padding alone"], asdict(diagnose(make_rows(120, seed=3))))


# ---- what is known without computing


def test_even_gates_use_all_experts() -> None:
    task = diagnose_gates(torch.full((2, 6), 1 / 6)).tasks["click"]
    assert task.effective_experts == pytest.approx(6, rel=1e-6)
    assert task.effective_experts_per_row == pytest.approx(6, rel=1e-6)
    assert task.largest == pytest.approx(1 / 6, rel=1e-6)


def test_gates_alike_in_all_tasks_overlap_fully_however_even() -> None:
    result = diagnose_gates([[0.5, 0.3, 0.2]] * 2)
    assert result.overlap["click/cart"] == pytest.approx(1, rel=1e-6)
    assert result.overlap_per_row["click/cart"] == pytest.approx(1, rel=1e-6)
    assert result.js == {"click/cart": 0.0}


def test_one_hot_gates_are_polarised() -> None:
    result = diagnose_gates([[0, 1, 0, 0], [0, 0, 0, 1]])
    expected = TaskHealth(
        [0, 1, 0, 0], effective_experts=1, effective_experts_per_row=1, largest=1, primary=1, secondary=None
    )
    assert result.tasks["click"] == expected
    assert result.overlap == {"click/cart": 0} and result.js["click/cart"] == pytest.approx(math.log(2))
    assert result.polarised == ["click", "cart"] and result.dead == [0, 2]


def test_rows_may_be_decided_where_the_mean_is_even() -> None:
    gates = torch.eye(4).repeat(50, 1)[:, None].repeat(1, 2, 1)
    gates[:, 1] = gates[:, 1].roll(1, dims=-1)  # the second task takes the next expert in each row
    result = diagnose((gates, torch.randn(200, 4, 3), torch.ones(200, dtype=torch.bool)), tasks=TASKS[:2])
    task = result.tasks["click"]
    assert (task.effective_experts, task.effective_experts_per_row) == (pytest.approx(4), 1)
    assert (result.overlap["click/cart"], result.overlap_per_row["click/cart"]) == (pytest.approx(1), 0)


def test_specialisation_of_experts_alike_and_unlike() -> None:
    even, one = torch.full((2, 2), 0.5), torch.randn(200, 1, 6, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2))).Q
    assert diagnose_gates(even, outputs=one.expand(-1, 2, -1)).specialisation == pytest.approx(0, abs=1e-12)
    alike = torch.cat([one, 7 + 3 * one @ rotation], dim=1)  # linear CKA sees no shift, scale or rotation
    assert diagnose_gates(even, outputs=alike).specialisation == pytest.approx(0, abs=1e-6)
    unlike = torch.linalg.qr(torch.cat([torch.ones(200, 1), torch.randn(200, 12)], dim=1)).Q[:, 1:].view(200, 2, 6)
    assert diagnose_gates(even, outputs=unlike).specialisation == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_constant_experts_are_left_out_of_specialisation(value: float) -> None:
    gates, outputs, counts = make_rows(200)
    others = diagnose((gates[..., 1:] / gates[..., 1:].sum(-1, keepdim=True), outputs[:, 1:], counts)).specialisation
    outputs[:, 0] = value
    result = diagnose((gates, outputs, counts))
    assert result.constant == [0]
    assert result.specialisation == pytest.approx(others, rel=1e-9)
    outputs[:, 1:4] = value
    assert diagnose((gates, outputs, counts)).specialisation is None


def test_one_expert_and_one_task_have_no_pairs() -> None:
    result = diagnose_gates([[1.0]])
    assert (result.overlap, result.overlap_per_row, result.js, result.specialisation) == ({}, {}, {}, None)
    assert (result.dead, result.polarised, result.tasks["click"].secondary) == ([], [], None)
    assert advice(result) == []
    assert "overlap" not in table_of_health(result) and "specialisation -" in table_of_health(result)


def test_padding_alone_has_no_result() -> None:
    gates, outputs, counts = make_rows(20)
    health = ExpertHealth(TASKS)
    health.update(gates, outputs, torch.zeros_like(counts), rows_before=0)
    assert health.compute() is None
    health.update(gates, outputs, counts, rows_before=20)
    assert_close(asdict(health.compute()), asdict(diagnose((gates, outputs, counts))))


def test_reset_forgets_and_takes_another_number_of_experts() -> None:
    health = ExpertHealth(TASKS)
    for num_experts in (5, 3):
        rows = make_rows(60, num_experts=num_experts)
        health.update(*rows, rows_before=0)
        assert_close(asdict(health.compute()), asdict(diagnose(rows)))
        health.reset()


def test_memory_does_not_grow_with_rows() -> None:
    health = ExpertHealth(TASKS)
    sizes = []
    for step in range(3):
        health.update(*make_rows(50), rows_before=50 * step)
        sizes.append(sum(getattr(health, name).numel() for name in health._defaults))
    assert sizes == [1 + 15 + 15 + 3 + 9 + 1 + 20 + 400] * 3


# ---- bad input


def test_wrong_shapes_are_named() -> None:
    gates, outputs, counts = make_rows(10)
    health = ExpertHealth(TASKS)
    for wrong, message in (
        ((gates[:, :2], outputs, counts), r"gate_weights has shape \[10, 2, 5\], expected \[10, 3, N\]"),
        ((gates, outputs[:, :4], counts), r"expert_outputs has shape \[10, 4, 4\], expected \[10, 5, H\]"),
        ((gates, outputs[..., 0], counts), r"expert_outputs has shape \[10, 5\]"),
        ((gates, outputs, counts.float()), r"counts is \[10\] torch.float32, expected \[10\] torch.bool"),
        ((gates, outputs, counts[:9]), r"gate_weights has shape \[10, 3, 5\], expected \[9, 3, N\]"),
    ):
        with pytest.raises(ValueError, match=message):
            health.update(*wrong, rows_before=0)
    with pytest.raises(ConfigError, match="cka_rows is 1, expected a value from 2"):
        ExpertHealth(TASKS, cka_rows=1)


@pytest.mark.parametrize("wrong", [[0.5, 0.2, 0.2], [2.0, -0.5, -0.5], [math.nan, 0.5, 0.5]])
def test_gates_that_are_no_distribution_are_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="gate_weights of task 'cart' sum to .* expected weights from 0 to 1"):
        diagnose_gates([[0.5, 0.3, 0.2], wrong])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(wrong: float) -> None:
    outputs = torch.randn(200, 3, 4)
    outputs[17, 1, 2] = wrong
    with pytest.raises(ValueError, match="outputs of expert 1 hold NaN or infinity"):
        diagnose_gates([[0.5, 0.3, 0.2]], outputs=outputs)


# ---- words


def test_nothing_to_say_of_healthy_gates() -> None:
    assert advice(diagnose_gates([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]])) == []


def test_advice_names_the_finding_its_numbers_and_the_setting() -> None:
    dead, polarised, unshared = advice(diagnose_gates([[0.01, 0.98, 0.01, 0], [0.01, 0, 0.29, 0.7]]))
    assert dead.startswith("expert 0 of 4 is dead") and "more than 0.01 on average" in dead and "0.25" in dead
    assert (
        "model.experts.temperature" in dead and "model.experts.expert_dropout=0.1" in dead and "fewer experts" in dead
    )
    assert "'click' gives 0.98 to expert 1" in polarised and "Ma et al. 2018" in polarised and "cart" not in polarised
    assert "model.experts.temperature" in polarised and "model.experts.expert_dropout=0.1" in polarised
    assert "click/cart 0.02" in unshared and "model.experts.temperature" in unshared


def test_advice_on_experts_that_do_the_same_or_nothing() -> None:
    even, one = torch.full((2, 3), 1 / 3), torch.randn(200, 1, 6)
    (alike,) = advice(diagnose_gates(even, outputs=one.expand(-1, 3, -1)))
    assert "specialisation 0.000" in alike and "experts=mixed" in alike and "fewer experts" in alike
    (constant,) = advice(diagnose_gates(even, outputs=torch.cat([0 * one, 0 * one + 1, one], dim=1)))
    assert constant.startswith("experts 0, 1 of 3 are constant") and "optim.dense.lr" in constant


def test_advice_stays_short_with_many_tasks() -> None:
    result = diagnose_gates([[1, 0, 0], [0, 1, 0], [0, 0, 1]])
    result.overlap = {f"a{i}/b": (40 - i) / 1000 for i in range(40)}
    unshared = next(sentence for sentence in advice(result) if "share" in sentence)
    assert "overlap of a39/b 0.00, a38/b 0.00" in unshared and "and 34 more" in unshared and len(unshared) < 250


def test_table_shows_each_task() -> None:
    gates = torch.tensor([[0.31, 0.22, 0.17, 0.15, 0.15, 0], [0.02, 0.95, 0.02, 0.01, 0, 0]])
    assert table_of_health(replace(diagnose_gates(gates), specialisation=0.714)).splitlines() == [
        "task    effective   per row   largest       0     1     2     3     4     5",
        "click        4.79      4.79      0.31    0.31  0.22  0.17  0.15  0.15     .",
        "cart         1.29      1.29      0.95    0.02  0.95  0.02  0.01     .     .",
        "overlap click/cart 0.27 (0.27 per row); 6 experts, specialisation 0.71; dead 5",
    ]


def test_table_of_many_experts_and_tasks_is_no_wider() -> None:
    result = diagnose_gates(torch.softmax(torch.arange(3.0 * 40).view(3, 40).sin(), dim=-1))
    result.overlap = {f"a{i}/b": 0.9 - i / 100 for i in range(6)}
    result.overlap_per_row = dict(result.overlap)
    head, *lines, last = table_of_health(result).splitlines()
    assert "largest gate weights" in head and len(lines) == 3
    task = result.tasks["click"]
    assert f"#{task.primary} {task.largest:.2f}" in lines[0] and f"#{task.secondary}" in lines[0]
    assert "overlap a5/b 0.85 (0.85 per row), a4/b 0.86" in last and "3 more up to 0.90" in last
    assert max(map(len, [head, *lines])) < 110


def test_an_expert_of_a_rare_domain_is_not_dead_and_one_that_nobody_uses_is() -> None:
    gates = torch.zeros(200, 1, 4)
    gates[:, 0, 0] = 1
    gates[:4, 0, :2] = 0.5  # a domain of 2 % of the rows
    gates[:, 0, 0] -= 1e-6
    gates[:, 0, 2] = 1e-6
    health = ExpertHealth(["click"])
    health.update(gates, torch.randn(200, 4, 3), torch.ones(200, dtype=torch.bool), rows_before=0)
    assert health.compute().dead == [2, 3]

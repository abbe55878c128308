import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

from rec.curves import BINARY_METRICS, REGRESSION_METRICS, TRUTH_METRICS
from rec.metrics import MetricsConfig, MultitaskMetrics
from rec.schema import TaskConfig, TaskKind
from tests.conftest import ROOT, start_ranks
from tests.test_curves import loop_ece, loop_gauc

TASKS = {
    "click": TaskConfig(label="click", truth="p_click"),
    "cart": TaskConfig(label="cart"),
    "watch": TaskConfig(label="watch", kind=TaskKind.regression),
}
DOMAINS = ["home", "search", "cart", "never"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of several test runs on one machine wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_rows(num_rows: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows of three tasks: predictable labels, ties, weights, masked rows that hold garbage."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(num_rows, 3)) * 1.5 - [0.5, 3, 0]
    probability = 1 / (1 + np.exp(-true))
    labels = (rng.random((num_rows, 3)) < probability).astype(np.float32)
    labels[:, 2] = np.abs(true[:, 2] + rng.normal(size=num_rows))
    logits = (true + rng.normal(size=true.shape)).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    weights = rng.choice([0.0, 0.5, 1.0, 2.5], size=(num_rows, 3)).astype(np.float32)
    logits[weights == 0], labels[weights == 0] = np.nan, np.inf
    probability[weights == 0] = np.nan
    probability[:, 1:] = 7  # not a truth of anything
    rows = {"logits": logits, "labels": labels, "weights": weights, "truth": probability.astype(np.float32)}
    rows |= {"domain_id": rng.integers(0, 3, num_rows), "group_id": rng.integers(-(2**62), 2**62, 1 + num_rows // 8)}
    rows["group_id"] = rng.choice(rows["group_id"], num_rows)
    return {name: torch.from_numpy(x) for name, x in rows.items()}


def evaluate(rows: dict[str, torch.Tensor], *, batch_size: int = 10**9, grouped: bool = True, **config):
    metrics = MultitaskMetrics(TASKS, domains=DOMAINS, config=MetricsConfig(**config), grouped=grouped)
    for start in range(0, len(rows["logits"]), batch_size):
        metrics.update(**{name: x[start : start + batch_size] for name, x in rows.items() if x is not None})
    return metrics.compute()


def evaluate_one(logits, labels, *, weights=None, **config):
    """The metrics of one binary task."""
    logits, labels = (torch.as_tensor(np.asarray(x), dtype=torch.float32)[:, None] for x in (logits, labels))
    weights = torch.ones_like(logits) if weights is None else torch.as_tensor(weights, dtype=torch.float32)[:, None]
    metrics = MultitaskMetrics({"click": TaskConfig(label="click")}, domains=["all"], config=MetricsConfig(**config))
    for batch in zip(*(x.split(500_000) for x in (logits, labels, weights)), strict=True):
        metrics.update(*batch, torch.zeros(len(batch[0]), dtype=torch.int64))
    return metrics.compute().metrics["click"]


def assert_close(a, b, *, rel: float = 1e-9) -> None:
    """Equal numbers at equal keys, None where the other is None."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_close(a[key], b[key], rel=rel)
    else:
        assert a == (b if b is None else pytest.approx(b, rel=rel, abs=1e-12))


def counted(rows: dict[str, torch.Tensor], task: int, domain: int | None = None):
    """Logits, labels, weights, groups, truth of the rows that count, float64."""
    keep = rows["weights"][:, task] > 0
    if domain is not None:
        keep &= rows["domain_id"] == domain
    columns = [rows[name][keep, task].double().numpy() for name in ("logits", "labels", "weights", "truth")]
    return [*columns, rows["group_id"][keep].numpy()]


@cache
def reference(num_rows: int, task: int, domain: int | None) -> dict[str, float]:
    """The metrics of `make_rows(num_rows)`."""
    logits, labels, weights, _, groups = counted(make_rows(num_rows), task, domain)
    preds = 1 / (1 + np.exp(-logits))
    rate = np.average(labels, weights=weights)
    logloss = log_loss(labels, preds, sample_weight=weights)
    return {
        "auc": roc_auc_score(labels, logits, sample_weight=weights),
        "pr_auc": average_precision_score(labels, logits, sample_weight=weights),
        "logloss": logloss,
        "ne": logloss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)),
        "calibration": (weights * preds).sum() / (weights * labels).sum(),
        "ece": loop_ece(logits, labels, weights, num_bins=20),
        "field_ece": field_ece_of(num_rows, task) if domain is None else None,
        "gauc": loop_gauc(logits, labels, weights, groups),
        "rows": len(logits),
        "positives": int(labels.sum()),
    }


def field_ece_of(num_rows: int, task: int) -> float:
    """The mean of the ECEs of the domains that have rows, weighted by their weight."""
    parts = [counted(make_rows(num_rows), task, domain)[:3] for domain in range(len(DOMAINS))]
    parts = [part for part in parts if len(part[0])]
    eces = [loop_ece(logits, labels, weights, num_bins=20) for logits, labels, weights in parts]
    return float(np.average(eces, weights=[weights.sum() for _, _, weights in parts]))


BINS = {"kept_rows": 1}  # so few that everything comes from the histogram
MODES = pytest.mark.parametrize("mode", [{"exact": True}, {}, BINS], ids=["exact", "kept", "bins"])


@pytest.mark.parametrize("domain", [None, 0, 2])
@MODES
def test_binary_metrics_equal_scikit_learn_and_loops(mode: dict, domain: int | None) -> None:
    rows = make_rows(3000)
    result = evaluate(rows, **mode, batch_size=500)
    for task, name in enumerate(["click", "cart"]):
        values = result.metrics[name] if domain is None else result.domains[name][DOMAINS[domain]]
        expected = dict(reference(3000, task, domain))
        if domain is not None:
            assert values["field_ece"] is expected.pop("field_ece") is None
        assert tuple(values) == (*BINARY_METRICS, *(TRUTH_METRICS if name == "click" else ()), "log_mae")
        assert values["log_mae"] is None  # no label is a teacher's
        tolerances = {"auc": 2e-4, "pr_auc": 3e-3, "ece": 3e-2, "field_ece": 3e-2} if mode is BINS else {}
        if mode is BINS:
            assert values["gauc"] is None  # no group fits
            del expected["gauc"]
        for metric, value in expected.items():
            assert values[metric] == pytest.approx(value, rel=tolerances.get(metric, 1e-6)), metric
        assert type(values["rows"]) is int
        assert type(values["positives"]) is int


@MODES
def test_truth_bounds_what_can_be_learned(mode: dict) -> None:
    rows = make_rows(3000)
    logits, labels, weights, truth, _ = counted(rows, 0)
    values = evaluate(rows, **mode).metrics["click"]
    best = roc_auc_score(labels, truth, sample_weight=weights)
    assert values["auc_truth"] == pytest.approx(best, abs=1e-4)
    gap = (roc_auc_score(labels, logits, sample_weight=weights) - 0.5) / (best - 0.5)
    assert 0.5 < values["gap_closed"] < 1
    assert values["gap_closed"] == pytest.approx(gap, abs=1e-3)
    without = evaluate({name: x for name, x in rows.items() if name != "truth"}, **mode).metrics["click"]
    assert without["auc_truth"] is None
    assert without["gap_closed"] is None
    assert without["auc"] == values["auc"]


def test_regression_metrics() -> None:
    rows = make_rows(2000)
    preds, labels, weights, _, _ = counted(rows, 2)
    values = evaluate(rows).metrics["watch"]
    assert tuple(values) == (*REGRESSION_METRICS, "log_mae")
    assert values["log_mae"] is None
    assert values["rows"] == len(preds)
    assert values["mae"] == pytest.approx(np.average(np.abs(preds - labels), weights=weights), rel=1e-6)
    assert values["rmse"] == pytest.approx(math.sqrt(np.average((preds - labels) ** 2, weights=weights)), rel=1e-6)
    assert values["calibration"] == pytest.approx((weights * preds).sum() / (weights * labels).sum(), rel=1e-5)


def draw(num_rows: int, rate: float, *, spread: float = 1.3, seed: int = 0):
    """Calibrated float32 logits around the base rate, and their labels."""
    rng = np.random.default_rng(seed)
    shift = math.log(rate / (1 - rate)) - (spread**2 / 2 if rate < 0.1 else 0)
    logits = rng.standard_normal(num_rows, dtype=np.float32) * np.float32(spread) + np.float32(shift)
    return logits, rng.random(num_rows, dtype=np.float32) < 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.mark.parametrize(("rate", "num_rows"), [(0.5, 300_000), (1e-2, 300_000), (1e-3, 500_000), (1e-4, 2_000_000)])
def test_ranking_of_rare_events(rate: float, num_rows: int) -> None:
    logits, labels = draw(num_rows, rate)
    assert labels.mean() == pytest.approx(rate, rel=0.2)
    values = evaluate_one(logits, labels)  # more rows than are kept
    assert values["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=3e-5)
    assert values["pr_auc"] == pytest.approx(average_precision_score(labels, logits), rel=5e-3)


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_ranking_of_an_untrained_model(spread: float) -> None:
    """Logits within a hair of each other, off centre: a fixed grid would see one score."""
    rng = np.random.default_rng(1)
    signal = rng.normal(size=200_000)
    labels = rng.random(200_000) < 1 / (1 + np.exp(4 - signal))
    logits = (-6.9 + spread * signal).astype(np.float32)
    values = evaluate_one(logits, labels, **BINS)
    assert roc_auc_score(labels, logits) > 0.7
    assert values["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=3e-5)
    assert values["pr_auc"] == pytest.approx(average_precision_score(labels, logits), rel=5e-3)


def test_far_logits_coarsen_the_grid_and_no_more() -> None:
    logits, labels = draw(300_000, 1e-2)
    logits[::1000] = np.float32([-1e30, 90, 16])[np.arange(300) % 3]
    clipped = np.clip(logits, -16, 15.999)
    values = evaluate_one(logits, labels, **BINS)
    assert values["auc"] == pytest.approx(roc_auc_score(labels, clipped), abs=1e-4)
    kept = evaluate_one(logits, labels, exact=True)
    assert kept["auc"] == pytest.approx(roc_auc_score(labels, logits), rel=1e-9)


def test_logloss_of_confident_logits_keeps_its_precision() -> None:
    logits = np.float32([-30, -17, 25, 40, 3])
    for labels in (np.float32([0, 0, 1, 1, 0.25]), np.float32([1, 1, 0, 0, 1])):
        z = logits.astype(np.float64)
        expected = np.mean(np.logaddexp(0, z) * (1 - labels) + np.logaddexp(0, -z) * labels)
        assert evaluate_one(logits, labels)["logloss"] == pytest.approx(expected, rel=1e-6)
    assert evaluate_one([-30.0], [0.0])["logloss"] == pytest.approx(math.exp(-30), rel=1e-6)


@MODES
def test_one_score_for_all_is_a_tie(mode: dict) -> None:
    values = evaluate_one(np.full(100, -1.0), np.arange(100) < 30, **mode)
    assert values["auc"] == 0.5
    assert values["pr_auc"] == pytest.approx(0.3)
    assert values["ece"] == pytest.approx(abs(0.3 - 1 / (1 + math.e)), rel=1e-6)


@MODES
def test_what_has_no_meaning_is_none(mode: dict) -> None:
    none_of_these = {"auc", "pr_auc", "ne", "gauc", "log_mae"}
    no_positives = evaluate_one([0.5, -1.0], [0, 0], **mode)
    assert {name for name, value in no_positives.items() if value is None} == none_of_these | {"calibration"}
    no_negatives = evaluate_one([0.5, -1.0], [1, 1], **mode)
    assert {name for name, value in no_negatives.items() if value is None} == none_of_these
    masked = evaluate_one([math.nan, math.inf], [7, math.nan], weights=[0.0, 0.0], **mode)
    assert masked == dict.fromkeys((*BINARY_METRICS, "log_mae")) | {"rows": 0, "positives": 0}
    result = evaluate(make_rows(50), **mode)
    assert result.domains["watch"]["never"] == dict.fromkeys((*REGRESSION_METRICS, "log_mae")) | {"rows": 0}
    never = dict.fromkeys((*BINARY_METRICS, *TRUTH_METRICS, "log_mae")) | {"rows": 0, "positives": 0}
    assert result.domains["click"]["never"] == never
    json.dumps(asdict(result), allow_nan=False)


@MODES
def test_rows_of_an_unknown_domain_count_overall_and_in_no_domain(mode: dict) -> None:
    rows = make_rows(2000)
    known = torch.from_numpy(np.random.default_rng(1).random(2000) < 0.7)
    result = evaluate(rows | {"domain_id": torch.where(known, rows["domain_id"], -1)}, **mode)
    inside = evaluate({name: x[known] for name, x in rows.items()}, **mode)
    rel = 1e-2 if mode is BINS else 1e-9  # the grid of fewer rows may be another
    assert_close(result.domains, inside.domains, rel=rel)
    overall, expected = (dict(one.metrics["click"]) for one in (result, evaluate(rows, **mode)))
    assert overall.pop("field_ece") == pytest.approx(inside.metrics["click"]["field_ece"], rel=rel)
    assert expected.pop("field_ece") != inside.metrics["click"]["field_ece"]
    assert_close(overall, expected)
    assert_close(result.metrics["watch"], evaluate(rows, **mode).metrics["watch"])


def soften(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows, some of which have a teacher's label of task cart; some logits and labels are far out."""
    rng, labels, logits = np.random.default_rng(2), rows["labels"].clone(), rows["logits"].clone()
    soft = torch.from_numpy(rng.choice([0.0, 1.0, 0.3, 0.999, 1e-4, 1e-30], len(labels))).float()
    counts = rows["weights"][:, 1] > 0
    labels[counts, 1] = soft[counts]
    logits[counts & (torch.arange(len(labels)) % 7 == 0), 1] = -40
    return rows | {"labels": labels, "logits": logits}


@pytest.mark.parametrize("domain", [None, 0, 2])
def test_log_mae_equals_a_loop(domain: int | None) -> None:
    rows = soften(make_rows(2000))
    result = evaluate(rows, batch_size=333)
    logits, labels, weights, _, _ = counted(rows, 1, domain)
    total, weight = 0.0, 0.0
    for z, y, w in zip(logits, labels, weights, strict=True):
        if 0 < y < 1:
            total += w * abs(math.log(max(1 / (1 + math.exp(-z)), 1e-12)) - math.log(max(y, 1e-12)))
            weight += w
    values = result.metrics["cart"] if domain is None else result.domains["cart"][DOMAINS[domain]]
    assert values["log_mae"] == pytest.approx(total / weight, rel=1e-6)
    assert result.metrics["click"]["log_mae"] is None and result.domains["cart"]["never"]["log_mae"] is None


def test_a_perfect_student_has_a_log_mae_of_0() -> None:
    labels = np.array([1e-6, 0.01, 0.5, 0.99])
    logits = np.log(labels / (1 - labels))
    assert evaluate_one(logits, labels)["log_mae"] == pytest.approx(0, abs=1e-6)
    assert evaluate_one(logits - math.log(2), labels)["log_mae"] > 0.3


def test_no_update_and_no_rows() -> None:
    metrics = MultitaskMetrics(TASKS, domains=DOMAINS, grouped=True)
    with pytest.warns(UserWarning, match="before the ``update``"):
        empty = metrics.compute()
    metrics.update(**{name: x[:0] for name, x in make_rows(1).items()})
    assert metrics.compute() == empty
    assert empty.metrics["click"]["auc"] is None


def test_masked_rows_do_not_matter() -> None:
    rows = make_rows(1000)
    keep = (rows["weights"] > 0).all(1)
    rows["weights"] *= keep[:, None]
    padded = evaluate(rows | {"domain_id": torch.where(keep, rows["domain_id"], -99)})
    assert_close(asdict(padded), asdict(evaluate({name: x[keep] for name, x in rows.items()})))


@MODES
def test_a_domain_is_the_subset(mode: dict) -> None:
    rows = make_rows(2000)
    result = evaluate(rows, **mode)
    for d, domain in enumerate(DOMAINS[:3]):
        alone = evaluate({name: x[rows["domain_id"] == d] for name, x in rows.items()}, **mode)
        for task in TASKS:
            # the grid of a subset may be narrower, so the histogram agrees to its accuracy only
            values = dict(alone.metrics[task])
            if "field_ece" in values:  # in a domain it would be the ECE again
                assert (
                    values["field_ece"] == pytest.approx(values["ece"])
                    and result.domains[task][domain]["field_ece"] is None
                )
                values["field_ece"] = None
            assert_close(result.domains[task][domain], values, rel=1e-2 if mode is BINS else 1e-9)


@pytest.mark.parametrize("config", [{"exact": True}, BINS, {"kept_rows": 300}])
def test_batches_and_their_order_do_not_matter(config: dict) -> None:
    rows = make_rows(2000)
    rows["logits"][:1000] *= 1e-3  # the grid starts narrow and has to widen
    once = evaluate(rows, **config)
    assert (once.metrics["click"]["gauc"] is None) == (config is BINS)
    assert_close(asdict(evaluate(rows, batch_size=37, **config)), asdict(once))
    shuffled = {name: x[torch.randperm(2000, generator=torch.Generator().manual_seed(0))] for name, x in rows.items()}
    assert_close(asdict(evaluate(shuffled, batch_size=150, **config)), asdict(once))


def test_reset_and_state_dict() -> None:
    rows = make_rows(500)
    metrics = MultitaskMetrics(TASKS, domains=DOMAINS, grouped=True)
    metrics.update(**make_rows(300, seed=1))
    metrics.reset()
    metrics.update(**rows)
    assert_close(asdict(metrics.compute()), asdict(evaluate(rows)))
    metrics.persistent(True)
    restored = MultitaskMetrics(TASKS, domains=DOMAINS, grouped=True)
    restored.load_state_dict(metrics.state_dict())
    restored.update(**rows)
    metrics.update(**rows)
    assert asdict(restored.compute()) == asdict(metrics.compute())


def test_group_auc_samples_whole_groups_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    num_rows, groups = 200_000, 40_000
    group_id = torch.from_numpy(rng.integers(0, groups, num_rows))
    ease = rng.random(groups)[group_id]  # groups differ, so that a sample of rows or of first groups would show
    labels = rng.random(num_rows) < 0.3
    logits = rng.normal(size=num_rows) + 2 * ease * labels
    one = {"logits": logits, "labels": labels, "weights": np.ones(num_rows)}
    batch = [torch.as_tensor(x, dtype=torch.float32)[:, None] for x in one.values()]
    gaucs = {}
    for limit in (10**6, 20_000):
        config = MetricsConfig(kept_rows=limit)
        metrics = MultitaskMetrics({"t": TASKS["cart"]}, domains=["all"], config=config, grouped=True)
        for start in range(0, num_rows, 4000):
            part = slice(start, start + 4000)
            metrics.update(*(x[part] for x in batch), torch.zeros(4000, dtype=torch.int64), group_id[part])
            assert sum(map(len, metrics.kept_keys)) <= limit
            assert all(len(x) == len(y) for x, y in zip(metrics.kept_keys, metrics.kept_values, strict=True))
        gaucs[limit] = metrics.compute().metrics["t"]["gauc"]
    assert sum(map(len, metrics.kept_keys)) > 10_000  # halved no more often than needed
    assert gaucs[20_000] == pytest.approx(gaucs[10**6], abs=0.02)
    assert gaucs[20_000] != gaucs[10**6]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logits", math.nan, "logits of task 'click' is nan in row 3"),
        ("logits", math.inf, "logits of task 'click' is inf in row 3"),
        ("labels", 1.5, "labels of task 'click' is 1.5 in row 3 of the batch, expected 0 to 1"),
        ("weights", -1.0, "weights of task 'click' is -1 in row 3"),
        ("weights", math.nan, "weights of task 'click' is nan in row 3"),
        ("truth", math.nan, "truth of task 'click' is nan in row 3"),
        ("domain_id", 4, "domain_id of task 'click' is 4 in row 3 of the batch, expected -1 to 3"),
        ("domain_id", -2, "domain_id of task 'click' is -2 in row 3 of the batch, expected -1 to 3"),
    ],
)
def test_a_bad_value_is_named_and_loses_nothing(field: str, value: float, message: str) -> None:
    rows = make_rows(10)
    rows["weights"][3, 0] = 1
    rows["logits"][3, 0], rows["labels"][3, 0], rows["truth"][3, 0] = 0, 1, 0.5
    metrics = MultitaskMetrics(TASKS, domains=DOMAINS, grouped=True)
    metrics.update(**rows)
    before = metrics.compute()
    bad = rows[field].clone()
    bad[(3, 0) if bad.ndim == 2 else 3] = value
    with pytest.raises(ValueError, match=message):
        metrics.update(**(rows | {field: bad}))
    assert metrics.compute() == before


def test_wrong_shapes_and_missing_groups_are_named() -> None:
    rows = make_rows(10)
    metrics = MultitaskMetrics(TASKS, domains=DOMAINS, grouped=True)
    with pytest.raises(ValueError, match=r"labels has shape \[10, 2\], expected \[10, 3\]"):
        metrics.update(**(rows | {"labels": rows["labels"][:, :2]}))
    with pytest.raises(ValueError, match="group_id is None"):
        metrics.update(**(rows | {"group_id": None}))
    assert evaluate(rows | {"group_id": None}, grouped=False).metrics["click"]["gauc"] is None


CONFIGS = {"kept": {}, "exact": {"exact": True}, "sampled": {"kept_rows": 700}, "bins": BINS}


def test_two_and_three_ranks_equal_one_process(tmp_path: Path) -> None:
    rows = make_rows(5000)
    for start in range(700, 5000, 2100):  # the rows of rank 1, whose grid is then finer than that of rank 0
        rows["logits"][start : start + 700] *= 1e-3
    rows = soften(rows)
    rows["domain_id"][::5] = -1
    torch.save({"rows": rows, "tasks": TASKS, "domains": DOMAINS, "configs": CONFIGS}, tmp_path / "rows.pt")
    worker = [str(ROOT / "tests/workers/metrics_worker.py"), str(tmp_path / "rows.pt"), str(tmp_path / "out.json")]
    start_ranks(*worker, ranks=3, timeout=120)
    ranks = json.loads((tmp_path / "out.json").read_text())
    assert [len(results) for results in ranks] == [2 * len(CONFIGS), 2 * len(CONFIGS), len(CONFIGS)]
    for name, config in CONFIGS.items():
        expected = asdict(evaluate(rows, **config))
        assert expected["metrics"]["cart"]["log_mae"] > 0
        for results in ranks:
            for world_size in (2, 3):
                assert_close(results.get(f"{name} {world_size}", expected), expected)

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from rec.calibration import FILE, VERSION, CalibrationConfig, CalibratorKind, Calibrators
from rec.curves import exact_curve, expected_calibration_error, field_ece
from rec.predictions import Rows
from rec.schema import ConfigError, TaskConfig, TaskKind

DOMAINS = ["search", "home", "mail"]
TASKS = {
    "click": TaskConfig(label="click"),
    "dwell": TaskConfig(label="dwell", kind=TaskKind.regression),
    "cart": TaskConfig(label="cart", auxiliary=True),
    "purchase": TaskConfig(label="purchase", condition="click"),
}
KINDS = pytest.mark.parametrize("kind", CalibratorKind)


def market(num_rows: int = 60_000, *, seed: int = 0) -> Rows:
    """Three placements of 70, 22 and 8 % of the rows in which the logits are off by another slope and offset each."""
    rng = np.random.default_rng(seed)
    domain = rng.choice(3, num_rows, p=[0.7, 0.22, 0.08])
    true = rng.normal(-2.3, 1.2, num_rows)
    slope, offset = np.array([1.0, 1.3, 0.6])[domain], np.array([0.15, 0.5, -1.6])[domain]
    logits = (true[:, None] * slope[:, None] + offset[:, None]).repeat(4, 1)
    labels = (rng.random((num_rows, 4)) < 1 / (1 + np.exp(-true[:, None]))).astype(np.float32)
    weights = np.ones((num_rows, 4), np.float32)
    weights[:, 3] = labels[:, 0]
    columns = (torch.from_numpy(x.astype(np.float32)) for x in (logits, labels, weights))
    return Rows(*columns, torch.from_numpy(domain), torch.zeros(num_rows, dtype=torch.int64))


def fitted(rows: Rows, **config: object) -> Calibrators:
    return Calibrators(TASKS, domains=DOMAINS, config=CalibrationConfig(**config)).fit(rows, split="valid", step=7)


@pytest.fixture(scope="module")
def rows() -> Rows:
    return market()


@pytest.fixture(scope="module")
def fresh() -> Rows:
    return market(300_000, seed=1)


@pytest.fixture(scope="module", params=list(CalibratorKind), ids=lambda kind: kind.name)
def calibrators(request: pytest.FixtureRequest, rows: Rows) -> Calibrators:
    return fitted(rows, kind=request.param)


def eces(logits: Tensor, rows: Rows) -> tuple[float, float, list[float]]:
    """Of `click`: over all rows, within placements, and sum of predictions over sum of labels in each."""
    scores, labels, domain = logits[:, 0].double().numpy(), rows.labels[:, 0].numpy(), rows.domain_id.numpy()
    curves = [
        exact_curve(scores[among], labels=labels[among], weights=np.ones(among.sum()))
        for among in (domain >= 0, *(domain == d for d in range(3)))
    ]
    overall, *own = (expected_calibration_error(curve, num_bins=20) or 0.0 for curve in curves)
    field = field_ece(own, [float((domain == d).mean()) for d in range(3)])
    return overall, field or 0.0, [float(curve[2].sum() / curve[1].sum()) for curve in curves[1:]]


class TestPlacements:
    def test_a_curve_each_is_what_mends_them(self, rows: Rows, fresh: Rows) -> None:
        """One line over all rows gives a small error over all rows, and leaves every placement wrong."""
        platt = fitted(rows)
        together = platt(fresh.logits, torch.full_like(fresh.domain_id, -1))
        overall, field, _ = eces(together, fresh)
        own_overall, own_field, ratios = eces(platt(fresh.logits, fresh.domain_id), fresh)
        assert overall < field / 3 and own_overall < 0.003
        assert own_field < field / 5
        assert ratios == pytest.approx([1, 1, 1], abs=0.06)

    def test_isotonic_mends_them_too(self, rows: Rows, fresh: Rows) -> None:
        _, before, _ = eces(fresh.logits, fresh)
        _, field, ratios = eces(fitted(rows, kind=CalibratorKind.isotonic)(fresh.logits, fresh.domain_id), fresh)
        assert field < before / 4 and ratios == pytest.approx([1, 1, 1], abs=0.06)

    def test_auc_within_a_placement_is_unchanged_by_a_line(self, rows: Rows, fresh: Rows) -> None:
        after = fitted(rows)(fresh.logits, fresh.domain_id)
        for d in range(3):
            among = fresh.domain_id == d
            aucs = [
                roc_auc_score(fresh.labels[among, 0], logits[among, 0].double()) for logits in (fresh.logits, after)
            ]
            assert aucs[0] == pytest.approx(aucs[1], abs=1e-6)


class TestApplied:
    def test_regression_and_auxiliary_tasks_pass_through(self, calibrators: Calibrators, fresh: Rows) -> None:
        after = calibrators(fresh.logits, fresh.domain_id)
        assert after.dtype == torch.float32 and calibrators.cells_.keys() == {"click", "purchase"}
        assert torch.equal(after[:, 1:3], fresh.logits[:, 1:3])
        assert (after[:, 0] != fresh.logits[:, 0]).float().mean() > 0.9

    def test_each_row_takes_the_curve_of_its_task_and_domain(self, calibrators: Calibrators) -> None:
        logits = torch.linspace(-9, 6, 300)[:, None].repeat(1, 4)
        for d, domain in enumerate(DOMAINS):
            after = calibrators(logits, torch.full((300,), d)).double().numpy()
            for t, name in ((0, "click"), (3, "purchase")):
                cell = calibrators.cells_[name].domains[domain]
                cell = cell if cell.has_curve else calibrators.cells_[name].overall
                z = logits[:, t].double().numpy()
                want = np.interp(z, cell.logits, cell.calibrated) if cell.logits else cell.a * z + cell.b  # type: ignore[operator]
                np.testing.assert_allclose(after[:, t], want, rtol=2e-5, atol=2e-5)

    def test_monotone(self, calibrators: Calibrators) -> None:
        logits = torch.linspace(-20, 20, 1001)[:, None].repeat(1, 4)
        for d in (-1, 0, 1, 2):
            assert (calibrators(logits, torch.full((1001,), d)).diff(dim=0) >= 0).all()

    @pytest.mark.parametrize("unknown", [-1, 3, 10**9])
    def test_an_unknown_domain_takes_the_curve_of_all_rows(self, rows: Rows, unknown: int) -> None:
        calibrators, alone = fitted(rows), fitted(rows, per_domain=False)
        assert alone.cells_["click"].domains == {}
        logits = torch.randn(50, 4)
        after = calibrators(logits, torch.full((50,), unknown))
        assert torch.equal(after, alone(logits, torch.zeros(50, dtype=torch.int64)))
        assert not torch.equal(after, calibrators(logits, torch.zeros(50, dtype=torch.int64)))

    def test_the_rows_of_a_batch_do_not_touch_each_other(self, calibrators: Calibrators, fresh: Rows) -> None:
        one = torch.cat([calibrators(fresh.logits[i : i + 1], fresh.domain_id[i : i + 1]) for i in range(40)])
        assert torch.equal(one, calibrators(fresh.logits[:40], fresh.domain_id[:40]))
        assert calibrators(fresh.logits[:0], fresh.domain_id[:0]).shape == (0, 4)


class TestFit:
    def test_what_does_not_count_is_not_looked_at(self, rows: Rows) -> None:
        logits, labels = rows.logits.clone(), rows.labels.clone()
        masked = rows.weights == 0
        logits[masked], labels[masked] = torch.nan, torch.inf
        spoilt = Rows(logits, labels, rows.weights, rows.domain_id, rows.group_id)
        assert fitted(spoilt).cells_ == fitted(rows).cells_

    def test_a_diverged_network_is_refused(self, rows: Rows) -> None:
        logits = rows.logits.clone()
        logits[5, 0] = torch.nan
        with pytest.raises(ConfigError, match="logits of task 'click' hold NaN or infinity, .*checkpoint=STEP"):
            fitted(rows.with_logits(logits))

    def test_notes(self, rows: Rows) -> None:
        labels = rows.labels.clone()
        labels[rows.domain_id == 1, 0] = 0
        reversed_ = rows.with_logits(torch.where(rows.domain_id[:, None] == 2, -5 * rows.logits, rows.logits))
        odd = Rows(reversed_.logits, labels, rows.weights, rows.domain_id, rows.group_id)
        cells = (
            Calibrators(TASKS, domains=[*DOMAINS, "new"], config=CalibrationConfig(prior_positives=0)).fit(odd).cells_
        )
        click = cells["click"].domains
        assert cells["click"].overall.note is None and click["search"].note is None
        assert click["home"].note == "no positives: the slope is not fitted" and click["home"].positives == 0
        assert click["mail"].note == "the logits do not rank the labels: the slope is at its lower bound"
        assert click["new"].note == "no rows: not fitted" and click["new"].rows == 0
        assert (click["new"].a, click["new"].b) == (cells["click"].overall.a, cells["click"].overall.b)

    def test_isotonic_without_positives_enough_takes_the_curve_of_all_rows(self, rows: Rows) -> None:
        calibrators = fitted(rows, kind=CalibratorKind.isotonic, min_positives=3000)
        mail = calibrators.cells_["click"].domains["mail"]
        assert mail.note == "fewer than 3000 positives or no negatives: the curve of all rows" and mail.positives > 100
        logits, ids = torch.randn(20, 4), torch.full((20,), 2)
        assert torch.equal(calibrators(logits, ids)[:, 0], calibrators(logits, ids - 3)[:, 0])
        assert not torch.equal(calibrators(logits, ids - 2)[:, 0], calibrators(logits, ids)[:, 0])

    @KINDS
    def test_without_any_positive(self, rows: Rows, kind: CalibratorKind) -> None:
        none = Rows(rows.logits, torch.zeros_like(rows.labels), rows.weights, rows.domain_id, rows.group_id)
        calibrators = fitted(none, kind=kind)
        assert calibrators(rows.logits, rows.domain_id).isfinite().all()
        assert calibrators.cells_["click"].overall.note

    @pytest.mark.parametrize(("name", "value"), [("prior_positives", -1), ("min_positives", 0)])
    def test_a_setting_out_of_range(self, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=f"calibration.{name} is {value}, expected a value from"):
            CalibrationConfig(**{name: value})


class TestFile:
    def test_round_trip(self, calibrators: Calibrators, fresh: Rows, tmp_path: Path) -> None:
        path = calibrators.save(tmp_path)
        assert path == tmp_path / FILE and [p.name for p in tmp_path.iterdir()] == [FILE]
        found = Calibrators.load(tmp_path, TASKS, domains=DOMAINS)
        assert found is not None
        assert (found.cells_, found.config, found.fitted_on_) == (
            calibrators.cells_,
            calibrators.config,
            calibrators.fitted_on_,
        )
        assert torch.equal(found(fresh.logits, fresh.domain_id), calibrators(fresh.logits, fresh.domain_id))

    def test_says_what_it_is(self, rows: Rows, tmp_path: Path) -> None:
        said = json.loads(fitted(rows).save(tmp_path).read_text())
        assert said["version"] == VERSION and said["fitted_on"] == {"split": "valid", "step": 7, "rows": 60_000}
        assert said["config"] == {"kind": "platt", "per_domain": True, "prior_positives": 20.0, "min_positives": 200}
        assert list(said["tasks"]) == ["click", "purchase"] and list(said["tasks"]["click"]["domains"]) == DOMAINS
        assert said["tasks"]["click"]["global"].keys() == {"rows", "positives", "a", "b"}
        assert said["tasks"]["click"]["global"]["positives"] == int(rows.labels[:, 0].sum())

    def test_domains_are_found_by_name(self, calibrators: Calibrators, tmp_path: Path) -> None:
        calibrators.save(tmp_path)
        found = Calibrators.load(tmp_path, TASKS, domains=["new", "mail", "search"])
        assert found is not None
        logits = torch.randn(30, 4)
        for now, then in ((0, -1), (1, 2), (2, 0)):
            assert torch.equal(found(logits, torch.full((30,), now)), calibrators(logits, torch.full((30,), then)))

    def test_tasks_are_found_by_name(self, calibrators: Calibrators, tmp_path: Path) -> None:
        calibrators.save(tmp_path)
        found = Calibrators.load(tmp_path, {"purchase": TASKS["purchase"]}, domains=DOMAINS)
        assert found is not None
        logits, ids = torch.randn(30, 4), torch.zeros(30, dtype=torch.int64)
        assert torch.equal(found(logits[:, 3:], ids), calibrators(logits, ids)[:, 3:])

    def test_none(self, tmp_path: Path) -> None:
        assert Calibrators.load(tmp_path, TASKS, domains=DOMAINS) is None

    def test_a_task_without_calibration_is_refused(self, calibrators: Calibrators, tmp_path: Path) -> None:
        calibrators.save(tmp_path)
        with pytest.raises(
            ConfigError, match=r"no calibration of the tasks \['like'\], only of \['click', 'purchase'\]"
        ):
            Calibrators.load(tmp_path, TASKS | {"like": TaskConfig(label="like")}, domains=DOMAINS)

    def test_a_digit_that_is_not_what_was_written(self, calibrators: Calibrators, tmp_path: Path) -> None:
        path = calibrators.save(tmp_path)
        said = json.loads(path.read_text())
        said["tasks"]["click"]["global"]["rows"] += 1
        path.write_text(json.dumps(said))
        with pytest.raises(ConfigError, match=r"no calibration .*SHA-256 \w{12}\.\.\., \w{12}\.\.\. was written"):
            Calibrators.load(tmp_path, TASKS, domains=DOMAINS)
        del said["sha256"]  # as files had it before
        path.write_text(json.dumps(said))
        assert Calibrators.load(tmp_path, TASKS, domains=DOMAINS)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{", "is no calibration .* fit it again with rec.calibrate"),
            ("[]", "is no calibration"),
            ('{"version": 1}', "is no calibration .*config"),
            (
                f'{{"version": {VERSION + 1}}}',
                f"has version {VERSION + 1}, expected at most {VERSION}; update to read it",
            ),
        ],
    )
    def test_damaged_or_newer(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ConfigError, match=said):
            Calibrators.load(tmp_path, TASKS, domains=DOMAINS)

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression

from rec.isotonic import fit_knots
from tests.test_platt import drawn, rows_of


class TestKnots:
    @pytest.mark.parametrize("weighted", [False, True])
    def test_give_what_scikit_learn_does(self, weighted: bool) -> None:
        logits, labels = drawn(2000, slope=0.8)
        logits = logits.round(2).astype(np.float32).astype(float)  # some rows share a logit
        weights = (
            np.random.default_rng(0).exponential(1, 2000).astype(np.float32).astype(float)
            if weighted
            else np.ones(2000)
        )
        curve = fit_knots(rows_of(logits, labels, weights), 0, num_domains=0, min_positives=1).overall
        fitted = IsotonicRegression().fit(logits, labels, sample_weight=weights).predict(logits)
        positives, negatives = weights @ labels, weights @ (1 - labels)
        want = np.clip(fitted, 1 / (negatives + 2), (positives + 1) / (positives + 2))
        got = 1 / (1 + np.exp(-np.interp(logits, curve.logits, curve.calibrated)))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert 10 < len(curve.logits) < 100 and curve.rows == 2000 and curve.labels == labels.sum()

    def test_do_not_fall(self) -> None:
        curve = fit_knots(rows_of(*drawn(3000)), 0, num_domains=0, min_positives=1).overall
        assert (np.diff(curve.logits) > 0).all() and (np.diff(curve.calibrated) >= 0).all()

    def test_of_domains_with_positives_enough(self) -> None:
        logits, labels = drawn(3000)
        domain = np.repeat([0, 1], [2900, 100])
        curves = fit_knots(rows_of(logits, labels, domain_id=domain), 0, num_domains=3, min_positives=100)
        alone = fit_knots(rows_of(logits[:2900], labels[:2900]), 0, num_domains=0, min_positives=1).overall
        assert curves.domains[0].logits == alone.logits and curves.domains[0].calibrated == alone.calibrated
        assert curves.domains[1].logits == [] and curves.domains[1].labels == labels[2900:].sum() < 100
        assert (curves.domains[2].rows, curves.domains[2].logits) == (0, [])

    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_none_of_one_class(self, label: float) -> None:
        assert (
            fit_knots(rows_of(drawn(50)[0], np.full(50, label)), 0, num_domains=0, min_positives=1).overall.logits == []
        )

    def test_separated_labels_stay_short_of_0_and_1(self) -> None:
        logits = np.linspace(-1, 1, 100)
        curve = fit_knots(rows_of(logits, (logits > 0).astype(float)), 0, num_domains=0, min_positives=1).overall
        assert torch.tensor(curve.calibrated).sigmoid().tolist() == pytest.approx([1 / 52, 1 / 52, 51 / 52, 51 / 52])

    def test_a_row_of_an_unknown_domain_is_in_the_curve_of_all_rows_alone(self) -> None:
        logits, labels = drawn(3000)
        domain = np.random.default_rng(1).integers(-1, 2, 3000)
        curves = fit_knots(rows_of(logits, labels, domain_id=domain), 0, num_domains=2, min_positives=1)
        assert curves.overall == fit_knots(rows_of(logits, labels), 0, num_domains=0, min_positives=1).overall
        for d in (0, 1):
            here = rows_of(logits[domain == d], labels[domain == d])
            assert curves.domains[d] == fit_knots(here, 0, num_domains=0, min_positives=1).overall

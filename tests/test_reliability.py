import numpy as np
import pytest

from rec.curves import exact_curve, expected_calibration_error
from rec.reliability import reliability
from tests.test_platt import drawn, rows_of


class TestReliability:
    def test_is_that_of_sorted_rows(self) -> None:
        logits, labels = drawn(1000)
        bins = reliability(rows_of(logits, labels), 0, num_bins=10)
        order = np.argsort(logits)
        preds = (1 / (1 + np.exp(-logits)))[order].reshape(10, 100).mean(1)
        assert bins.rows == pytest.approx([100] * 10)
        assert bins.mean_pred == pytest.approx(preds, rel=1e-3)
        assert bins.rate == pytest.approx(labels[order].reshape(10, 100).mean(1), abs=1e-2)

    def test_bins_are_of_equal_weight(self) -> None:
        logits, labels = drawn(500)
        weights = np.where(np.arange(500) < 250, 3.0, 0.5)
        bins = reliability(rows_of(np.sort(logits), labels, weights), 0, num_bins=2)
        assert bins.rows == pytest.approx([875 / 2 / 3, 250 - 875 / 2 / 3 + 250], rel=0.01)

    def test_gives_the_expected_calibration_error(self) -> None:
        logits, labels = drawn(5000, slope=0.6, offset=0.5)
        bins = reliability(rows_of(logits, labels), 0, num_bins=20)
        ece = sum(abs(p - r) for p, r in zip(bins.mean_pred, bins.rate, strict=True)) / 20
        curve = exact_curve(logits, labels=labels, weights=np.ones(5000))
        assert ece == pytest.approx(expected_calibration_error(curve, num_bins=20), rel=1e-2)

    def test_rows_alike_are_shared_out(self) -> None:
        labels = np.repeat([1.0, 0.0], [25, 75])
        bins = reliability(rows_of(np.zeros(100), labels), 0, num_bins=4)
        assert (bins.rows, bins.mean_pred, bins.rate) == ([25] * 4, [0.5] * 4, [0.25] * 4)

    def test_of_no_rows(self) -> None:
        assert reliability(rows_of(np.zeros(3), np.zeros(3), np.zeros(3)), 0).rows == []
        assert reliability(rows_of(np.zeros(0), np.zeros(0)), 0).rows == []

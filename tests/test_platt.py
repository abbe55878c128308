import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from rec.platt import MIN_SLOPE, Lines, fit_lines
from rec.predictions import Rows

Array = np.ndarray


def drawn(num_rows: int, *, slope: float = 1.0, offset: float = 0.0, seed: int = 0) -> tuple[Array, Array]:
    """Logits, and labels of which the probability is sigmoid(slope z + offset)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-2, 1.3, num_rows).astype(np.float32).astype(np.float64)
    return logits, (rng.random(num_rows) < 1 / (1 + np.exp(-slope * logits - offset))).astype(np.float64)


def rows_of(logits: Array, labels: Array, weights: Array | None = None, domain_id: Array | None = None) -> Rows:
    """Of one task."""
    ids = torch.zeros(len(logits), dtype=torch.int64) if domain_id is None else torch.from_numpy(domain_id)
    weights = np.ones(len(logits)) if weights is None else weights
    columns = (torch.from_numpy(x).float()[:, None] for x in (logits, labels, weights))
    return Rows(*columns, ids, torch.zeros_like(ids))


def fit(rows: Rows, *, num_domains: int = 0, prior_positives: float = 20, offset: bool = True) -> tuple[Lines, Lines]:
    return fit_lines(rows, num_domains=num_domains, prior_positives=prior_positives, offset=offset)


def loss(line: Array, logits: Array, labels: Array, weights: Array) -> float:
    """Cross-entropy to Platt's targets, written out."""
    positives, negatives = weights @ labels, weights @ (1 - labels)
    high, low = (positives + 1) / (positives + 2), 1 / (negatives + 2)
    total = 0.0
    for z, y, w in zip(logits, labels, weights, strict=True):
        target, s = y * high + (1 - y) * low, line[0] * z + line[1]
        total += w * (target * np.logaddexp(0, -s) + (1 - target) * np.logaddexp(0, s))
    return total


class TestLine:
    def test_is_scikit_learns_on_the_smoothed_targets(self) -> None:
        """A target between 0 and 1 is a positive and a negative, which share the weight."""
        logits, labels = drawn(3000, slope=0.7, offset=1.0)
        positives, negatives = labels.sum(), (1 - labels).sum()
        targets = np.where(labels > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
        reference = LogisticRegression(C=np.inf, tol=1e-12, max_iter=1000).fit(
            np.tile(logits, 2)[:, None], np.repeat([1, 0], 3000), sample_weight=np.concatenate([targets, 1 - targets])
        )
        overall, _ = fit(rows_of(logits, labels))
        want = [reference.coef_.item(), reference.intercept_.item()]
        assert overall.ab[0, 0].tolist() == pytest.approx(want, rel=1e-5)

    @pytest.mark.parametrize("offset", [True, False])
    def test_of_weighted_soft_labels_is_the_minimum_that_scipy_finds(self, offset: bool) -> None:
        logits, labels = drawn(400, slope=1.4, offset=-0.5)
        rng = np.random.default_rng(1)
        labels, weights = np.clip(labels + rng.uniform(-0.3, 0.3, 400), 0, 1), rng.exponential(2, 400)
        labels, weights = labels.astype(np.float32).astype(float), weights.astype(np.float32).astype(float)
        overall, _ = fit(rows_of(logits, labels, weights), offset=offset)
        if offset:
            want = minimize(loss, [1, 0], args=(logits, labels, weights), tol=1e-12).x
        else:
            want = [minimize(lambda a: loss([a[0], 0], logits, labels, weights), [1], tol=1e-12).x.item(), 0]
        assert overall.ab[0, 0].tolist() == pytest.approx(want, rel=1e-4, abs=1e-9)

    def test_rows_of_weight_0_do_not_count(self) -> None:
        logits, labels = drawn(500)
        more = rows_of(
            np.append(logits, [50.0, -50.0]), np.append(labels, [0.0, 1.0]), np.append(np.ones(500), [0.0, 0.0])
        )
        torch.testing.assert_close(fit(more)[0].ab, fit(rows_of(logits, labels))[0].ab, rtol=1e-12, atol=0)
        assert fit(more)[0].counts.rows.tolist() == [[500.0]]

    def test_chunks_change_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, labels = drawn(500)
        whole = fit(rows_of(logits, labels))[0].ab
        monkeypatch.setattr("rec.platt._CHUNK", 64)
        torch.testing.assert_close(fit(rows_of(logits, labels))[0].ab, whole, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("scale", [1e-4, 1e4])
    def test_of_logits_of_any_size(self, scale: float) -> None:
        logits, labels = drawn(20_000)
        plain, scaled = (fit(rows_of(logits * s, labels))[0].ab[0, 0].tolist() for s in (1, scale))
        if scale < 1:
            assert [scaled[0] * scale, scaled[1]] == pytest.approx(plain, rel=0.1, abs=0.1)
        else:  # 1e-4 is below the bound on the slope
            assert scaled[0] == MIN_SLOPE and np.isfinite(scaled[1])


class TestDomains:
    logits, labels = drawn(4000, slope=0.8, offset=0.6)
    domain = np.repeat([0, 1, 2], [3000, 900, 100])

    def lines(self, prior_positives: float) -> tuple[Lines, Lines]:
        return fit(
            rows_of(self.logits, self.labels, domain_id=self.domain), num_domains=3, prior_positives=prior_positives
        )

    def test_without_a_prior_each_has_its_own_fit(self) -> None:
        _, own = self.lines(0)
        for d in range(3):
            among = self.domain == d
            want, _ = fit(rows_of(self.logits[among], self.labels[among]))
            torch.testing.assert_close(own.ab[0, d], want.ab[0, 0], rtol=1e-5, atol=1e-5)

    def test_rows_of_an_unknown_domain_are_in_the_line_of_all_rows_alone(self) -> None:
        _, want = self.lines(0)
        known = np.where(self.domain == 2, -1, self.domain)
        overall, own = fit(rows_of(self.logits, self.labels, domain_id=known), num_domains=2, prior_positives=0)
        torch.testing.assert_close(own.ab, want.ab[:, :2])
        torch.testing.assert_close(overall.ab, fit(rows_of(self.logits, self.labels))[0].ab)

    def test_under_an_endless_prior_all_have_the_fit_of_all_rows(self) -> None:
        overall, own = self.lines(1e12)
        torch.testing.assert_close(own.ab[0], overall.ab[0].expand(3, 2), rtol=1e-7, atol=1e-7)

    def test_the_prior_is_worth_its_positives(self) -> None:
        """A domain's loss plus the quadratic of the overall fit's information, minimised by scipy."""
        overall, own = self.lines(30)
        z, y = self.logits, self.labels
        a, b = overall.ab[0, 0].numpy()
        pred = 1 / (1 + np.exp(-a * z - b))
        x = np.stack([z, np.ones_like(z)])
        information = 30 * (x * pred * (1 - pred)) @ x.T / y.sum()
        z, y, s = z[self.domain == 2], y[self.domain == 2], 1 / 31
        target = np.where(y > 0, (y.sum() + s) / (y.sum() + 2 * s), s / ((1 - y).sum() + 2 * s))

        def objective(line: Array) -> float:
            logit, away = line[0] * z + line[1], line - np.array([a, b])
            entropy = target * np.logaddexp(0, -logit) + (1 - target) * np.logaddexp(0, logit)
            return float(entropy.sum() + away @ information @ away / 2)

        assert own.ab[0, 2].tolist() == pytest.approx(minimize(objective, [1, 0], tol=1e-12).x, rel=1e-4)

    def test_few_positives_stay_near_many_go_their_way(self) -> None:
        z, y = drawn(40_000, offset=1.5, seed=3)
        rows = rows_of(
            np.concatenate([self.logits, z, z[:200]]),
            np.concatenate([self.labels, y, y[:200]]),
            domain_id=np.repeat([0, 1, 2], [4000, 40_000, 200]),
        )
        overall, own = fit(rows, num_domains=3, prior_positives=200)
        alone, _ = fit(rows_of(z, y))
        few, _ = fit(rows_of(z[:200], y[:200]))
        assert (own.ab[0, 1] - alone.ab[0, 0]).abs().max() < 0.02
        near, far = (own.ab[0, 2] - overall.ab[0, 0]).norm(), (own.ab[0, 2] - few.ab[0, 0]).norm()
        assert near < far

    def test_the_tail_is_not_raised(self) -> None:
        """400 domains of half a positive each: Platt's targets in full would add 4 %."""
        rng = np.random.default_rng(0)
        z = rng.normal(-5, 1, 20_000)
        y = (rng.random(20_000) < 1 / (1 + np.exp(-z))).astype(float)
        domain = np.repeat(np.arange(400), 50)
        _, own = fit(rows_of(z, y, domain_id=domain), num_domains=400)
        a, b = own.ab[0, domain].numpy().T
        assert (1 / (1 + np.exp(-a * z - b))).sum() / y.sum() == pytest.approx(1, abs=0.01)


class TestDegenerate:
    def fit(self, labels: Array, logits: Array | None = None) -> tuple[Lines, Lines]:
        """A domain with these rows beside an ordinary one."""
        z, y = drawn(2000)
        logits = drawn(len(labels), seed=5)[0] if logits is None else logits
        rows = rows_of(np.append(z, logits), np.append(y, labels), domain_id=np.repeat([0, 1], [2000, len(labels)]))
        overall, own = fit(rows, num_domains=2)
        assert own.ab.isfinite().all() and overall.ab.isfinite().all() and (own.ab[..., 0] >= MIN_SLOPE).all()
        return overall, own

    def test_no_rows(self) -> None:
        overall, own = self.fit(np.zeros(0))
        assert own.ab[0, 1].tolist() == overall.ab[0, 0].tolist() and own.counts.rows.tolist() == [[2000, 0]]

    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_one_class_moves_the_offset_alone(self, label: float) -> None:
        overall, own = self.fit(np.full(300, label))
        assert own.ab[0, 1, 0] == overall.ab[0, 0, 0]
        assert (own.ab[0, 1, 1] > overall.ab[0, 0, 1]) == (label == 1)

    @pytest.mark.parametrize("labels", [np.zeros(0), np.zeros(50), np.ones(50)], ids=["none", "0", "1"])
    def test_all_rows(self, labels: Array) -> None:
        overall, own = fit(rows_of(drawn(len(labels))[0], labels), num_domains=2)
        assert overall.ab.isfinite().all() and own.ab.isfinite().all()
        assert (overall.ab[..., 0] == 1).all() and (own.ab[..., 0] == 1).all()
        if len(labels):
            z = torch.from_numpy(drawn(50)[0])
            mean = (z + overall.ab[0, 0, 1]).sigmoid().mean()
            assert mean == pytest.approx(51 / 52 if labels[0] else 1 / 52, rel=1e-4)

    def test_separated(self) -> None:
        logits = np.linspace(-3, 1, 200)
        overall, _ = fit(rows_of(logits, (logits > 0).astype(float)))
        a, b = overall.ab[0, 0].tolist()
        assert np.isfinite([a, b]).all() and a > 5

    def test_one_distinct_logit(self) -> None:
        labels = np.repeat([0.0, 1.0], [90, 10])
        overall, _ = fit(rows_of(np.full(100, -1.5), labels))
        a, b = overall.ab[0, 0].tolist()
        targets = 90 * 1 / 92 + 10 * 11 / 12
        assert 1 / (1 + np.exp(1.5 * a - b)) == pytest.approx(targets / 100, rel=1e-4)

    def test_logits_that_rank_the_wrong_way(self) -> None:
        """The slope goes to its bound, and the offset gives the right rate."""
        z, y = drawn(4000, slope=-1.0, offset=-3)
        overall, _ = fit(rows_of(z, y))
        a, b = overall.ab[0, 0].tolist()
        assert a == MIN_SLOPE
        assert (1 / (1 + np.exp(-a * z - b))).mean() == pytest.approx(y.mean(), rel=0.01)

"""The equations of IOMT against values worked out by hand, LEEP and LogME against their definitions."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import l3rs
from l3rs.baselines import iomt


def test_stage_score_by_hand():
    """l = 4 | 2, 4, 1: Δ = 1/2, -1/2, 3/4; μ = 1/4; U = 0; L = (4-1)/4/3 = 1/4; σ² = 7/24."""
    expected = math.tanh((1 / 4 + 0 + 1 / 4) / 3 + 0.3 * math.sqrt(7 / 24))
    assert iomt.stage_score([4, 2, 4, 1], alpha=0.3) == pytest.approx(expected, rel=1e-12)


def test_the_bounds_of_a_stage_by_hand():
    """l = 1 | 2: Δ = -1/2; U = L = (1-2)/2/1; no spread. And l = 2 | 1, 1: μ = 1/4, U = L = 1/4, σ = 1/4."""
    assert iomt.stage_score([1, 2], alpha=9) == pytest.approx(math.tanh(-0.5), rel=1e-12)
    assert iomt.stage_score([2, 1, 1], alpha=1) == pytest.approx(math.tanh(0.5), rel=1e-12)


def test_same_mean_and_spread_but_lower_losses():
    """This is why there are bounds: the same Δ in another order."""
    early, late = [4, 1, 2, 2], [4, 4, 8, 2]
    assert iomt.stage_score(early, 0.5) > iomt.stage_score(late, 0.5)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-(10**9), 10**9).map(lambda x: x / 1000), min_size=2, max_size=30),
    st.floats(0, 2),
    st.sampled_from([1e-3, 7.0]),
)
def test_scores_are_bounded_and_independent_of_units(losses, alpha, unit):
    """They are in [-1, 1] for any losses, also negative and zero, and do not depend on units."""
    found = iomt.stage_score(losses, alpha)
    assert -1 <= found <= 1
    assert iomt.stage_score(np.array(losses) * unit, alpha) == pytest.approx(found, abs=1e-9)  # rounding


def test_sampling_weight():
    assert iomt.sampling_weight(0.5, 0.1) == 0.75
    assert iomt.sampling_weight(-1.0, 0.1) == 0.1


def test_acquisition_by_hand():
    """ω = 1/2, n = 10: the weights of the deviation are 1/2, 1/2, 3/4, 7/8."""
    for stage, weight in ((0, 1 / 2), (9, 1 / 2), (10, 3 / 4), (29, 7 / 8)):
        found = iomt.acquisition([0.2, -0.1], [0.4, 0.0], stage, transferability=0.5, halving=10)
        np.testing.assert_allclose(found, 1 / (1 + np.exp(-np.array([0.2 + weight * 0.4, -0.1]))), rtol=1e-12)


def test_variants_of_the_acquisition():
    """Equation 5 has no halving, equation 4 no transferability, and DOIT's has α before the deviation."""

    def inside(**options):
        e = iomt.acquisition(0.2, 0.4, 35, **options)
        return float(np.log(e / (1 - e)))

    assert inside(transferability=0.3, halving=None) == pytest.approx(0.2 + 0.7 * 0.4)
    assert inside(transferability=0.0, halving=10, weight=0.6) == pytest.approx(0.2 + 0.6 * 0.4)
    assert inside(transferability=0.8, halving=10, weight=0.6) == pytest.approx(0.2 + 0.6 * (1 - 0.1) * 0.4)


def leep_in_loops(theta, labels):
    n, source = theta.shape
    joint = {(y, z): sum(theta[i, z] for i in range(n) if labels[i] == y) / n for y in labels for z in range(source)}
    marginal = [sum(joint[y, z] for y in set(labels)) for z in range(source)]
    total = 0.0
    for i in range(n):
        total += math.log(sum(joint[labels[i], z] / marginal[z] * theta[i, z] for z in range(source)))
    return total / n


def test_leep_in_loops():
    rng = np.random.default_rng(0)
    theta, labels = rng.dirichlet(np.ones(6), 40), rng.integers(3, 7, 40)
    assert iomt.leep(theta, labels) == pytest.approx(leep_in_loops(theta, labels.tolist()), rel=1e-12)


def test_leep_in_known_cases():
    """With a source class for each label the labels are certain: 0. With one source class it is the labels' entropy."""
    labels = np.array([0, 1, 1, 2])
    assert iomt.leep(np.eye(4)[labels], labels) == pytest.approx(0, abs=1e-12)  # the 4th is never predicted
    assert iomt.leep(np.ones((4, 1)), labels) == pytest.approx(np.log(0.5) / 2 + np.log(0.25) / 2)


def log_evidence(features, y, alpha, beta):
    """Of y ~ N(0, FFᵀ/α + I/β): the definition, with w integrated out."""
    return stats.multivariate_normal(None, features @ features.T / alpha + np.eye(len(y)) / beta).logpdf(y)


@pytest.mark.parametrize("shape", [(40, 5), (12, 20)], ids=["more examples", "more features"])
def test_logme_is_the_largest_evidence(shape):
    """Against a search over α and β from two starts."""
    rng = np.random.default_rng(1)
    F = rng.normal(size=shape) + 0.3
    labels = (F[:, 0] + 0.5 * rng.normal(size=shape[0]) > 0.3).astype(int) + (F[:, 1] > 1)
    best = []
    for label in np.unique(labels):
        y = (labels == label).astype(float)
        runs = [
            optimize.minimize(
                lambda x, y=y: -log_evidence(F, y, *np.exp(np.clip(x, -20, 20))), start, method="Nelder-Mead"
            )
            for start in [(0, 0), (3, 3)]
        ]
        best.append(-min(run.fun for run in runs) / len(y))
    assert iomt.logme(F, labels) == pytest.approx(np.mean(best), abs=1e-4)  # the simplex stops at 1e-4


def test_logme_prefers_informative_features():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 60)
    noise = rng.normal(size=(60, 4))
    good = np.eye(3)[labels] + 0.1 * rng.normal(size=(60, 3))
    assert iomt.logme(good, labels) > iomt.logme(noise, labels) + 0.5


@pytest.mark.parametrize(
    "features",
    [np.zeros((9, 3)), np.eye(3)[np.arange(9) % 3], np.ones((9, 1))],
    ids=["nothing", "a perfect fit", "a constant"],
)
def test_logme_of_degenerate_problems(features):
    assert np.isfinite(iomt.logme(features, np.arange(9) % 3))


def test_transferability_by_hand():
    """β ω_p + (1-β) mean sigmoid; sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4."""
    assert iomt.transferability(0.9, [0.0, math.log(3)], beta=0.2) == pytest.approx(0.2 * 0.9 + 0.8 * 0.625)
    assert iomt.transferability(0.4, [-1e9]) == pytest.approx(0.2)  # without an overflow


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: iomt.leep(np.ones((3, 2)), [0, 1, 1]), "rows that add up to 1"),
        (lambda: iomt.leep(np.ones((3, 1)), [0, 1]), r"source_probabilities \(3, 1\) and labels \(2,\)"),
        (lambda: iomt.logme(np.full((2, 2), np.nan), [0, 1]), "features must be finite"),
        (lambda: iomt.logme(np.ones(3), [0, 1, 1]), r"features \(3,\)"),
        (lambda: iomt.transferability(1.2, [0.0]), r"accuracy is 1.2; it must be one number in \[0, 1\]"),
        (lambda: iomt.transferability(0.2, [0.0], beta=-1), "beta is -1"),
        (lambda: iomt.transferability(0.2, []), "one or more numbers"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        call()

"""AVGrad against its recurrence in NumPy."""

import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import avgrad
from tests.l3rs.baselines.common import EXACT, Recurrence, decaying, decaying_at, error, follow, follow_numpy, ones


def recurrence(rate, b1=0.9, b2=0.95, eps=1e-6):
    moments, seen = Recurrence(), []

    def step(t, g, x):
        del x
        m = moments.first(g, b1) / (1 - b1**t)
        seen.append(moments.second(g, b2).copy())
        v = np.mean(seen, axis=0) / (1 - b2**t)  # the mean over time, computed directly
        return -rate(t) * m / (np.sqrt(v) + eps)

    return step


def test_recurrence():
    found, _ = follow(avgrad(0.03))
    assert error(found, follow_numpy(recurrence(lambda _: 0.03))) < EXACT


def test_recurrence_with_a_schedule_and_other_arguments():
    found, _ = follow(avgrad(decaying, 0.5, 0.999, eps=1e-3))
    expected = follow_numpy(recurrence(decaying_at, 0.5, 0.999, 1e-3))
    assert error(found, expected) < EXACT


def test_first_step_is_adams_and_later_ones_are_not():
    """One value is its own mean; later the small first values make the mean smaller, the step larger."""
    found, states = follow(avgrad(0.03), steps=5, gradient=ones)
    adam, _ = follow(optax.adam(0.03, 0.9, 0.95, eps=1e-6), steps=5, gradient=ones)
    np.testing.assert_allclose(found[0], adam[0], rtol=1e-12)  # rounding
    assert np.all(np.abs(found[4]) > 1.2 * np.abs(adam[4]))
    np.testing.assert_allclose(states[-1].nu_mean["b"], np.mean([1 - 0.95**t for t in range(1, 6)]), rtol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"b1": 1.0}, r"b1 is 1.0; it must be one number in \[0, 1\)"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": 0}, "eps is 0; it must be one number > 0"),
        ({"learning_rate": "fast"}, "learning_rate is fast; it must be one number ≥ 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": np.ones(3)}, "learning_rate is"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        avgrad(**{"learning_rate": 0.1, **arguments})

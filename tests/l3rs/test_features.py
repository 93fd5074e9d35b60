"""Features, version 1. The expected numbers are worked out by hand: a changed formula must fail here,
because it needs a new feature version."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3rs import features
from l3rs.spec import FEATURE_VERSION

ROUNDING = 2e-6  # float32 rounding of values of order one, through a log or a tanh
DECAYS = (0.5, 0.75)  # powers of two and three quarters: EMAs that can be done by hand

any_float32 = st.floats(width=32)  # with ±0, denormals, ±inf, NaN
fuzz = settings(max_examples=100, deadline=None, database=None, derandomize=True)


def losses_seen(*values, decays=DECAYS):
    state = features.init_loss(decays)
    for value in values:
        state = features.update_loss(state, jnp.float32(value), decays)
    return state


def test_version():
    assert FEATURE_VERSION == 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (1.0, 0.0),
        (np.e, 1.0),
        (1e-3, -6.9077553),
        (0.0, -20.0),
        (-0.0, -20.0),
        (-1.0, -20.0),
        (-np.inf, -20.0),
        (np.nan, -20.0),
        (1e-45, -20.0),
        (1e30, 20.0),
        (np.inf, 20.0),
    ],
)
def test_safe_log(x, expected):
    np.testing.assert_allclose(features.safe_log(jnp.float32(x)), expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("step", "total_steps", "expected"),
    [  # tanh(10 (t/T - τ)) for τ = .03, .1, .2, .4, .6, .8, .9, 1, 1.1
        (1, 10, [0.6043678, 0, -0.7615942, -0.9950548, -0.9999092, -0.9999983, -0.9999998, -1, -1]),
        (10, 10, [1, 1, 0.9999998, 0.9999877, 0.9993293, 0.9640276, 0.7615942, 0, -0.7615942]),
        (12, 10, [1, 1, 1, 0.9999998, 0.9999877, 0.9993293, 0.9950548, 0.9640276, 0.7615942]),  # past the horizon
        (1, 1, [1, 1, 0.9999998, 0.9999877, 0.9993293, 0.9640276, 0.7615942, 0, -0.7615942]),
        (10**6, 10, [1] * 9),
    ],
)
def test_fraction_of_the_horizon(step, total_steps, expected):
    found = features.time_features(jnp.int32(step), jnp.int32(total_steps), absolute=False)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


@pytest.mark.parametrize(
    ("step", "expected"),
    [  # tanh(t/τ - 1) for τ = 1, 3, 10, 30 … 1e5
        (
            1,
            [
                *(0, -0.5827829, -0.7162979, -0.7472358, -0.7573623),
                *(-0.7601907, -0.7611739, -0.7614541, -0.7615522, -0.7615802, -0.7615900),
            ],
        ),
        (
            10,
            [
                *(1, 0.9813681, 0, -0.5827829, -0.7162979),
                *(-0.7472358, -0.7573623, -0.7601907, -0.7611739, -0.7614541, -0.7615522),
            ],
        ),
    ],
)
def test_absolute_time_is_appended(step, expected):
    plain = features.time_features(jnp.int32(step), jnp.int32(7), absolute=False)
    found = features.time_features(jnp.int32(step), jnp.int32(7), absolute=True)
    assert found.shape == (20,)
    np.testing.assert_array_equal(found[:9], plain)
    np.testing.assert_allclose(found[9:], expected, atol=ROUNDING)


def test_without_absolute_time_only_the_fraction_counts():
    """What lets an optimizer go past its meta-training horizon."""
    a = features.time_features(jnp.int32(3), jnp.int32(12), absolute=False)
    b = features.time_features(jnp.int32(3_000), jnp.int32(12_000), absolute=False)
    np.testing.assert_array_equal(a, b)


def test_losses_by_hand():
    state = losses_seen(2.0, 4.0)
    assert int(state.observed) == 2
    assert float(state.first) == 2.0
    # fast: 1, then 0.5·1 + 0.5·4; slow: 0.5, then 0.75·0.5 + 0.25·4. All exact in binary.
    np.testing.assert_array_equal(state.ema, [2.5, 1.375])
    # corrected: 2.5/0.75 = 10/3, 1.375/0.4375 = 22/7
    expected = [
        0.24079456,  # log(10/3) / 5
        0.05884050,  # log(10/3) - log(22/7)
        0.51082562,  # log(10/3) - log 2
        0.45198512,  # log(22/7) - log 2
    ]
    np.testing.assert_allclose(features.loss_features(state, DECAYS), expected, atol=ROUNDING)


def test_three_decays():
    """Ratios of neighbours come first, then those to the first loss."""
    decays = (0.0, 0.5, 0.75)
    found = features.loss_features(losses_seen(2.0, 4.0, decays=decays), decays)
    # the EMA of decay 0 is the last loss: log 4 / 5; log(4·3/10), log(10/3·7/22); log 2 and as above
    expected = [0.27725887, 0.18232156, 0.05884050, 0.69314718, 0.51082562, 0.45198512]
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_before_the_first_loss_all_is_zero():
    np.testing.assert_array_equal(features.loss_features(features.init_loss(DECAYS), DECAYS), np.zeros(4))
    np.testing.assert_array_equal(features.loss_features(losses_seen(np.nan), DECAYS), np.zeros(4))


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_averages_of_a_constant_loss_are_that_loss(steps):
    """Bias correction, at any number of steps. log 5 / 5 = 0.32188758."""
    decays = (0.8, 0.97)
    found = features.loss_features(losses_seen(*[5.0] * steps, decays=decays), decays)
    # 1 - 0.97 has lost five of its bits in float32
    np.testing.assert_allclose(found, [0.32188758, 0, 0, 0], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_losses_are_left_out(bad):
    for found in (losses_seen(bad, 2.0, 4.0), losses_seen(2.0, bad, 4.0, bad)):
        for a, b in zip(found, losses_seen(2.0, 4.0), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_loss_too_large_for_float32_is_left_out():
    with np.errstate(over="ignore"):
        state = features.update_loss(losses_seen(2.0), 1e300, DECAYS)
    for a, b in zip(state, losses_seen(2.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_that_have_no_log():
    np.testing.assert_allclose(features.loss_features(losses_seen(0.0, 0.0), DECAYS), [-4, 0, 0, 0])
    np.testing.assert_allclose(features.loss_features(losses_seen(-3.0), DECAYS), [-4, 0, 0, 0])
    # grown by 10³⁰: every ratio to the first at its limit
    np.testing.assert_allclose(features.loss_features(losses_seen(1.0, 1e30), DECAYS)[2:], [3, 3])
    # and fallen by 10⁶⁰
    np.testing.assert_allclose(
        features.loss_features(losses_seen(1e30, *[1e-30] * 150, decays=(0.5, 0.5)), (0.5, 0.5))[2:], [-3, -3]
    )


def test_norms_by_hand():
    ema = jnp.zeros((2, 1, 2))
    first, second = jnp.array([[1.0, -2.0]]), jnp.array([[3.0, -2.0]])

    ema = features.update_log_norms(ema, first, DECAYS)
    np.testing.assert_array_equal(ema, [[[0.5, -1.0]], [[0.25, -0.5]]])
    found = features.norm_features(first, ema, jnp.int32(1), DECAYS)
    np.testing.assert_allclose(found, [[0.2, -0.4, 0, 0]], atol=ROUNDING)

    ema = features.update_log_norms(ema, second, DECAYS)
    np.testing.assert_array_equal(ema, [[[1.75, -1.5]], [[0.9375, -0.875]]])
    found = features.norm_features(second, ema, jnp.int32(2), DECAYS)
    # 1.75/0.75 - 0.9375/0.4375 = 7/3 - 15/7 = 4/21; a norm that stays has ratio 0
    np.testing.assert_allclose(found, [[0.6, -0.4, 4 / 21, 0]], atol=ROUNDING)


def test_norm_ratios_are_cut():
    """From e^-20 to e^20 and back: 20/3 - 20/7 = 3.8, cut to 3."""
    for sign in (1.0, -1.0):
        x = sign * jnp.array([[-20.0], [20.0]])
        ema = features.update_log_norms(jnp.zeros((2, 1, 1)), x[:1], DECAYS)
        ema = features.update_log_norms(ema, x[1:], DECAYS)
        found = features.norm_features(x[1:], ema, jnp.int32(2), DECAYS)
        np.testing.assert_allclose(found, [[sign * 4, sign * 3]], rtol=ROUNDING)


def test_layers_do_not_mix():
    """Row i of the features is a function of row i of the norms."""
    x = jnp.array([[1.0, -2.0], [0.0, 5.0]])
    both = features.norm_features(x, features.update_log_norms(jnp.zeros((2, 2, 2)), x, DECAYS), jnp.int32(1), DECAYS)
    for i in range(2):
        row = x[i : i + 1]
        ema = features.update_log_norms(jnp.zeros((2, 1, 2)), row, DECAYS)
        alone = features.norm_features(row, ema, jnp.int32(1), DECAYS)
        np.testing.assert_array_equal(both[i], alone[0])


@jax.jit
def _loss_features_after(values):
    decays = (0.8, 0.97)
    state = features.init_loss(decays)
    for i in range(4):
        state = features.update_loss(state, values[i], decays)
    return state, features.loss_features(state, decays)


@fuzz
@given(st.lists(any_float32, min_size=4, max_size=4))
def test_any_losses_give_finite_features_in_range(values):
    state, found = _loss_features_after(np.array(values, np.float32))
    assert np.all(np.isfinite(found))
    assert abs(found[0]) <= 4
    assert np.all(np.abs(found[1:]) <= 3)
    assert all(np.all(np.isfinite(leaf)) for leaf in state)
    assert int(state.observed) == np.isfinite(values).sum()


@jax.jit
def _norm_features_after(norms):
    decays, ema = (0.8, 0.97), jnp.zeros((2, 1, 2))
    for i in range(3):
        log_norms = features.safe_log(norms[i])[None]
        ema = features.update_log_norms(ema, log_norms, decays)
    return features.norm_features(log_norms, ema, jnp.int32(3), decays)[0]


@fuzz
@given(st.lists(any_float32, min_size=6, max_size=6))
def test_any_norms_give_finite_features_in_range(values):
    found = _norm_features_after(np.array(values, np.float32).reshape(3, 2))
    assert np.all(np.isfinite(found))
    assert np.all(np.abs(found[:2]) <= 4)
    assert np.all(np.abs(found[2:]) <= 3)


_time_features = jax.jit(features.time_features, static_argnums=2)


@fuzz
@given(st.integers(1, 2**31 - 1), st.integers(-5, 2**31 - 1))
def test_any_time_gives_finite_features_in_range(step, total_steps):
    found = _time_features(jnp.int32(step), jnp.int32(total_steps), True)
    assert np.all(np.abs(found) <= 1)  # false for NaN

"""Features, version 1, in both array libraries. The expected numbers are worked out by hand: a changed formula must
fail here, because it needs a new feature version."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l3rs import core
from l3rs.spec import FEATURE_VERSION

ROUNDING = 2e-6  # float32 rounding of values of order one, through a log or a tanh
DECAYS = (0.5, 0.75)  # powers of two and three quarters: EMAs that can be done by hand

any_float32 = st.floats(width=32)  # with ±0, denormals, ±inf, NaN
fuzz = settings(max_examples=100, deadline=None, database=None, derandomize=True)


@pytest.fixture(params=[np, jnp], ids=["numpy", "jax"])
def xp(request):
    return request.param


def losses_seen(xp, *values, decays=DECAYS):
    state = core.init_loss(decays, xp)
    for value in values:
        state = core.update_loss(state, xp.float32(value), decays, xp)
    return state


def test_version():
    assert FEATURE_VERSION == 2


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
def test_safe_log(x, expected, xp):
    np.testing.assert_allclose(core.safe_log(xp.float32(x), xp), expected, atol=ROUNDING)


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
def test_fraction_of_the_horizon(step, total_steps, expected, xp):
    found = core.time_features(xp.int32(step), xp.int32(total_steps), False, xp)
    assert found.dtype == xp.float32
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
def test_absolute_time_is_appended(step, expected, xp):
    plain = core.time_features(xp.int32(step), xp.int32(7), False, xp)
    found = core.time_features(xp.int32(step), xp.int32(7), True, xp)
    assert found.shape == (20,)
    np.testing.assert_array_equal(found[:9], plain)
    np.testing.assert_allclose(found[9:], expected, atol=ROUNDING)


def test_without_absolute_time_only_the_fraction_counts(xp):
    """This lets an optimizer go past its meta-training horizon."""
    a = core.time_features(xp.int32(3), xp.int32(12), False, xp)
    b = core.time_features(xp.int32(3_000), xp.int32(12_000), False, xp)
    np.testing.assert_array_equal(a, b)


def test_losses_by_hand(xp):
    state = losses_seen(xp, 2.0, 4.0)
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
    np.testing.assert_allclose(core.loss_features(state, DECAYS, xp), expected, atol=ROUNDING)


def test_three_decays(xp):
    """Ratios of neighbours come first, then those to the first loss."""
    decays = (0.0, 0.5, 0.75)
    found = core.loss_features(losses_seen(xp, 2.0, 4.0, decays=decays), decays, xp)
    # the EMA of decay 0 is the last loss: log 4 / 5; log(4·3/10), log(10/3·7/22); log 2 and as above
    expected = [0.27725887, 0.18232156, 0.05884050, 0.69314718, 0.51082562, 0.45198512]
    np.testing.assert_allclose(found, expected, atol=ROUNDING)


def test_before_the_first_loss_all_is_zero(xp):
    np.testing.assert_array_equal(core.loss_features(core.init_loss(DECAYS, xp), DECAYS, xp), np.zeros(4))
    np.testing.assert_array_equal(core.loss_features(losses_seen(xp, np.nan), DECAYS, xp), np.zeros(4))


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_averages_of_a_constant_loss_are_that_loss(steps, xp):
    """Bias correction, at any number of steps. log 5 / 5 = 0.32188758."""
    decays = (0.8, 0.97)
    found = core.loss_features(losses_seen(xp, *[5.0] * steps, decays=decays), decays, xp)
    # 1 - 0.97 has lost five of its bits in float32
    np.testing.assert_allclose(found, [0.32188758, 0, 0, 0], atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_losses_are_left_out(bad, xp):
    for found in (losses_seen(xp, bad, 2.0, 4.0), losses_seen(xp, 2.0, bad, 4.0, bad)):
        for a, b in zip(found, losses_seen(xp, 2.0, 4.0), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_loss_too_large_for_float32_is_left_out(xp):
    with np.errstate(over="ignore"):
        state = core.update_loss(losses_seen(xp, 2.0), 1e300, DECAYS, xp)
    for a, b in zip(state, losses_seen(xp, 2.0), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_that_have_no_log(xp):
    np.testing.assert_allclose(core.loss_features(losses_seen(xp, 0.0, 0.0), DECAYS, xp), [-4, 0, 0, 0])
    np.testing.assert_allclose(core.loss_features(losses_seen(xp, -3.0), DECAYS, xp), [-4, 0, 0, 0])
    # grown by 10³⁰: every ratio to the first at its limit
    np.testing.assert_allclose(core.loss_features(losses_seen(xp, 1.0, 1e30), DECAYS, xp)[2:], [3, 3])
    # and fallen by 10⁶⁰
    np.testing.assert_allclose(
        core.loss_features(losses_seen(xp, 1e30, *[1e-30] * 150, decays=(0.5, 0.5)), (0.5, 0.5), xp)[2:], [-3, -3]
    )


def test_norms_by_hand(xp):
    ema = xp.zeros((2, 1, 2))
    first, second = xp.array([[1.0, -2.0]]), xp.array([[3.0, -2.0]])

    ema = core.update_log_norms(ema, first, DECAYS, xp)
    np.testing.assert_array_equal(ema, [[[0.5, -1.0]], [[0.25, -0.5]]])
    found = core.norm_features(first, ema, xp.int32(1), DECAYS, xp)
    np.testing.assert_allclose(found, [[0.2, -0.4, 0, 0]], atol=ROUNDING)

    ema = core.update_log_norms(ema, second, DECAYS, xp)
    np.testing.assert_array_equal(ema, [[[1.75, -1.5]], [[0.9375, -0.875]]])
    found = core.norm_features(second, ema, xp.int32(2), DECAYS, xp)
    # 1.75/0.75 - 0.9375/0.4375 = 7/3 - 15/7 = 4/21; a norm that stays has ratio 0
    np.testing.assert_allclose(found, [[0.6, -0.4, 4 / 21, 0]], atol=ROUNDING)


def test_norm_ratios_are_cut(xp):
    """From e^-20 to e^20 and back: 20/3 - 20/7 = 3.8, cut to 3."""
    for sign in (1.0, -1.0):
        x = sign * xp.array([[-20.0], [20.0]])
        ema = core.update_log_norms(xp.zeros((2, 1, 1)), x[:1], DECAYS, xp)
        ema = core.update_log_norms(ema, x[1:], DECAYS, xp)
        found = core.norm_features(x[1:], ema, xp.int32(2), DECAYS, xp)
        np.testing.assert_allclose(found, [[sign * 4, sign * 3]], rtol=ROUNDING)


def test_layers_do_not_mix(xp):
    """Row i of the features is a function of row i of the norms."""
    x = xp.array([[1.0, -2.0], [0.0, 5.0]])
    both = core.norm_features(x, core.update_log_norms(xp.zeros((2, 2, 2)), x, DECAYS, xp), xp.int32(1), DECAYS, xp)
    for i in range(2):
        row = x[i : i + 1]
        ema = core.update_log_norms(xp.zeros((2, 1, 2)), row, DECAYS, xp)
        alone = core.norm_features(row, ema, xp.int32(1), DECAYS, xp)
        np.testing.assert_array_equal(both[i], alone[0])


@jax.jit
def _loss_features_after(values):
    decays = (0.8, 0.97)
    state = core.init_loss(decays, jnp)
    for i in range(4):
        state = core.update_loss(state, values[i], decays, jnp)
    return state, core.loss_features(state, decays, jnp)


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
        log_norms = core.safe_log(norms[i], jnp)[None]
        ema = core.update_log_norms(ema, log_norms, decays, jnp)
    return core.norm_features(log_norms, ema, jnp.int32(3), decays, jnp)[0]


@fuzz
@given(st.lists(any_float32, min_size=6, max_size=6))
def test_any_norms_give_finite_features_in_range(values):
    found = _norm_features_after(np.array(values, np.float32).reshape(3, 2))
    assert np.all(np.isfinite(found))
    assert np.all(np.abs(found[:2]) <= 4)
    assert np.all(np.abs(found[2:]) <= 3)


_time_features = jax.jit(functools.partial(core.time_features, absolute=True, xp=jnp))


@fuzz
@given(st.integers(1, 2**31 - 1), st.integers(-5, 2**31 - 1))
def test_any_time_gives_finite_features_in_range(step, total_steps):
    found = _time_features(jnp.int32(step), jnp.int32(total_steps))
    assert np.all(np.abs(found) <= 1)  # false for NaN

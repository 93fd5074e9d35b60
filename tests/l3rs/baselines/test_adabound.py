"""AdaBound and AMSBound against their recurrence in NumPy, their bounds and their limits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3rs
from l3rs.baselines import adabound
from tests.l3rs.baselines.common import (
    EXACT,
    START,
    STEPS,
    TRAINED,
    N,
    Recurrence,
    decaying,
    decaying_at,
    error,
    fading,
    follow,
    follow_numpy,
)


def bounds(t, final=0.1, gamma=1e-3):
    return final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t))


def recurrence(rate, b1=0.9, b2=0.999, final=0.1, gamma=1e-3, eps=1e-8, amsbound=False):
    moments, largest = Recurrence(), np.zeros(N)

    def step(t, g, x):
        del x
        m, v = moments.first(g, b1), moments.second(g, b2)
        if amsbound:
            v = np.maximum(largest, v, out=largest)
        adam = rate(t) * np.sqrt(1 - b2**t) / (1 - b1**t) / (np.sqrt(v) + eps)
        return -np.clip(adam, *bounds(t, final * rate(t) / rate(1), gamma)) * m

    return step


@pytest.mark.parametrize("amsbound", [False, True])
@pytest.mark.parametrize("gamma", [1e-3, 0.3])
def test_recurrence(amsbound, gamma):
    found, states = follow(adabound(0.02, gamma=gamma, amsbound=amsbound))
    expected = follow_numpy(recurrence(lambda _: 0.02, gamma=gamma, amsbound=amsbound))
    assert error(found, expected) < EXACT
    assert (states[-1].nu_max is None) != amsbound


@pytest.mark.parametrize("amsbound", [False, True])
def test_recurrence_with_a_schedule_and_other_arguments(amsbound):
    """The final rate falls with the schedule, as it does where a scheduler changes the rate of a param group."""
    tx = adabound(decaying, 0.5, 0.8, 0.03, 0.05, eps=1e-3, amsbound=amsbound)
    expected = follow_numpy(recurrence(decaying_at, 0.5, 0.8, 0.03, 0.05, 1e-3, amsbound))
    assert error(follow(tx)[0], expected) < EXACT


def test_amsbound_differs():
    """The large gradient comes first, and the bounds are far."""

    ours, ams = (follow(adabound(0.02, b2=0.5, amsbound=a), gradient=fading)[0] for a in (False, True))
    assert np.all(np.abs(ours[-1]) > 10 * np.abs(ams[-1]))


@functools.cache
def _one_step(amsbound):
    return jax.jit(adabound(0.01, amsbound=amsbound, gamma=0.01).update)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_every_step_size_is_within_the_bounds(grads, count, amsbound):
    """At any step and for any gradient: the update divided by the momentum, for each parameter."""
    state = adabound(0.01, amsbound=amsbound, gamma=0.01).init(jnp.zeros(3))._replace(count=jnp.int32(count))
    for g in (grads, grads[::-1]):
        updates, state = _one_step(amsbound)(jnp.asarray(g, jnp.float32), state)
        m = np.asarray(state.mu, np.float64)
        moves = np.abs(m) > 1e-30  # a denormal has no digits to divide by
        size = -np.asarray(updates, np.float64)[moves] / m[moves]
        lower, upper = bounds(int(state.count), gamma=0.01)
        slack = 1e-5  # the bounds themselves, and a product and a quotient, in float32
        assert np.all(size >= lower * (1 - slack))
        assert np.all(size <= upper * (1 + slack))


@pytest.mark.parametrize("amsbound", [False, True])
def test_becomes_sgd_with_momentum(amsbound):
    """After 10⁹ steps with γ = ½ the bounds are 2e-9 apart, relatively; momentum's weight is 1-β1."""
    start, sgd = adabound(1e-3, gamma=0.5, amsbound=amsbound), optax.sgd(0.1 * (1 - 0.9), momentum=0.9)

    def late(params):
        state = start.init(params)
        return state._replace(count=jnp.full([], 10**9, jnp.int32))

    found, _ = follow(optax.GradientTransformationExtraArgs(late, start.update))
    assert error(found, follow(sgd)[0]) < 1e-7  # the bounds' distance, fed back 50 times
    assert error(follow(start)[0], follow(sgd)[0]) > 0.1  # it does not start as SGD


def test_far_bounds_make_it_adam():
    """γ → 0 opens the bounds; Adam's ε, scaled by the bias correction here, must not matter."""
    found, _ = follow(adabound(0.01, gamma=1e-12, eps=1e-20))
    expected, _ = follow(optax.adam(0.01, eps=1e-20))
    assert error(found[:, TRAINED], expected[:, TRAINED]) < EXACT


def test_a_schedule_that_warms_up_from_zero_needs_a_base():
    warm_up = optax.linear_schedule(0.0, 0.01, 10)
    sentence = "the schedule begins at 0.0; adabound needs base_learning_rate"
    with pytest.raises(l3rs.L3RSError, match=sentence):
        adabound(warm_up)
    with pytest.raises(l3rs.L3RSError, match=sentence):  # under jit, too, because nothing in it is traced
        jax.jit(lambda x: adabound(warm_up).init(x))(jnp.zeros(3))
    warm, _ = follow(adabound(warm_up, gamma=0.9, base_learning_rate=0.01), gradient=_along(0.01))
    expected, _ = follow(adabound(0.01, gamma=0.9), gradient=_along(0.01))
    assert not warm[0].any()
    assert error(warm[10:], expected[10:]) < 1e-6  # equal from the peak on; optax's schedule is float32


def _along(scale):
    """Gradients that do not depend on the path."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(STEPS, N)) * scale
    return lambda t, x: rows[t - 1] + 0 * x


@pytest.mark.parametrize("amsbound", [False, True])
def test_pytorch_optimizer(amsbound):
    """Without weight decay its arguments mean what ours do; it adds 1e-15 to v."""
    theirs = pytest.importorskip("pytorch_optimizer", reason="the comparison needs pytorch_optimizer")
    torch = pytest.importorskip("torch")
    gradients = _along(1.0)
    found, _ = follow(adabound(0.02, 0.9, 0.99, 0.05, 0.1, amsbound=amsbound), gradient=gradients)
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = theirs.AdaBound(
        [weight], lr=0.02, final_lr=0.05, betas=(0.9, 0.99), gamma=0.1, eps=1e-8, ams_bound=amsbound
    )
    expected = []
    for t in range(1, STEPS + 1):
        before = weight.detach().numpy().copy()
        weight.grad = torch.tensor(gradients(t, before))
        optimizer.step()
        expected.append(weight.detach().numpy() - before)
    assert error(found, np.stack(expected)) < 1e-9  # 1e-15 beside v ≥ 1e-5, and float64's rounding


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"gamma": 0.0}, r"gamma is 0.0; it must be one number in \(0, 1\)"),
        ({"gamma": 1}, "gamma is 1"),
        ({"final_learning_rate": -0.1}, "final_learning_rate is -0.1; it must be one number ≥ 0"),
        ({"base_learning_rate": 0}, "base_learning_rate is 0; it must be one number > 0"),
        ({"b1": 1.5}, "b1 is 1.5"),
        ({"b2": float("inf")}, "b2 is inf"),
        ({"eps": 0.0}, "eps is 0.0"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        adabound(**{"learning_rate": 0.1, **arguments})


def test_the_problem_reaches_both_bounds():
    """Otherwise the comparisons above would hardly test clipping."""
    moments, low, high, between = Recurrence(), 0, 0, 0
    step = recurrence(lambda _: 0.02, gamma=0.3)

    def watch(t, g, x):
        nonlocal low, high, between
        update, m = step(t, g, x), moments.first(g, 0.9)
        lower, upper = bounds(t, gamma=0.3)
        size = -update[m != 0] / m[m != 0]
        low, high = low + np.sum(np.isclose(size, lower)), high + np.sum(np.isclose(size, upper))
        between += np.sum((size > 1.01 * lower) & (size < 0.99 * upper))
        return update

    follow_numpy(watch)
    assert min(low, high, between) > 10

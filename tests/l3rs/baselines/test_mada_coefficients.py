"""MADA: which coefficients move and when, its state, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import l3rs
from l3rs.baselines import (
    hyper_adam,
    mada,
    mada_coefficients,
    mada_history,
)
from l3rs.baselines.mada import COEFFICIENTS, DOMAIN
from tests.l3rs.baselines.common import (
    EXACT,
    N,
    error,
    follow,
    gradient,
)
from tests.l3rs.baselines.mada_reference import (
    ADAM,
    ALPHA,
    INSIDE,
    assert_in_domain,
)

# What moves, and when


@pytest.mark.parametrize(
    "learned",
    [(), ("b1", "rho"), ("b2", "b3", "c", "gamma")],
    ids=lambda names: "+".join(names) or "none",
)
def test_frozen_coefficients_never_move(learned):
    """Also those outside D, where a learned one is not allowed."""
    frozen_outside = {"b1": 0.0, "b2": 0.999, "b3": 0.995}
    begin = {name: INSIDE[name] if name in learned else frozen_outside.get(name, INSIDE[name]) for name in INSIDE}
    tx = mada(
        0.03, **begin, learned=learned, hyper_learning_rates=dict.fromkeys(learned, 0.1), start_step=2, history=30
    )
    history = mada_history(follow(tx, steps=30)[1][-1])
    for name, value in begin.items():
        if name in learned:
            assert history[name][-1] != value
            assert history[name][0] == value
        else:
            assert np.all(history[name] == value)


@pytest.mark.parametrize("start_step", [0, 5])
def test_no_hyper_step_before_the_start(start_step):
    """There is none at the first step either, which follows no update. The first update is the sign of the
    gradient whatever the coefficients are, so that the second step moves the learning rate alone."""
    names = (*COEFFICIENTS, "learning_rate")
    options = {"learned": names, "hyper_learning_rates": {"learning_rate": 1e-4}, "history": 8}
    _, states = follow(mada(0.03, **INSIDE, start_step=start_step, **options), steps=8)
    history = mada_history(states[-1])
    for name, value in {**INSIDE, **ALPHA}.items():
        waiting = max(start_step, 2 if name == "learning_rate" else 3) - 1
        tolerance = 1e-9 if start_step < 3 else 0  # the sign is g/(|g| + ε)
        np.testing.assert_allclose(history[name][:waiting], value, rtol=tolerance)
        assert np.all(np.abs(history[name][waiting:] - value) > 1e-6)


def test_published_defaults():
    """Start, rates, clip and ε; D is in `test_coefficients_stay_in_domain`."""
    default, spelled = (
        mada(0.03, history=60),
        mada(
            0.03,
            b1=0.9,
            b2=0.95,
            b3=0.0,
            c=1.0,
            rho=1.0,
            gamma=1.0,
            hyper_learning_rates={"b1": 5e-4, "b2": 5e-4, "b3": 1e-1, "c": 1e-1, "rho": 1e-1, "gamma": 1e-1},
            hyper_clip=10.0,
            start_step=50,
            eps=1e-6,
            weight_decay=0.0,
            history=60,
        ),
    )
    histories = [mada_history(follow(tx, steps=60)[1][-1]) for tx in (default, spelled)]
    jax.tree.map(np.testing.assert_array_equal, *histories)
    moved = [name for name in COEFFICIENTS if np.any(histories[0][name][49:] != histories[0][name][0])]
    assert {"b1", "b2", "gamma"} <= set(moved)
    assert all(np.all(histories[0][name][:49] == histories[0][name][0]) for name in COEFFICIENTS)
    assert DOMAIN["b1"] == (0.01, 0.99)
    assert DOMAIN["b2"] == (0.501, 0.99)
    assert DOMAIN["b3"] == (0, 0.99)
    assert DOMAIN["c"] == DOMAIN["rho"] == DOMAIN["gamma"] == (0, 1)


def test_learned_learning_rate():
    """A rate that is far too small grows; a large one may fall to zero, but not below."""
    options = {"learned": ("learning_rate",), "start_step": 2, "history": 50}
    up = mada(1e-4, hyper_learning_rates={"learning_rate": 1e-3}, **options)
    rates = mada_history(follow(up)[1][-1])["learning_rate"]
    assert rates[-1] > 10 * rates[0]
    down = mada(3.0, hyper_learning_rates={"learning_rate": 10.0}, **options)
    rates = mada_history(follow(down)[1][-1])["learning_rate"]
    assert rates.min() == 0


@jax.jit
def _hammer(rows, rates, clip):
    """Coefficients [steps, 7] under gradients [steps, 3], in float32."""
    tx = mada(
        0.03,
        **INSIDE,
        learned=(*COEFFICIENTS, "learning_rate"),
        hyper_learning_rates={**dict.fromkeys(COEFFICIENTS, rates[0]), "learning_rate": rates[1]},
        hyper_clip=clip,
        start_step=2,
    )
    params = jnp.ones(3)

    def step(state, row):
        state = tx.update(row, state, params)[1]
        return state, mada_coefficients(state)

    return jax.lax.scan(step, tx.init(params), rows)[1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=24, max_size=24),
    st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)),
    st.floats(1e-3, 1e30),
)
def test_coefficients_stay_in_domain(values, rates, clip):
    """With any gradients, also NaN and infinities, and any hyper learning rates."""
    rows = jnp.asarray(values, jnp.float32).reshape(8, 3)
    assert_in_domain(_hammer(rows, jnp.asarray(rates, jnp.float32), jnp.float32(clip)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_do_not_reach_the_coefficients(bad):
    """Behind `apply_if_finite` the moments survive them, too."""
    plain = mada(0.03, **INSIDE, start_step=2, history=20)
    tx = optax.apply_if_finite(plain, max_consecutive_errors=5)

    def spoiled(t, x):
        g = gradient(t, x)
        return np.where(np.arange(N) == 5, bad, g) if t == 10 else g

    _, states = follow(plain, steps=20, dtype=np.float32, gradient=spoiled)
    history = mada_history(states[-1])
    assert_in_domain(history)
    for name in COEFFICIENTS:
        assert history[name][9] == history[name][8]
    _, states = follow(tx, steps=20, dtype=np.float32, gradient=spoiled)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(states[-1]))
    history = mada_history(states[-1])
    assert len(history["step"]) == 19  # one was left out
    assert np.all(history["b1"][9:] != history["b1"][8])  # and then it continues to learn


# State


@pytest.mark.parametrize(
    ("tx", "numbers"),
    [
        (mada(0.1), 7),
        (mada(0.1, weight_decay=0.1), 7),
        (mada(0.1, learned=("b1", "learning_rate"), hyper_learning_rates={"learning_rate": 1.0}, **INSIDE), 7),
        (
            mada(0.1, learned=("learning_rate",), hyper_learning_rates={"learning_rate": 1}, weight_decay=1, **INSIDE),
            8,
        ),
        (mada(0.1, **INSIDE, learned=()), 6),
        (mada(0.1, **ADAM, learned=()), 2),
        (mada(0.1, **{**ADAM, "b3": 0.5}, learned=()), 4),
        (hyper_adam(0.1), 3),
    ],
    ids=["mada", "decay", "rate", "rate and decay", "fixed", "adam", "adan", "hyper_adam"],
)
def test_memory_is_what_the_docstring_says(tx, numbers):
    params = {"w": jax.ShapeDtypeStruct((100, 100), jnp.bfloat16), "b": jax.ShapeDtypeStruct((100,), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    after = jax.eval_shape(lambda p, s: tx.update(p, s, p)[1], params, state)
    for each in (state, after):
        size = sum(leaf.size for leaf in jax.tree.leaves(each))
        assert numbers * 10_100 <= size <= numbers * 10_100 + 8  # the count and seven coefficients


def test_hyper_adam_is_mada_that_learns_two():
    options = {"start_step": 3, "history": 40, "hyper_learning_rates": {"b1": 0.01, "b2": 0.01}}
    found, states = follow(hyper_adam(0.03, 0.5, 0.7, **options), steps=40)
    reference = mada(0.03, **{**ADAM, "b1": 0.5, "b2": 0.7}, learned=("b1", "b2"), **options)
    # b3 learned at a rate of zero: the same, with all moments kept
    slow = {**dict.fromkeys(COEFFICIENTS, 0.0), **options["hyper_learning_rates"]}
    kept = mada(0.03, **{**ADAM, "b1": 0.5, "b2": 0.7}, **{**options, "hyper_learning_rates": slow})
    assert error(found, follow(reference, steps=40)[0]) == 0
    assert error(found, follow(kept, steps=40)[0]) < EXACT
    history = mada_history(states[-1])
    assert np.ptp(history["b1"]) > 0
    assert np.ptp(history["b2"]) > 0


def test_a_fixed_run_starts_with_the_coefficients_found():
    _, states = follow(mada(0.03, start_step=5), dtype=np.float32)
    found = mada_coefficients(states[-1])
    _, fixed_states = follow(mada(**found, learned=()), steps=3, dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, mada_coefficients(fixed_states[-1]), found)
    again = mada(**found)  # also where a coefficient ended at an edge of D, in float32
    jax.tree.map(np.testing.assert_array_equal, mada_coefficients(again.init(jnp.ones(2))), found)


def test_history_is_a_ring():
    _, states = follow(mada(0.03, **INSIDE, start_step=2, history=50), steps=20)
    whole = mada_history(states[-1])
    assert whole["step"].tolist() == list(range(1, 21))
    for rows, steps in ((7, 20), (30, 20)):
        _, states = follow(mada(0.03, **INSIDE, start_step=2, history=rows), steps=steps)
        kept = mada_history(states[-1])
        assert list(kept) == ["step", *COEFFICIENTS, "learning_rate"]
        for name in kept:
            np.testing.assert_array_equal(kept[name], whole[name][max(steps - rows, 0) : steps])
        assert states[-1].history.shape == (rows, 7)
    np.testing.assert_array_equal(kept["b1"][-1], mada_coefficients(states[-1])["b1"])
    assert not any(len(row) for row in mada_history(mada(0.03).init(jnp.ones(2))).values())


def test_coefficients_are_found_in_a_larger_state():
    chained = optax.chain(optax.clip_by_global_norm(1.0), mada(0.1, b1=0.5))
    assert float(mada_coefficients(chained.init(jnp.ones(3)))["b1"]) == 0.5
    with pytest.raises(l3rs.L3RSError, match="the state of one mada transformation, found 0"):
        mada_coefficients(optax.adam(0.1).init(jnp.ones(3)))
    with pytest.raises(l3rs.L3RSError, match="found 2"):
        mada_history(optax.chain(mada(0.1), mada(0.1)).init(jnp.ones(3)))
    batch = jax.vmap(mada(0.1, history=3).init)(jnp.ones((4, 2)))
    with pytest.raises(l3rs.L3RSError, match=r"these are \(4,\) runs; take one"):
        mada_history(batch)
    assert mada_history(jax.tree.map(lambda x: x[1], batch))["b1"].shape == (0,)


def test_traced_coefficients():
    """A grid of starts in one call equals each of them alone; a traced start outside D is moved into it."""
    starts = {name: jnp.asarray([value, value * 0.9], jnp.float32) for name, value in INSIDE.items()}
    params, rows = jnp.ones(4), jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)

    def train(q, rate, decay):
        tx = mada(rate, **q, weight_decay=decay, start_step=2, eps=rate, hyper_clip=rate)
        return jax.lax.scan(
            lambda s, g: (tx.update(g, s, params)[1], tx.update(g, s, params)[0]), tx.init(params), rows
        )

    rates = jnp.asarray([0.1, 0.3]), jnp.asarray([0.0, 0.1])
    together = jax.jit(jax.vmap(train))(starts, *rates)
    alone = jax.jit(train)
    for i in range(2):
        one = alone({name: value[i] for name, value in starts.items()}, rates[0][i], rates[1][i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-7), together, one)
    outside = jax.jit(lambda b2: mada_coefficients(mada(0.1, b2=b2).init(params)))(jnp.float32(0.999))
    assert outside["b2"] == np.float32(0.99)


# Errors of the user


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"b2": 0.999}, r"b2 is 0.999; it must be one number in \[0.501, 0.99\] when learned"),
        ({"b2": 1.0, "learned": ()}, r"b2 is 1.0; it must be one number in \[0, 1\)"),
        ({"c": 1.1, "learned": ()}, r"c is 1.1; it must be one number in \[0.0, 1.0\]"),
        ({"gamma": np.ones(2)}, "gamma is"),
        ({"learned": ("b1", "beta2")}, r"learned names \('b1', 'beta2'\); allowed are b1, b2, b3, c, rho, gamma"),
        ({"learned": "b1"}, "learned names"),
        ({"hyper_learning_rates": {"alpha": 1.0}}, r"hyper_learning_rates names \('alpha',\)"),
        ({"hyper_learning_rates": {"b1": -1.0}}, "the hyper learning rate of b1 is -1.0"),
        ({"learned": ("learning_rate",)}, "a learned learning rate needs its own rate"),
        (
            {
                "learned": ("learning_rate",),
                "hyper_learning_rates": {"learning_rate": 1.0},
                "learning_rate": optax.constant_schedule(0.1),
            },
            "learning_rate is a schedule",
        ),
        ({"hyper_clip": 0}, "hyper_clip is 0; it must be one number > 0"),
        ({"start_step": 1.5}, "start_step is 1.5; it must be one number that is whole and ≥ 0"),
        ({"history": -1}, "history is -1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"eps": 0}, "eps is 0"),
        ({"learning_rate": -1}, "learning_rate is -1"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        mada(**{"learning_rate": 0.1, **arguments})


def test_weight_decay_needs_params():
    tx = mada(0.1, weight_decay=0.1)
    with pytest.raises(l3rs.L3RSError, match="weight decay reads the params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    jax.eval_shape(lambda g: mada(0.1).update(g, mada(0.1).init(g)), jnp.ones(2))  # otherwise it does not need them

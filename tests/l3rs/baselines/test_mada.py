"""MADA: its corners against the optimizers they are, its hyper-gradients against finite differences,
and all of it against the recurrence in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

import l3rs
from l3rs.baselines import (
    Coefficients,
    avgrad,
    hyper_adam,
    mada,
    mada_coefficients,
    mada_history,
    plot_coefficients,
)
from l3rs.baselines.mada import COEFFICIENTS, DOMAIN
from tests.l3rs.baselines.common import (
    EXACT,
    START,
    STEPS,
    N,
    decaying,
    decaying_at,
    error,
    follow,
    follow_numpy,
    gradient,
    loss,
    ravel,
    unravel,
)
from tests.l3rs.baselines.test_avgrad import recurrence as avgrad_recurrence

ALPHA = {"learning_rate": 0.03}
NEVER = 2**31 - 1  # a start step
INSIDE = {"b1": 0.7, "b2": 0.8, "b3": 0.4, "c": 0.6, "rho": 0.7, "gamma": 0.8}
ADAM = {"b1": 0.9, "b2": 0.95, "b3": 0.0, "c": 1.0, "rho": 1.0, "gamma": 1.0}
NEAR_ADAM = {"b1": 0.9, "b2": 0.95, "b3": 1e-3, "c": 0.999, "rho": 0.999, "gamma": 0.999}
# A frozen corner keeps no moments that it has no use for; one that could move keeps them all.
FROZEN, STILL = {"learned": ()}, {"start_step": NEVER}


def no_moments():
    return {name: np.zeros(N) for name in ("m", "n", "v", "mean", "lion", "g")}


def numpy_update(q, t, g, old, x, eps=1e-6, weight_decay=0.0):
    """(update, moments after) of step t with the coefficients q, a dict."""
    b1, b2, b3 = q["b1"], q["b2"], q["b3"]
    change = g - old["g"] if t > 1 else np.zeros(N)
    m = b1 * old["m"] + (1 - b1) * g
    n = b3 * old["n"] + (1 - b3) * change
    ahead = (g + b3 * change) ** 2
    square = q["c"] * ahead + (1 - q["c"]) * (old["v"] + ahead * np.sign(ahead - old["v"]))
    v = b2 * old["v"] + (1 - b2) * square
    mean = (v + (t - 1) * old["mean"]) / t
    w = (q["rho"] * v + (1 - q["rho"]) * mean) / (1 - b2**t)
    adaptive = (m / (1 - b1**t) + b3 * n) / (np.sqrt(w) + eps)
    u = 0.95 * old["lion"] + 0.05 * g
    lion = 0.98 * old["lion"] + 0.02 * g
    direction = q["gamma"] * adaptive + (1 - q["gamma"]) * np.sign(u) + weight_decay * x
    return -q["learning_rate"] * direction, {"m": m, "n": n, "v": v, "mean": mean, "lion": lion, "g": g}


def fixed(q, rate, **options):
    """The recurrence with coefficients that do not move."""
    old = no_moments()

    def step(t, g, x):
        update, after = numpy_update({**q, "learning_rate": rate(t)}, t, g, old, x, **options)
        old.update(after)
        return update

    return step


def assert_in_domain(coefficients):
    for name, (low, high) in DOMAIN.items():
        value = np.asarray(coefficients[name])
        edge = value.dtype.type  # D's edges, in the dtype that the coefficients have
        assert np.all((edge(low) <= value) & (value <= edge(high))), (name, value)  # false of NaN, too


# Corners


@pytest.mark.parametrize("kept", [FROZEN, STILL], ids=["frozen", "still"])
@pytest.mark.parametrize(
    ("corner", "reference"),
    [
        (ADAM, optax.adam(0.03, 0.9, 0.95, eps=1e-6)),
        ({**ADAM, "rho": 0.0}, avgrad(0.03, 0.9, 0.95, eps=1e-6)),
        # optax.yogi starts both moments at 1e-6; MADA, as all else, at 0
        ({**ADAM, "c": 0.0}, optax.chain(optax.scale_by_yogi(0.9, 0.95, 1e-6, 0.0, 0.0), optax.scale(-0.03))),
        ({**ADAM, "gamma": 0.0}, optax.lion(0.03, 0.95, 0.98, weight_decay=0.0)),
    ],
    ids=["adam", "avgrad", "yogi", "lion"],
)
def test_corners(corner, reference, kept):
    found, _ = follow(mada(0.03, **corner, **kept))
    assert error(found, follow(reference)[0]) < EXACT


def test_adam_corner_in_float32():
    """optax rounds β2 and 1-β2 apart, which is 1e-6 of 1-β2ᵗ at first; fed back for 50 steps."""
    found, _ = follow(mada(0.03, **ADAM, **STILL), dtype=np.float32)
    expected, _ = follow(optax.adam(0.03, 0.9, 0.95, eps=1e-6), dtype=np.float32)
    assert error(found, expected) < 1e-5


def test_avgrad_corner_is_its_recurrence():
    found, _ = follow(mada(0.03, **{**ADAM, "rho": 0.0}, **FROZEN))
    assert error(found, follow_numpy(avgrad_recurrence(lambda _: 0.03))) < EXACT


@pytest.mark.parametrize("kept", [FROZEN, STILL], ids=["frozen", "still"])
def test_adan_corner(kept):
    """The recurrence on its own: differences are averaged with β3 and enter, weighted with β3, both
    the step and what the second moment squares."""
    b1, b2, b3, eps = 0.9, 0.95, 0.7, 1e-6
    m, n, v, last = np.zeros(N), np.zeros(N), np.zeros(N), None

    def adan(t, g, x):
        nonlocal m, n, v, last
        del x
        change = 0 * g if last is None else g - last
        m, n, last = b1 * m + (1 - b1) * g, b3 * n + (1 - b3) * change, g
        v = b2 * v + (1 - b2) * (g + b3 * change) ** 2
        return -0.03 * (m / (1 - b1**t) + b3 * n) / (np.sqrt(v / (1 - b2**t)) + eps)

    found, _ = follow(mada(0.03, **{**ADAM, "b3": b3}, **kept))
    assert error(found, follow_numpy(adan)) < EXACT


def test_adan_corner_against_optax():
    """optax weights the differences with 1-b2 where MADA has β3: they agree at one half. optax also
    corrects their average by 1-b2ᵗ, which after 35 steps is 1 - 3e-11."""
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(STEPS, N))

    def along(t, x):
        del x
        return rows[t - 1]

    found, _ = follow(mada(0.03, **{**ADAM, "b3": 0.5}, **FROZEN), gradient=along)
    reference = optax.chain(optax.scale_by_adan(0.9, 0.5, 0.95, eps=1e-6, eps_root=0.0), optax.scale(-0.03))
    expected, _ = follow(reference, gradient=along)
    assert error(found[35:], expected[35:]) < 1e-10
    assert error(found[:5], expected[:5]) > 1e-3  # and before that it shows


def test_decoupled_weight_decay_is_adamws():
    found, _ = follow(mada(0.03, **ADAM, weight_decay=0.1, **FROZEN))
    assert error(found, follow(optax.adamw(0.03, 0.9, 0.95, eps=1e-6, weight_decay=0.1))[0]) < EXACT


@pytest.mark.parametrize("kept", [FROZEN, STILL], ids=["frozen", "still"])
def test_between_the_corners(kept):
    """All coefficients inside of D, with weight decay and a schedule."""
    found, states = follow(mada(decaying, **INSIDE, weight_decay=0.1, eps=1e-3, **kept))
    expected = follow_numpy(fixed(INSIDE, decaying_at, weight_decay=0.1, eps=1e-3))
    assert error(found, expected) < EXACT
    np.testing.assert_allclose(states[-1].coefficients.learning_rate, decaying_at(STEPS), rtol=1e-12)


# Hyper-gradients


@pytest.mark.parametrize("q", [INSIDE, NEAR_ADAM], ids=["inside", "near adam"])
def test_hyper_gradient_is_that_of_the_next_loss(q):
    """Central differences, in float64, of f_T+1(x_T) in the coefficients of step T alone. Those come
    from a run that learns nothing; the hyper-gradient is read off one that learns, for one step."""
    last, rate, names = 12, 1e-5, (*COEFFICIENTS, "learning_rate")
    learns = mada(
        0.03,
        **q,
        learned=names,
        hyper_learning_rates=dict.fromkeys(names, rate),
        hyper_clip=np.inf,
        weight_decay=0.1,
        start_step=last + 1,
    )
    _, states = follow(learns, steps=last + 1)
    found = {name: (value - mada_coefficients(states[-1])[name]) / rate for name, value in {**q, **ALPHA}.items()}

    with jax.enable_x64(True):
        fixed_update = jax.jit(
            lambda coefficients, *args: mada(**coefficients, weight_decay=0.1, learned=()).update(*args)
        )
        params, state = unravel(START), mada(**q, **ALPHA, learned=()).init(unravel(START))
        for t in range(1, last):
            updates, state = fixed_update({**q, **ALPHA}, unravel(gradient(t, ravel(params))), state, params)
            params = optax.apply_updates(params, updates)
        g = unravel(gradient(last, ravel(params)))

        def next_loss(name, change):
            changed = {**q, **ALPHA, name: {**q, **ALPHA}[name] + change}
            after = state._replace(coefficients=Coefficients(**jax.tree.map(jnp.float64, changed)))
            return loss(last + 1, ravel(params) + ravel(fixed_update(changed, g, after, params)[0]))

        for name in names:
            slope = (next_loss(name, 1e-5) - next_loss(name, -1e-5)) / 2e-5
            assert abs(slope) > 1e-4  # there is something to compare
            # Differences over δ err by δ² = 1e-10 of the third derivative, and by 1e-15/δ of rounding.
            assert abs(found[name] / slope - 1) < 1e-5, name


def test_whole_algorithm():
    """Every coefficient of 40 steps, beside NumPy's recurrence whose hyper-gradients are finite
    differences: which gradient meets which update, clipping, projection, the start."""
    start, clip = 5, 0.5
    rates = {"b1": 0.02, "b2": 0.02, "b3": 0.3, "c": 5.0, "rho": 3.0, "gamma": 0.3, "learning_rate": 1e-4}
    tx = mada(
        0.03,
        **INSIDE,
        learned=tuple(rates),
        hyper_learning_rates=rates,
        hyper_clip=clip,
        start_step=start,
        weight_decay=0.1,
        history=40,
    )
    q, last, slopes, clipped, projected = {**INSIDE, "learning_rate": 0.03}, None, [], 0, 0
    rows = {name: [] for name in rates}

    def step(t, g, x):
        nonlocal last, q, clipped, projected
        if t >= start:
            for name in rates:
                ends = [numpy_update({**last[0], name: last[0][name] + d}, *last[1:])[0] @ g for d in (1e-5, -1e-5)]
                slopes.append((ends[0] - ends[1]) / 2e-5)
                clipped += abs(slopes[-1]) > clip
                free = q[name] - rates[name] * np.clip(slopes[-1], -clip, clip)
                q = {**q, name: np.clip(free, *DOMAIN[name])}
                projected += q[name] != free
        old = no_moments() if last is None else numpy_update(*last)[1]
        last = (q, t, g, old, x, 1e-6, 0.1)
        for name in rates:
            rows[name].append(q[name])
        return numpy_update(*last)[0]

    expected = follow_numpy(step, steps=40)
    found, states = follow(tx, steps=40)
    assert clipped > 5
    assert projected > 5
    assert len(slopes) - clipped > 100
    history = mada_history(states[-1])
    for name, row in rows.items():  # finite differences, fed back into all that follows
        np.testing.assert_allclose(history[name], row, rtol=1e-6, atol=1e-8, err_msg=name)
    assert error(found, expected) < 1e-5


# What moves, and when


@pytest.mark.parametrize(
    "learned",
    [(), ("b1", "rho"), ("b2", "b3", "c", "gamma")],
    ids=lambda names: "+".join(names) or "none",
)
def test_frozen_coefficients_never_move(learned):
    """Also those outside of D, where a learned one may not be."""
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
    """And none at the first step, which has no update behind it. The first update is the sign of the
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
    """From far too small a rate it grows; from a large one it may fall to zero, but not below."""
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
    """Under any gradients, NaN and infinities among them, and any hyper learning rates."""
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
    assert np.all(history["b1"][9:] != history["b1"][8])  # and then it learns on


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


def test_a_fixed_run_begins_with_what_was_found():
    _, states = follow(mada(0.03, start_step=5), dtype=np.float32)
    found = mada_coefficients(states[-1])
    _, fixed_states = follow(mada(**found, learned=()), steps=3, dtype=np.float32)
    jax.tree.map(np.testing.assert_array_equal, mada_coefficients(fixed_states[-1]), found)
    again = mada(**found)  # also where a coefficient came to lie at an edge of D, in float32
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
    """A grid of starts in one call is each of them alone; a traced start outside of D is put into it."""
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


# The user's errors


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
    jax.eval_shape(lambda g: mada(0.1).update(g, mada(0.1).init(g)), jnp.ones(2))  # of no use otherwise


# Training


def test_from_a_poor_start_it_ends_below_adam():
    """An MLP on the scikit-learn digits, 300 steps of 64, from β's that suit neither: the loss on all
    of the data. Seeds differ in weights and batches."""
    images, labels = load_digits(return_X_y=True)
    images, labels = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)

    def mean_loss(params, rows):
        hidden, out = params[: 64 * 32].reshape(64, 32) / 8, params[64 * 32 :].reshape(32, 10) / np.sqrt(32)
        logits = jnp.tanh(images[rows] @ hidden) @ out
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def train(tx):
        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(mean_loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        scan = jax.jit(lambda params, batches: jax.lax.scan(step, (params, tx.init(params)), batches)[0])
        ends = []
        for seed in range(5):
            rng = np.random.default_rng(seed)
            start, batches = rng.normal(size=64 * 32 + 320), rng.integers(0, len(labels), (300, 64))
            params, state = scan(jnp.asarray(start, jnp.float32), batches)
            ends.append(float(mean_loss(params, slice(None))))
        return np.array(ends), state

    poor = {"b1": 0.1, "b2": 0.6}
    adam, _ = train(optax.adam(0.05, **poor, eps=1e-6))
    found, state = train(mada(0.05, **poor))
    assert_in_domain(mada_coefficients(state))
    assert np.all(np.isfinite(found))
    assert np.sum(found < adam) >= 4
    assert found.mean() < 0.75 * adam.mean()


def test_the_picture_of_the_coefficients(tmp_path):
    state = _trained_state()
    file = plot_coefficients(mada_history(state), tmp_path / "new" / "q.png", title="a run", start_step=2)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(l3rs.L3RSError, match="there are no steps to plot"):
        plot_coefficients({"step": [], "b1": []}, file)


def _trained_state():
    """A few steps that keep their history."""
    params, tx = {"w": jnp.ones(3)}, mada(1e-2, start_step=2, history=4)
    state = tx.init(params)
    for i in range(6):
        updates, state = tx.update({"w": jnp.array([1.0, -2.0, i])}, state, params)
        params = optax.apply_updates(params, updates)
    return state

"""MADA: its corners against the optimizers that they equal, its hyper-gradients against finite differences, and the
whole algorithm against the recurrence in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from l3rs.baselines import (
    Coefficients,
    avgrad,
    mada,
    mada_coefficients,
    mada_history,
)
from l3rs.baselines.mada import COEFFICIENTS, DOMAIN
from tests.l3rs import precision
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
from tests.l3rs.baselines.mada_reference import (
    ADAM,
    ALPHA,
    FROZEN,
    INSIDE,
    NEAR_ADAM,
    STILL,
    assert_in_domain,
    fixed,
    no_moments,
    numpy_update,
)
from tests.l3rs.baselines.test_avgrad import recurrence as avgrad_recurrence

# Corners


@pytest.mark.parametrize("kept", [FROZEN, STILL], ids=["frozen", "still"])
@pytest.mark.parametrize(
    ("corner", "reference"),
    [
        (ADAM, optax.adam(0.03, 0.9, 0.95, eps=1e-6)),
        ({**ADAM, "rho": 0.0}, avgrad(0.03, 0.9, 0.95, eps=1e-6)),
        # optax.yogi starts both moments at 1e-6, MADA at 0
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
    assert error(found[:5], expected[:5]) > 1e-3  # and before that the difference shows


def test_decoupled_weight_decay_is_adamws():
    found, _ = follow(mada(0.03, **ADAM, weight_decay=0.1, **FROZEN))
    assert error(found, follow(optax.adamw(0.03, 0.9, 0.95, eps=1e-6, weight_decay=0.1))[0]) < EXACT


@pytest.mark.parametrize("kept", [FROZEN, STILL], ids=["frozen", "still"])
def test_between_the_corners(kept):
    """All coefficients inside D, with weight decay and a schedule."""
    found, states = follow(mada(decaying, **INSIDE, weight_decay=0.1, eps=1e-3, **kept))
    expected = follow_numpy(fixed(INSIDE, decaying_at, weight_decay=0.1, eps=1e-3))
    assert error(found, expected) < EXACT
    np.testing.assert_allclose(states[-1].coefficients.learning_rate, decaying_at(STEPS), rtol=1e-12)


# Hyper-gradients


@pytest.mark.parametrize("q", [INSIDE, NEAR_ADAM], ids=["inside", "near adam"])
def test_hyper_gradient_is_that_of_the_next_loss(q):
    """Central differences, in float64, of f_T+1(x_T) in the coefficients of step T alone. They come from a run that
    learns nothing; the hyper-gradient comes from a run that learns for one step."""
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

    with precision.x64():
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
    """Every coefficient over 40 steps against NumPy's recurrence, whose hyper-gradients are finite differences: pairs
    of gradient and update, clipping, projection, the start."""
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


# Training


def test_from_a_poor_start_it_ends_below_adam():
    """An MLP on the scikit-learn digits, 300 steps with batches of 64, from β's that are poor for both: the loss on all
    data. Seeds differ in weights and batches."""
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

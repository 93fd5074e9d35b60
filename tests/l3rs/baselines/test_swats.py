"""SWATS against its Algorithm 1 in NumPy, and where the switch can be worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import swats
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
    follow,
    follow_numpy,
    gradient,
)

LOOSE = {"tolerance": 3e-3}  # on the noisy problem the switch comes within 50 steps, and not at once


class Algorithm1(Recurrence):
    """Step by step as published, with a schedule that continues after the switch."""

    def __init__(self, rate, b1=0.9, b2=0.999, eps=1e-9, tolerance=1e-9, relative_tolerance=0.0):
        super().__init__()
        self.rate, self.b1, self.b2, self.eps = rate, b1, b2, eps
        self.tolerance, self.relative_tolerance = tolerance, relative_tolerance
        self.average, self.sgd_rate, self.switch_step, self.momentum = 0.0, 0.0, 0, np.zeros(N)

    def __call__(self, k, g, x):
        del x
        if self.switch_step:
            self.momentum = self.b1 * self.momentum + g
            decay = self.rate(k) / self.rate(self.switch_step)
            return -(1 - self.b1) * self.sgd_rate * decay * self.momentum
        m, a = self.first(g, self.b1), self.second(g, self.b2)
        p = -self.rate(k) * np.sqrt(1 - self.b2**k) / (1 - self.b1**k) * m / (np.sqrt(a) + self.eps)
        if p @ g != 0:
            gamma = p @ p / -(p @ g)
            self.average = self.b2 * self.average + (1 - self.b2) * gamma
            self.sgd_rate = self.average / (1 - self.b2**k)
            near = abs(self.sgd_rate - gamma) < self.tolerance + self.relative_tolerance * abs(gamma)
            if k > 1 and near and self.sgd_rate > 0:
                self.switch_step = k
        return p


@pytest.mark.parametrize(
    "options",
    [{}, LOOSE, {"relative_tolerance": 0.1}, {"b1": 0.5, "b2": 0.9, "eps": 1e-3, "tolerance": 1e-3}],
    ids=["never switches", "tolerance", "relative", "other numbers"],
)
def test_algorithm_1(options):
    reference = Algorithm1(lambda _: 0.03, **options)
    expected = follow_numpy(reference)
    found, states = follow(swats(0.03, **options))
    assert error(found, expected) < EXACT
    assert int(states[-1].switch_step) == reference.switch_step
    assert bool(states[-1].sgd) == bool(reference.switch_step)
    np.testing.assert_allclose(states[-1].learning_rate, reference.sgd_rate, rtol=EXACT)
    assert (2 < reference.switch_step < STEPS - 10) == bool(options)  # both phases are compared


def test_a_schedule_goes_on_after_the_switch():
    reference = Algorithm1(decaying_at, tolerance=1e-2)
    expected = follow_numpy(reference)
    found, states = follow(swats(decaying, tolerance=1e-2))
    assert 2 < reference.switch_step < STEPS - 10
    assert error(found, expected) < EXACT
    np.testing.assert_allclose(states[-1].adam_rate, decaying_at(reference.switch_step), rtol=1e-12)  # rounding


def test_before_the_switch_it_is_adam():
    """But for ε, which optax adds after the bias correction, Algorithm 1 before."""
    found, states = follow(swats(0.03, eps=1e-20, **LOOSE))
    last = int(states[-1].switch_step)
    expected, _ = follow(optax.adam(0.03, eps=1e-20), steps=last)
    assert 2 < last < STEPS
    assert error(found[:last, TRAINED], expected[:, TRAINED]) < EXACT


def test_after_the_switch_it_is_sgd_with_a_new_momentum():
    _, states = follow(swats(0.03, **LOOSE))
    last = int(states[-1].switch_step)
    before, rate = states[last - 1], float(states[-1].learning_rate)
    assert not any(leaf.any() for leaf in jax.tree.leaves(before.mu))
    assert all(leaf.any() for leaf in jax.tree.leaves(before.nu))
    reference = optax.sgd((1 - 0.9) * rate, momentum=0.9)
    resumed = optax.GradientTransformationExtraArgs(lambda _: jax.tree.map(jnp.asarray, before), swats(0.03).update)
    found, after = follow(resumed)
    expected, _ = follow(reference)
    assert error(found, expected) < EXACT
    for name in ("sgd", "switch_step", "learning_rate", "average", "adam_rate"):  # fixed at the switch
        np.testing.assert_array_equal(getattr(after[-1], name), getattr(before, name))
    np.testing.assert_array_equal(after[-1].nu["a"], before.nu["a"])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_gradient_switches_at_the_second_step(dtype):
    """Every step of Adam is then α sign g, so γ = α² n / (α Σ|g|), its own average, at once; the paper's tolerance
    suffices in float32, too. SGD then moves by Λ (1 - β1^k) g."""
    slope = np.linspace(-3, 3, N) + 0.2

    def constant(t, x):
        del t, x
        return slope

    found, states = follow(swats(0.01), dtype=dtype, gradient=constant)
    expected_rate = 0.01 * N / np.abs(slope).sum()
    digits = 1e-5 if dtype == np.float32 else 1e-6  # ε = 1e-9 beside √a = 0.03 |g|, |g| > 0.1
    assert [int(state.switch_step) for state in states[:3]] == [0, 2, 2]
    np.testing.assert_allclose(states[-1].learning_rate, expected_rate, rtol=digits)
    np.testing.assert_allclose(found[:2], -0.01 * np.sign(slope) * np.ones((2, 1)), rtol=digits)
    weights = 1 - 0.9 ** np.arange(1, STEPS - 1)[:, None]
    np.testing.assert_allclose(found[2:], -expected_rate * weights * slope, rtol=digits)


def test_a_negative_rate_never_takes_over():
    """λ is put far below zero by hand; whatever γ is, it agrees within this tolerance."""
    tx = swats(0.01, tolerance=1e9)

    def below_zero(params):
        return tx.init(params)._replace(average=jnp.full([], -1e3, jnp.result_type(float)))

    _, states = follow(optax.GradientTransformationExtraArgs(below_zero, tx.update), steps=10)
    assert all(state.learning_rate < 0 and not state.sgd for state in states)
    _, states = follow(tx, steps=2)
    assert not states[0].sgd  # k > 1
    assert states[1].sgd  # so the sign is what prevented the switch


def test_zero_gradients_leave_the_average():
    """pᵀg = 0: no γ, and no NaN; the first steps, and some in the middle of training."""

    def pausing(t, x):
        return gradient(t, x) * (5 < t < 10 or t > 15)

    reference = Algorithm1(lambda _: 0.03)
    # With no gradient at all the largest update of a step is 0: compare those that move.
    expected = follow_numpy(reference, gradient=pausing)
    found, states = follow(swats(0.03), gradient=pausing)
    assert not found[:5].any()
    assert error(found[5:], expected[5:]) < EXACT
    assert states[4].average == 0
    assert states[9].average == states[14].average != 0
    np.testing.assert_allclose(states[-1].average, reference.average, rtol=EXACT)


def test_an_overflowing_rate_is_left_out():
    """In float32 pᵀp is infinite, pᵀg is not."""
    tx = swats(1e30)
    updates, state = jax.jit(tx.update)({"w": jnp.ones(3)}, tx.init({"w": jnp.zeros(3)}))
    np.testing.assert_allclose(updates["w"], -1e30, rtol=1e-5)  # ε, and float32's rounding
    assert state.average == 0


def test_pytorch_optimizer():
    """One tensor, because its products run over one tensor; its ε is also the relative tolerance, beside an
    absolute one of 1e-8, and v gets 1e-15."""
    theirs = pytest.importorskip("pytorch_optimizer", reason="the comparison needs pytorch_optimizer")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(STEPS, N)) + 1.0

    def along(t, x):
        del x
        return rows[t - 1]

    found, states = follow(swats(0.03, eps=0.01, tolerance=1e-8, relative_tolerance=0.01), gradient=along)
    weight = torch.nn.Parameter(torch.tensor(START))
    optimizer = theirs.SWATS([weight], lr=0.03, betas=(0.9, 0.999), eps=0.01)
    expected = []
    for t in range(1, STEPS + 1):
        before = weight.detach().numpy().copy()
        weight.grad = torch.tensor(along(t, before))
        optimizer.step()
        expected.append(weight.detach().numpy() - before)
    assert 2 < int(states[-1].switch_step) < STEPS - 10
    assert optimizer.param_groups[0]["phase"] == "sgd"
    np.testing.assert_allclose(optimizer.param_groups[0]["lr"], states[-1].learning_rate, rtol=1e-9)
    assert error(found, np.stack(expected)) < 1e-9  # 1e-15 beside a of 1e-5, and float64's rounding


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"b1": 1.0}, "b1 is 1.0"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"tolerance": -1e-9}, "tolerance is -1e-09; it must be one number ≥ 0"),
        ({"relative_tolerance": "small"}, "relative_tolerance is small"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        swats(**{"learning_rate": 0.1, **arguments})

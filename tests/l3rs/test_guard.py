"""The safety net: Adam takes over when the loss runs away, and only then."""

import copy
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.guard import GuardState, advance

SHAPES = {"a": (4, 3), "b": (5,)}
DIRECTIONS = ("sgd", {"name": "adam", "b1": 0.5}, "lion")
GUARD = l3rs.Guard(bound=0.1, patience=2, steps=3, learning_rate=0.01)


def normal(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


SPEC = l3rs.Spec.create(normal(0), DIRECTIONS, hidden=(4,))
THETA = jax.tree.map(
    lambda leaf: 0.4 * np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32),
    jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), SPEC)),
)


def run(losses, guard, grads=None):
    """Updates and states of steps with these losses."""
    params, tx = normal(0), l3rs.learned_optimizer(THETA, SPEC, 40, guard=guard)
    state, update = tx.init(params), jax.jit(tx.update)
    results = []
    for i, loss in enumerate(losses):
        updates, state = update(normal(10 + i) if grads is None else grads(i), state, params, value=jnp.float32(loss))
        params = optax.apply_updates(params, updates)
        results.append((updates, state))
    return results


def taken_over(losses, guard=GUARD, xp=np):
    """Which steps Adam takes, from the losses' own EMA of decay 0 (the loss itself)."""
    state, first, taken = GuardState(0, 0, 0, 0, np.inf), None, []
    for loss in losses:
        finite = np.isfinite(loss)
        first = loss if first is None and finite else first
        ema = loss if finite else np.nan
        state = advance(guard, GuardState(*map(xp.asarray, state)), loss, ema, first or 0.0, xp)
        taken.append(bool(state.left > 0))
    return taken, state


def test_fires_after_patience_for_the_given_steps():
    """The bound is 0.1 · |first| above the best; two steps in a row; three steps of Adam."""
    for xp in (np, jnp):
        taken, state = taken_over([2.0, 1.0, 1.15, 1.25, 1.19, 1.25, 1.3, 1.4, 1.4, 1.0, 1.0], xp=xp)
        assert taken == [*[False] * 6, *[True] * 3, False, False]
        assert (int(state.count), int(state.adam_steps), int(state.left), int(state.high)) == (1, 3, 0, 0)
        assert float(state.best) == 1.0


def test_fires_again_if_the_loss_stays():
    taken, state = taken_over([1.0, *[5.0] * 10])
    assert taken == [False, False, True, True, True, False, True, True, True, False, True]
    assert state.count == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fires_at_once_when_a_loss_is_not_finite(bad):
    assert taken_over([1.0, bad, 1.0, 1.0, 1.0])[0] == [False, True, True, True, False]
    taken, state = taken_over([bad, bad, 1.0, 1.0])
    assert taken == [True, True, True, False]
    assert (state.count, state.best) == (1, 1.0)


def test_losses_of_any_sign_and_scale():
    assert taken_over([-1.0, -2.0, -1.95, -1.95])[0] == [False] * 4
    assert taken_over([-1.0, -2.0, -1.8, -1.8])[0] == [False, False, False, True]
    assert taken_over([1e-6, 2e-6, 2e-6])[0] == [False, False, True]
    assert taken_over([1e6, 0.9e6, 0.95e6, 0.95e6])[0] == [False] * 4


RUNAWAY = (1.0, 0.9, 2.0, 3.0, 3.0, 3.0, 3.0, 0.5, 0.5, 0.5)


def test_steps_of_a_fall_back_are_adams():
    """They are not normalised, and use moments kept from the start; before and after, the network decides the steps."""
    adam, plain = optax.scale_by_adam(b1=0.5), run(RUNAWAY, False)
    adam_state = adam.init(normal(0))
    by_adam, guarded = [], run(RUNAWAY, GUARD)
    for i, (updates, state) in enumerate(guarded):
        d, adam_state = adam.update(normal(10 + i), adam_state)
        expected = jax.tree.map(lambda x: -0.01 * x, d)
        is_adam = all(np.allclose(updates[name], expected[name], rtol=1e-4, atol=1e-8) for name in SHAPES)
        by_adam.append(is_adam)
        assert is_adam == bool(state.guard.left > 0)
        if is_adam:
            np.testing.assert_array_equal(state.mix, [[0, 1, 0], [0, 1, 0]])
        np.testing.assert_allclose([np.linalg.norm(updates[name]) for name in SHAPES], state.step_norm, rtol=1e-4)
    assert by_adam == [False, False, False, True, True, True, False, True, True, True]
    for i in range(3):  # until it fires
        jax.tree.map(np.testing.assert_array_equal, guarded[i][0], plain[i][0])
    jax.tree.map(np.testing.assert_array_equal, guarded[-1][1].directions, plain[-1][1].directions)
    assert l3rs.guard_report(guarded[-1][1]) == {
        "count": 2,
        "adam_steps": 6,
        "active": False,
        "best_loss": float(guarded[-1][1].guard.best),
    }


def test_a_guard_that_is_off_changes_nothing():
    """The same program and the same state, leaf by leaf."""
    params = normal(0)
    programs = []
    for keywords in ({}, {"guard": False}, {"guard": GUARD}):
        tx = l3rs.learned_optimizer(THETA, SPEC, 40, **keywords)
        state = tx.init(params)
        programs.append(jax.jit(tx.update).lower(params, state, params, value=1.0).as_text())
    assert programs[0] == programs[1] != programs[2]
    off, on = (run((1.0, 0.9, 0.8), guard)[-1][1] for guard in (False, GUARD))
    assert off.guard is None
    assert len(jax.tree.leaves(on)) == len(jax.tree.leaves(off)) + len(GuardState._fields)
    assert jax.tree.structure(on._replace(guard=None)) == jax.tree.structure(off)


def test_a_gradient_that_is_not_finite_enters_no_moment():
    """Also while Adam has the step."""

    def grads(i):
        made = normal(10 + i)
        return {**made, "b": made["b"].at[0].set(jnp.nan)} if i in (1, 4) else made

    for i, (updates, state) in enumerate(run(RUNAWAY, GUARD, grads)):
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((updates, state.directions)))
        assert bool(jnp.any(updates["b"] != 0)) == (i not in (1, 4))


def test_the_guard_rescues_a_run():
    """A network whose steps are far too long for the task: its loss falls only with the guard."""
    params = {"w": jnp.full(20, 3.0)}
    spec = l3rs.Spec.create(params, step_scale=2.0)
    theta = jax.jit(l3rs.init_meta_params, static_argnums=1)(jax.random.key(0), spec)

    def final(guard):
        tx = l3rs.learned_optimizer(theta, spec, 300, guard=guard)

        def step(carry, _):
            p, state = carry
            value, grads = jax.value_and_grad(lambda p: jnp.mean(p["w"] ** 4))(p)
            updates, state = tx.update(grads, state, p, value=value)
            return (optax.apply_updates(p, updates), state), value

        (_, state), losses = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=300))()
        return float(losses[-20:].mean()), state

    alone, _ = final(False)
    saved, state = final(l3rs.Guard(bound=0.001, patience=3, steps=295, learning_rate=0.05))
    assert saved < 0.1 * alone
    assert l3rs.guard_report(state)["count"] >= 1


def test_report_of_wrapped_states():
    params = normal(0)
    guarded = l3rs.learned_optimizer(THETA, SPEC, 40, guard=True)
    for tx in (
        optax.chain(optax.clip(1.0), guarded),
        optax.MultiSteps(guarded, 2),
        optax.masked(guarded, {"a": True, "b": False}),
    ):
        assert l3rs.guard_report(tx.init(params))["count"] == 0
    for tx, n in ((l3rs.learned_optimizer(THETA, SPEC, 40), 0), (optax.chain(guarded, guarded), 2)):
        with pytest.raises(l3rs.L3RSError) as error:
            l3rs.guard_report(tx.init(params))
        assert str(error.value) == f"the state has {n} guards; it must have one: l3rs.load(…, guard=True)"


def test_a_state_without_guard():
    params = normal(0)
    state = l3rs.learned_optimizer(THETA, SPEC, 40).init(params)
    with pytest.raises(l3rs.L3RSError, match="the state is from an optimizer without a guard"):
        l3rs.learned_optimizer(THETA, SPEC, 40, guard=True).update(params, state, params, value=1.0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bound": 0.0}, "guard.bound is 0.0; it must be a number > 0"),
        ({"bound": float("nan")}, "guard.bound is nan; it must be a number > 0"),
        ({"learning_rate": "a"}, "guard.learning_rate is 'a'; it must be a number > 0"),
        ({"patience": 0}, "guard.patience is 0; it must be a whole number ≥ 1"),
        ({"steps": 1.5}, "guard.steps is 1.5; it must be a whole number ≥ 1"),
    ],
    ids=str,
)
def test_fields_out_of_range(fields, sentence):
    with pytest.raises(l3rs.L3RSError) as error:
        l3rs.Guard(**fields)
    assert str(error.value) == sentence


@pytest.mark.parametrize("torch_too", [False, True], ids=["jax", "torch"])
def test_invalid_guards(torch_too):
    make = functools.partial(l3rs.learned_optimizer, total_steps=10)
    if torch_too:
        pytest.importorskip("torch", reason="the extra `torch` is not installed")
        from l3rs.torch import L3RS

        def make(theta, spec, guard):
            return L3RS([], (theta, spec), 10, guard=guard)

    with pytest.raises(l3rs.L3RSError, match=r"^guard is 3; allowed are True, False and a l3rs.Guard$"):
        make(THETA, SPEC, guard=3)
    spec = l3rs.Spec.create(normal(0), ("lion", "sgd"), hidden=(4,))
    theta = jax.jit(l3rs.init_meta_params, static_argnums=1)(jax.random.key(0), spec)
    with pytest.raises(l3rs.L3RSError) as error:
        make(theta, spec, guard=True)
    assert str(error.value) == "guard needs Adam among the optimizer's directions; this one has lion, sgd"


def test_parity_in_pytorch():
    """The same steps, the same report; a saved state continues in the middle of a fall-back."""
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    from l3rs.torch import L3RS

    losses = [*RUNAWAY, float("nan"), *RUNAWAY]
    expected = run(losses, GUARD)

    def parameters():
        return {name: torch.nn.Parameter(torch.tensor(np.asarray(x))) for name, x in normal(0).items()}

    def steps(opt, params, which):
        for i in which:
            for name, grad in normal(10 + i).items():
                params[name].grad = torch.tensor(np.asarray(grad))
            opt.step(loss=losses[i])

    params = parameters()
    opt = L3RS(params.items(), (THETA, SPEC), 40, guard=GUARD)
    steps(opt, params, range(5))
    assert opt.guard_report() == pytest.approx(l3rs.guard_report(expected[4][1]))
    assert opt.guard_report()["active"]
    saved, values = copy.deepcopy(opt.state_dict()), {k: p.detach().clone() for k, p in params.items()}
    steps(opt, params, range(5, len(losses)))
    assert opt.guard_report() == pytest.approx(l3rs.guard_report(expected[-1][1]))
    end = normal(0)
    for updates, _ in expected:
        end = optax.apply_updates(end, updates)
    for name, param in params.items():
        np.testing.assert_allclose(param.detach().numpy(), end[name], rtol=1e-4, atol=1e-6)

    resumed = {name: torch.nn.Parameter(value) for name, value in values.items()}
    again = L3RS(resumed.items(), (THETA, SPEC), 40, guard=GUARD)
    with warnings.catch_warnings(action="error"):
        again.load_state_dict(saved)
        steps(again, resumed, range(5, len(losses)))
    assert all(torch.equal(resumed[name], params[name]) for name in SHAPES)
    assert again.guard_report() == opt.guard_report()

    with pytest.raises(l3rs.L3RSError, match="the optimizer has no guard"):
        L3RS(parameters().items(), (THETA, SPEC), 40).guard_report()

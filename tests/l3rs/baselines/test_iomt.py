"""Training with interleaved optimizers: comparison with plain training, switches, rollback."""

import collections
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import iomt
from tests.l3rs.baselines.test_iomt_space import RATE, close, counting

plans = pytest.mark.parametrize("plan", ["fused", "stepwise"])
SMALL = iomt.Options(stage_steps=5, initial_stages=4)
_CLASSES = 3


_traced = []


def loss(params, stats, batch):
    """A small classifier; its stats count batches and average inputs, as a normalization would."""
    _traced.append(1)  # once for each compilation: a compiled function does not call it
    x, y = batch
    logits = jnp.tanh(x @ params["hidden"]) @ params["head"] + params["bias"]
    stats = {"count": stats["count"] + 1, "mean": 0.9 * stats["mean"] + 0.1 * x.mean()}
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), stats


def batch(data, step):
    rows = data["rows"][step]  # drawn in advance: random numbers take long to compile
    return data["x"][rows], data["y"][rows]


def problem(seed=0):
    """(params, stats, data)"""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    labels = np.argmax(x @ rng.normal(size=(6, _CLASSES)), axis=1)
    params = {"hidden": rng.normal(size=(6, 8)) / 2, "head": rng.normal(size=(8, _CLASSES)) / 2, "bias": np.zeros(3)}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    stats = {"count": jnp.zeros([], jnp.int32), "mean": jnp.zeros([])}
    data = {"x": x, "y": labels, "rows": rng.integers(0, 200, (301, 16))}
    return params, stats, jax.tree.map(jnp.asarray, data)


@functools.cache
def trainer(plan):
    """With the five optimizers, compiled once for many tests."""
    return iomt.make_train(loss, batch, options=SMALL, plan=plan)


_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))


def plain(tx, steps):
    """Training with one optimizer, step by step."""
    params, stats, data = problem()
    state, losses = tx.init(params), []

    @jax.jit
    def step(params, stats, state, i):
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, batch(data, i))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, value

    for i in range(steps):
        params, stats, state, value = step(params, stats, state, i)
        losses.append(value)
    return params, stats, state, np.array(losses)


@pytest.mark.parametrize(("plan", "name"), [("fused", "adam"), ("stepwise", "adam"), ("stepwise", "rmsprop")])
def test_one_optimizer_is_plain_training(plan, name):
    """60 steps in stages of 25, the last one of 10: params, stats, state and losses."""
    make = iomt.SPACE[name].make
    train = iomt.make_train(loss, batch, space={name: iomt.Optimizer(make, RATE)}, plan=plan)
    result = train(*problem(), 60)
    params, stats, state, losses = plain(make(learning_rate=0.05), 60)
    close(result.params, params)  # compiled apart
    close(result.stats, stats)
    close(result.state.states[0], state)
    assert result.losses.shape == (61,)
    close(result.losses[:60], losses)
    assert [stage.steps for stage in result.history] == [25, 25, 10]
    assert [stage.step for stage in result.history] == [0, 25, 50]


@plans
def test_stages_follow_the_history(plan):
    """Each stage is training with the optimizer it names, from the state that optimizer had."""
    result = trainer(plan)(*problem(), 52, seed=1)
    assert len({stage.optimizer for stage in result.history}) >= 3
    params, stats, data = problem()
    states = {name: optimizer.make(learning_rate=0.1).init(params) for name, optimizer in iomt.SPACE.items()}
    draw = jax.jit(batch)
    for stage in result.history:
        update = jax.jit(iomt.SPACE[stage.optimizer].make(**stage.hyperparameters).update)
        for i in range(stage.step, stage.step + stage.steps):
            (value, stats), grads = _gradient(params, stats, draw(data, i))
            np.testing.assert_allclose(result.losses[i], value, rtol=1e-4)  # compiled apart, over 52 steps
            updates, states[stage.optimizer] = update(grads, states[stage.optimizer], params)
            params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), result.params, params)
    for stage in result.history:
        found = iomt.stage_score(result.losses[stage.step : stage.step + stage.steps + 1], SMALL.alpha)
        assert stage.score == pytest.approx(found)


@plans
def test_after_stage_is_called_with_the_params_of_each_stage(plan):
    """It sees the params with which a shorter run would end; after a rollback, the params from before the stage."""
    seen = {}
    result = trainer(plan)(*problem(), 12, seed=1, after_stage=lambda params, _, step: seen.setdefault(step, params))
    assert list(seen) == [5, 10, 12]
    close(seen[12], result.params)
    close(seen[5], trainer(plan)(*problem(), 5, seed=1).params)
    options = iomt.Options(stage_steps=5, switch="cyclical")
    seen.clear()
    iomt.make_train(loss, batch, space=EXPLODING, options=options, plan=plan)(
        *problem(), 10, after_stage=lambda params, _, step: seen.setdefault(step, params)
    )
    close(seen[10], seen[5])


@plans
def test_a_custom_controller(plan):
    """It may have other learning rates and options; nothing is compiled again."""
    train = trainer(plan)
    train(*problem(), 5)
    before = len(_traced)
    space = {name: o._replace(hyperparameters={"learning_rate": (0.3, 0.03)}) for name, o in iomt.SPACE.items()}
    options = iomt.Options(stage_steps=5, switch="cyclical", variant="doit")
    result = train(*problem(), 30, controller=iomt.Controller(space, options, seed=2))
    assert len(_traced) == before
    assert [stage.optimizer for stage in result.history] == [*space, "sgd"]
    assert {stage.hyperparameters["learning_rate"] for stage in result.history} == {0.3, 0.03}
    whole = iomt.make_train(loss, batch, space=space, options=options, plan=plan)(*problem(), 30, seed=2)
    close(result.params, whole.params)
    with pytest.raises(
        l3rs.L3RSError, match="the controller has stages of 25 steps and moments 'keep', not of 5 and 'keep'"
    ):
        train(*problem(), 30, controller=iomt.Controller(space, iomt.Options()))


def test_both_plans_agree():
    fused, stepwise = (trainer(plan)(*problem(), 30) for plan in ("fused", "stepwise"))
    assert [stage.optimizer for stage in fused.history] == [stage.optimizer for stage in stepwise.history]
    close(fused.params, stepwise.params)


@plans
def test_nothing_is_compiled_twice(plan):
    """Neither a switch, nor a shorter last stage, nor another run compiles anything."""
    train = trainer(plan)
    train(*problem(), 5)
    before = len(_traced)
    for steps, seed in ((23, 1), (31, 2)):
        assert len({stage.optimizer for stage in train(*problem(seed), steps, seed).history}) >= 3
    assert len(_traced) == before > 0


@plans
def test_a_seed_decides_everything(plan):
    train = trainer(plan)
    first, again, other = (train(*problem(), 40, seed=seed) for seed in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert [s.optimizer for s in first.history] != [s.optimizer for s in other.history]


def test_moments_in_training():
    """In 4 stages of 5 steps, two optimizers take turns; the step counts in their states show whether moments are
    kept."""
    space = {name: iomt.Optimizer(counting, RATE) for name in "ab"}
    for moments, expected in (("keep", 10), ("reset", 5)):
        options = iomt.Options(stage_steps=5, switch="cyclical", moments=moments)
        result = iomt.make_train(loss, batch, space=space, options=options)(*problem(), 20)
        assert [float(s) for s in result.state.states] == [expected, expected]


def test_the_loss_reaches_optimizers_that_read_it():
    space = {"plateau": iomt.Optimizer(lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()), {})}
    result = iomt.make_train(loss, batch, space=space, options=SMALL)(*problem(), 7)
    plateau = result.state.states[0][1]
    assert float(plateau.best_value) == pytest.approx(min(result.losses[:7]), rel=1e-5)


EXPLODING = {
    "good": iomt.Optimizer(optax.sgd, {"learning_rate": (0.1,)}),
    "nan": iomt.Optimizer(lambda learning_rate: optax.scale(learning_rate * jnp.nan), {"learning_rate": (1.0,)}),
    "far": iomt.Optimizer(lambda learning_rate: optax.scale(learning_rate), {"learning_rate": (1e6,)}),
}


@plans
def test_rollback(plan):
    """good, nan, far, good, nan: what remains is the two good stages, the second on its own batches."""
    options = iomt.Options(stage_steps=5, switch="cyclical")
    result = iomt.make_train(loss, batch, space=EXPLODING, options=options, plan=plan)(*problem(), 25)
    assert [stage.diverged for stage in result.history] == [False, True, True, False, True]
    assert [stage.score for stage in result.history if stage.diverged] == [-1, -1, -1]
    assert all("rolled back" in stage.notes[0] for stage in result.history if stage.diverged)
    params, stats, data = problem()
    for i in (0, 1, 2, 3, 4, 15, 16, 17, 18, 19):
        (_, stats), grads = _gradient(params, stats, batch(data, i))
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    close(result.params, params)
    close(result.stats, stats)
    assert np.isnan(result.losses[6:11]).all()  # the record says what happened


def test_without_rollback():
    """The run is lost, and its record says so; the controller continues."""
    options = iomt.Options(stage_steps=5, initial_stages=3, rollback=False)
    result = iomt.make_train(loss, batch, space=EXPLODING, options=options)(*problem(), 40, seed=0)
    lost = [stage.diverged for stage in result.history].index(True)
    assert all(stage.diverged for stage in result.history[lost:])
    assert "training went on" in result.history[lost].notes[-1]
    assert not any(np.all(np.isfinite(p)) for p in jax.tree.leaves(result.params))


@pytest.mark.parametrize(("bad", "lost"), [(8, [1]), (10, [1, 2])])
def test_a_bad_batch_costs_a_stage(bad, lost):
    """One batch makes loss and gradient NaN; with rollback the run goes on. Where it is the last of
    a stage, the next one begins with it and is lost, too."""

    def spoiled(data, step):
        x, y = batch(data, step)
        return jnp.where(step == bad, jnp.nan, x), y

    def only_params(params, stats, batch):
        return loss(params, problem()[1], batch)[0], stats

    params, _, data = problem()
    train = iomt.make_train(only_params, spoiled, space={"sgd": iomt.Optimizer(optax.sgd, RATE)}, options=SMALL)
    result = train(params, (), data, 30)
    assert [i for i, stage in enumerate(result.history) if stage.diverged] == lost
    assert np.isfinite(result.losses[-1])


def test_everything_diverges():
    space = {name: EXPLODING[name] for name in ("nan", "far")}
    result = iomt.make_train(loss, batch, space=space, options=SMALL)(*problem(), 40)
    assert all(stage.diverged for stage in result.history)
    jax.tree.map(np.testing.assert_array_equal, result.params, problem()[0])


@pytest.mark.parametrize("steps", [1, 5, 6])
@plans
def test_short_runs(plan, steps):
    result = trainer(plan)(*problem(), steps)
    assert [stage.steps for stage in result.history] == {1: [1], 5: [5], 6: [5, 1]}[steps]
    assert np.all(np.isfinite(result.losses))


def test_it_learns():
    """On a problem that all optimizers can solve, the loss ends far below its start, with surrogates in use."""
    result = trainer("fused")(*problem(), 300)
    assert collections.Counter(stage.chosen for stage in result.history) == {"initial": 4, "surrogate": 56}
    assert result.losses[-20:].mean() < 0.4 * result.losses[0]


def test_head_only_with_frozen_parameters_as_stats():
    params, _, data = problem()
    frozen = {"hidden": params.pop("hidden")}

    def head_loss(params, stats, batch):
        return loss({**params, **stats}, problem()[1], batch)[0], stats

    space = {"sgd": iomt.Optimizer(optax.sgd, {"learning_rate": (0.1, 0.01)})}
    result = iomt.make_train(head_loss, batch, space=space, options=SMALL)(params, frozen, data, 30)
    assert set(result.params) == {"head", "bias"}
    np.testing.assert_array_equal(result.stats["hidden"], frozen["hidden"])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: iomt.make_train(loss, batch, plan="host"), "plan is 'host'; allowed are fused, stepwise"),
        (lambda: iomt.make_train(loss, batch)(*problem(), 0), "steps is 0; it must be ≥ 1"),
        (lambda: iomt.interleave(iomt.SPACE, "share"), "moments is 'share'; allowed are keep, reset"),
        (
            lambda: iomt.encode(iomt.SPACE, iomt.Choice("lion", {})),
            "Choice.*lion.*is not a choice of a space of sgd, sgdm",
        ),
        (lambda: iomt.encode(iomt.SPACE, iomt.Choice("adam", {"b1": 0.9})), "b1.*is not a choice"),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        call()


def test_a_loss_that_is_nan_before_the_first_step():
    params, stats, data = problem()
    train = iomt.make_train(loss, batch)
    with pytest.raises(l3rs.L3RSError, match="the loss is nan before the first step"):
        train({**params, "head": params["head"] * jnp.nan}, stats, data, 10)


def test_public_face():
    for name in iomt.__all__:
        assert name in dir(iomt)
        assert name in ("SPACE", "Space") or getattr(iomt, name).__doc__


def test_import_loads_no_extra():
    code = "import sys, l3rs.baselines.iomt; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not set(done.stdout.split()) & {"sklearn", "umap", "matplotlib", "threadpoolctl", "torch", "ray"}

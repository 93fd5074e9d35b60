"""VeLO and Celo2 as baselines: what is handed to their packages, and the real ones where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metatrain.evaluation.baselines import MissingBaselineError, Tuned, find_baseline, make_baseline

DATA = Path(os.environ.get("L3RS_SHARED") or Path(__file__).resolve().parents[3] / "shared") / "data"
PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
GRADIENTS = {"w": jnp.full((2, 3), 0.5), "b": jnp.array([1.0, -2.0, 3.0])}
PACKAGES = {"velo": "learned_optimization", "celo2": "celo2_optax"}
WEIGHTS = {"velo": DATA / "weights" / "velo" / "params", "celo2": DATA / "weights" / "celo2" / "theta.state"}


class Shrinking:
    """Stands in for VeLO: of learned_optimization's form, with a step that says what it was given."""

    def __init__(self, path):
        self.path = path

    def init(self, params, num_steps, **_):
        return {"params": params, "num_steps": num_steps, "calls": 0}

    def set_params(self, state, params):
        return {**state, "params": params}

    def get_params(self, state):
        return state["params"]

    def update(self, state, gradients, loss, **_):
        rate = loss / state["num_steps"]
        params = jax.tree.map(lambda p, g: 0.5 * p - rate * g, state["params"], gradients)
        return {**state, "params": params, "calls": state["calls"] + 1}


def with_package(name, monkeypatch, **modules):
    """Import the example beside modules that stand in for its package; all of them are gone after the test."""
    for module, content in modules.items():
        path = module.replace("__", ".")
        made = types.ModuleType(path)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, path, made)
    monkeypatch.setitem(sys.modules, f"examples.{name}", None)
    monkeypatch.setattr(importlib.import_module("examples"), name, None, raising=False)
    del sys.modules[f"examples.{name}"]


def step_of(baseline, rate, horizon, loss):
    def run(horizon):
        made = make_baseline(baseline, Tuned(jnp.float32(rate), jnp.int32(0)), horizon)
        return made.update(GRADIENTS, made.init(PARAMS), PARAMS, value=loss)

    return jax.jit(run)(jnp.int32(horizon))


def test_velo_is_given_the_parameters_the_loss_and_the_number_of_steps(monkeypatch):
    with_package(
        "velo", monkeypatch, learned_optimization={}, learned_optimization__learned_optimizers={},
        learned_optimization__learned_optimizers__opt_from_checkpoint={"opt_from_checkpoint": Shrinking},
        learned_optimization__research={}, learned_optimization__research__general_lopt={"hyper_v2": None},
    )  # fmt: skip
    baseline = find_baseline("examples.velo:velo", {"weights": "params", "learning_rate": 1})
    assert not baseline.tuned
    updates, state = step_of(baseline, 1.0, 8, 2.0)
    for name in PARAMS:
        np.testing.assert_allclose(updates[name], -0.5 * PARAMS[name] - 2.0 / 8 * GRADIENTS[name], rtol=1e-6)
    assert state[0]["params"] == ()  # the state does not hold a second copy of the parameters
    assert int(state[0]["calls"]) == 1
    half, _ = step_of(baseline, 0.5, 8, 2.0)
    np.testing.assert_allclose(half["w"], 0.5 * updates["w"], rtol=1e-6)


def test_celo2_steps_matrices_and_adam_the_rest(monkeypatch):
    def scale_by_celo2(theta):
        return optax.scale(theta)

    with_package("celo2", monkeypatch, celo2_optax={"load_checkpoint": float, "scale_by_celo2": scale_by_celo2})
    baseline = find_baseline("examples.celo2:celo2", {"weights": "3.0", "vector_multiplier": 0.5})
    assert (baseline.tuned, baseline.learning_rate) == (True, 2.0**-9)
    updates, _ = step_of(baseline, 0.1, 8, 2.0)
    np.testing.assert_allclose(updates["w"], -0.1 * 3.0 * GRADIENTS["w"], rtol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.1 * 0.5 * np.sign(GRADIENTS["b"]), rtol=1e-5)


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_package_it_is_left_out(name):
    if importlib.util.find_spec(PACKAGES[name]):
        pytest.skip(f"{PACKAGES[name]} is installed")
    with pytest.raises(MissingBaselineError, match=f"examples.{name}:{name} is left out.*{PACKAGES[name]}"):
        find_baseline(f"examples.{name}:{name}", {"weights": "none"})


@pytest.mark.parametrize("name", PACKAGES)
def test_with_its_published_weights_it_learns(name):
    pytest.importorskip(PACKAGES[name], reason=f"{PACKAGES[name]} is not installed")
    if not WEIGHTS[name].exists():
        pytest.skip(f"there is no {WEIGHTS[name]}")
    baseline = find_baseline(f"examples.{name}:{name}", {"weights": str(WEIGHTS[name])})
    made = make_baseline(baseline, Tuned(jnp.float32(baseline.learning_rate), jnp.int32(0)), 50)

    def loss(params):
        return jnp.mean((params["w"] - 1.0) ** 2) + jnp.mean(params["b"] ** 2)

    params, state = PARAMS, made.init(PARAMS)
    for _ in range(50):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = made.update(gradients, state, params, value=value)
        params = optax.apply_updates(params, updates)
    assert loss(params) < loss(PARAMS)

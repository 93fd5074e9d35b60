"""The algorithm in one file computes the service's numbers."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l3rs
import metatrain
from examples import meta_train_minimal as minimal
from tasks import make_task
from tests.metatrain.common import REGRESSION, small_config

FILE = Path(minimal.__file__)


def test_a_short_file_without_the_service():
    text = FILE.read_text()
    assert len(text.splitlines()) <= 150
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {name for node in imports for name in [getattr(node, "module", None), *(x.name for x in node.names)]}
    assert not [name for name in modules if name and name.startswith("metatrain")]


def test_the_same_meta_training(tmp_path):
    """After four generations from one seed θ is the service's, and every generation has the same meta-losses."""
    outer = {"steps": 4, "population": 8, "horizon": {"min": 2, "max": 20}}
    config = small_config(seed=3, outer=outer, optimizer={"hidden": [32, 32], "embedding_dim": 8})
    run = metatrain.run(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = list(minimal.meta_train(make_task(REGRESSION, {}), 4, 8, (2, 20), seed=3))
    assert len({line["horizon"] for line in lines}) > 1
    for (_, losses), line in zip(found, lines, strict=True):
        np.testing.assert_allclose(losses.mean(), line["meta_loss_mean"], rtol=1e-5)
        np.testing.assert_allclose(losses.min(), line["meta_loss_best"], rtol=1e-5)
    theta, _, _ = l3rs.restore(run.optimizer)
    # Both add floats in another order; ranks make all else equal. A generation moves θ by up to 0.03.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), theta, dict(found[-1][0]))


def test_the_same_steps():
    """A step of the file is the library's, in a network with kernels and biases of several sizes, for 30 steps."""
    rng = np.random.default_rng(0)
    params = {"a": {"kernel": rng.normal(size=(3, 3, 2, 4)), "bias": rng.normal(size=4)}, "b": rng.normal(size=(4, 5))}
    params = jax.tree.map(jnp.float32, params)
    targets = jax.tree.map(lambda x: x[::-1] * 0.5, params)
    spec = l3rs.Spec.create(params)
    theta = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), minimal.init_theta(jax.random.key(0), 3)
    )
    tx = l3rs.learned_optimizer(theta, spec, 30)

    def loss_of(params):
        return sum(jnp.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (params, targets)), strict=True))

    @jax.jit
    def steps(params, state, other, other_state):
        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        other_loss, other_grads = jax.value_and_grad(loss_of)(other)
        other, other_state = minimal.learned_step(theta, other_state, other, other_loss, other_grads, 30)
        return optax.apply_updates(params, updates), state, other, other_state

    both = params, tx.init(params), params, minimal.init_state(params)
    first = loss_of(params)
    for _ in range(30):
        both = steps(*both)
    assert abs(loss_of(both[0]) - first) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), both[0], both[2])


def test_new_theta_is_the_library_s():
    spec = l3rs.Spec.create({"a": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
    key = jax.random.key(7)
    jax.tree.map(np.testing.assert_array_equal, minimal.init_theta(key, 2), l3rs.init_meta_params(key, spec))

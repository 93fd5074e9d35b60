"""Parameters sharded over devices: state and updates keep the sharding, and norms are those of whole layers."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.integrations.common import ROOT

CODE = """
import jax, jax.numpy as jnp, numpy as np, optax, l3rs
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from tests.integrations.common import random_theta

assert len(jax.devices()) == 2
rng = np.random.default_rng(0)
shapes = {"dense": {"kernel": (512, 300), "bias": (300,)}, "norm": {"scale": (512,)}, "out": {"kernel": (300, 6)}}
params = jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params) for _ in range(4)]
spec = l3rs.Spec.create(params, ("adam", "sgd", "momentum"))
tx = l3rs.learned_optimizer(random_theta(spec), spec, 10)
layout = {"dense": {"kernel": P("d", None), "bias": P()}, "norm": {"scale": P("d")}, "out": {"kernel": P(None, "d")}}


def run(devices):
    mesh = Mesh(np.array(devices), ("d",))
    shardings = jax.tree.map(lambda p: NamedSharding(mesh, p), layout, is_leaf=lambda x: isinstance(x, P))
    p = jax.device_put(params, shardings)
    state = jax.jit(tx.init)(p)
    step = jax.jit(lambda g, s, p, v: tx.update(g, s, p, value=v))
    for i, grad in enumerate(grads):
        updates, state = step(jax.device_put(grad, shardings), state, p, jnp.float32(2.0 / (1 + i)))
        for tree in (updates, state.directions[0].mu, state.directions[0].nu):
            jax.tree.map(lambda x, s: check(x, s), tree, shardings)
        p = optax.apply_updates(p, updates)
    hlo = step.lower(jax.device_put(grads[0], shardings), state, p, jnp.float32(1.0)).compile().as_text()
    return jax.tree.map(np.asarray, (p, state.mix, state.step_norm, state.log_norms)), hlo


def check(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.shape, x.sharding, sharding)


two, hlo = run(jax.devices())
one, _ = run(jax.devices()[:1])


def near(a, b):
    assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b), np.linalg.norm(a - b) / np.linalg.norm(b)


jax.tree.map(near, two, one)
assert "all-reduce" in hlo  # of norms and inner products
large = [line for line in hlo.splitlines() if "all-gather" in line and "512,300" in line]
assert not large, large  # no layer is gathered on one device
print("same")
"""


def test_two_devices_are_one():
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": str(ROOT)}
    environment["JAX_PLATFORMS"] = "cpu"
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["same"]

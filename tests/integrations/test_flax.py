"""Flax NNX: the training loop of its documentation, with `nnx.Optimizer`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx", reason="flax is not installed")

import l3rs  # noqa: E402
from tests.integrations.common import untrained  # noqa: E402


class Net(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(8, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.norm(self.hidden(x))))


def test_nnx_optimizer():
    """`update` passes `value=` on; batch statistics are not parameters; the state is kept in the optimizer."""
    model = Net(nnx.Rngs(0))
    theta, spec = untrained(nnx.state(model, nnx.Param))
    assert [layer.path for layer in spec.layers][:2] == ["head/bias", "head/kernel"]
    optimizer = nnx.Optimizer(model, l3rs.learned_optimizer(theta, spec, total_steps=40), wrt=nnx.Param)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 0)

    @nnx.jit
    def train_step(model, optimizer):
        def loss_fn(model):
            logits = model(x)
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1))

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads, value=loss)
        return loss

    losses = [float(train_step(model, optimizer)) for _ in range(40)]
    assert losses[-1] < 0.6 * losses[0]
    assert int(optimizer.opt_state.count[...]) == 40
    assert float(optimizer.opt_state.loss.first[...]) == pytest.approx(losses[0])

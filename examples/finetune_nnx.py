"""Fine-tune a Flax NNX model with L3RS, through `nnx.Optimizer`.

python examples/finetune_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import l3rs


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(8, 32, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.head = nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(nnx.relu(self.norm(self.hidden(x))))


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> jax.Array:
    def loss_fn(model: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, value=loss)  # the optimizer uses the loss
    return loss


def make_batch(key: jax.Array, size: int = 32) -> tuple[jax.Array, jax.Array]:
    """Points [size, 8], and which quadrant of the first two coordinates each is in."""
    x = jax.random.normal(key, (size, 8))
    return x, 2 * (x[:, 0] > 0).astype(jnp.int32) + (x[:, 1] > 0)


def fine_tune(model: nnx.Module, steps: int) -> list[float]:
    """Train for `steps` steps; returns their losses."""
    optimizer = nnx.Optimizer(model, l3rs.load(total_steps=steps), wrt=nnx.Param)  # no learning rate
    keys = jax.random.split(jax.random.key(0), steps)
    return [float(train_step(model, optimizer, *make_batch(key))) for key in keys]


if __name__ == "__main__":
    losses = fine_tune(Network(nnx.Rngs(0)), steps=60)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")

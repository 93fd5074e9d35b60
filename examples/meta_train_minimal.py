"""L3RS in one sitting: a learned optimizer, and the evolution strategy that meta-trains it.

    python examples/meta_train_minimal.py my-optimizer    # 160 generations, half a minute on 2 cores

The learned optimizer is a small MLP. At every step it reads, for each layer of a network, how far the training has
come, the loss, the layer's norms, and a learned embedding of the layer. It returns μ, in which direction the layer
moves (a mixture of the steps of Adam and SGD), and λ, how far. Evolution finds its weights θ: fine-tune a network
with each of θ ± σz for random z, and move θ toward those z whose networks ended with a low loss.

`metatrain run configs/demo.yaml` computes the same numbers. It adds what long runs need: clusters, resuming, more
directions and features, protection against NaN, evaluation and reports.
"""

import itertools
import math
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import l3rs
from tasks import make_task, sample

ADAM = optax.scale_by_adam()
HIDDEN, EMBEDDING = (32, 32), 8
DECAYS = jnp.array([0.8, 0.97])  # of the fast and the slow averages
FRACTIONS = jnp.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])  # of the training, where a time feature is 0
FEATURES = len(FRACTIONS) + 4 + 8 + EMBEDDING  # time, loss, norms, embedding
SIGMA, LEARNING_RATE = 0.05, 0.03  # of the evolution strategy


class State(NamedTuple):
    """What the learned optimizer remembers of a training. L layers."""

    step: jax.Array  # int32 []
    first_loss: jax.Array  # float32 []
    losses: jax.Array  # float32 [2], fast and slow average of the loss
    norms: jax.Array  # float32 [2, L, 4], fast and slow averages of the log norms
    adam: optax.OptState


def init_theta(key, n_layers):
    """Random weights, small in the last layer: such an optimizer already works, and mostly follows Adam."""
    embedding_key, *keys = jax.random.split(key, len(HIDDEN) + 2)
    theta = {"embedding": 0.5 * jax.random.normal(embedding_key, (n_layers, EMBEDDING))}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise([FEATURES, *HIDDEN, 3])):
        scale = (0.01 if i == len(HIDDEN) else 1) / math.sqrt(fan_in)
        kernel = scale * jax.random.normal(keys[i], (fan_in, fan_out))
        theta[f"dense_{i}"] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
    return theta


def init_state(params):
    n_layers = len(jax.tree.leaves(params))
    return State(jnp.int32(0), jnp.float32(0), jnp.zeros(2), jnp.zeros((2, n_layers, 4)), ADAM.init(params))


def learned_step(theta, state, params, loss, grads, horizon):
    """One step, Δ = -λ · unit(μ₁ · unit(Adam) + μ₂ · unit(SGD)) in each layer. Returns (params, state)."""
    adam, adam_state = ADAM.update(grads, state.adam)
    layers = list(zip(*map(jax.tree.leaves, (grads, params, adam, grads)), strict=True))  # SGD follows grads
    root_n = jnp.sqrt(jnp.array([x.size for x, *_ in layers], jnp.float32))
    lengths = jnp.array([[jnp.linalg.norm(x) for x in layer] for layer in layers])  # [L, 4]
    norms = safe_log(lengths / root_n[:, None])
    state = State(
        step=state.step + 1,
        first_loss=jnp.where(state.step == 0, loss, state.first_loss),
        losses=DECAYS * state.losses + (1 - DECAYS) * loss,
        norms=DECAYS[:, None, None] * state.norms + (1 - DECAYS[:, None, None]) * norms,
        adam=adam_state,
    )
    shared, per_layer = features(state, norms, horizon)
    x = jnp.concatenate([jnp.tile(shared, (len(layers), 1)), per_layer, theta["embedding"]], axis=1)
    for i in range(len(HIDDEN) + 1):
        x = x @ theta[f"dense_{i}"]["kernel"] + theta[f"dense_{i}"]["bias"]
        x = jnp.tanh(x) if i < len(HIDDEN) else x

    mu = jax.nn.softmax(x[:, :2] + jnp.array([2.0, -2.0]))  # [L, 2]
    step_norm = 3e-3 * root_n * jnp.exp(jnp.clip(2 * x[:, 2], -10, 10))  # λ, [L]
    mixtures = [mu[i, 0] * unit(adam) + mu[i, 1] * unit(sgd) for i, (_, _, adam, sgd) in enumerate(layers)]
    updates = [-r * x / jnp.maximum(jnp.linalg.norm(x), 1e-3) for r, x in zip(step_norm, mixtures, strict=True)]
    return optax.apply_updates(params, jax.tree.unflatten(jax.tree.structure(params), updates)), state


def features(state, norms, horizon):
    """What the MLP reads: of the training, [13], and of each layer, [L, 8]."""
    corrected = 1 - DECAYS ** state.step.astype(jnp.float32)  # the averages begin at zero
    time = jnp.tanh(10 * (state.step / horizon - FRACTIONS))
    losses, first = safe_log(state.losses / corrected), safe_log(state.first_loss)
    changes = jnp.array([losses[0] - losses[1], losses[0] - first, losses[1] - first])
    fast, slow = state.norms / corrected[:, None, None]
    shared = jnp.concatenate([time, losses[:1] / 5, jnp.clip(changes, -3, 3)])
    return shared, jnp.concatenate([norms / 5, jnp.clip(fast - slow, -3, 3)], axis=1)


def safe_log(x):
    """Natural log, between -20 and 20."""
    return jnp.log(jnp.clip(x, math.exp(-20), math.exp(20)))


def unit(x):
    """x / ‖x‖; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-30)


def rollout(theta, task, data, start, horizon):
    """Fine-tune a network with the optimizer θ for `horizon` steps; the meta-loss is its loss on other examples."""
    params, stats = task.init(data, start.init)

    def step(t, carry):
        params, stats, state = carry
        batch = task.batch(data, jax.random.fold_in(jax.random.wrap_key_data(start.key), t))
        (loss, aux), grads = jax.value_and_grad(task.loss, has_aux=True)(params, stats, batch, True)
        params, state = learned_step(theta, state, params, loss, grads, horizon)
        return params, aux.stats, state

    params, stats, _ = jax.lax.fori_loop(0, horizon, step, (params, stats, init_state(params)))
    return task.loss(params, stats, data["outer_valid"], False)[0]


def meta_train(task, generations=160, population=32, horizons=(10, 200), seed=0):
    """OpenAI's evolution strategy. Yields θ after each generation, and the generation's meta-losses."""
    theta_key, _ = jax.random.split(jax.random.key(seed))
    mean, unravel = ravel_pytree(init_theta(theta_key, len(jax.tree.leaves(task.params_shape()))))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, generations))
    optimizer_state = optimizer.init(mean)
    meta_losses = jax.jit(jax.vmap(lambda flat, *same: rollout(unravel(flat), task, *same), (0, None, None, None)))
    for generation in range(generations):
        key = jax.random.fold_in(jax.random.key(seed), generation)
        noise_key, start_key, horizon_key = jax.random.split(key, 3)
        low, high = map(math.log, horizons)
        horizon = round(math.exp(low + float(jax.random.uniform(horizon_key)) * (high - low)))
        half = jax.random.normal(noise_key, (population // 2, mean.size))
        z = jnp.concatenate([half, -half])  # in mirrored pairs, which cancels much of the noise
        losses = meta_losses(mean + SIGMA * z, task.data, sample(task, start_key), horizon)  # all meet the same task
        ranks = jnp.argsort(jnp.argsort(losses)) / (population - 1) - 0.5  # only the order counts
        updates, optimizer_state = optimizer.update(ranks @ z / (population * SIGMA), optimizer_state)
        mean = optax.apply_updates(mean, updates)
        yield unravel(mean), losses


if __name__ == "__main__":
    folder = sys.argv[1] if len(sys.argv) == 2 else sys.exit(__doc__)
    task = make_task("digits", {})  # networks pretrained on UCI digits, to be fine-tuned on images of MNIST
    for generation, (theta, losses) in enumerate(meta_train(task)):
        print(f"{generation:3d}: mean meta-loss {losses.mean():.3f}, norm of θ {optax.tree.norm(theta):.1f}")
    l3rs.save(folder, theta, l3rs.Spec.create(task.params_shape()))  # l3rs.load(…) makes it an optax optimizer

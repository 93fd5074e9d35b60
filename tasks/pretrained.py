"""Init distributions: networks pretrained on another data set."""

from __future__ import annotations

import dataclasses
import logging
import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.base import Aux, Batch, Data, Params, Stats, TaskError, check_keys, size, uniform_batches
from tasks.data.cache import cached
from tasks.data.crop_flip import random_crop_flip
from tasks.models.functional import Model

_log = logging.getLogger(__name__)

Loss = Callable[[Params, Stats, Batch, bool], tuple[jax.Array, Aux]]
_Carry = tuple[Params, Stats, Any]  # with the optimizer's state


def pretrain(
    model: Model,
    loss: Loss,
    data: Data,
    seeds: Sequence[int],
    steps: Sequence[int],
    batch_size: int,
    start: tuple[Params, Stats] | None = None,
) -> tuple[Params, Stats]:
    """Train one network per seed with Adam (learning rate 1e-3) on inner_train of `data`.

    Args:
      model, loss: the network and its loss.
      data: the source data, of which only inner_train is used.
      seeds: one per network [N], for its initialization and batches.
      steps: training steps of each network [N].
      batch_size: examples per step.
      start: (params, stats) to start from, with a leading axis [N]; random initialization when not given.

    Returns:
      (params, stats), every array with a leading axis [N].
    """
    tx = optax.adam(1e-3)
    step = _training_step(loss, tx, uniform_batches(batch_size))

    def train(source: Data, seed: jax.Array, n_steps: jax.Array, given: Any) -> tuple[Params, Stats]:
        init_key, batch_key = jax.random.split(jax.random.key(seed))
        params, stats = model.init(init_key) if given is None else given
        carry = (params, stats, tx.init(params))
        params, stats, _ = jax.lax.fori_loop(0, n_steps, lambda i, carry: step(carry, source, batch_key, i), carry)
        return params, stats

    source = {"inner_train": data["inner_train"]}
    _log.info("pretraining %d networks for up to %d steps; they are kept", len(seeds), max(steps))
    return jax.jit(jax.vmap(train, (None, 0, 0, 0)))(source, jnp.asarray(seeds), jnp.asarray(steps), start)


def _training_step(
    loss: Loss, tx: optax.GradientTransformation, draw: Callable[[Data, jax.Array], Batch]
) -> Callable[[_Carry, Data, jax.Array, jax.Array], _Carry]:
    """A function (carry, data, key, i) -> the carry after step i."""

    def step(carry: _Carry, source: Data, key: jax.Array, i: jax.Array) -> _Carry:
        params, stats, state = carry
        batch = draw(source, jax.random.fold_in(key, i))
        grads, aux = jax.grad(loss, has_aux=True)(params, stats, batch, True)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), aux.stats, state

    return step


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How an init distribution is pretrained: for every seed, the network after each of the `epochs` is an init.

    Attributes:
      seeds: the number of networks for meta-training.
      held_out_seeds: the number of further networks, never used in meta-training.
      epochs: when a copy of the network is kept, increasing.
      batch_size: examples per step.
      learning_rate: Adam's, which decays to zero along a cosine.
    """

    seeds: int = 4
    held_out_seeds: int = 2
    epochs: tuple[int, ...] = (2,)
    batch_size: int = 32
    learning_rate: float = 2e-3

    @classmethod
    def parse(cls, options: Mapping[str, Any], where: str) -> Schedule:
        """Check the keys and values of a configuration."""
        known = [field.name for field in dataclasses.fields(cls)]
        check_keys(options, ["source", *known], where, "a pretraining option")
        epochs = tuple(options.get("epochs", cls.epochs))
        schedule = cls(**{**options, "epochs": epochs})
        if min(schedule.seeds, schedule.held_out_seeds, schedule.batch_size, len(epochs), *epochs) < 1:
            raise TaskError(f"{where}: seeds, held_out_seeds, batch_size and epochs must all be ≥ 1")
        if list(epochs) != sorted(set(epochs)):
            raise TaskError(f"{where}.epochs is {list(epochs)}; it must increase")
        return schedule


def pretrain_stepwise(model: Model, loss: Loss, data: Data, schedule: Schedule, padding: int) -> tuple[Params, Stats]:
    """Train networks on random crops of inner_train of `data`, one jitted step at a time, as suits convolutions.

    Args:
      model, loss: the network and its loss.
      data: the source images; inner_train for training, inner_valid for the accuracy in the log.
      schedule: seeds, epochs and the optimizer.
      padding: of the random crop, in pixels.

    Returns:
      (params, stats), every array with a leading axis [seeds · epochs], grouped by seed.
    """
    count = size(data["inner_train"])
    per_epoch = max(count // schedule.batch_size, 1)
    total = per_epoch * schedule.epochs[-1]
    tx = optax.adam(optax.cosine_decay_schedule(schedule.learning_rate, total))
    draw = uniform_batches(schedule.batch_size)

    def augmented(source: Data, key: jax.Array) -> Batch:
        draw_key, augment_key = jax.random.split(key)
        batch = draw(source, draw_key)
        return {**batch, "image": random_crop_flip(augment_key, batch["image"], padding)}

    step = jax.jit(_training_step(loss, tx, augmented), donate_argnums=0)
    accuracy = jax.jit(lambda params, stats, batch: loss(params, stats, batch, False)[1].accuracy)

    def train(seed: int, device: jax.Device) -> list[tuple[Params, Stats]]:
        source, valid = jax.device_put(({"inner_train": data["inner_train"]}, data["inner_valid"]), device)
        init_key, key = jax.device_put(jax.random.split(jax.random.key(seed)), device)
        params, stats = model.init(init_key)
        carry = (params, stats, tx.init(params))
        taken = []
        for epoch in range(1, schedule.epochs[-1] + 1):
            for i in range(per_epoch * (epoch - 1), per_epoch * epoch):
                carry = step(carry, source, key, np.int32(i))
            right = float(accuracy(carry[0], carry[1], valid))
            _log.info("pretraining, seed %d: epoch %d, accuracy %.3f on inner_valid", seed, epoch, right)
            if epoch in schedule.epochs:
                taken.append(jax.tree.map(np.asarray, carry[:2]))
        return taken

    devices = jax.local_devices()
    with ThreadPoolExecutor(len(devices)) as pool:
        free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
        for device in devices:
            free.put(device)

        def on_a_device(seed: int) -> list[tuple[Params, Stats]]:
            device = free.get()
            try:
                return train(seed, device)
            finally:
                free.put(device)

        networks = [n for seed in pool.map(on_a_device, range(schedule.seeds + schedule.held_out_seeds)) for n in seed]
    return jax.tree.map(lambda *arrays: np.stack(arrays), *networks)


def pretraining_model(options: Mapping[str, Any]) -> dict[str, Any]:
    """A model's options in pretraining: norm "frozen" is "batch" there, whose statistics the network then keeps."""
    frozen = options.get("norm") == "frozen"
    return {**options, "norm": "batch"} if frozen else dict(options)


def stacked_init(data: Data, i: jax.Array) -> tuple[Params, Stats]:
    """The i-th of the stacked inits in a task's data."""
    return jax.tree.map(lambda x: jnp.asarray(x)[i], data["inits"])


def cached_inits(
    key: Mapping[str, Any], shape: tuple[Params, Stats], build: Callable[[], tuple[Params, Stats]]
) -> tuple[Params, Stats]:
    """Stacked inits from the resident cache; `shape` gives the pytree's structure."""
    treedef = jax.tree.structure(shape)

    def arrays() -> dict[str, np.ndarray]:
        return {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(build()))}

    return jax.tree.unflatten(treedef, list(cached({"inits": dict(key)}, arrays).values()))

"""The optimizers to choose from, and one transformation that switches between them without recompiling."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.spec import L3RSError

Moments = Literal["keep", "reset"]


class Optimizer(NamedTuple):
    """An optimizer and the values of its hyper-parameters."""

    make: Callable[..., Any]  # hyper-parameters, by keyword and traced -> optax transformation
    hyperparameters: Mapping[str, Sequence[float]]  # e.g. {"learning_rate": (0.1, 0.01), "b1": (0.9, 0.5)}


Space = Mapping[str, Optimizer]


class Choice(NamedTuple):
    """The optimizer of one stage."""

    optimizer: str
    hyperparameters: dict[str, float]


_RATES = {"learning_rate": (0.1, 0.01, 0.001)}

# The paper's space, with PyTorch's defaults. Adagrad's ε is 1e-10 outside the root there, and its square inside here.
SPACE: Space = {
    "sgd": Optimizer(optax.sgd, _RATES),
    "sgdm": Optimizer(functools.partial(optax.sgd, momentum=0.9), _RATES),
    "adagrad": Optimizer(functools.partial(optax.adagrad, initial_accumulator_value=0.0, eps=1e-20), _RATES),
    "rmsprop": Optimizer(functools.partial(optax.rmsprop, decay=0.99, eps_in_sqrt=False), _RATES),
    "adam": Optimizer(optax.adam, _RATES),
}


def _with_decay(make: Callable[..., Any]) -> Callable[..., Any]:
    """An optimizer of gradients to which weight_decay · θ is added, as in PyTorch."""

    def build(*, weight_decay: Any, **rest: Any) -> optax.GradientTransformation:
        return optax.chain(optax.add_decayed_weights(weight_decay), make(**rest))

    return build


_DECAYS: Mapping[str, Sequence[float]] = {"weight_decay": (1e-2, 1e-3, 1e-4)}
_TENTHS = (0.5, 0.6, 0.7, 0.8, 0.9)
_FURTHER: Mapping[str, Mapping[str, Sequence[float]]] = {
    "sgd": _DECAYS,
    "sgdm": {"momentum": _TENTHS},
    "adagrad": _DECAYS,
    "rmsprop": {**_DECAYS, "decay": _TENTHS},  # the second is PyTorch's alpha
    "adam": _DECAYS,
}

# With all hyper-parameters that the paper adds for its Figure 11, and its values of them.
LARGER_SPACE: Space = {
    name: Optimizer(
        _with_decay(SPACE[name].make) if "weight_decay" in further else SPACE[name].make, {**_RATES, **further}
    )
    for name, further in _FURTHER.items()
}


def choices(space: Space) -> list[list[Choice]]:
    """For each optimizer, every combination of its hyper-parameters.

    Raises:
      L3RSError: there is no optimizer, or no value, or a value is not a finite number.
    """
    if not space:
        raise L3RSError("the space has no optimizer")
    for name, optimizer in space.items():
        for key, values in optimizer.hyperparameters.items():
            if not len(values) or not np.all(np.isfinite(np.asarray(values, np.float64))):
                raise L3RSError(f"{key} of {name} is {values}; it must be one or more finite numbers")
    return [
        [
            Choice(name, dict(zip(optimizer.hyperparameters, map(float, values), strict=True)))
            for values in itertools.product(*optimizer.hyperparameters.values())
        ]
        for name, optimizer in space.items()
    ]


def encode(space: Space, choice: Choice) -> dict[str, np.ndarray]:
    """A choice as the keyword arguments for the update of `interleave`.

    Returns:
      optimizer: int32 [], its index in the space. hyperparameters: float [k], its values in order,
      padded with zeros to the largest k in the space.

    Raises:
      L3RSError: the space has no such optimizer, or the optimizer has other hyper-parameters.
    """
    optimizer = space.get(choice.optimizer)
    if optimizer is None or list(optimizer.hyperparameters) != list(choice.hyperparameters):
        raise L3RSError(f"{choice} is not a choice of a space of {', '.join(space)}")
    values = np.zeros(_width(space), jnp.result_type(float))
    values[: len(choice.hyperparameters)] = list(choice.hyperparameters.values())
    return {"optimizer": np.asarray(list(space).index(choice.optimizer), np.int32), "hyperparameters": values}


def _width(space: Space) -> int:
    return max(len(optimizer.hyperparameters) for optimizer in space.values())


class InterleavedState(NamedTuple):
    """State of `interleave`, with the states of all its optimizers."""

    last: jax.Array  # int32 [], the optimizer of the last step; -1 before the first
    states: tuple[Any, ...]  # of each optimizer, in the order of the space


def interleave(space: Space, moments: Moments = "keep") -> optax.GradientTransformationExtraArgs:
    """All optimizers of a space as one transformation; each update takes the choice of the optimizer.

    The choice is traced, so that a new one compiles nothing.

    Args:
      space: the optimizers by name; the structure of a state must not depend on hyper-parameters.
      moments: the state with which an optimizer takes over from another one; the source leaves it
        open. "keep": its own last state, including the step count. "reset": a new one.

    Returns:
      A transformation; update(grads, state, params, *, optimizer, hyperparameters, **more), where
      `encode` gives the two, and `more`, e.g. value=loss, is passed to optimizers that use it. Updates
      have the dtypes of the params.

    Raises:
      L3RSError: the space or `moments` is not valid.

    Example:
      >>> import jax
      >>> from l3rs.baselines import iomt
      >>> tx = iomt.interleave(iomt.SPACE)
      >>> params = jax.numpy.ones(3)
      >>> state = tx.init(params)
      >>> choice = iomt.encode(iomt.SPACE, iomt.Choice("adam", {"learning_rate": 0.01}))
      >>> updates, state = tx.update(params, state, params, **choice)
      >>> int(state.last)
      4
    """
    if moments not in get_args(Moments):
        raise L3RSError(f"moments is {moments!r}; allowed are {', '.join(get_args(Moments))}")
    firsts = [of_one[0] for of_one in choices(space)]

    def made(i: int, values: Sequence[Any]) -> optax.GradientTransformationExtraArgs:
        optimizer = list(space.values())[i]
        return optax.with_extra_args_support(
            optimizer.make(**dict(zip(optimizer.hyperparameters, values, strict=False)))
        )

    def fresh(i: int, params: optax.Params) -> Any:
        return jax.tree.map(_strong, made(i, list(firsts[i].hyperparameters.values())).init(params))

    def init_fn(params: optax.Params) -> InterleavedState:
        return InterleavedState(jnp.full([], -1, jnp.int32), tuple(fresh(i, params) for i in range(len(space))))

    def update_fn(
        updates: optax.Updates,
        state: InterleavedState,
        params: optax.Params,
        *,
        optimizer: jax.Array,
        hyperparameters: jax.Array,
        **extra_args: Any,
    ) -> tuple[optax.Updates, InterleavedState]:
        def branch(i: int) -> Callable[[], tuple[optax.Updates, tuple[Any, ...]]]:
            def run() -> tuple[optax.Updates, tuple[Any, ...]]:
                old = state.states[i]
                if moments == "reset":
                    taken_over = state.last != optimizer
                    old = jax.tree.map(lambda new, kept: jnp.where(taken_over, new, kept), fresh(i, params), old)
                moved, new = made(i, list(hyperparameters)).update(updates, old, params, **extra_args)
                new = jax.tree.map(lambda x, like: _strong(x, like.dtype), new, old)
                moved = jax.tree.map(lambda u, p: _strong(u, jnp.result_type(p)), moved, params)
                return moved, (*state.states[:i], new, *state.states[i + 1 :])

            return run

        moved, states = jax.lax.switch(optimizer, [branch(i) for i in range(len(space))])
        return moved, InterleavedState(jnp.asarray(optimizer, jnp.int32), states)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _strong(x: Any, dtype: Any = None) -> jax.Array:
    """An array without a weak type, because the carry of a loop must not change its type."""
    return jnp.asarray(x, jnp.result_type(x) if dtype is None else dtype)

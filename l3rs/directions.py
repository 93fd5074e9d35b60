"""The base directions: what each base optimizer steps along, without its learning rate.

A direction d points uphill: descent is -d. All directions are computed in float32, in JAX by `l3rs.transforms` and in
PyTorch by `l3rs.torch.directions`. This module holds what both share: names, options and their defaults.
"""

from __future__ import annotations

from collections.abc import Sequence

from l3rs.spec import Direction, L3RSError

Options = dict[str, float | bool]

OPTIONS: dict[str, Options] = {
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0},  # m̂ / (√(v̂ + eps_root) + eps)
    "first_moment": {},  # m̂, the average of gradients that Adam keeps anyway: no moments of its own
    "sgd": {},  # the gradient
    "momentum": {"decay": 0.9, "nesterov": False},  # the heavy-ball trace of the gradients
    "lion": {"b1": 0.9, "b2": 0.99},  # the sign of Lion's interpolated momentum
    "rmsprop": {"decay": 0.9, "eps": 1e-8},  # the gradient over the root of its running mean square
    "weight_decay": {},  # the parameters themselves: a step along them shrinks the layer
}


def direction_options(direction: Direction) -> Options:
    """All options of a direction: those it states, and defaults for the rest.

    Raises:
      L3RSError: there is no such direction, or it has no such option.
    """
    if direction.name not in OPTIONS:
        raise L3RSError(f"unknown direction {direction.name!r}; allowed are {', '.join(OPTIONS)}")
    defaults = OPTIONS[direction.name]
    for option, value in direction.options:
        if type(value) not in (int, float, bool):
            raise L3RSError(f"direction {direction.name!r}: {option} is {value!r}; it must be a number")
        if option not in defaults:
            raise L3RSError(
                f"direction {direction.name!r} has no option {option!r}; allowed are {', '.join(defaults) or 'none'}"
            )
    return {**defaults, **dict(direction.options)}


def resolved_options(directions: Sequence[Direction]) -> list[tuple[str, Options]]:
    """(name, arguments) of every direction's base optimizer; first_moment has the b1 of the Adam that it reads.

    Raises:
      L3RSError: there is no such direction, or it has no such option.
    """
    found = [(direction.name, direction_options(direction)) for direction in directions]
    adam = next((options for name, options in found if name == "adam"), {})
    return [(name, {"b1": adam["b1"]} if name == "first_moment" else options) for name, options in found]

"""Networks by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from flax import nnx

from tasks.base import TaskError
from tasks.models.cnn import CNN
from tasks.models.functional import Model, functional
from tasks.models.mlp import MLP
from tasks.models.resnet import cifar_resnet, imagenet_resnet
from tasks.models.vit import vit

__all__ = ["MODELS", "Model", "make_model"]

_GIVEN = ("image_shape", "classes", "rngs")  # arguments that make_model passes itself


def _mlp(
    image_shape: Sequence[int],
    classes: int,
    *,
    hidden: Sequence[int] = (64, 64),
    norm: Literal["none", "layer"] = "none",
    rngs: nnx.Rngs,
) -> MLP:
    for width in hidden:
        _check_number("each of hidden", width, 1)
    if norm not in ("none", "layer"):
        raise TaskError(f"norm is {norm!r}; allowed are none, layer")
    return MLP(image_shape, hidden, classes, norm=norm, rngs=rngs)


def _cnn(image_shape: Sequence[int], classes: int, *, widths: Sequence[int] = (8, 16), rngs: nnx.Rngs) -> CNN:
    for width in widths:
        _check_number("each of widths", width, 1)
    return CNN(image_shape, widths, classes, rngs=rngs)


# name -> (image_shape, classes, *, options, rngs) -> module
MODELS: dict[str, Callable[..., nnx.Module]] = {
    "mlp": _mlp,
    "cnn": _cnn,
    **{f"resnet{depth}": functools.partial(cifar_resnet, depth) for depth in (8, 14, 20, 32, 56)},
    **{f"resnet{depth}": functools.partial(imagenet_resnet, depth) for depth in (18, 34, 50)},
    "vit_tiny": functools.partial(vit, dim=192, heads=3),
    "vit_small": functools.partial(vit, dim=384, heads=6),
}


def make_model(name: str, image_shape: Sequence[int], classes: int, **options: Any) -> Model:
    """Build a network.

    Args:
      name: a name of `MODELS`.
      image_shape: [H, W, C] of the images.
      classes: the number of logits.
      options: keyword arguments of its builder in `MODELS`.

    Raises:
      TaskError: an unknown model, an unknown option, or a value that the model rejects.
    """
    if name not in MODELS:
        raise TaskError(f"unknown model {name!r}; allowed are {', '.join(MODELS)}")
    builder = MODELS[name]
    defaults = {k: p.default for k, p in inspect.signature(builder).parameters.items() if k not in _GIVEN}
    for option in options:
        if option not in defaults:
            raise TaskError(f"{option} is not an option of model {name!r}; allowed are {', '.join(defaults)}")
    try:
        if len(image_shape) != 3:
            raise TaskError(f"image_shape is {tuple(image_shape)}; it must be (height, width, channels)")
        for key, value in {"classes": classes, **options}.items():
            _check_number(key, value, defaults.get(key, 1))
        return functional(lambda rngs: builder(image_shape, classes, **options, rngs=rngs))
    except TaskError as error:
        raise TaskError(f"model {name!r}: {error}") from None


def _check_number(key: str, value: Any, default: Any) -> None:
    """Check that an option whose default is a number is a positive number of the same type."""
    if not isinstance(default, int | float):
        return
    integer = isinstance(default, int)
    if isinstance(value, bool) or not isinstance(value, int if integer else int | float) or value <= 0:
        raise TaskError(f"{key} is {value!r}; it must be {'an integer' if integer else 'a number'} > 0")

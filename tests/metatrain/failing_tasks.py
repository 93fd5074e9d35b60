"""Tasks of a user's whose code fails in the middle of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tasks import Task
from tests.metatrain.quadratic import regression


def in_jax(part: str = "", after: int = 0) -> Task:
    """A task of which a part fails: `loss` for the rows of a whole split, `batch` when it has been drawn that often."""
    own, calls = regression(), []

    def loss(params: dict, stats: dict, batch: dict, train: bool) -> Any:
        if part == "loss" and len(batch["y"]) > 16:
            raise KeyError("label")  # loss
        return own.loss(params, stats, batch, train)

    def drawn(key: np.ndarray) -> np.ndarray:
        calls.append(key)
        if part == "batch" and len(calls) > after:
            raise RuntimeError("no more rows\nat all")  # batch
        return key

    def batch(data: Any, key: jax.Array) -> Any:
        bits = jax.random.key_data(key)
        checked = jax.pure_callback(drawn, jax.ShapeDtypeStruct(bits.shape, bits.dtype), bits, vmap_method="sequential")
        return own.batch(data, jax.random.wrap_key_data(checked))

    return dataclasses.replace(own, loss=loss, batch=batch)


def line(marker: str, file: str = __file__) -> str:
    """Name of this file and number of the line that ends with a comment, as messages show them."""
    with open(file) as source:
        [number] = [n for n, text in enumerate(source, 1) if text.endswith(f"  # {marker}\n")]
    return f"{file}:{number}"


def counted(function: Callable[..., Any], after: int, error: Exception, flag: str = "") -> Callable[..., Any]:
    """A function that fails when it has been called so often; if there is a file to flag that, in every process."""
    calls: list[int] = []

    def call(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > after and flag:
            Path(flag).touch()
        if len(calls) > after or (flag and Path(flag).exists()):
            raise error  # torch
        return function(*args)

    return call

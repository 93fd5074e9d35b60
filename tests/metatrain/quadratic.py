"""A task small enough that a whole meta-training run takes seconds: a linear model on made-up data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tasks import Aux, Task, uniform_batches


def regression(dimension: int = 4, poison: str = "", examples: int = 64, seconds: float = 0.0, hold: str = "") -> Task:
    """Least squares from a random start. `poison` fills a split with NaN; `seconds` slows a run down; while the file
    `hold` exists, a run stands still."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=dimension)

    def split(n: int) -> Mapping[str, np.ndarray]:
        x = rng.normal(size=(n, dimension)).astype(np.float32)
        return {"x": x, "y": (x @ truth).astype(np.float32)}

    data = {name: split(examples) for name in ("inner_train", "inner_valid", "outer_valid", "test")}
    if poison:
        data[poison] = {"x": data[poison]["x"], "y": np.full(examples, np.nan, np.float32)}

    def wait() -> None:
        time.sleep(seconds)
        if hold:
            with contextlib.suppress(FileNotFoundError), open(hold, "r+") as opened:  # which never makes it
                opened.write("standing still")
        while hold and Path(hold).exists():
            time.sleep(0.05)

    def init(data: object, i: jax.Array) -> tuple[dict, dict]:
        del data
        if seconds or hold:
            jax.debug.callback(wait)
        key = jax.random.key(i)
        return {"w": jax.random.normal(key, (dimension,)), "b": jnp.zeros(())}, {}

    def loss(params: dict, stats: dict, batch: dict, train: bool) -> tuple[jax.Array, Aux]:
        del train
        error = batch["x"] @ params["w"] + params["b"] - batch["y"]
        return jnp.mean(error**2), Aux(stats, jnp.mean(jnp.abs(error) < 0.1))

    pools = {"meta_train": range(8), "held_out": range(8, 12)}
    return Task("regression", data, init, uniform_batches(16), loss, pools)


def diverging() -> Task:
    """A task whose loss is never finite."""
    return regression(poison="outer_valid")

"""Helpers that the tests of metatrain share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

import l3rs
from metatrain.config import Config, check_config

REGRESSION = "tests.metatrain.quadratic:regression"
PATIENCE = 300.0  # seconds to wait for a process, on a machine that has other work


def small_config(**sections: Any) -> Config:
    """A run of seconds; sections are merged into it."""
    data: dict[str, Any] = {
        "name": "small",
        "task": {"name": REGRESSION},
        "optimizer": {"hidden": [4], "embedding_dim": 2},
        "outer": {"steps": 6, "population": 4, "horizon": {"min": 2, "max": 9}},
        "execution": {},
        "checkpoint": {"every": 1, "keep": 3},
        "logging": {"tensorboard": False},
    }
    for name, value in sections.items():
        data[name] = {**data.get(name, {}), **value} if isinstance(value, dict) else value
    return check_config(data)


def assert_same_theta(a: Path, b: Path) -> None:
    """Two deployed optimizers are equal bit for bit."""
    left, right = l3rs.restore(a)[0], l3rs.restore(b)[0]
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(x, y)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without those that depend on the clock or the process."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    varying = {"seconds", "candidate_steps_per_s", "workers", "compiled", "waited", "devices"}
    return [{key: value for key, value in line.items() if key not in varying} for line in lines]

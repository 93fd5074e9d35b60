"""Helpers of the integration tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

import l3rs

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("L3RS_SHARED") or ROOT.parent / "shared") / "data"


def random_theta(spec: l3rs.Spec, seed: int = 0, scale: float = 0.3) -> l3rs.spec.Theta:
    """Meta-parameters with which each layer gets a different step."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), spec))
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def untrained(params: Any, **fields: Any) -> tuple[l3rs.spec.Theta, l3rs.Spec]:
    """An untrained optimizer close to normalised Adam, which works on any task."""
    spec = l3rs.Spec.create(params, **fields)
    return jax.tree.map(np.asarray, jax.jit(l3rs.init_meta_params, static_argnums=1)(jax.random.key(0), spec)), spec


def assert_same(a: Any, b: Any) -> None:
    """Assert that two trees are equal bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, a, b)

"""The learned optimizer of a checkpoint, as an evaluation runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import l3rs
from metatrain.evaluation.records import NO_OPTIMIZER
from metatrain.inner.rollout import MakeOptimizer, learned


class LearnedOptimizer(NamedTuple):
    """Meta-parameters, their spec, and the guard that they run with."""

    theta: l3rs.spec.Theta
    spec: l3rs.Spec
    guard: bool | l3rs.Guard

    @property
    def make(self) -> MakeOptimizer:
        """(theta, horizon) -> the optimizer."""
        return learned(self.spec, self.guard)

    @property
    def rows(self) -> Any:
        """`theta` with a leading axis [1], as `Runner` takes hyper-parameters."""
        return jax.tree.map(lambda x: jnp.asarray(x)[None], self.theta)


def restore_optimizer(
    optimizer: str | Path, guard: bool | l3rs.Guard
) -> tuple[LearnedOptimizer | None, dict[str, Any]]:
    """The optimizer of a checkpoint, and the checkpoint's information; (None, {}) for "-".

    Raises:
      L3RSError: not a checkpoint.
    """
    if str(optimizer) == NO_OPTIMIZER:
        return None, {}
    theta, spec, info = l3rs.restore(optimizer)
    return LearnedOptimizer(theta, spec, guard), info

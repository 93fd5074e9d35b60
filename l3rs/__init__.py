"""L3RS: a learned optimizer for fine-tuning, as an ordinary optax transformation.

tx = l3rs.load("checkpoints/digits-mlp", total_steps=200)
updates, state = tx.update(grads, state, params, value=loss)
"""

import importlib
from typing import Any

from l3rs.checkpoint import info, load, match_layers, restore, save
from l3rs.guard import Guard, guard_report
from l3rs.layers import Match
from l3rs.network import init_meta_params
from l3rs.optimizer import L3RSState, learned_optimizer
from l3rs.places import available
from l3rs.spec import Direction, L3RSError, Layer, Spec


def __getattr__(name: str) -> Any:
    """`l3rs.torch` and `l3rs.baselines`, when they are asked for: `import l3rs` loads neither."""
    if name in ("torch", "baselines"):
        return importlib.import_module(f"l3rs.{name}")
    raise AttributeError(f"module 'l3rs' has no attribute {name!r}")


__all__ = [
    "Direction",
    "Guard",
    "L3RSError",
    "L3RSState",
    "Layer",
    "Match",
    "Spec",
    "available",
    "guard_report",
    "info",
    "init_meta_params",
    "learned_optimizer",
    "load",
    "match_layers",
    "restore",
    "save",
]

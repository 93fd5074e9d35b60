"""L3RS: a learned optimizer for fine-tuning, as an ordinary optax transformation.

tx = l3rs.load("checkpoints/digits-mlp", total_steps=200)
updates, state = tx.update(grads, state, params, value=loss)
"""

import importlib
from typing import TYPE_CHECKING, Any

from l3rs.extras import optax_face
from l3rs.io.checkpoint import info, load, match_layers, restore, save
from l3rs.io.locations import available
from l3rs.spec import Direction, L3RSError, Layer, Spec

if TYPE_CHECKING:
    from l3rs.guard import Guard
    from l3rs.init import init_meta_params
    from l3rs.layers import Match
    from l3rs.optimizer import L3RSState, guard_report, learned_optimizer

# Loaded when they are first used, so that `import l3rs` needs neither JAX nor PyTorch.
_MODULES = {
    "Guard": "guard",
    "L3RSState": "optimizer",
    "Match": "layers",
    "guard_report": "optimizer",
    "init_meta_params": "init",
    "learned_optimizer": "optimizer",
}


def __getattr__(name: str) -> Any:
    if name in ("torch", "baselines"):
        return importlib.import_module(f"l3rs.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("l3rs")
    if name in _MODULES:
        return optax_face(_MODULES[name], name)
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

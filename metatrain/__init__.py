"""Meta-training and evaluation of learned optimizers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metatrain.config import Config, UserError, load_config
    from metatrain.evaluation.comparison import evaluate
    from metatrain.evaluation.records import Results
    from metatrain.outer.export import export
    from metatrain.outer.loop import Run, resume, run

_MODULES = {
    "metatrain.config": ("Config", "UserError", "load_config"),
    "metatrain.evaluation.comparison": ("evaluate",),
    "metatrain.evaluation.records": ("Results",),
    "metatrain.outer.export": ("export",),
    "metatrain.outer.loop": ("Run", "resume", "run"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: the command line must start fast."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'metatrain' has no attribute {name!r}")


__all__ = ["Config", "Results", "Run", "UserError", "evaluate", "export", "load_config", "resume", "run"]

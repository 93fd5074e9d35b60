"""Parts of the package that need an extra: imported when they are used, with one sentence where it is missing."""

from __future__ import annotations

import importlib
from typing import Any


def pip_install(extra: str) -> str:
    """The command that installs an extra of this project, for error messages."""
    return f"pip install 'l3rs[{extra}]' ('.[{extra}]' in a checkout)"


def optax_face(module: str, name: str) -> Any:
    """`l3rs.MODULE.NAME`, for which JAX and optax must be installed.

    Raises:
      ImportError: one of them is not.
    """
    try:
        return getattr(importlib.import_module(f"l3rs.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("jax", "jaxlib", "optax"):
            raise
        raise ImportError(f"l3rs.{name} needs {error.name}: {pip_install('jax')}", name=error.name) from None

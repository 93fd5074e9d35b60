"""Packages that only parts of IOMT need, and that l3rs does not install."""

from __future__ import annotations

import importlib.util

from l3rs.spec import L3RSError


def require(module: str, package: str, purpose: str) -> None:
    """Say what is missing, for what, and how to get it; now, rather than in the middle of a run.

    Raises:
      L3RSError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise L3RSError(f"{purpose} needs {package}: pip install {package}")

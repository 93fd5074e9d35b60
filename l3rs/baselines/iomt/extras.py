"""Packages that only parts of IOMT need and l3rs does not install."""

from __future__ import annotations

import importlib.util

from l3rs.spec import L3RSError


def require(module: str, package: str, purpose: str) -> None:
    """Check that a module is installed, so that a run does not fail halfway.

    Raises:
      L3RSError: the module is not installed.
    """
    if importlib.util.find_spec(module) is None:
        raise L3RSError(f"{purpose} needs {package}: pip install {package}")

"""Float64 in JAX, for a part of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def x64(enabled: bool = True) -> Iterator[None]:
    """Turn float64 on or off; `jax.enable_x64` does the same, but older versions of JAX lack it."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", enabled)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)

"""JAX's modes, which a user sets for a program of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Promote ranks and dtypes as usual, whatever modes are set: as the code within means it. A decorator, too."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield

"""Fixtures of the tests of the optax transformation."""

import jax
import pytest

from tests.l3rs.optimizer.common import (
    SHAPES,
    make,
    normal,
)


@pytest.fixture(scope="module")
def adam_sgd():
    """(params, tx, jitted update) of the default directions, compiled once for this module."""
    params = normal(SHAPES, 0)
    tx = make(params)
    return params, tx, jax.jit(tx.update)

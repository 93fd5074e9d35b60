"""Fixtures shared by all tests, and the devices they run on."""

from __future__ import annotations

import os
import tempfile

import jax
import pytest

from metatrain.devices import use_cores

use_cores()
# The same small programs are compiled in many tests.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="l3rs-tests-"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to a network


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One resident cache for the session: pretraining is done once, and the user's cache is left alone."""
    os.environ.setdefault("L3RS_CACHE", str(tmp_path_factory.mktemp("cache")))

"""Fixtures shared by all tests, and the devices they run on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import jax
import pytest
from xdist.scheduler import LoadScopeScheduling

from metatrain.inner.devices import use_cores
from metatrain.system import usable_cpus

use_cores()
# The same small programs are compiled in many tests, in processes that they start, and when the tests run again.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
os.environ["HF_HUB_OFFLINE"] = "1"  # no test goes to a network
# Where a shell starts the tests in the background they ignore Ctrl-C, and so would the commands that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


_CLUSTERS = (
    "test_accelerators.py",
    "test_chaos.py",
    "test_cluster.py",
    "test_doctor.py",
    "test_failing_tasks.py",
    "test_hangs.py",
    "test_jobs.py",
    "test_many_workers.py",
    "test_monitoring.py",
    "test_retry.py",
    "test_torch_cluster.py",
)
_LONG = (
    *_CLUSTERS,
    "test_cli.py",
    "test_evaluate.py",
    "test_evaluate_baselines.py",
    "test_images_task.py",
    "test_blocks.py",
    "test_plan.py",
    "test_parity.py",
    "test_battery.py",
)


def pytest_xdist_auto_num_workers() -> int:
    """One process more than there are cores: a tenth of the time, tests wait for processes that they have started."""
    return usable_cpus() + 1


class _ByFile(LoadScopeScheduling):
    """With several processes a file's tests stay together, for their fixtures; so do all tests that start clusters,
    because some kill every worker on the machine."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "clusters" if Path(file).name in _CLUSTERS else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, or one process would end long after the others."""
    first = {name: i for i, name in enumerate(_LONG)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One resident cache for all processes: pretraining is done once, and the user's cache is left alone."""
    own = tmp_path_factory.getbasetemp()
    os.environ.setdefault("L3RS_CACHE", str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "cache"))

"""The loops of driver and aggregators in isolation: without arrays to send, and with shards of one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

from metatrain.config import ExecutionConfig
from metatrain.ray.aggregator import Sent
from metatrain.ray.fleet import Fleet
from metatrain.ray.groups import Groups
from metatrain.ray.health import Health
from metatrain.ray.pool import Pool


class Package(Sent):
    def send_all(self) -> None:
        """Nothing is sent."""


def pool(worker: Any, workers: int, chunk: int) -> Pool:
    """A driver's `workers` workers of the class `worker`, with `chunk` members in a call."""
    health = Health()
    execution = ExecutionConfig(backend="ray", workers=workers)
    return Pool(Fleet(worker, Package(None, {}), execution, chunk, health, print), health, print)


def groups(worker: Any, workers: int, chunk: int, log: Callable[[str], None] = print) -> Groups:
    """As `pool`, with the workers behind aggregators."""
    execution = ExecutionConfig(backend="ray", workers=workers)
    return Groups(worker, Package(None, {}), execution, chunk, lambda: workers, log)


def shards_of_one_call() -> Any:
    """A context manager under which every shard of a pool is one call."""
    return mock.patch(
        "metatrain.ray.pool.cut_shards", lambda seconds, *_: [range(i, i + 1) for i in range(len(seconds))]
    )

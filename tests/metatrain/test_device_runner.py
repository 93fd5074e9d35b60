"""Chunks on several devices: every device is used, and results do not depend on which one computes them."""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import Any

import jax
import numpy as np
import pytest

import l3rs
from metatrain.inner.device_runner import DeviceRunner
from metatrain.inner.devices import device_kind
from metatrain.inner.population import host_arguments
from metatrain.ray.share import Share
from metatrain.ray.worker import Job, Worker, versions
from tasks import Task
from tests.metatrain.common import small_config
from tests.metatrain.quadratic import regression
from tests.metatrain.test_population import evaluator, generation

_DEVICES = jax.devices()


class Call:
    """Stands in for `candidate_losses`: the factor of its draw times the member's number.

    A call ends once every device computes one.

    Attributes:
      members: of the calls that each device made.
    """

    def __init__(self, devices: int, fits: int = 100) -> None:
        self.members: dict[jax.Device, list[list[int]]] = {}
        self._fits, self._lock, self._all = fits, threading.Lock(), threading.Barrier(devices, timeout=60)

    def __call__(self, factor: jax.Array, data: Any, members: jax.Array) -> np.ndarray:
        [device] = members.devices()
        assert {device} == factor.devices() == jax.tree.leaves(data)[0].devices()
        with self._lock:
            self.members.setdefault(device, []).append(np.asarray(members).tolist())
        if len(members) > self._fits:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        self._all.wait()
        return np.asarray(factor) * np.asarray(members)


def run(call: Call, chunk: int, devices: int) -> tuple[np.ndarray, int]:
    """Twelve members in two draws."""
    runner = DeviceRunner([regression()], [call], _DEVICES[:devices])
    chunks = [(draw, np.arange(i, i + chunk, dtype=np.int32)) for draw in (1, 0) for i in range(0, 12, chunk)]
    try:
        runner.begin([(0, (np.float32(1.0),)), (0, (np.float32(10.0),))])
        losses, chunk = runner.run(chunks, chunk)
    finally:
        runner.close()
    return np.concatenate(losses), chunk


def test_every_device_computes_chunks_and_answers_keep_their_order() -> None:
    assert len(_DEVICES) >= 2
    expected = np.concatenate([10.0 * np.arange(12), np.arange(12)]).astype(np.float32)
    for devices in (1, 2):
        call = Call(devices)
        losses, chunk = run(call, 2, devices)
        np.testing.assert_array_equal(losses, expected)
        assert chunk == 2
        assert set(call.members) == set(_DEVICES[:devices])
        assert all(len(own) == 12 // devices for own in call.members.values())


def test_calls_that_do_not_fit_are_halved_on_every_device() -> None:
    call = Call(1, fits=2)
    losses, chunk = run(call, 4, 2)
    np.testing.assert_array_equal(losses, np.concatenate([10.0 * np.arange(12), np.arange(12)]))
    assert chunk == 2
    tried = [members for own in call.members.values() for members in own if len(members) > 2]
    assert 1 <= len(tried) <= 2  # a device that does not know of it yet may also try


def test_an_error_ends_the_work_of_all_devices() -> None:
    started: list[int] = []

    def call(_: jax.Array, __: Any, members: jax.Array) -> np.ndarray:
        started.append(int(members[0]))
        if len(started) == 1:
            raise ZeroDivisionError
        time.sleep(0.05)
        return np.zeros(len(members), np.float32)

    runner = DeviceRunner([regression()], [call], _DEVICES[:2])
    runner.begin([(0, (np.float32(1.0),))])
    with pytest.raises(ZeroDivisionError):
        runner.run([(0, np.array([i], np.int32)) for i in range(50)], 1)
    runner.close()
    assert len(started) < 10


def test_a_worker_with_two_devices_answers_as_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: the test hands the worker what Ray would send."""
    import ray
    from ray import cloudpickle

    monkeypatch.setattr("metatrain.ray.worker.take_share", lambda _: None)
    monkeypatch.setattr(ray, "get", lambda value: value)
    local, state = evaluator(_DEVICES[:1])
    spec, task = generation(), regression()
    losses = local.evaluate(state, spec)
    local.close()

    form = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
    arrays, treedef = jax.tree.flatten(task.data)
    numbers = jax.tree.unflatten(treedef, range(len(arrays)))
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(Task)}
    outer = small_config(outer={"population": 8}).outer
    job = Job([{**fields, "data": numbers}], [None] * len(arrays), form, outer, "fused", versions("fused"))
    worker = Worker(Share(2))
    assert worker.setup(cloudpickle.dumps(job), {}) == list(range(len(arrays)))
    assert worker.setup(cloudpickle.dumps(job), dict(enumerate(map(np.asarray, arrays)))) == []
    assert worker._runner.devices == tuple(_DEVICES)
    shared = [host_arguments(state, spec)]
    answer = worker.evaluate(7, shared, 3, 0, np.arange(8, dtype=np.int32), 2)
    assert (answer.round, answer.shard, answer.chunk, answer.device) == (7, 3, 2, device_kind())
    np.testing.assert_array_equal(answer.fitness, losses[0])

"""What Ray costs: one worker against this process, two workers against two plain processes side by side.

First a task whose candidates take 20 ms of waiting each, so that the clock sees nothing but the
overhead; then ResNet-8, stepwise: what bounds it is what two plain processes reach at the same time
on the same cores, each with its half of the population.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

import l3rs
from metatrain.config import ExecutionConfig, OuterConfig, Plan
from metatrain.inner.devices import use_cores
from metatrain.inner.population import Draw, Evaluator, GenerationSpec, LocalEvaluator
from metatrain.outer.strategy import make_strategy
from metatrain.ray.evaluator import RayEvaluator
from metatrain.ray.fleet import Member
from metatrain.ray.pool import Pool
from tasks import Task, sample
from tests.benchmarks.stepwise import resnet8
from tests.benchmarks.timing import in_turn, ratio
from tests.metatrain.loops import shards_of_one_call
from tests.metatrain.quadratic import regression

POPULATION, HORIZON, ROUNDS = 8, 12, 7
WAITING = 64  # candidates of the task that waits


def _parts(task: Task, population: int) -> tuple[l3rs.Spec, OuterConfig, Any, Any]:
    spec = l3rs.Spec.create(task.params_shape())
    outer = OuterConfig(population=population)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    strategy = make_strategy(outer, theta)
    return spec, outer, strategy, strategy.init(jax.random.key(0), theta)


def _generation(task: Task, horizon: int) -> GenerationSpec:
    key = jax.random.key(0)
    return GenerationSpec(0, jax.random.key_data(key), (Draw(sample(task, key), horizon),))


def _local(task: Task, population: int, plan: Plan) -> tuple[Evaluator, Any]:
    spec, _, strategy, state = _parts(task, population)
    with mock.patch("jax.local_devices", return_value=jax.local_devices()[:1]):
        return LocalEvaluator([task], spec, strategy, population, 1, plan), state


def _remote(task: Task, population: int, plan: Plan, workers: int) -> tuple[RayEvaluator, Any]:
    spec, outer, _, state = _parts(task, population)
    execution = ExecutionConfig(backend="ray", workers=workers)
    return RayEvaluator([task], spec, outer, 1, plan, execution, print), state


def _overhead() -> None:
    calls: dict[str, Callable[[], object]] = {}
    for seconds, name in ((0.02, "20 ms"), (0.0, "0 ms")):
        task = regression(seconds=seconds)
        spec = _generation(task, 1)
        local, state = _local(task, WAITING, "fused")
        remote, _ = _remote(task, WAITING, "fused", 1)
        calls[f"here, {name}"] = lambda local=local, state=state, spec=spec: local.evaluate(state, spec)
        calls[f"worker, {name}"] = lambda remote=remote, state=state, spec=spec: remote.evaluate(state, spec)
    seconds_of = in_turn(calls, ROUNDS)
    per = {name: 1e3 * np.median(s) / WAITING for name, s in seconds_of.items()}
    print("ms a candidate: " + ", ".join(f"{name} {ms:.2f}" for name, ms in per.items()))
    found = ratio(seconds_of, "here, 20 ms", "worker, 20 ms")
    print(f"rate of one worker / rate of this process, 20 ms a candidate: {found}  (wanted: ≥ 0.95)")
    _constants(remote, state, spec)


def _constants(remote: RayEvaluator, state: Any, spec: GenerationSpec) -> None:
    """Measure what tests/metatrain/simulation.py assumes. Every shard is one candidate."""
    with shards_of_one_call():
        began = time.process_time()
        for _ in range(5):
            remote.evaluate(state, spec)
        driver = (time.process_time() - began) / 5 / WAITING
    for member in _members(remote):
        remote._ray.kill(member.actor)
    began_again = time.perf_counter()
    remote.evaluate(state, spec)
    recovery = time.perf_counter() - began_again
    print(f"driver's own work: {1e3 * driver:.2f} ms a shard; a lost worker is replaced after {recovery:.1f} s")


def _members(remote: RayEvaluator) -> list[Member]:
    assert isinstance(remote._workers, Pool)
    return list(remote._workers._fleet.members)


def _scaling() -> None:
    task = resnet8()
    spec = _generation(task, HORIZON)
    plain = [_Plain() for _ in range(2)]

    def side_by_side() -> None:
        for process in plain:
            process.go()
        for process in plain:
            process.wait()

    remote, state = _remote(task, POPULATION, "stepwise", 2)
    calls = {"processes": side_by_side, "workers": lambda: remote.evaluate(state, spec)}
    seconds = in_turn(calls, ROUNDS)
    for process in plain:
        process.end()
    rates = ", ".join(f"{name} {POPULATION * HORIZON / np.median(s):.1f}" for name, s in seconds.items())
    print(f"candidate-steps/s of ResNet-8, two {rates}")
    print(
        f"rate of two workers / rate of two plain processes: {ratio(seconds, 'processes', 'workers')}  (wanted: ≥ 0.95)"
    )
    pool = remote._workers
    assert isinstance(pool, Pool)
    shares = sorted(pool._health.answers(member) for member in _members(remote))
    print(f"shards evaluated by each worker: {shares}; started twice: {remote.report()['duplicated']}")
    remote.close()


class _Plain:
    """A process that evaluates half of the population on request."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.cluster", "half"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.wait()

    def go(self) -> None:
        assert self._process.stdin
        print("go", file=self._process.stdin, flush=True)

    def wait(self) -> None:
        assert self._process.stdout
        while self._process.stdout.readline() != "done\n":
            assert self._process.poll() is None

    def end(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def _half() -> None:
    use_cores(1)
    task = resnet8()
    local, state = _local(task, POPULATION // 2, "stepwise")
    spec = _generation(task, HORIZON)
    local.evaluate(state, spec)
    print("done", flush=True)
    for _ in sys.stdin:
        local.evaluate(state, spec)
        print("done", flush=True)


def main() -> None:
    use_cores(1)
    _overhead()
    time.sleep(1)
    _scaling()


if __name__ == "__main__":
    _half() if sys.argv[1:] == ["half"] else main()

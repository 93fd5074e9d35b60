"""The Evaluator on Ray: real Ray, real processes, killed for real."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import psutil
import pytest

import l3rs
from metatrain.config import Config, UserError, load_config
from metatrain.inner.population import LocalEvaluator
from metatrain.outer.loop import run
from metatrain.outer.strategy import make_strategy
from metatrain.ray.evaluator import RayEvaluator
from metatrain.ray.fleet import Fleet, Member
from metatrain.ray.health import Health
from metatrain.ray.pool import Pool
from metatrain.ray.worker import Answer, Job, Worker, versions
from tasks import make_task
from tests.metatrain.common import PATIENCE, REGRESSION, assert_same_theta, metrics, small_config
from tests.metatrain.nodes import local_ray, worker_processes
from tests.metatrain.test_population import generation
from tests.metatrain.test_trainer import count_lines

ROOT = Path(__file__).parents[2]
_OUTER = {"steps": 6, "population": 16, "samples": 2}
_TASK = {"name": REGRESSION, "variants": [{}, {"examples": 48}]}  # a sample is of one of the two


def ray_config(workers: int | str = 2, task: dict | None = None, **execution: object) -> Config:
    return small_config(
        task={**_TASK, **(task or {})},
        outer=_OUTER,
        execution={"backend": "ray", "workers": workers, "members_per_call": 2, **execution},
    )


def evaluator(config: Config, log: Callable[[str], None] = print) -> tuple[RayEvaluator, LocalEvaluator, object]:
    """The Ray evaluator and the local one of a configuration, and a state of the strategy."""
    task = make_task(*config.task.form())
    spec = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    strategy = make_strategy(config.outer, theta)
    with mock.patch("jax.local_devices", return_value=jax.devices()[:1]):
        local = LocalEvaluator([task], spec, strategy, config.outer.population, 2, "fused")
    remote = RayEvaluator([task], spec, config.outer, 2, "fused", config.execution, log)
    return remote, local, strategy.init(jax.random.key(0), theta)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One Ray for the module."""
    with local_ray(num_cpus=4):
        yield


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generations of two samples in this process."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run(small_config(task=_TASK, outer=_OUTER, execution={"members_per_call": 2, "plan": "fused"}), folder)
    return folder


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_gives_the_bits_of_one_process(workers: int, quiet: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(ray_config(workers), folder)
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    for one, two in zip(metrics(folder), metrics(quiet), strict=True):
        assert one["meta_loss_mean"] == two["meta_loss_mean"]


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_recipe_gives_the_same_bits_everywhere_with_nothing_set(tmp_path: Path) -> None:
    here = ["outer.steps=8", "outer.population=8", "logging.tensorboard=false"]
    run(load_config(ROOT / "configs" / "digits.yaml", here), tmp_path / "local")
    for workers in (1, 2):
        there = [*here, "execution.backend=ray", f"execution.workers={workers}"]
        run(load_config(ROOT / "configs" / "digits.yaml", there), tmp_path / f"ray-{workers}")
        assert_same_theta(tmp_path / f"ray-{workers}" / "optimizer", tmp_path / "local" / "optimizer")


class ShuffledWorker(Worker):
    """Answers after a random delay."""

    def evaluate(self, *arguments: object) -> Answer:
        time.sleep(0.2 * np.random.default_rng().random())
        return super().evaluate(*arguments)  # type: ignore[arg-type]


class HalfAwakeWorker(Worker):
    """Takes much longer for every third answer."""

    calls = 0

    def evaluate(self, *arguments: object) -> Answer:
        HalfAwakeWorker.calls += 1
        time.sleep(1.0 if HalfAwakeWorker.calls % 3 == 0 else 0.05)
        return super().evaluate(*arguments)  # type: ignore[arg-type]


class GarblingWorker(Worker):
    """Gives a wrong answer every fifth time, each wrong in another way."""

    calls = 0

    def evaluate(self, *arguments: object) -> Answer:
        answer = super().evaluate(*arguments)  # type: ignore[arg-type]
        GarblingWorker.calls += 1
        garbled = (
            answer._replace(fitness=np.zeros(7, np.float32)),
            answer._replace(round=answer.round + 1),
            answer._replace(fitness=answer.fitness.astype(np.float64)),
            "nonsense",
        )
        return answer if GarblingWorker.calls % 5 else garbled[GarblingWorker.calls // 5 % 4]  # type: ignore[return-value]


class FailingWorker(Worker):
    def evaluate(self, *_: object) -> Answer:
        raise ZeroDivisionError("the task divides by zero")


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("kind", [ShuffledWorker, HalfAwakeWorker, GarblingWorker])
def test_order_duplicates_and_garbage_change_no_bit(
    kind: type[Worker], quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", kind)
    folder = tmp_path / "run"
    run(ray_config(2), folder)
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    if kind is HalfAwakeWorker:
        assert last["duplicated"] > 0
    if kind is GarblingWorker:
        assert last["rejected"] > 3
        said = capsys.readouterr().out
        assert "a worker's answer is dropped: it contains float64(2,), not float32(2,)" in said
        assert "a worker is lost (too many unusable answers)" in said


def answers(remote: RayEvaluator) -> list[int]:
    """How often each worker has answered."""
    workers = remote._workers
    assert isinstance(workers, Pool)
    return [workers._health.answers(member) for member in workers._fleet.members]


def at_work(remote: RayEvaluator, state: object, workers: int) -> list[psutil.Process]:
    """The processes of `workers` workers, once each has answered: some start while others already compute, and those of
    an earlier test may still be stopping."""
    deadline = time.monotonic() + PATIENCE
    while True:
        remote.evaluate(state, generation(0))
        found = worker_processes()
        if len(found) == workers == sum(n > 0 for n in answers(remote)):
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {workers} workers"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_stopped_worker_is_overtaken_and_a_killed_one_replaced() -> None:
    said: list[str] = []
    remote, local, state = evaluator(ray_config(2, task={"seconds": 0.1}), said.append)
    try:
        expected = {n: local.evaluate(state, generation(n)) for n in range(4)}
        np.testing.assert_array_equal(remote.evaluate(state, generation(0)), expected[0])
        stopped, _ = at_work(remote, state, 2)
        stopped.suspend()
        np.testing.assert_array_equal(remote.evaluate(state, generation(1)), expected[1])
        assert remote.report()["duplicated"] >= 1
        assert not any("no answer for" in sentence for sentence in said)  # nobody waited until it counted as hung
        np.testing.assert_array_equal(remote.evaluate(state, generation(2)), expected[2])
        stopped.resume()
        killed = next(process for process in worker_processes() if process.pid != stopped.pid)
        threading.Timer(0.3, lambda: os.kill(killed.pid, signal.SIGKILL)).start()
        np.testing.assert_array_equal(remote.evaluate(state, generation(3)), expected[3])
        assert remote.report()["lost"] == 1
        assert any("a worker is lost" in sentence for sentence in said)
    finally:
        remote.close()
        local.close()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_a_worker_that_hangs_for_ever_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatrain.ray.health.HANG_SECONDS", 2.0)
    monkeypatch.setattr("metatrain.ray.health.HANG_FACTOR", 1.0)
    said: list[str] = []
    remote, local, state = evaluator(ray_config(1), said.append)
    try:
        [only] = at_work(remote, state, 1)
        only.suspend()
        np.testing.assert_array_equal(remote.evaluate(state, generation(1)), local.evaluate(state, generation(1)))
        assert any("no answer for" in sentence for sentence in said)
        deadline = time.monotonic() + 30
        while only.is_running() and only.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "the hung process is still there"
            time.sleep(0.2)
    finally:
        remote.close()
        local.close()


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_aggregators_give_the_bits_of_one_process_though_one_of_them_is_killed(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metatrain.ray.groups.MANY_WORKERS", 5)
    monkeypatch.setattr("metatrain.ray.groups.GROUP_WORKERS", 3)
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", ShuffledWorker)  # slow enough to be hit
    folder, killed = tmp_path / "run", threading.Event()

    def kill() -> None:
        while not killed.is_set():
            victims = worker_processes("Aggregator")
            if count_lines(folder) >= 2 and victims:
                os.kill(victims[0].pid, signal.SIGKILL)
                killed.set()
            time.sleep(0.05)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(ray_config(6, resources_per_worker={"CPU": 0.2}), folder)
    assert killed.is_set()
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    assert "an aggregator is lost with" in capsys.readouterr().out
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["lost"] >= 1


@pytest.mark.usefixtures("cluster")
def test_a_machine_with_other_versions_stops_no_run_in_progress() -> None:
    """It has other versions: before any worker is ready this stops the run, afterwards only that machine is refused."""
    said: list[str] = []
    health = Health()
    fleet = Fleet(Worker, mock.Mock(), ray_config(1).execution, 2, health, said.append)
    with pytest.raises(UserError, match="host7 has jax 0"):
        fleet.welcome(Member(None, 2), "host7 has jax 0", 0.0)
    fleet.welcome(Member(None, 2), [], 1.0)
    fleet.welcome(Member(None, 2), "host7 has jax 0", 2.0)
    assert said == ["a worker is not used: host7 has jax 0"]
    assert (len(fleet.members), fleet.lost) == (1, 1)
    assert not health.may_recruit(3.0)


@pytest.mark.usefixtures("cluster")
def test_every_worker_does_its_share() -> None:
    remote, local, state = evaluator(ray_config(2, task={"seconds": 0.05}))
    try:
        np.testing.assert_array_equal(remote.evaluate(state, generation(0)), local.evaluate(state, generation(0)))
        at_work(remote, state, 2)
        before = answers(remote)
        remote.evaluate(state, generation(1))
        answered = [now - then for now, then in zip(answers(remote), before, strict=True)]
        assert min(answered) >= 1, "one worker did it all"
    finally:
        remote.close()
        local.close()


def test_what_is_sent_in_a_generation_does_not_grow_with_the_model() -> None:
    """The strategy's state knows layers, not parameters; a shard's call is a reference and member numbers."""

    def sent(dimension: int) -> int:
        task = make_task(REGRESSION, {"dimension": dimension})
        spec = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
        theta = l3rs.init_meta_params(jax.random.key(0), spec)
        state = make_strategy(ray_config().outer, theta).init(jax.random.key(0), theta)
        return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves((state, generation()[1:])))

    assert sent(4) == sent(40_000) < 10_000


@pytest.mark.usefixtures("cluster")
def test_errors_of_a_task_and_what_no_node_has_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"resources_per_worker is CPU 1, GPU 1; no node has that.*CPU 4, GPU 0"):
        run(ray_config(resources_per_worker={"CPU": 1.0, "GPU": 1.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a run that never began is in the way of the next try"
    monkeypatch.setattr("metatrain.ray.evaluator.Worker", FailingWorker)
    remote, _, state = evaluator(ray_config(1))
    with pytest.raises(UserError, match="candidates fail on the workers: ZeroDivisionError: the task divides by zero"):
        remote.evaluate(state, generation(0))
    remote.close()


def test_a_worker_with_other_versions_or_without_the_tasks_code_says_so() -> None:
    from ray import cloudpickle

    def setup(blob: bytes) -> list[int] | str:
        return object.__new__(Worker).setup(blob, {})

    config = ray_config()
    spec = l3rs.Spec.create(make_task(REGRESSION, {}).params_shape())
    job = Job([], [], spec, config.outer, "fused", {**versions("fused"), "jax": "0.0.1"})
    assert "(driver: 0.0.1); all machines need the same versions" in str(setup(cloudpickle.dumps(job)))
    missing = cloudpickle.dumps(job).replace(b"metatrain.ray.worker", b"metatrain.ray.workeX")
    assert "the task's code cannot be imported on" in str(setup(missing))


def test_data_comes_from_the_machines_cache_when_it_has_the_same_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tasks.data.cache import cached, find_resident, resident

    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "here"))
    arrays = cached({"test": "resident"}, lambda: {"a/b": np.arange(5), "c": np.zeros((2, 3))})
    where = resident(arrays["a/b"])
    assert where is not None
    found = find_resident(where)
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, np.arange(5))
    assert resident(arrays["a/b"][:3]) is None  # a part of an array is sent
    assert resident(np.arange(5)) is None
    assert find_resident(where._replace(key="another")) is None
    assert find_resident(where._replace(entry="nowhere")) is None
    # Pretrained on another machine: the same key and sizes, not the same numbers.
    monkeypatch.setenv("L3RS_CACHE", str(tmp_path / "elsewhere"))
    cached({"test": "resident"}, lambda: {"a/b": np.arange(5) + 1, "c": np.zeros((2, 3))})
    assert find_resident(where) is None

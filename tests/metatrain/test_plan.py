"""The two execution plans: equal results, chosen by measurement."""

from __future__ import annotations

import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from metatrain.config import Plan, UserError, load_config
from metatrain.inner.plan import (
    candidates_at_once,
    choose_plan,
    members_per_call,
    members_that_fit,
    plan_seconds,
    scratch_bytes,
    time_steps,
)
from metatrain.inner.rollout import fused_rollout, stepwise_rollout
from metatrain.outer.loop import resume, run
from metatrain.outer.setup import Setup, is_elsewhere, memory_is_limited
from metatrain.outer.strategy import make_strategy
from tasks import Task, make_task, sample
from tests.metatrain.common import metrics, small_config
from tests.metatrain.quadratic import regression
from tests.metatrain.test_population import evaluator, generation


@pytest.fixture(scope="module")
def convolutional() -> Task:
    """A small ResNet with batch norm on made-up images: model state, convolutions, several chunks of a split."""
    from tasks.base import uniform_batches
    from tasks.classification import classification_loss
    from tasks.models import make_model

    rng = np.random.default_rng(0)

    def split(n: int) -> dict[str, np.ndarray]:
        images = rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
        return {"image": images, "label": rng.integers(0, 4, n).astype(np.int32)}

    model = make_model("resnet8", (8, 8, 3), 4, width=8, norm="batch")
    data = {"inner_train": split(64), "inner_valid": split(300), "outer_valid": split(32), "test": split(32)}
    pools = {"meta_train": range(8), "held_out": range(8, 16)}
    return Task(
        "convolutional",
        data,
        lambda _, i: model.init(jax.random.key(i)),
        uniform_batches(16),
        classification_loss(model),
        pools,
    )


@pytest.mark.parametrize("name", ["regression", pytest.param("convolutional", marks=pytest.mark.slow)])
def test_both_plans_agree_over_twenty_steps(name: str, convolutional: Task) -> None:
    task = regression() if name == "regression" else convolutional
    # Small steps: batch norm makes twenty large ones chaotic, and rounding differs between the plans.
    spec = l3rs.Spec.create(task.params_shape(), step_scale=3e-4)
    theta, chosen = l3rs.init_meta_params(jax.random.key(0), spec), sample(task, jax.random.key(1))
    splits = ("inner_valid", "outer_valid")
    results = []
    for plan in (fused_rollout, stepwise_rollout):
        rollout = plan(task, lambda t, horizon: l3rs.learned_optimizer(t, spec, horizon), splits)
        rollout = jax.jit(rollout) if plan is fused_rollout else rollout
        results.append(rollout(theta, jax.tree.map(jnp.asarray, task.data), chosen, jnp.int32(20)))
    # Convolutions add up in another order in each plan; some processors round 1.03e-5 apart after twenty steps.
    rtol = 2e-5 if name == "convolutional" else 1e-5
    for split in splits:
        np.testing.assert_allclose(results[0][split].loss, results[1][split].loss, rtol=rtol)


def test_evaluators_agree_and_stepwise_does_not_depend_on_devices() -> None:
    fitness = {}
    for plan, devices in (("fused", 1), ("stepwise", 1), ("stepwise", 2)):
        local, state = evaluator(jax.devices()[:devices], plan=plan)  # type: ignore[arg-type]
        fitness[plan, devices] = local.evaluate(state, generation(horizon=20))
        local.close()
    np.testing.assert_array_equal(fitness["stepwise", 1], fitness["stepwise", 2])
    np.testing.assert_allclose(fitness["stepwise", 1], fitness["fused", 1], rtol=1e-5)


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, tuple[float, float]]) -> list[str]:
    """Replace the measurement by these (fused, stepwise) seconds of a task; returns the names of those measured."""
    names: list[str] = []

    def look_up(task: Task, _: l3rs.Spec) -> dict[Plan, float]:
        names.append(task.name)
        return dict(zip(("fused", "stepwise"), seconds[task.name], strict=True))

    monkeypatch.setattr("metatrain.inner.plan._seconds_per_step", look_up)
    return names


def test_the_faster_plan_is_chosen_and_matrices_are_fused_unmeasured(
    convolutional: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = measured(monkeypatch, {"regression": (1.0, 2.0), "convolutional": (9.0, 1.0)})
    any_network = l3rs.Spec.create(convolutional.params_shape(), embedding="descriptor")
    assert choose_plan([regression()], any_network) == "fused"
    assert names == []
    assert choose_plan([convolutional], any_network) == "stepwise"
    assert choose_plan([regression(), convolutional], any_network) == "stepwise"  # all variants count
    assert names == ["convolutional", "regression", "convolutional"]
    measured(monkeypatch, {"regression": (1.0, 9.0), "convolutional": (2.0, 1.0)})
    assert choose_plan([convolutional], any_network) == "stepwise"
    assert choose_plan([regression(), convolutional], any_network) == "fused"  # by their mean
    measured(monkeypatch, {"regression": (1.0, 9.0), "convolutional": (1.0, 2.0)})
    assert choose_plan([convolutional], any_network) == "fused"


@pytest.mark.slow  # compiles both plans
def test_both_plans_of_convolutions_are_measured(convolutional: Task) -> None:
    # Which is faster depends on what else runs; `python -m tests.benchmarks stepwise` says by how much.
    found = plan_seconds([convolutional], l3rs.Spec.create(convolutional.params_shape()))
    assert set(found) == {"fused", "stepwise"}
    assert all(0 < seconds < np.inf for seconds in found.values())


def test_a_forced_plan_is_used_and_recorded(tmp_path) -> None:
    run(small_config(execution={"plan": "stepwise"}), tmp_path / "s")
    run(small_config(), tmp_path / "f")
    assert load_config(tmp_path / "s" / "config.yaml").execution.plan == "stepwise"
    assert load_config(tmp_path / "s" / "config.yaml").execution.members_per_call == 1
    assert load_config(tmp_path / "f" / "config.yaml").execution.plan == "fused"
    for one, two in zip(metrics(tmp_path / "s"), metrics(tmp_path / "f"), strict=True):
        assert one["meta_loss_mean"] == pytest.approx(two["meta_loss_mean"], rel=1e-4)
    assert resume(tmp_path / "s").finished


def test_digits_have_no_convolutions() -> None:
    task = make_task("digits", {"init": "random"})
    assert choose_plan([task], l3rs.Spec.create(task.params_shape())) == "fused"


def test_a_call_holds_the_population_or_what_fits_the_smallest_memory() -> None:
    assert members_per_call(64, "fused", True) == members_per_call(64, "fused", True, [None]) == 64
    assert members_per_call(64, "fused", False) == 8
    assert members_per_call(64, "fused", True, [40, 24, None]) == 24
    assert members_per_call(64, "stepwise", True, [40]) == members_per_call(64, "torch", False) == 1


@pytest.mark.slow  # compiles for many sizes
def test_as_many_candidates_fit_as_xla_would_allocate() -> None:
    task = regression()
    spec = l3rs.Spec.create(task.params_shape(), hidden=(4,), embedding_dim=2)
    strategy = make_strategy(
        small_config(outer={"population": 64}).outer, l3rs.init_meta_params(jax.random.key(0), spec)
    )
    need = {n: scratch_bytes(task, spec, strategy, n) for n in (1, 8, 64)}
    data = sum(x.nbytes for x in jax.tree.leaves(task.data))
    assert need[64] > need[8] > need[1]
    found = members_that_fit(task, spec, strategy, int((need[8] + data) / 0.8))
    assert 4 <= found < 16  # the estimate is linear in the members, XLA's allocation nearly so
    assert members_that_fit(task, spec, strategy, 2**30) > 64
    with pytest.raises(UserError, match=r"one candidate of regression needs .* MiB, but a device has 0 MiB"):
        members_that_fit(task, spec, strategy, 1000)


class FakeMeasurements:
    """Two kinds of device: on one the plan stepwise is a little faster, on the other it is far slower."""

    closed = 0

    def plan_seconds(self) -> dict[str, dict[Plan, float]]:
        return {"Old GPU": {"fused": 2e-3, "stepwise": 1e-3}, "New GPU": {"fused": 1e-3, "stepwise": 9e-3}}

    def members_that_fit(self) -> dict[str, int | None]:
        return {"Old GPU": 3, "New GPU": 7}

    def close(self) -> None:
        FakeMeasurements.closed += 1


def test_plan_and_members_are_measured_on_every_kind_of_device_and_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("metatrain.outer.setup.known_plan", lambda _: None)
    monkeypatch.setattr("metatrain.outer.setup._measurements", lambda *_: FakeMeasurements())
    FakeMeasurements.closed = 0
    run(small_config(outer={"steps": 1}), tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.execution.plan, config.execution.members_per_call) == ("fused", 3)
    assert [one.model_dump() for one in config.measured] == [
        {"device": "Old GPU", "ms_per_step": {"fused": 2.0, "stepwise": 1.0}, "members_that_fit": 3},
        {"device": "New GPU", "ms_per_step": {"fused": 1.0, "stepwise": 9.0}, "members_that_fit": 7},
    ]
    assert FakeMeasurements.closed == 1
    grown = resume(tmp_path / "run", ["outer.steps=2"])  # nothing is measured again
    assert grown.finished
    assert load_config(tmp_path / "run" / "config.yaml").measured == config.measured
    assert FakeMeasurements.closed == 1


def test_where_a_run_measures() -> None:
    def where(**execution: object) -> tuple[bool, bool]:
        section = small_config(execution=execution).execution
        return is_elsewhere(section), memory_is_limited(section)

    assert where() == (False, True)
    assert where(backend="ray") == (False, False)
    assert where(backend="ray", address="10.0.0.5:6379") == (True, False)
    assert where(backend="ray", resources_per_worker={"CPU": 1.0, "GPU": 0.5}) == (True, True)
    assert where(backend="ray", address="10.0.0.5:6379", resources_per_worker={"TPU": 4.0}) == (True, True)


@pytest.mark.parametrize(
    ("population", "on_cores", "on_accelerators"),
    [(2, 2, 2), (8, 4, 8), (24, 4, 24), (32, 4, 32), (100, 13, 64), (1000, 16, 125), (100_000, 16, 1024)],
)
def test_a_call_holds_enough_to_be_efficient_and_leaves_calls_for_others(
    population: int, on_cores: int, on_accelerators: int
) -> None:
    assert candidates_at_once(population, accelerator=False) == on_cores
    assert candidates_at_once(population, accelerator=True) == on_accelerators


@pytest.mark.parametrize("execution", [{}, *({"backend": "ray", "workers": n} for n in (1, 2, 4, "auto"))])
def test_how_candidates_are_grouped_does_not_depend_on_devices_or_workers(execution: dict) -> None:
    groups = set()
    for devices in (1, 2):
        with mock.patch("jax.local_devices", return_value=jax.devices()[:devices]):
            groups.add(
                Setup.build(
                    small_config(outer={"population": 32}, execution=execution)
                ).config.execution.members_per_call
            )
    assert groups == {4}


def test_the_time_of_a_step_is_positive_whatever_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def run(count: int) -> None:  # a step takes 0.1 ms, and the shortest call happens to be delayed
        nonlocal now
        now += 0.05 if count == 1 else count * 1e-4

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    a_step, _ = time_steps(run, steps=50, rounds=2)
    assert a_step == pytest.approx((0.0801 - 0.05) / 800)  # 50 and 200 steps are no longer than one

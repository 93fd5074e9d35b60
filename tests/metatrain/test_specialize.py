"""`metatrain specialize`: the plan, and the whole command."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import l3rs
from metatrain import cli, specialize
from metatrain.config import UserError
from metatrain.inner.network import task_layers
from metatrain.outer.setup import Setup
from metatrain.specialize import Work, horizons_of, make_plan
from metatrain.start_search import (
    MULTIPLIERS,
    StartFactors,
    at_horizon,
    find_factors,
    search,
    searched_powers,
    searched_roles,
)
from tasks import TaskError, make_task
from tests.metatrain.common import REGRESSION


def work(step: float, processes: int = 2) -> Work:
    return Work(step, 0.01, candidates=processes, runs=processes, roles=6)


def test_the_plan_fits_the_time() -> None:
    for step in (1e-4, 1e-3, 4e-3, 1e-2):
        plan = make_plan(work(step), 1800)
        assert plan.training_seconds <= 0.6 * 1800
        assert plan.evaluation_seconds <= 0.4 * 1800
        assert plan.generations * plan.population >= 384


def test_a_slower_model_gets_a_shorter_plan() -> None:
    plans = [make_plan(work(step), 1800) for step in (1e-3, 5e-2, 1e-1)]
    longest = [plan.longest for plan in plans]
    assert longest == sorted(longest, reverse=True)
    assert longest[0] > longest[-1]
    assert make_plan(work(5e-2, 8), 1800).longest >= plans[1].longest


def test_too_little_time_says_how_much_is_needed() -> None:
    with pytest.raises(UserError, match=r"--minutes is 1; this task needs at least (\d+)") as refused:
        make_plan(work(0.1), 60)
    needed = int(str(refused.value).split("at least ")[1].split(":")[0])
    assert make_plan(work(0.1), 60 * needed).longest == 20


def test_the_horizon_may_be_given() -> None:
    plan = make_plan(work(1e-3), 1800, 70)
    assert (plan.longest, horizons_of(plan.longest)) == (70, [23, 70])
    assert make_plan(work(1e-3), 1800, 10).longest == 10  # the shortest that is allowed
    with pytest.raises(UserError, match="candidates over up to 5000 steps"):
        make_plan(work(1e-2), 1800, 5000)


@pytest.fixture
def tiny_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialize, "_CANDIDATES", 8)
    monkeypatch.setattr(specialize, "_MOST_GENERATIONS", 2)
    monkeypatch.setattr(specialize, "_SEEDS", (2,))
    monkeypatch.setattr(specialize, "_LONGEST", (20,))
    monkeypatch.setattr(specialize, "_POPULATIONS", (4,))
    # Another process takes seconds to start; the slow tests of the guide have one for each core.
    monkeypatch.setattr("metatrain.inner.processes.usable_cpus", lambda: 1)


@pytest.mark.usefixtures("tiny_plan")
def test_a_stop_on_request_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metatrain.outer.loop._generation", interrupted)
    out = tmp_path / "run"
    arguments = ["specialize", "tests.metatrain.torch_tasks:tiny", "--minutes", "30", "--out", str(out)]
    cli.app(arguments, standalone_mode=False)
    assert f"{out} was interrupted; once it is resumed and finished" in capsys.readouterr().out.replace("\n", " ")
    assert not (out / "evaluation").exists()


@pytest.mark.usefixtures("tiny_plan")
def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    out = tmp_path / "run"
    arguments = ["specialize", "tests.metatrain.torch_tasks:tiny", "noise=0.2", "--minutes", "30", "--out", str(out)]
    cli.app(arguments, standalone_mode=False)
    said = capsys.readouterr().out
    assert "6 layers with 63 parameters that train" in said
    assert "plan: 2 generations of 4 candidates over 10 to 20 steps" in said
    assert "meta-loss with all steps × 0.25: " in said
    assert said.count("with those of output_") == 2  # kernel, bias
    assert "meta-training begins with all steps × " in said
    assert "generation 2 of 2: meta-loss " in said
    assert "INFO" not in said  # a log's line
    assert "worth it" in said
    assert "It was worth it: " in said or "with a learning rate of " in said
    results = json.loads((out / "evaluation" / "results.json").read_text())
    assert {r["optimizer"].partition("/")[0] for r in results["records"]} == {"l3rs", "adamw", "sgdm"}
    assert results["config"]["task"]["noise"] == 0.2
    assert (out / "evaluation" / "report.html").is_file()
    theta, spec, _ = l3rs.restore(out / "optimizer")
    assert spec.embedding == "table"
    assert theta["embedding"].shape == (6, spec.embedding_dim + 1)
    assert np.ptp(theta["embedding"][:, -1]) > 0.01  # its column was learned, or set by the search
    from tests.metatrain.torch_tasks import tiny

    optimizer = l3rs.torch.L3RS(tiny().model(0).named_parameters(), out / "optimizer")
    assert len(optimizer.param_groups[0]["layers"]) == 6
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_start_of_form_1_has_no_factors_by_role(tmp_path: Path) -> None:
    spec = l3rs.Spec.create({"w": np.ones((3, 2))}, embedding="descriptor", hidden=(4,))
    start = l3rs.save(tmp_path / "start", l3rs.init_meta_params(jax.random.key(0), spec), spec, {})
    config = specialize._config(REGRESSION, {}, str(start), specialize._TRIAL)
    setup = Setup.build(config)
    assert (setup.spec.form, setup.spec.embedding, setup.spec.layer_gain) == (1, "table", 0)
    said: list[str] = []
    found = find_factors(setup, [2], said.append)
    assert found.multiplier in MULTIPLIERS
    assert found.by_role == {}
    assert len(said) == 2


def test_the_search_keeps_what_lowers_the_meta_loss() -> None:
    """A loss that is lowest at known factors, and one that is infinite everywhere."""
    spec = l3rs.Spec.create(
        {"a": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}}, form=2, step="initial", layer_gain=9.0
    )
    assert searched_roles(spec) == ["output_bias", "output_kernel"]

    def losses(choices: Sequence[StartFactors]) -> list[float]:
        return [
            abs(math.log(each.multiplier / 0.5)) + abs(math.log(each.by_role.get("output_kernel", 1.0) / 4))
            for each in choices
        ]

    assert search(losses, spec, [100], print) == StartFactors(0.5, None, {"output_kernel": 4.0})
    nothing = search(lambda choices: [math.inf] * len(choices), spec, [30, 100], print)
    assert nothing == StartFactors()


@pytest.mark.parametrize("horizons", [[10, 30], [33, 100], [333, 1000]])
@pytest.mark.parametrize(("best", "found"), [(0.1, 0.0), (0.28, 0.25), (0.45, None)])
def test_the_search_finds_the_power_of_the_horizon_wherever_the_horizons_lie(
    horizons: list[int], best: float, found: float | None
) -> None:
    """The loss is the squared distance of a step's log from that of the best steps, which are right in the middle."""
    spec = l3rs.Spec.create({"a": {"kernel": np.ones((2, 2))}}, form=2, step="initial", layer_gain=9.0)
    middle = math.sqrt(horizons[0] * horizons[1])

    def losses(choices: Sequence[StartFactors]) -> list[float]:
        def error(each: StartFactors, horizon: int) -> float:
            power = 0.5 if each.horizon_power is None else each.horizon_power
            taken = math.log(each.multiplier) + (power - 0.5) * math.log(100 / horizon)
            other = sum(abs(math.log(factor)) for factor in each.by_role.values())
            return (taken - (best - 0.5) * math.log(middle / horizon)) ** 2 + other

        return [sum(error(each, horizon) for horizon in horizons) for each in choices]

    kept = search(losses, spec, horizons, print)
    assert kept.horizon_power == found
    power = 0.5 if found is None else found
    assert kept.multiplier * (100 / middle) ** (power - 0.5) == pytest.approx(1)


def test_a_power_is_searched_where_layers_have_factors_and_there_are_horizons() -> None:
    params = {"a": {"kernel": np.ones((2, 2))}}
    spec = l3rs.Spec.create(params, form=2, step="initial", layer_gain=9.0)
    assert searched_powers(spec, [30, 100]) == [0.0, 0.25]
    assert searched_powers(dataclasses.replace(spec, horizon_power=0.14), [30, 100]) == [0.0, 0.25, 0.5]
    assert searched_powers(spec, [100]) == []
    assert searched_powers(dataclasses.replace(spec, layer_gain=0.0), [30, 100]) == []
    assert Work(1.0, 0.0, powers=2).search(100) == pytest.approx(6 / 4 * Work(1.0, 0.0).search(100))
    assert Work(1.0, 0.0, powers=2).search(10) == Work(1.0, 0.0).search(10)  # one horizon


@pytest.mark.parametrize("output", [0.0, 5.0])
def test_a_searched_power_takes_the_steps_of_a_form_that_has_it(output: float) -> None:
    """To a rounding, also where the network's output is at its limit, with the power's effect outside of it."""
    params, grads = {"w": np.ones((3, 2), np.float32)}, {"w": np.full((3, 2), 0.1, np.float32)}
    spec = l3rs.Spec.create(params, form=2, step="initial", layer_gain=9.0)
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    theta["dense_2"]["bias"] = theta["dense_2"]["bias"].at[len(spec.directions)].set(output)

    def update(values: Any, form: l3rs.Spec) -> Any:
        tx = l3rs.learned_optimizer(values, form, 25)
        return tx.update(grads, tx.init(params), params, value=1.0)[0]["w"]

    of_form = update(theta, dataclasses.replace(spec, horizon_power=0.25))
    np.testing.assert_allclose(update(at_horizon(25, theta, spec, StartFactors(1.0, 0.25)), spec), of_form, rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(2) * of_form, update(theta, spec), rtol=1e-5)


def test_a_found_power_is_that_of_the_run(tmp_path: Path) -> None:
    spec = l3rs.Spec.create({"w": np.ones((3, 2))}, form=2, step="initial", embedding="descriptor", hidden=(4,))
    start = l3rs.save(tmp_path / "start", l3rs.init_meta_params(jax.random.key(0), spec), spec, {})
    config = specialize._config(REGRESSION, {}, str(start), specialize._TRIAL, StartFactors(1.0, 0.25))
    assert Setup.build(config).spec.horizon_power == 0.25


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--minutes is 0"):
        specialize.specialize("tests.metatrain.torch_tasks:tiny", 0, tmp_path)
    with pytest.raises(UserError, match=r"--steps is 9; it must be a whole number ≥ 10"):
        specialize.specialize("tests.metatrain.torch_tasks:tiny", 1, tmp_path, steps=9)
    with pytest.raises(UserError, match="'noise' is not an option of the task; write key=value"):
        cli.app(["specialize", "tests.metatrain.torch_tasks:tiny", "noise"], standalone_mode=False)
    with pytest.raises(
        UserError, match=r"exists; resume it with `metatrain resume .*--out"
    ):  # before anything is built
        specialize.specialize("no_such_module:task", 30, tmp_path)
    with pytest.raises(TaskError, match=r"no_such_module cannot be imported.*No module named 'no_such_module'$"):
        specialize.specialize("no_such_module:task", 30, tmp_path / "run")


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        ("scores", r"the model returns a mapping with scores: float32\[8, 2\]; without loss=…"),
        ("mappings_alone", r"keyword argument 'x'; without loss=….*a batch is a mapping with x: .*y: "),
        ("nan_at_once", "the loss of batch 1 is nan"),
        ("nan_later", "the loss of batch 3 is nan"),
        ("views", "parameters 0.weight and 1.weight share memory"),
        ("elsewhere", "parameter 0.weight is on meta, but the task's device is cpu"),
        ("one_network", r"model\(i\) returns parameter 0.weight of an earlier network again"),
        ("undeclared", "does not declare that it returns a task"),
    ],
)
def test_a_mistake_in_a_task_is_one_sentence(function: str, sentence: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(TaskError, match=sentence) as refused:
        specialize.specialize(f"tests.metatrain.user_tasks:{function}", 30, tmp_path / "run")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("function", ["logits", "with_mappings", "tied"])
def test_what_people_have(function: str) -> None:
    """A model that returns a mapping, examples that are mappings, one parameter at two places."""
    pytest.importorskip("torch")
    assert len(task_layers(make_task(f"tests.metatrain.user_tasks:{function}"))) == (5 if function == "tied" else 4)

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import l3rs
from metatrain.config import UserError
from metatrain.evaluation.analysis import Analysis, speedups
from metatrain.evaluation.baselines import ALL, BASELINES, SCHEDULES, Tuned, make_baseline
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.records import Record, RecordTable, Results
from metatrain.evaluation.runner import held_out_samples
from metatrain.inner.params import deployed_params
from tests.metatrain.common import REGRESSION, small_config
from tests.metatrain.quadratic import regression


@pytest.fixture(scope="module")
def optimizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = l3rs.Spec.create(regression().params_shape(), hidden=(4,), embedding_dim=2)
    return l3rs.save(tmp_path_factory.mktemp("o") / "opt", l3rs.init_meta_params(jax.random.key(0), spec), spec)


@pytest.fixture(scope="module")
def results(optimizer: Path) -> Results:
    return evaluate(optimizer, small_config(), horizons=(1, 20), seeds=3)


def test_every_optimizer_runs_every_horizon_and_seed(results: Results) -> None:
    assert results.optimizers() == ["l3rs", "adam/constant", "adam/cosine", "sgdm/constant", "sgdm/cosine"]
    assert len(results.records) == 5 * 2 * 3
    assert all(math.isfinite(record.loss) and record.seconds > 0 for record in results.records)


def test_the_choice_has_the_lowest_inner_valid_loss_of_a_grid_no_coarser_than_two(results: Results) -> None:
    for baseline, horizons in results.tuning["regression"].items():
        for grid in horizons.values():
            rates, losses = grid["learning_rate"], grid["inner_valid_loss"]
            assert np.allclose(np.diff(np.log2(rates)), 1)
            assert grid["chosen"] == rates[int(np.argmin(losses))], baseline
            assert grid["at_edge"] == (grid["chosen"] in (rates[0], rates[-1]))
    # 20 steps of plain least squares need a larger rate than the first grid contains: it has to grow.
    grown = results.tuning["regression"]["adam/constant"]["20"]
    assert len(grown["learning_rate"]) > 12
    assert not grown["at_edge"]


def test_tuning_on_fewer_seeds_and_stepwise(optimizer: Path, results: Results) -> None:
    config = small_config(execution={"plan": "stepwise"})
    found = evaluate(optimizer, config, horizons=(3,), seeds=2, tuning_seeds=1, baselines=["sgdm"])
    whole = evaluate(optimizer, small_config(), horizons=(3,), seeds=2, tuning_seeds=1, baselines=["sgdm"])
    assert [r.hparams for r in found.records] == [r.hparams for r in whole.records]
    for one, two in zip(found.records, whole.records, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=1e-4)
    assert found.tuning["regression"]["sgdm/cosine"]["3"]["seeds"] == 1
    assert results.tuning["regression"]["sgdm/cosine"]["20"]["seeds"] == 3


def test_tuning_never_reads_test(optimizer: Path, results: Results) -> None:
    poisoned = small_config(task={"name": REGRESSION, "poison": "test"})
    found = evaluate(optimizer, poisoned, horizons=(1, 20), seeds=3)
    assert found.tuning == results.tuning
    assert all(math.isnan(record.loss) for record in found.records)


def test_settings_replace_options_of_the_task(optimizer: Path, results: Results) -> None:
    settings = {"A": {}, "B": {"poison": "test"}}
    config = small_config(evaluation={"settings": settings, "baselines": ["adam"]})
    found = evaluate(optimizer, config, horizons=(1, 20), seeds=3)
    assert found.settings() == ["A: regression", "B: regression"]
    same = [
        dataclasses.replace(record, setting="", seconds=0.0) for record in found.records if record.setting[0] == "A"
    ]
    assert same == [
        dataclasses.replace(record, setting="", seconds=0.0)
        for record in results.records
        if not record.optimizer.startswith("sgdm")
    ]
    assert all(math.isnan(record.loss) for record in found.records if record.setting[0] == "B")
    assert evaluate(optimizer, config, horizons=(1,), seeds=3, settings=["B"]).settings() == ["B: regression"]
    with pytest.raises(UserError, match=r"evaluation\.settings .* Z; allowed are A, B"):
        evaluate(optimizer, config, horizons=(1,), settings=["A", "Z"])


def test_a_record_can_be_reproduced(results: Results) -> None:
    """An adam/cosine record is repeated with optax's own cosine schedule, step by step."""
    task, horizon = regression(), 20
    (record,) = [r for r in results.records if (r.optimizer, r.horizon, r.seed) == ("adam/cosine", horizon, 1)]
    samples = held_out_samples(task, 0, 3)
    data = jax.tree.map(jnp.asarray, task.data)
    params, stats = task.init(data, samples.init[1])
    tx = optax.adam(optax.cosine_decay_schedule(record.hparams["learning_rate"], horizon))
    state = tx.init(params)
    gradient = jax.jit(jax.grad(lambda p, batch: task.loss(p, stats, batch, True)[0]))
    for i in range(horizon):
        key = jax.random.fold_in(jax.random.wrap_key_data(samples.key[1]), i)
        updates, state = tx.update(gradient(params, task.batch(data, key)), state, params)
        params = optax.apply_updates(params, updates)
    loss, _ = task.loss(params, stats, data["test"], False)
    assert record.loss == pytest.approx(float(loss), rel=1e-4)  # float32 over 20 steps, fused differently


@pytest.mark.parametrize("name", list(BASELINES))
def test_the_constant_schedule_is_constant(name: str) -> None:
    params = {"w": jnp.ones(3)}
    tx = make_baseline(name, Tuned(jnp.float32(0.1), jnp.int32(0)), 5)
    more = {"total_steps": 5} if BASELINES[name].knows_horizon else {}
    plain = BASELINES[name].make(0.1, **more)
    state, expected_state = tx.init(params), plain.init(params)
    for i in range(8):
        grads = {"w": jnp.array([1.0, -2.0, i])}
        updates, state = tx.update(grads, state, params, value=1.0)
        expected, expected_state = plain.update(grads, expected_state, params)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)


@pytest.mark.parametrize(("schedule", "expected"), [("cosine", optax.cosine_decay_schedule(0.5, 40)), (
    "warmup_cosine", optax.warmup_cosine_decay_schedule(0.1, 0.5, 4, 40)), (
    "step", optax.piecewise_constant_schedule(0.5, {20: 0.1, 30: 0.1}))])  # fmt: skip
def test_schedules_are_those_of_optax(schedule: str, expected: optax.Schedule) -> None:
    params = {"w": jnp.zeros(())}
    tx = make_baseline("sgd", jax.tree.map(lambda x: x[0], Tuned.grid([0.5], schedule)), 40)
    state = tx.init(params)
    for step in range(42):
        updates, state = tx.update({"w": jnp.ones(())}, state, params)
        assert float(updates["w"]) == pytest.approx(-float(expected(step)), abs=1e-6)


@pytest.mark.parametrize("name", ["adabound", "amsbound"])
def test_bounds_are_a_share_of_the_schedules_peak(name: str) -> None:
    """With a gradient that never changes, a schedule's factor multiplies the step: Adam's part of it and the bounds."""
    steps = {}
    for schedule in SCHEDULES:
        params = {"w": jnp.zeros(())}
        tx = make_baseline(name, jax.tree.map(lambda x: x[0], Tuned.grid([2.0**-9], schedule)), 40)
        state, moved = tx.init(params), []
        for _ in range(40):
            updates, state = tx.update({"w": jnp.ones(())}, state, params)
            moved.append(float(updates["w"]))
        steps[schedule] = np.array(moved)
    for schedule, factors in (
        ("cosine", optax.cosine_decay_schedule(1.0, 40)),
        ("warmup_cosine", optax.warmup_cosine_decay_schedule(0.2, 1.0, 4, 40)),
    ):
        expected = steps["constant"] * np.array([float(factors(i)) for i in range(40)])
        np.testing.assert_allclose(steps[schedule], expected, rtol=1e-5)


@pytest.mark.slow
def test_every_baseline_trains_on_digits_and_runs_in_one_call() -> None:
    task = {"name": "digits", "init": "random", "model": {"name": "mlp", "hidden": [24]}, "batch_size": 32}
    config = small_config(task=task, evaluation={"costs": False})
    found = evaluate("-", config, horizons=(60,), seeds=1, curve_points=1, baselines=["all"], schedules=["constant"])
    (setting,) = found.settings()
    assert found.optimizers() == [f"{name}/constant" for name in ALL]
    for label in found.optimizers():
        assert found.mean(setting, label, 60) < 0.7 * np.log(10), label  # the loss of ten equal guesses


def test_unknown_names(optimizer: Path) -> None:
    with pytest.raises(UserError, match=r"no baseline adma; allowed are sgd, sgdm, adam"):
        evaluate(optimizer, small_config(), horizons=(1,), baselines=["adma"])
    with pytest.raises(UserError, match=r"no schedule cosinus; allowed are constant, cosine, warmup_cosine"):
        evaluate(optimizer, small_config(), horizons=(1,), schedules=["cosinus"])


def test_schedule_free_is_judged_at_its_average() -> None:
    params = {"w": jnp.array([1.0])}
    tx = make_baseline("schedule_free", Tuned(jnp.float32(0.1), jnp.int32(0)), 9)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
    average = optax.contrib.schedule_free_eval_params(state, params)
    assert float(average["w"][0]) != float(params["w"][0])
    np.testing.assert_array_equal(deployed_params(state, params)["w"], average["w"])
    adam = optax.adam(0.1)
    np.testing.assert_array_equal(deployed_params(adam.init(params), params)["w"], params["w"])


def test_held_out_samples_never_meet_meta_training() -> None:
    task = regression()
    samples = held_out_samples(task, 0, 6)
    assert set(samples.init.tolist()) <= set(task.pools["held_out"])
    assert not set(samples.init.tolist()) & set(task.pools["meta_train"])
    assert len({tuple(key) for key in samples.key.tolist()}) == 6


def test_speedup_is_the_baselines_steps_over_ours() -> None:
    curves = {"l3rs": {10: 0.6, 100: 0.9}, "sgd": {10: 0.3, 100: 0.6}}
    records = [
        Record("s", name, horizon, seed, 1.0, value, 0.1, {}, 1.0)
        for name, curve in curves.items()
        for horizon, value in curve.items()
        for seed in range(5)
    ]
    early, late = speedups(RecordTable(records))
    assert (early.steps_ratio, early.low, early.high) == pytest.approx((10, 10, 10))
    assert (late.steps_ratio, late.low, late.high) == (None, None, None)


def test_curves_and_paths_are_those_of_the_runs(results: Results) -> None:
    for curve in results.curves:
        assert curve.steps[0] == 0
        assert curve.steps[-1] == curve.horizon
        end = results.mean(curve.setting, curve.optimizer, curve.horizon)
        assert curve.loss[-1] == pytest.approx(end, rel=1e-3)
    starts = {curve.loss[0] for curve in results.curves}
    assert len(starts) == 1  # all begin at the same inits
    by_hand = [c for c in results.curves if c.optimizer == "l3rs" and c.horizon == 20]
    losses = np.array(by_hand[0].loss, float)
    area = np.trapezoid(losses, by_hand[0].steps) / 20
    assert results.mean("regression", "l3rs", 20, "auc") == pytest.approx(area, rel=1e-3)
    (path,) = results.paths
    assert path.layers == ["b", "w"]
    assert np.shape(path.mix) == (20, 2, 2)
    np.testing.assert_allclose(np.sum(path.mix, -1), 1, atol=1e-3)
    assert (np.array(path.step_rms) > 0).all()


def test_costs_are_measured(results: Results) -> None:
    assert [cost.optimizer for cost in results.costs] == results.optimizers()
    [setting] = results.settings()
    assert Analysis(results).seconds_a_step(setting, "l3rs") > 0
    assert math.isnan(Analysis(results).seconds_a_step("another network", "l3rs"))
    (adam,) = [cost for cost in results.costs if cost.optimizer == "adam/constant"]
    assert adam.state_floats_a_parameter == pytest.approx(2, abs=0.5)  # and two counters, of five parameters


def test_the_controller_is_part_of_what_a_step_of_iomt_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run of its length is timed: the controller takes longer with every stage."""
    timed: list[int] = []

    def time_steps(run: Callable[[int], object], steps: int, _: int) -> tuple[float, float]:
        run(steps)
        timed.append(steps)
        return 1e-3 * steps, 0.0

    monkeypatch.setattr("metatrain.evaluation.costs.time_steps", time_steps)
    entries = [{"name": name, "learning_rate": 0.1} for name in ("adam", "iomt")]
    found = evaluate(
        "-", small_config(evaluation={"baselines": entries}), horizons=(40,), schedules=["constant"], seeds=1
    )
    assert timed[1] == 40 != timed[0]
    assert [cost.seconds_a_step for cost in found.costs] == [1e-3 * steps for steps in timed]


def test_an_optimizer_for_another_model_is_left_out_and_reported(optimizer: Path) -> None:
    settings = {"A": {}, "B": {"dimension": 5}}
    config = small_config(evaluation={"settings": settings, "costs": False})
    found = evaluate(optimizer, config, horizons=(2,), seeds=1, baselines=[])
    assert found.settings() == ["A: regression"]
    assert found.costs == []
    assert any("B: regression is left out: layer 'w' has shape" in note for note in found.notes)
    assert Analysis(found).difference("A: regression", "l3rs", 2).low == -math.inf  # of one seed


def test_the_runs_use_the_guard_of_the_configuration(optimizer: Path) -> None:
    def losses(guard: bool | dict[str, float]) -> list[float]:
        config = small_config(evaluation={"guard": guard, "baselines": []})
        found = evaluate(optimizer, config, horizons=(60,), seeds=2)
        assert any("guard" in note for note in found.notes) == bool(guard)
        return found.values("regression", "l3rs", 60).tolist()

    off = losses(False)
    assert losses({"bound": 1e6}) == off  # never takes over
    assert losses({"bound": 1e-9, "patience": 1, "steps": 60}) != off  # does when the loss first rises


def test_a_baseline_that_diverges_is_reported(optimizer: Path) -> None:
    config = small_config(evaluation={"baselines": ["tests.metatrain.test_evaluate:exploding", "adam"]})
    found = evaluate(optimizer, config, horizons=(30,), seeds=2, schedules=["constant"])
    label = "tests.metatrain.test_evaluate:exploding/constant"
    assert f"regression: {label} has no finite test loss after 30 steps in 2 of its runs" in found.notes
    assert Analysis(found).best_baseline("regression", 30) == "adam/constant"
    assert Analysis(found).win_rate("regression", label, 30) == 1
    assert any(f"{label} has its best learning rate" in note and "edge" in note for note in found.notes)


def exploding(learning_rate: optax.Schedule, total_steps: jax.Array) -> optax.GradientTransformation:
    """A user's baseline, which diverges."""
    del learning_rate
    return optax.sgd(1e30 * total_steps)


def test_a_baseline_whose_package_is_missing_is_left_out_and_reported(optimizer: Path) -> None:
    names = ["sgd", "no_such_package:velo"]
    found = evaluate(optimizer, small_config(), horizons=(2,), seeds=1, baselines=names, schedules=["constant"])
    assert found.baselines() == ["sgd/constant"]
    assert found.notes[0] == "baseline no_such_package:velo is left out: No module named 'no_such_package'"
    with pytest.raises(UserError, match="has no function 'velo'"):
        evaluate(optimizer, small_config(), horizons=(2,), baselines=["tests.metatrain.common:velo"])


def test_results_json_and_the_summary(results: Results, tmp_path: Path) -> None:
    saved = json.loads(results.save(tmp_path).read_text())
    assert {"optimizer", "records", "speedup", "tuning", "curves", "paths", "costs", "notes"} <= set(saved)
    fields = {"setting", "optimizer", "horizon", "seed", "loss", "accuracy", "seconds", "hparams", "auc"}
    assert set(saved["records"][0]) == fields
    assert set(saved["speedup"][0]) == {"setting", "baseline", "horizon", "steps_ratio", "low", "high"}
    assert Results.load(tmp_path / "results.json") == results
    loss, accuracy, seeds = results.summary()["regression"]["sgdm/cosine"]["20"]
    assert (loss, seeds) == (round(results.mean("regression", "sgdm/cosine", 20), 4), 3)
    assert accuracy == round(results.mean("regression", "sgdm/cosine", 20, "accuracy"), 4)


def test_diverged_runs_are_null_in_json_and_lose(results: Results, tmp_path: Path) -> None:
    broken = [Record(**{**r.__dict__, "loss": math.nan}) if r.optimizer == "l3rs" else r for r in results.records]
    bad = Results("o", broken, [], {})
    assert json.loads(bad.save(tmp_path).read_text())["records"][0]["loss"] is None
    assert math.isnan(Results.load(tmp_path / "results.json").mean("regression", "l3rs", 1))


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        Results.load(tmp_path / "none.json")
    for text in ("{", "[]", '{"records": [{}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"is not a results\.json"):
            Results.load(tmp_path / "bad.json")


def test_bad_input(optimizer: Path, tmp_path: Path) -> None:
    config = small_config()
    for options, sentence in (
        ({"horizons": (0, 10)}, r"evaluation: horizons\.0: input should be greater than or equal to 1, found 0"),
        ({"horizons": ()}, "evaluation: horizons"),
        ({"seeds": 0}, "evaluation: seeds: input should be greater than or equal to 1, found 0"),
        ({"seeds": 2, "tuning_seeds": 3}, "tuning_seeds 3 is larger than seeds 2"),
        ({"guard": {"bounds": 1}}, "guard has no bounds; allowed are bound, patience, steps, learning_rate"),
        ({"guard": {"bound": -1}}, "guard.bound is -1; it must be a number > 0"),
        ({"horizon": 3}, "horizon: unknown key; allowed here are settings, horizons"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate(optimizer, config, **options)
    with pytest.raises(l3rs.L3RSError, match="not an L3RS checkpoint"):
        evaluate(tmp_path, config)
    with pytest.raises(l3rs.L3RSError, match=r"fits the model of no setting; .* layer 'w' has shape"):
        evaluate(optimizer, small_config(task={"name": REGRESSION, "dimension": 5}), horizons=(10,))

"""Baselines with options, among them IOMT, and evaluations without a learned optimizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l3rs.baselines import iomt, mada_coefficients
from l3rs.baselines.iomt.space import choices
from metatrain.config import UserError, load_config
from metatrain.evaluation.analysis import Analysis, tried_rates
from metatrain.evaluation.baselines import (
    ALL,
    BASELINES,
    INTERLEAVED,
    Interleaved,
    Tuned,
    chosen_baselines,
    find_baseline,
    make_baseline,
)
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.interleaved import interleaved_rollout, trainers
from metatrain.evaluation.records import Results
from metatrain.evaluation.runner import held_out_samples
from metatrain.report.tables import tuning
from tasks import Task, uniform_batches
from tasks.classification import classification_loss
from tasks.models import make_model
from tasks.trainable import train_only
from tests.metatrain.common import REGRESSION, small_config
from tests.metatrain.quadratic import regression

CONFIGS = Path(__file__).parents[2] / "configs" / "baselines"
PLAIN = {"schedules": ["constant"], "seeds": 2}


def steps_of(make: Any, horizon: int, steps: int = 6, rate: float = 0.1) -> np.ndarray:
    """Updates [steps, 3] on gradients that change."""
    params = {"w": jnp.ones(3)}
    tx = make_baseline(make, Tuned(jnp.float32(rate), jnp.int32(0)), horizon)
    state, updates = tx.init(params), []
    for i in range(steps):
        update, state = tx.update({"w": jnp.array([1.0, -2.0, i])}, state, params, value=1.0)
        updates.append(update["w"])
    return np.stack(updates)


def test_options_go_to_the_constructor() -> None:
    params = {"w": jnp.ones(3)}
    tx = optax.adamw(0.1, b1=0.5, weight_decay=1e-2)  # other options keep their defaults
    state = tx.init(params)
    found = steps_of(find_baseline("adamw", {"b1": 0.5}), 10)
    for i in range(6):
        expected, state = tx.update({"w": jnp.array([1.0, -2.0, i])}, state, params)
        np.testing.assert_allclose(found[i], expected["w"], rtol=1e-5)
    decayed = steps_of(find_baseline("adamw", {"b1": 0.5, "weight_decay": 0.3}), 10)
    assert not np.allclose(found, decayed)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"name": "adam", "beta": 1}, "baseline adam has no option beta; allowed are learning_rate, b1, b2, eps"),
        ({"name": "mada", "b4": 1}, "baseline mada has no option b4; allowed are learning_rate, b1, b2, b3, c, rho"),
        (
            {"name": "hyper_adam", "b4": 1},
            "baseline hyper_adam has no option b4; allowed are learning_rate, b1, b2, hyper",
        ),
        ({"name": "iomt", "tau": 5}, "baseline iomt has no option tau; allowed are learning_rate, stage_steps"),
        ({"name": "mada", "b1": 2.0}, "baseline mada: b1 is 2.0; it must be one number in"),
        ({"name": "iomt", "stage_steps": "x"}, "baseline iomt: stage_steps is 'x'; it must be a whole number ≥ 1"),
        ({"name": "adam", "learning_rate": 0}, "baseline adam: learning_rate is 0; it must be one number > 0"),
        ({"name": "schedule_free", "b1": 0.5}, "baseline schedule_free has no option b1; allowed are learning_rate$"),
        ({"b1": 0.5}, r"a baseline needs a name, found \{'b1': 0.5\}"),
        ({"name": "adam", "label": "a/b"}, "baseline adam: label is 'a/b'"),
        ({"name": "adam", "label": "l3rs"}, "baseline adam: label is 'l3rs'"),
        (
            {"name": "adam", "schedules": ["cosinus"]},
            "baseline adam: no schedule cosinus; allowed are constant, cosine",
        ),
        (
            {"name": "adam", "schedules": "cosine"},
            "baseline adam: schedules is 'cosine'; it must be a list of constant",
        ),
        ({"name": "adam", "schedules": []}, r"baseline adam: schedules is \[\]; it must be a list of constant"),
        ({"name": "adma", "b1": 0.5}, "no baseline adma; allowed are sgd, .*swats, iomt, doit, .*package.module:funct"),
    ],
)
def test_bad_entries(entry: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        chosen_baselines([entry], ["constant"])


def test_labels_order_and_duplicates() -> None:
    entries = [
        {"name": "mada", "b1": 0.5, "b2": 0.6},
        "adam",
        {"name": "mada", "b1": 0.5, "b2": 0.6},  # again
        {"name": "mada", "b1": 0.5, "label": "mada, poor β1"},
        "adam",
        {"name": "adam"},
        "iomt_random",
    ]
    chosen, notes = chosen_baselines(entries, ["constant", "cosine"])
    assert list(chosen) == ["mada(b1=0.5, b2=0.6)", "adam", "mada, poor β1", "iomt_random"]
    assert chosen["adam"].schedules == ["constant", "cosine"]
    assert chosen["iomt_random"].schedules == ["constant"]
    assert notes == []
    with pytest.raises(UserError, match=r"two baselines .* 'x'"):
        chosen_baselines([{"name": "adam", "label": "x"}, {"name": "sgd", "label": "x"}], ["constant"])


def test_an_entry_may_have_its_own_schedules() -> None:
    entries = ["adam", {"name": "sgdm", "schedules": ["step", "cosine"]}, {"name": "swats", "schedules": ["step"]}]
    chosen, notes = chosen_baselines(entries, ["constant"])
    assert {label: list(baseline.schedules) for label, baseline in chosen.items()} == {
        "adam": ["constant"],
        "sgdm": ["step", "cosine"],
    }
    assert "swats is left out" in notes[0]  # it relies on a constant rate


def test_all_has_the_systems_and_not_their_ablations() -> None:
    chosen, _ = chosen_baselines(["sgdm", "all", {"name": "mada", "b1": 0.5}], ["constant"])
    assert list(chosen) == ["sgdm", *(name for name in ALL if name != "sgdm"), "mada(b1=0.5)"]
    assert {"iomt", "doit"} <= set(ALL)
    assert not set(ALL) & {name for name in INTERLEAVED if name.startswith("iomt_")}
    chosen, notes = chosen_baselines(["swats", "iomt", "adam"], ["cosine"])
    assert list(chosen) == ["adam"]
    for name, note in zip(("swats", "iomt"), notes, strict=True):
        assert f"baseline {name} is left out" in note
        assert "constant" in note


@pytest.mark.parametrize("name", ["mada", "hyper_adam"])
def test_mada_learns_from_a_tenth_of_the_horizon_on(name: str) -> None:
    found, frozen = steps_of(name, 30), steps_of(find_baseline("mada", {"learned": []}), 30)
    np.testing.assert_array_equal(found[:2], frozen[:2])
    assert np.all(np.any(found[2:] != frozen[2:], axis=1))  # from step 3 on
    np.testing.assert_array_equal(steps_of(name, 1000), frozen)  # from step 50 on
    np.testing.assert_array_equal(steps_of(find_baseline(name, {"start_step": 50}), 30), frozen)


def test_a_learned_learning_rate_goes_with_a_constant_one() -> None:
    entry = {"name": "mada", "learned": ["b1", "learning_rate"], "hyper_learning_rates": {"learning_rate": 1e-3}}
    chosen, _ = chosen_baselines([{**entry, "label": "m"}], ["constant", "cosine"])
    assert list(chosen["m"].schedules) == ["constant"]
    tx = make_baseline(chosen["m"], Tuned(jnp.float32(0.01), jnp.int32(0)), 30)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for i in range(6):
        _, state = tx.update({"w": jnp.array([1.0, -2.0, 0.1 * i])}, state, params, value=1.0)
    rate = float(mada_coefficients(state)["learning_rate"])
    assert 0 < rate != pytest.approx(0.01)


def test_mada_takes_a_traced_horizon() -> None:
    found = jax.jit(lambda n: jnp.sum(make_baseline("mada", Tuned(jnp.float32(0.1), jnp.int32(0)), n).init(
        {"w": jnp.ones(3)}).count))(jnp.int32(30))  # fmt: skip
    assert int(found) == 0


def test_iomt_s_stages_follow_the_horizon() -> None:
    entry = find_baseline("iomt")
    assert isinstance(entry, Interleaved)
    rule = {steps: (entry.at(steps).stage_steps, entry.at(steps).initial_stages) for steps in (1, 10, 100, 500, 5000)}
    assert rule == {1: (1, 1), 10: (1, 4), 100: (2, 20), 500: (10, 20), 5000: (25, 20)}
    fixed = find_baseline("iomt", {"stage_steps": 5, "initial_stages": 3})
    assert isinstance(fixed, Interleaved)
    assert (fixed.at(7).stage_steps, fixed.at(7).initial_stages) == (5, 3)
    space = entry.space(0.01)
    assert {tuple(o.hyperparameters["learning_rate"]) for o in space.values()} == {(0.1, 0.01, 0.001)}  # the paper's
    options = {name: find_baseline(name).at(100) for name in INTERLEAVED}  # type: ignore[union-attr]
    assert options["doit"].variant == "doit"
    assert [options[f"iomt_{name}"].switch for name in ("random", "cyclical")] == ["random", "cyclical"]
    assert options["iomt_no_halving"].halving is None
    assert options["iomt_unweighted"].start == "uniform"
    larger = find_baseline("iomt_larger_space")
    assert isinstance(larger, Interleaved)
    assert list(larger.space(0.1)["sgd"].hyperparameters.values()) == [(1.0, 0.1, 0.01), (1e-2, 1e-3, 1e-4)]
    assert [len(of_one) for of_one in choices(larger.space(0.1))] == [9, 15, 9, 45, 9]


@pytest.fixture(scope="module")
def results() -> Results:
    entries = ["adam", "iomt", {"name": "doit", "learning_rate": 0.1, "label": "doit at .1"}]
    return evaluate("-", small_config(evaluation={"baselines": entries}), horizons=(60,), **PLAIN)


def test_learned_coefficients_of_mada_are_kept() -> None:
    entries = [
        {"name": "mada", "learning_rate": 0.1, "start_step": 5},
        {"name": "hyper_adam", "learning_rate": 0.1, "b1": 0.5, "label": "from .5"},
    ]
    found = evaluate("-", small_config(evaluation={"baselines": entries}), horizons=(20, 150), **PLAIN)
    mada, hyper_adam = found.coefficients
    assert hyper_adam.optimizer == "from .5/constant"
    assert (mada.steps[0], mada.steps[-1], len(mada.steps)) == (1, 150, 100)
    assert [values[0] for values in mada.values.values()] == pytest.approx([0.9, 0.95, 0, 1, 1, 1])
    assert {rho for step, rho in zip(mada.steps, mada.values["rho"], strict=True) if step < 5} == {1}
    assert any(len(set(values)) > 10 for values in mada.values.values())
    assert hyper_adam.values["b1"][0] == 0.5
    assert len(set(hyper_adam.values["b1"])) > 1
    assert {name for name, values in hyper_adam.values.items() if len(set(values)) > 1} <= {"b1", "b2"}


def test_choices_of_iomt_are_kept(results: Results) -> None:
    """For the first seed's run over the longest horizon: the stages cover all steps."""
    iomt_history, doit_history = results.switches
    assert [h.optimizer for h in results.switches] == ["iomt/constant", "doit at .1/constant"]
    for history in (iomt_history, doit_history):
        stages = [iomt.Stage(**stage) for stage in history.stages]
        assert len(history.losses) == 61
        assert [stage.step for stage in stages] == list(range(0, 60, stages[0].steps))
        assert {stage.chosen for stage in stages} == {"initial", "surrogate"}
    rates = {round(stage["hyperparameters"]["learning_rate"], 6) for stage in doit_history.stages}
    assert rates <= {1.0, 0.1, 0.01}


def test_diverged_stages_are_reported() -> None:
    """At a learning rate of 1e4 nearly every stage diverges, which the results must state."""
    entries = [{"name": "iomt", "learning_rate": 1e4}]
    found = evaluate("-", small_config(evaluation={"baselines": entries}), horizons=(60,), **PLAIN)
    (note,) = [note for note in found.notes if "the loss diverged" in note]
    assert note.startswith("regression: iomt(learning_rate=10000.0)/constant, 60 steps: the loss diverged, in ")
    assert note.endswith(" of 120 stages")


@pytest.mark.parametrize(("tolerance", "said"), [(1.0, "switched to SGD after step "), (0.0, "did not switch")])
def test_the_switch_of_swats_is_reported(tolerance: float, said: str) -> None:
    entries = [
        {"name": "swats", "learning_rate": 0.01, "tolerance": 0.0, "relative_tolerance": tolerance, "label": "s"}
    ]
    found = evaluate("-", small_config(evaluation={"baselines": entries}), horizons=(20, 30), **PLAIN)
    (note,) = [note for note in found.notes if "switch" in note]
    assert note.startswith(f"regression: s/constant {said}")
    assert note.endswith("in the first seed's run of 30 steps")


def test_without_a_learned_optimizer(results: Results) -> None:
    assert results.optimizer == "-"
    assert results.optimizers() == ["adam/constant", "iomt/constant", "doit at .1/constant"]
    assert results.speedup == []
    assert results.paths == []
    assert results.coefficients == []  # those are MADA's
    assert results.meta_training == {}
    assert [cost.optimizer for cost in results.costs] == results.optimizers()
    with pytest.raises(UserError, match="there is nothing to compare: no optimizer and no baseline"):
        evaluate("-", small_config(), horizons=(1,), baselines=[])
    with pytest.raises(UserError, match=r"nothing to compare.*no_such_package:velo is left out"):
        evaluate("-", small_config(), horizons=(1,), baselines=["no_such_package:velo"])


def test_iomt_is_tuned_and_judged_like_the_others(results: Results) -> None:
    grid = results.tuning["regression"]["iomt/constant"]["60"]
    assert len(grid["learning_rate"]) >= 12
    assert 0.01 in grid["learning_rate"]
    assert grid["seeds"] == 2
    # A rate that is given is not tuned: there are no runs for it, and no other grid is the longer for it.
    given = results.tuning["regression"]["doit at .1/constant"]["60"]
    assert (given["learning_rate"], given["inner_valid_loss"], given["seeds"]) == ([0.1], [None], 0)
    summaries = {label: of[60] for label, of in Analysis(results).grids("regression").items()}
    assert (summaries["doit at .1/constant"].tried, summaries["iomt/constant"].tried >= 12) == (0, True)
    smallest = min(summary.tried for summary in summaries.values() if summary.tried)
    assert {summary.grown for summary in summaries.values() if summary.tried == smallest} == {False}
    assert tried_rates({"inner_valid_loss": [0.3], "seeds": 2}) == 0  # as earlier versions wrote a given rate
    table = tuning(Analysis(results), "regression")
    assert table is not None
    assert [row.cells[0].small for row in table.rows if row.cells[0].small == "given"] == ["given"]
    assert {r.hparams["learning_rate"] for r in results.records if r.optimizer.startswith("doit")} == {0.1}
    first = {curve.loss[0] for curve in results.curves}
    assert len(first) == 1  # the same inits
    for curve in results.curves:
        assert (curve.steps[0], curve.steps[-1]) == (0, 60)
        assert curve.loss[-1] == pytest.approx(results.mean("regression", curve.optimizer, 60), rel=1e-3)
    assert results.mean("regression", "iomt/constant", 60) < 0.1 * first.pop()
    (adam, iomts, _) = results.costs
    assert min(adam.seconds_a_step, iomts.seconds_a_step) > 0
    assert iomts.state_floats_a_parameter > 2 * adam.state_floats_a_parameter


def test_tuning_of_iomt_never_reads_test() -> None:
    poisoned = small_config(task={"name": REGRESSION, "poison": "test"})
    given = {"horizons": (6,), "baselines": ["iomt"], **PLAIN}
    found, clean = evaluate("-", poisoned, **given), evaluate("-", small_config(), **given)
    assert found.tuning == clean.tuning
    assert all(math.isnan(record.loss) for record in found.records)


@pytest.mark.parametrize("plan", ["fused", "stepwise"])
@pytest.mark.parametrize("name", ["iomt", "iomt_larger_space"])
def test_a_run_of_iomt_can_be_reproduced(plan: Any, name: str) -> None:
    """It is repeated with optax: the stages that the controller chose, on the batches of all other runs."""
    task, horizon = regression(), 30
    entry = find_baseline(name, {"stage_steps": 5, "initial_stages": 3, "transferability": 0.3})
    assert isinstance(entry, Interleaved)
    data = jax.tree.map(jnp.asarray, task.data)
    sample = jax.tree.map(lambda x: x[1], held_out_samples(task, 0, 2))
    hyper = Tuned(jnp.float32(0.02), jnp.int32(0))
    kept: list[iomt.Result] = []
    made = trainers(task, plan)

    def trainer(*form: Any) -> Any:
        def train(*args: Any, **more: Any) -> iomt.Result:
            kept.append(made(*form)(*args, **more))
            return kept[-1]

        return train

    points = [0, 10, 30]
    score = interleaved_rollout(task, entry, plan, trainer)(hyper, data, sample, jnp.int32(horizon), ("test",), points)
    params, stats = task.init(data, sample.init)
    gradient = jax.jit(jax.grad(lambda p, batch: task.loss(p, stats, batch, True)[0]))
    space = entry.space(float(np.float32(0.02)))
    made_of = {name: optimizer.make for name, optimizer in space.items()}
    first = {of: {key: choices[0] for key, choices in space[of].hyperparameters.items()} for of in space}
    states = {of: make(**first[of]).init(params) for of, make in made_of.items()}
    losses = {0: float(task.loss(params, stats, data["test"], False)[0])}
    for stage in kept[0].history:
        for key, value in stage.hyperparameters.items():
            assert value in space[stage.optimizer].hyperparameters[key]
        tx = made_of[stage.optimizer](**stage.hyperparameters)
        for i in range(stage.step, stage.step + stage.steps):
            key = jax.random.fold_in(jax.random.wrap_key_data(sample.key), i)
            grads = gradient(params, task.batch(data, key))
            updates, states[stage.optimizer] = tx.update(grads, states[stage.optimizer], params)
            params = optax.apply_updates(params, updates)
        losses[stage.step + stage.steps] = float(task.loss(params, stats, data["test"], False)[0])
    # float32 over 30 steps, compiled apart
    np.testing.assert_allclose(score["test"].loss, [losses[point] for point in points], rtol=1e-3)


@pytest.mark.parametrize("mode", [pytest.param("lora", marks=pytest.mark.slow), "head"])
def test_iomt_where_little_is_trained(mode: str) -> None:
    """A small ViT with adapters, or its head alone: the loss falls, and the surrogates see the trained parameters."""
    rng = np.random.default_rng(0)
    label = np.arange(64, dtype=np.int32) % 2  # dark and bright images
    images = rng.integers(0, 160, (64, 8, 8, 3), dtype=np.uint8) + 95 * label[:, None, None, None].astype(np.uint8)
    split = {"image": images, "label": label}
    model = make_model("vit_tiny", (8, 8, 3), 2, patch_size=4, dim=16, heads=2, depth=1)
    init, loss = train_only(mode, lambda _, i: model.init(jax.random.key(i)), classification_loss(model))
    data = dict.fromkeys(("inner_train", "inner_valid", "outer_valid", "test"), split)
    task = Task(mode, data, init, uniform_batches(32), loss, {"meta_train": range(2), "held_out": range(2, 4)})
    entry = find_baseline("iomt", {"stage_steps": 5, "initial_stages": 6})
    assert isinstance(entry, Interleaved)
    histories: list[list[iomt.Stage]] = []
    rollout = interleaved_rollout(
        task, entry, "fused", trainers(task, "fused"), lambda history, _: histories.append(history)
    )
    sample = jax.tree.map(lambda x: x[0], held_out_samples(task, 0, 1))
    hyper = Tuned(jnp.float32(0.01), jnp.int32(0))
    score = rollout(hyper, jax.tree.map(jnp.asarray, data), sample, jnp.int32(60), ("inner_train",), [0, 60])
    before, after = score["inner_train"].loss
    assert after < 0.8 * before
    (history,) = histories
    assert {stage.chosen for stage in history} == {"initial", "surrogate"}
    assert not any("do not vary" in note for stage in history for note in stage.notes)
    params, _ = task.init(data, jnp.int32(0))
    assert len(iomt.key_parameters(params)) == {"lora": 2, "head": 1}[mode]


def test_transferability_is_the_accuracy_of_the_init(monkeypatch: pytest.MonkeyPatch) -> None:
    task = regression()
    data = jax.tree.map(jnp.asarray, task.data)
    sample = jax.tree.map(lambda x: x[0], held_out_samples(task, 0, 1))
    seen: list[float] = []
    controller = iomt.Controller

    def watched(space: iomt.Space, options: iomt.Options, seed: int) -> iomt.Controller:
        seen.append(options.transferability)
        return controller(space, options, seed)

    monkeypatch.setattr(iomt, "Controller", watched)
    made = trainers(task, "fused")
    for name in ("iomt", "iomt_no_transferability"):
        entry = find_baseline(name)
        assert isinstance(entry, Interleaved)
        interleaved_rollout(task, entry, "fused", made)(Tuned(jnp.float32(0.1), jnp.int32(0)), data, sample, 1)
    accuracy = float(task.loss(*task.init(data, sample.init), data["inner_train"], False)[1].accuracy)
    assert accuracy > 0
    assert seen == [pytest.approx(accuracy), 0.0]


def test_a_run_of_iomt_without_a_loss_has_no_score() -> None:
    found = evaluate("-", small_config(task={"name": REGRESSION, "poison": "inner_train"}), horizons=(2,),
                     baselines=["iomt"], **PLAIN)  # fmt: skip
    assert all(math.isnan(record.loss) for record in found.records)
    assert any("no finite test loss" in note for note in found.notes)


def test_every_name_is_a_baseline() -> None:
    assert not set(BASELINES) & set(INTERLEAVED)
    for name in (*BASELINES, *INTERLEAVED):
        assert find_baseline(name).learning_rate > 0


def test_a_users_baseline_is_tried_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_of_options.py").write_text(
        "import optax\n"
        "def mine(learning_rate, *, momentum):\n"
        "    if not 0 < momentum < 1: raise ValueError('momentum is not in (0, 1)')\n"
        "    return optax.sgd(learning_rate, momentum)\n"
        "def nothing(): ...\n"
        "def late(learning_rate, *, k):\n"
        "    def init(params): raise TypeError('k is 2')\n"
        "    return optax.GradientTransformation(init, lambda *_: None)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = steps_of(find_baseline("own_of_options:mine", {"momentum": 0.5}), 10)
    np.testing.assert_array_equal(found, steps_of(find_baseline("sgdm", {"momentum": 0.5}), 10))
    for name, options, message in (
        ("mine", {}, "missing 1 required keyword-only argument: 'momentum'"),
        ("mine", {"momentum": 2}, "momentum is not in"),
        ("mine", {"decay": 2}, "has no option decay; allowed are learning_rate, momentum"),
        ("nothing", {}, "takes 0 positional arguments"),
        ("late", {"k": 2}, "own_of_options:late: k is 2"),
    ):
        with pytest.raises(UserError, match=message):
            find_baseline(f"own_of_options:{name}", options)


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_says_its_command(recipe: Path) -> None:
    how = load_config(recipe).evaluation
    chosen, notes = chosen_baselines(how.baselines, how.schedules)
    assert len(chosen) == len(how.baselines)
    assert notes == []
    assert f" configs/baselines/{recipe.name}\n" in recipe.read_text().partition("name:")[0]

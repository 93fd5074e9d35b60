"""`metatrain evaluate` on tasks of PyTorch: baselines of torch.optim, and the same results and page."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import l3rs  # noqa: E402
from metatrain import report  # noqa: E402
from metatrain.config import UserError  # noqa: E402
from metatrain.evaluation.analysis import Analysis  # noqa: E402
from metatrain.evaluation.baselines import SCHEDULES, MissingBaselineError, Tuned, make_baseline  # noqa: E402
from metatrain.evaluation.comparison import evaluate, in_common  # noqa: E402
from metatrain.evaluation.records import Results  # noqa: E402
from metatrain.evaluation.torch_baselines import (  # noqa: E402
    ALL_TORCH,
    TORCH_BASELINES,
    Scheduled,
    find_torch_baseline,
    make_torch_baseline,
    schedule_factor,
)
from metatrain.inner.network import make_spec, task_layers  # noqa: E402
from metatrain.inner.processes import local_processes  # noqa: E402
from metatrain.inner.torch_rollout import torch_rollout  # noqa: E402
from metatrain.system import usable_cpus  # noqa: E402
from tasks import make_task, sample  # noqa: E402
from tasks.torch_training import Training  # noqa: E402
from tests.metatrain.common import small_config  # noqa: E402
from tests.metatrain.torch_tasks import TINY, tiny  # noqa: E402

_HOW = {"horizons": [3, 6], "seeds": 2, "curve_points": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = make_spec(task_layers(tiny()), {"hidden": (4,), "embedding_dim": 2})
    theta = l3rs.init_meta_params(jax.random.key(0), spec)
    return Path(l3rs.save(tmp_path_factory.mktemp("optimizer") / "own", theta, spec, {}))


@pytest.fixture(scope="module")
def results(saved: Path) -> Results:
    how = {**_HOW, "baselines": ["adamw", {"name": "sgdm", "momentum": 0.8}], "multipliers": [0.3, 1.0]}
    return evaluate(saved, small_config(task={"name": TINY}, evaluation=how))


def test_results_and_page_are_those_of_other_tasks(results: Results, tmp_path: Path) -> None:
    labels = {f"{name}/{s}" for name in ("adamw", "sgdm(momentum=0.8)") for s in ("constant", "cosine")} | {"l3rs"}
    assert {record.optimizer for record in results.records} == labels
    assert len(results.records) == 5 * 2 * 2
    assert all(np.isfinite(record.loss) and 0 <= record.accuracy <= 1 for record in results.records)
    grid = results.tuning["tiny"]["adamw/cosine"]["6"]
    assert len(grid["learning_rate"]) >= 12
    assert grid["chosen"] in grid["learning_rate"]
    assert {cost.optimizer for cost in results.costs} == labels
    costs = {cost.optimizer: cost.state_floats_a_parameter for cost in results.costs}
    assert costs["adamw/constant"] > 2 > costs["sgdm(momentum=0.8)/constant"] >= 1
    path = results.paths[0]
    assert path.layers[:2] == ["body.0.weight", "body.0.bias"]
    assert np.shape(path.mix) == (6, 6, 2)
    np.testing.assert_allclose(np.sum(path.mix, -1), 1, atol=2e-4)
    assert [grid.horizon for grid in results.multipliers] == [3, 6]
    again = Results.load(results.save(tmp_path))
    assert again.records == results.records
    assert report.write(Analysis(again), tmp_path).is_file()


def test_a_parameter_that_is_never_used_is_left_out_of_the_path(tmp_path: Path) -> None:
    task = {"name": TINY, "unused": True}
    spec = make_spec(task_layers(make_task(TINY, {"unused": True})), {"hidden": (4,), "embedding_dim": 2})
    own = l3rs.save(tmp_path / "own", l3rs.init_meta_params(jax.random.key(0), spec), spec, {})
    how = {**_HOW, "baselines": [{"name": "adamw", "learning_rate": 0.01}]}
    [path] = evaluate(own, small_config(task=task, evaluation=how)).paths
    assert len(spec.layers) == 8
    assert len(path.layers) == len(path.shapes) == 6
    assert not any(name.startswith("unused") for name in path.layers)
    assert np.shape(path.mix) == (6, 6, 2)
    assert np.shape(path.step_rms) == (6, 6)


def test_processes_give_the_results_of_one(saved: Path, results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's results are computed in processes; here in this one."""
    started = []
    monkeypatch.setattr("metatrain.evaluation.runner.Processes", lambda *arguments: started.append(arguments))
    how = {**_HOW, "baselines": ["adamw", {"name": "sgdm", "momentum": 0.8}], "multipliers": [0.3, 1.0]}
    config = small_config(task={"name": TINY}, evaluation=how, execution={"workers": 1})
    alone = evaluate(saved, config)
    assert not started
    strip = dataclasses.replace
    assert [strip(r, seconds=0.0) for r in alone.records] == [strip(r, seconds=0.0) for r in results.records]
    assert (alone.curves, alone.tuning, alone.multipliers) == (results.curves, results.tuning, results.multipliers)


def test_one_process_for_an_accelerator() -> None:
    task = dataclasses.replace(tiny(), device="cuda")
    assert local_processes([task], "auto", 8) == 1
    assert local_processes([task], 3, 8) == 3
    assert local_processes([tiny()], "auto", 8) == min(usable_cpus(), 8)


def test_settings_of_both_frameworks_share_their_baselines() -> None:
    """A table needs the same ones in every setting."""
    jaxs, torchs = (dict.fromkeys(names, TORCH_BASELINES["adam"]) for names in (("adam", "mada"), ("soap", "adam")))
    found, notes = in_common({False: (dict(jaxs), []), True: (dict(torchs), ["a note"])})
    assert {kind: list(rivals) for kind, (rivals, _) in found.items()} == {False: ["adam"], True: ["adam"]}
    assert len(notes) == 1
    assert "mada, soap" in notes[0]
    assert in_common({True: (dict(torchs), [])}) == ({True: (torchs, [])}, [])


def test_multiplier_1_is_the_optimizer(results: Results) -> None:
    losses = [record.loss for record in results.records if (record.optimizer, record.horizon) == ("l3rs", 6)]
    found = next(grid for grid in results.multipliers if grid.horizon == 6)
    if found.best == 1.0:
        assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert set(found.multipliers) == {0.3, 1.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_are_those_of_jax(schedule: str) -> None:
    """SGD's step on a gradient of 1 is the learning rate."""
    horizon = 25
    hyper = jax.tree.map(lambda x: x[0], Tuned.grid([1.0], schedule))
    tx = make_baseline("sgd", hyper, horizon)
    params, state = np.float32(0.0), tx.init(np.float32(0.0))
    for step in range(horizon + 2):
        updates, state = tx.update(np.float32(1.0), state, params)
        assert schedule_factor(schedule, step, horizon) == pytest.approx(-float(updates), abs=1e-6)
    assert optax.tree.norm(params) == 0


@pytest.mark.parametrize("name", ALL_TORCH)
def test_every_baseline_descends(name: str) -> None:
    """On a matrix and a vector, at the rate where the search begins."""
    if name not in TORCH_BASELINES:
        pytest.importorskip("pytorch_optimizer", reason="the extra integrations")
    params = [torch.nn.Parameter(torch.eye(3) + 0.1), torch.nn.Parameter(torch.ones(3))]
    baseline = find_torch_baseline(name)
    schedule = "cosine" if "cosine" in baseline.schedules else "constant"
    hyper = jax.tree.map(lambda x: x[0], Tuned.grid([baseline.learning_rate], schedule))
    optimizer = make_torch_baseline(baseline, hyper, [("w", params[0]), ("b", params[1])], 20)
    assert isinstance(optimizer, Scheduled)
    losses = []
    for _ in range(20):
        optimizer.optimizer.zero_grad()
        loss = sum((param**2).sum() for param in params)
        loss.backward()
        optimizer.step(loss=loss.detach())
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("sophia", {}, "no baseline sophia for tasks of PyTorch; allowed are sgd, sgdm.*lion, adan"),
        ("adam", {"beta": 1}, "baseline adam has no option beta; allowed are learning_rate, betas"),
        ("adam", {"betas": [2, 0.9]}, "baseline adam: Invalid beta"),
        ("adam", {"learning_rate": 0}, "learning_rate is 0; it must be one number > 0"),
        ("torch.optim:Nothing", {}, "torch.optim has no class 'Nothing'"),
        ("torch.optim:LBFGS", {}, "baseline torch.optim:LBFGS cannot be used: its step needs closure"),
        ("torch.optim:RAdam", {"betas": [2, 0.9]}, "baseline torch.optim:RAdam failed: ValueError: Invalid beta"),
        ("math:pi", {}, "baseline math:pi is float, not a class"),
        ("types:SimpleNamespace", {}, "baseline types:SimpleNamespace failed: "),
    ],
)
def test_refused(name: str, options: dict, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        find_torch_baseline(name, options)


def test_a_module_that_raises_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising_optimizers.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"raising_optimizers cannot be imported: .*division by zero"):
        find_torch_baseline("raising_optimizers:Adam")


def test_own_classes_and_missing_packages() -> None:
    assert find_torch_baseline("torch.optim:RAdam").make is torch.optim.RAdam
    found = evaluate(
        "-",
        small_config(
            task={"name": TINY},
            evaluation={
                "horizons": [2], "seeds": 1, "curve_points": 1, "schedules": ["constant"],
                "baselines": ["no_such_package:Adam", {"name": "torch.optim:RAdam", "learning_rate": 0.01}],
            },
        ),
    )  # fmt: skip
    assert [record.optimizer for record in found.records] == ["torch.optim:RAdam(learning_rate=0.01)/constant"]
    assert any("no_such_package:Adam is left out" in note for note in found.notes)


def test_names_of_a_package_that_is_not_installed_or_too_old_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(MissingBaselineError, match=r"baseline lion is left out.*pip install pytorch-optimizer"):
        find_torch_baseline("lion")
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", types.ModuleType("pytorch_optimizer"))
    with pytest.raises(MissingBaselineError, match="the installed pytorch-optimizer has no SOAP"):
        find_torch_baseline("soap")


def test_muon_takes_matrices_and_its_adamw_the_rest() -> None:
    pytest.importorskip("pytorch_optimizer", reason="the extra integrations")
    found = find_torch_baseline("muon", {"momentum": 0.9})
    matrix, vector = torch.nn.Parameter(torch.eye(3)), torch.nn.Parameter(torch.ones(3))
    both = found.make([matrix, vector], lr=0.02).param_groups
    assert [(group["use_muon"], group["lr"], len(group["params"])) for group in both] == [
        (True, 0.02, 1),
        (False, pytest.approx(3e-4), 1),
    ]
    assert both[0]["momentum"] == 0.9
    assert len(found.make([vector], lr=0.02).param_groups) == 1


def test_schedule_free_is_judged_at_its_average() -> None:
    """Training then continues unchanged: with or without an evaluation in between, the last score is the same."""
    pytest.importorskip("pytorch_optimizer", reason="the extra integrations")
    baseline = find_torch_baseline("schedule_free")
    assert baseline.schedules == ("constant",)
    made: list[Scheduled] = []

    def make(hyper: Tuned, params: list, horizon: int) -> Scheduled:
        made.append(make_torch_baseline(baseline, hyper, params, horizon))
        return made[-1]

    # In float64: the gradient of a bias before batch norm is rounding alone, which Adam in float32 makes steps of.
    single = tiny()
    task = dataclasses.replace(
        single,
        model=lambda init: single.model(init).double(),
        loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0].double()), batch[1]),
    )
    rollout, chosen = torch_rollout(Training(task), make, ("test",)), sample(task, jax.random.key(0))
    hyper = jax.tree.map(lambda x: x[0], Tuned.grid([2.0**-4], "constant"))
    often = rollout(hyper, task.data, chosen, 8, points=[2, 5, 8])["test"].loss
    once = rollout(hyper, task.data, chosen, 8)["test"].loss
    assert often[-1] == pytest.approx(float(once), rel=1e-5)
    params = made[-1].optimizer.param_groups[0]["params"]
    left = [param.detach().clone() for param in params]  # the point of the next gradient
    made[-1].optimizer.eval()
    assert any(not torch.allclose(one, two) for one, two in zip(left, params, strict=True))

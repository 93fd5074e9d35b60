"""`optimizer.start`: meta-training that begins with a checkpoint."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from l3rs.descriptors import roles
from l3rs.spec import OFF_AT_ZERO
from metatrain.config import OptimizerConfig, UserError, load_config
from metatrain.inner.rollout import inner_steps, learned
from metatrain.outer.loop import resume, run
from metatrain.outer.setup import Setup
from metatrain.outer.start import start_theta
from tasks import TaskSample, make_task
from tests.metatrain.common import REGRESSION, assert_same_theta, metrics, small_config
from tests.metatrain.test_trainer import stopped_at

_SAMPLE = TaskSample(jnp.int32(3), jax.random.key_data(jax.random.key(4)))


@pytest.fixture(scope="module", params=[1, 2], ids=["form1", "form2"])
def general(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint with descriptors of another network, whose output layer is not near zero."""
    fields = {"form": 2, "step": "initial"} if request.param == 2 else {}
    fields |= {"embedding": "descriptor", "hidden": (4,), "embedding_dim": 3}
    spec = l3rs.Spec.create({"w": np.ones((3, 2))}, ("adam", "sgd", "weight_decay"), **fields)
    theta = jax.tree.map(lambda x: x + 0.1, l3rs.init_meta_params(jax.random.key(1), spec))
    return str(l3rs.save(tmp_path_factory.mktemp("general") / "general", theta, spec, {}))


def small_bare(**sections: Any) -> Any:
    """As `small_config`, without a form of the optimizer."""
    from metatrain.config import check_config

    data = small_config(**{key: value for key, value in sections.items() if key != "optimizer"}).model_dump()
    data["outer"] = {"steps": 6, "population": 4, "horizon": {"min": 2, "max": 9}, **sections.get("outer", {})}
    data["optimizer"] = sections["optimizer"]
    return check_config(data)


@pytest.mark.parametrize("layer_gain", [0.0, 7.0])
@pytest.mark.parametrize("embedding", [None, "table"])
def test_generation_0_is_the_checkpoint(general: str, embedding: str | None, layer_gain: float) -> None:
    """Bit for bit on a fine-tuning run, with the checkpoint's descriptors and with a table, and with a factor of each
    layer that evolution may change."""
    base, spec, _ = l3rs.restore(general)
    if layer_gain and spec.form == 1:
        pytest.skip("layer_gain is of form 2")
    asked: dict[str, Any] = {} if embedding is None else {"embedding": embedding}
    asked |= {"layer_gain": layer_gain} if layer_gain else {}
    setup = Setup.build(small_bare(optimizer={"start": general, **asked}))
    assert setup.spec.embedding == (embedding or "descriptor")
    theta = setup.strategy.mean(setup.fresh().strategy)
    task = make_task(REGRESSION)
    if embedding == "table":
        assert theta["embedding"].shape == (2, 4 if layer_gain else 3)  # a row for each layer

    def params(spec: l3rs.Spec, values: Any) -> list[np.ndarray]:
        carries = inner_steps(task, learned(spec), values, task.data, _SAMPLE, 20)
        return [np.concatenate([np.ravel(x) for x in jax.tree.leaves(carry.params)]) for carry in carries]

    expected, found = params(spec, base), params(setup.spec, theta)
    np.testing.assert_array_equal(found, expected)
    assert np.ptp(np.stack(expected), axis=0).min() > 1e-3  # every parameter moves


def test_a_start_may_have_another_power_of_the_horizon(general: str) -> None:
    asked = {"start": general, "start_horizon_power": 0.25}
    if l3rs.restore(general)[1].form == 1:
        with pytest.raises(UserError, match=r"optimizer.start_horizon_power is 0.25, but .* is of form 1, which has"):
            Setup.build(small_bare(optimizer=asked))
        return
    setup = Setup.build(small_bare(optimizer=asked))
    assert setup.spec.horizon_power == 0.25
    assert Setup.build(setup.config).spec.horizon_power == 0.25  # a resolved configuration stays as it is
    with pytest.raises(UserError, match=r"optimizer.horizon_power is 0.3, but .* has 0.5; leave it out"):
        Setup.build(small_bare(optimizer={"start": general, "horizon_power": 0.3}))


@pytest.mark.parametrize("field", OFF_AT_ZERO)
def test_what_only_form_2_has_may_be_new_in_a_start_of_form_2(general: str, field: str) -> None:
    asked = {"start": general, field: 0.3}
    if l3rs.restore(general)[1].form == 1:
        with pytest.raises(UserError, match=f"optimizer.{field} is 0.3, but .* has 0.0; leave it out"):
            Setup.build(small_bare(optimizer=asked))
        return
    assert getattr(Setup.build(small_bare(optimizer=asked)).spec, field) == 0.3


@pytest.mark.parametrize("field", OFF_AT_ZERO)
def test_what_only_form_2_has_with_form_1_is_one_sentence(general: str, field: str) -> None:
    with pytest.raises(UserError, match=f"{field} is 0.3; it is of form 2, and form 1 has none"):
        small_bare(optimizer={"start": general, "form": 1, field: 0.3})


def test_what_the_form_of_a_start_cannot_have_is_one_sentence(tmp_path: Path) -> None:
    spec = l3rs.Spec.create({"w": np.ones(3)}, ("adam",), form=2, step="initial", embedding="descriptor")
    start = l3rs.save(tmp_path / "own", l3rs.init_meta_params(jax.random.key(0), spec), spec, {})
    with pytest.raises(UserError, match=r"decrease_limit .*sgd"):
        Setup.build(small_bare(optimizer={"start": str(start), "decrease_limit": 3.0}))


def test_generation_0_is_the_checkpoint_in_pytorch(general: str) -> None:
    pytest.importorskip("torch")
    from metatrain.inner.network import task_layers
    from metatrain.inner.torch_rollout import LearnedTorch, torch_rollout
    from tasks.torch_training import Training
    from tests.metatrain.torch_tasks import tiny

    task = tiny()
    base, spec, _ = l3rs.restore(general)
    own = dataclasses.replace(spec, embedding="table", layers=task_layers(task))
    theta = start_theta(OptimizerConfig(start=general), own, task)
    assert theta["embedding"].shape == (6, 3)
    scores = [
        torch_rollout(Training(task), LearnedTorch(form), ())(values, {}, _SAMPLE, 15, ("test",), [0, 1, 15])[
            "test"
        ].loss
        for form, values in ((spec, base), (own, theta))
    ]
    np.testing.assert_array_equal(*scores)
    assert len(set(scores[0].tolist())) == 3


def test_a_multiplier_of_the_start_multiplies_its_steps(general: str) -> None:
    setup = Setup.build(small_bare(optimizer={"start": general, "start_multiplier": 0.25}))
    base, spec, _ = l3rs.restore(general)
    assert setup.start is not None
    assert setup.config.optimizer.start_multiplier == 0.25
    task = setup.tasks[0]
    params = task.init(task.data, jnp.int32(0))[0]
    grads = jax.tree.map(jnp.sin, params)

    def update(theta: Any) -> Any:
        tx = l3rs.learned_optimizer(theta, spec, 10)
        return tx.update(grads, tx.init(params), params, value=jnp.float32(1.0))[0]

    for quarter, whole in zip(*map(jax.tree.leaves, (update(setup.start), update(base))), strict=True):
        np.testing.assert_allclose(quarter, whole / 4, rtol=2e-6)


def test_factors_by_role_multiply_the_steps_of_those_layers(tmp_path: Path) -> None:
    spec = l3rs.Spec.create({"w": np.ones((3, 2))}, embedding="descriptor", hidden=(4,), form=2, step="initial")
    start = str(l3rs.save(tmp_path / "start", l3rs.init_meta_params(jax.random.key(1), spec), spec, {}))
    optimizer = {"start": start, "embedding": "table", "layer_gain": 4.0, "start_multiplier": 0.5}
    plain = Setup.build(small_bare(optimizer=optimizer)).start
    setup = Setup.build(small_bare(optimizer={**optimizer, "start_by_role": {"norm_scale": 3.0, "output_kernel": 9.0}}))
    assert plain is not None
    assert setup.start is not None
    roles_of = [role.name for role in roles(setup.spec.layers)]
    factors = np.exp(4.0 * (setup.start["embedding"] - plain["embedding"])[:, -1])
    np.testing.assert_allclose(factors, [{"norm_scale": 3.0}.get(role, 1.0) for role in roles_of], rtol=1e-5)
    assert set(roles_of) > {"norm_scale"}
    np.testing.assert_array_equal(setup.start["embedding"][:, :-1], plain["embedding"][:, :-1])


@pytest.mark.parametrize(
    ("optimizer", "sentence"),
    [
        ({"start_multiplier": 0.5}, "start_multiplier is 0.5, but there is no start"),
        ({"start_by_role": {"output_kernel": 2.0}}, "start_by_role is .*, but there is no start"),
        ({"start_horizon_power": 0.2}, "start_horizon_power is 0.2, but there is no start"),
        ({"start": "universal", "start_by_role": {"head": 2.0}}, "start_by_role has 'head'; allowed are input_kernel"),
        ({"start": "universal", "start_by_role": {"output_bias": 2.0}}, "start_by_role needs embedding: table and a"),
        ({"start": "universal", "start_horizon_power": 2}, "start_horizon_power.*less than or equal to 1"),
        ({"start": "universal", "start_horizon_power": "0.25"}, "start_horizon_power.*valid number"),
        ({"layer_gain": 5.0}, "layer_gain"),
        ({"form": 2, "step": "initial", "layer_gain": 500.0}, "layer_gain is 500.0; it must lie in"),
    ],
    ids=str,
)
def test_factors_that_are_refused(optimizer: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        small_bare(optimizer=optimizer)


def test_the_form_and_smaller_defaults_are_written_out(general: str, tmp_path: Path) -> None:
    started = small_bare(optimizer={"start": general})
    run(started, tmp_path / "run")
    saved = load_config(tmp_path / "run" / "config.yaml")
    assert (saved.optimizer.start, saved.optimizer.embedding_dim, saved.optimizer.embedding) == (
        general,
        3,
        "descriptor",
    )
    assert (saved.outer.sigma, saved.outer.learning_rate) == (0.02, 0.01)
    own = Setup.build(small_bare(optimizer={"start": general}, outer={"sigma": 0.1})).config.outer
    assert (own.sigma, own.learning_rate) == (0.1, 0.01)
    assert run(started, tmp_path / "run", resume_run=True).finished  # the same configuration, not a changed one


@pytest.mark.parametrize("by", ["run", "run, start removed", "resume, start removed"])
def test_resumes_bit_for_bit(general: str, tmp_path: Path, by: str) -> None:
    start = shutil.copytree(general, tmp_path / "start")
    sections = {"optimizer": {"hidden": [4], "embedding_dim": 3, "embedding": "table", "start": str(start)}}
    spec = l3rs.info(start)["spec"]
    sections["optimizer"] |= {key: spec[key] for key in ("form", "step") if key in spec}
    run(small_config(**sections), tmp_path / "quiet")
    stopped_at(3, tmp_path / "run", **sections)
    if "removed" in by:
        shutil.rmtree(start)
    if by.startswith("resume"):
        assert resume(tmp_path / "run").finished
    else:
        assert run(small_config(**sections), tmp_path / "run", resume_run=True).finished
    assert metrics(tmp_path / "run") == metrics(tmp_path / "quiet")
    assert_same_theta(tmp_path / "run" / "optimizer", tmp_path / "quiet" / "optimizer")


def test_from_a_table(tmp_path: Path) -> None:
    """Layers that the checkpoint knows keep their rows, others get the mean."""
    params = {"w": np.ones(4), "other": np.ones(7)}
    spec = l3rs.Spec.create(params, hidden=(4,), embedding_dim=3)
    theta = l3rs.init_meta_params(jax.random.key(1), spec)
    start = str(l3rs.save(tmp_path / "table", theta, spec, {}))
    setup = Setup.build(small_bare(optimizer={"start": start}))
    rows = {layer.path: row for layer, row in zip(setup.spec.layers, setup.start["embedding"], strict=True)}
    np.testing.assert_array_equal(rows["w"], theta["embedding"][1])
    np.testing.assert_allclose(rows["b"], theta["embedding"].mean(0), rtol=1e-6)
    with pytest.raises(UserError, match=r"optimizer.embedding is 'descriptor', but optimizer.start=.* has 'table'"):
        Setup.build(small_bare(optimizer={"start": start, "embedding": "descriptor"}))


def test_refused(general: str) -> None:
    with pytest.raises(UserError, match=r"optimizer.hidden is \(5,\), but optimizer.start=.* has \(4,\); leave it out"):
        Setup.build(small_bare(optimizer={"start": general, "hidden": [5]}))
    with pytest.raises(l3rs.L3RSError, match="nowhere"):
        Setup.build(small_bare(optimizer={"start": "nowhere"}))

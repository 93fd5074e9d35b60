"""Reading checkpoints: what is restored is what was saved, from every format."""

import json
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from tests.l3rs.io.common import GOLDEN, INFO, PARAMS, ROOT, SPEC, assert_same, names, sentence_of, some_theta


def test_restore_gives_what_was_saved(original):
    theta, spec, info = l3rs.restore(original)
    assert_same(theta, some_theta())
    assert spec == SPEC
    assert info == INFO
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(theta))


def test_unusual_values_survive(tmp_path):
    """Bit for bit: -0, denormals, the largest, infinities, NaN."""
    theta = some_theta()
    theta["dense_0"]["bias"] = np.array([-0.0, 1e-45, 3.4028235e38, -np.inf], np.float32)
    theta["dense_1"]["bias"] = np.array([np.nan, 1.0, 0.1], np.float32)
    l3rs.save(tmp_path / "it", theta, SPEC)
    assert_same(l3rs.restore(tmp_path / "it")[0], theta)


def test_untrained_optimizer_round_trip(tmp_path):
    """Initial meta-parameters, as JAX arrays, fit their spec; info is empty; missing parents are created."""
    spec = l3rs.Spec.create(PARAMS, hidden=())
    theta = jax.jit(l3rs.init_meta_params, static_argnums=1)(jax.random.key(0), spec)
    path = l3rs.save(str(tmp_path / "new" / "parent" / "it"), theta, spec)
    assert path == tmp_path / "new" / "parent" / "it"
    found, found_spec, info = l3rs.restore(str(path))
    assert_same(found, theta)
    assert (found_spec, info) == (spec, {})


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    l3rs.save("it", some_theta(), SPEC)
    assert names(tmp_path) == ["it"]
    assert_same(l3rs.restore("it")[0], some_theta())


def test_load_steps_as_the_original(original):
    loaded, tx = l3rs.load(original, total_steps=10), l3rs.learned_optimizer(some_theta(), SPEC, 10)
    grads = jax.tree.map(lambda p: np.random.default_rng(1).normal(size=p.shape).astype(np.float32), PARAMS)
    results = [jax.jit(each.update)(grads, each.init(PARAMS), PARAMS, value=1.0) for each in (loaded, tx)]
    assert_same(*results)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(results[0][0]))


def test_info(original):
    found = l3rs.info(original)
    assert set(found) == {"format", "features", "spec", "sha256", "info"}
    assert (found["format"], found["features"], found["info"]) == (2, 1, INFO)
    assert l3rs.Spec.from_json(found["spec"]) == SPEC
    assert len(found["sha256"]) == 64


def test_leftovers_of_a_killed_save_do_no_harm(tmp_path, original):
    """The save was killed while it removed the old checkpoint, with the new one in place."""
    theta, spec, _ = l3rs.restore(original)
    target = l3rs.save(tmp_path / "it", theta, spec)
    (tmp_path / "it.replaced" / "theta").mkdir(parents=True)
    l3rs.save(target, theta, spec, {"note": "new"}, overwrite=True)
    assert l3rs.info(target)["info"] == {"note": "new"}
    assert not (tmp_path / "it.replaced").exists()


def test_digest_is_of_the_values(tmp_path, original):
    same = l3rs.save(tmp_path / "same", some_theta(), SPEC)
    other = l3rs.save(tmp_path / "other", some_theta(seed=1), SPEC)
    assert l3rs.info(same)["sha256"] == l3rs.info(original)["sha256"]
    assert l3rs.info(other)["sha256"] != l3rs.info(original)["sha256"]


def test_folder_holds_what_it_says_and_nothing_else(original):
    assert names(original) == ["l3rs.json", "theta", "theta.safetensors"]
    assert names(original.parent) == ["it"]
    text = (original / "l3rs.json").read_text()
    assert json.loads(text) == l3rs.info(original)


def test_a_checkpoint_can_be_moved_and_read_only(original, tmp_path):
    moved = Path(shutil.copytree(original, tmp_path / "elsewhere"))
    before = {file: file.read_bytes() for file in moved.rglob("*") if file.is_file()}
    assert_same(l3rs.restore(moved)[0], some_theta())
    assert {file: file.read_bytes() for file in moved.rglob("*") if file.is_file()} == before


def test_nothing_is_unpickled(original, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    l3rs.load(original, 10)


def test_nothing_in_a_checkpoint_names_the_machine_it_was_made_on(original):
    for file in original.rglob("*"):
        if file.is_file():
            assert str(original.parent).encode() not in file.read_bytes(), file


def test_load_checks_the_horizon(original):
    assert sentence_of(l3rs.load, original, 0) == "total_steps is 0; it must be a whole number ≥ 1"


@pytest.mark.parametrize(("version", "embedding"), [(1, "table"), (1, "descriptor"), (2, "table")])
def test_a_checkpoint_of_every_format_steps_as_it_did(version, embedding):
    """`golden/` holds checkpoints and three steps as the code of that version made them; one loss is NaN."""
    name = f"v{version}" if embedding == "table" else f"v{version}-{embedding}"
    golden = GOLDEN / name
    assert l3rs.info(golden / "checkpoint")["format"] == version
    with np.load(golden / "steps.npz", allow_pickle=False) as file:
        arrays = dict(file)
    params = subtree(arrays, "params/")
    tx = l3rs.load(golden / "checkpoint", total_steps=40)
    state, update = tx.init(params), jax.jit(tx.update)
    for step, loss in enumerate((2.0, np.nan, 1.5)):
        updates, state = update(subtree(arrays, f"grads/{step}/"), state, params, value=np.float32(loss))
        expected = subtree(arrays, f"updates/{step}/")
        jax.tree.map(lambda u, e: np.testing.assert_allclose(u, e, rtol=1e-4, atol=1e-7), updates, expected)
        params = jax.tree.map(np.add, params, expected)
    np.testing.assert_allclose(state.mix, arrays["mix"], rtol=1e-4)  # another machine's tanh and sums
    np.testing.assert_allclose(state.step_norm, arrays["step_norm"], rtol=1e-4)


def subtree(arrays, prefix):
    """{"params/a/b": x} as {"a": {"b": x}}."""
    tree = {}
    for name, array in arrays.items():
        if name.startswith(prefix):
            module, leaf = name.removeprefix(prefix).split("/")
            tree.setdefault(module, {})[leaf] = array
    return tree


def test_the_shipped_optimizers_load():
    shipped = [path.parent for path in (ROOT / "checkpoints").glob("*/l3rs.json")]
    assert shipped
    for folder in shipped:
        _, _, info = l3rs.restore(folder)
        assert {"task", "horizon", "generations", "config", "results"} <= set(info)
        assert (folder / "README.md").is_file()


def test_without_a_name_it_is_universal():
    params = {"dense": {"kernel": np.ones((3, 2), np.float32), "bias": np.zeros(2, np.float32)}}
    made = [l3rs.load(*name, total_steps=10) for name in ((), ("universal",))]
    first, second = (jax.jit(tx.update)(params, tx.init(params), params, value=1.0)[0] for tx in made)
    assert_same(first, second)


def test_the_info_of_an_older_checkpoint_has_the_present_names(tmp_path):
    spec = l3rs.Spec.create(PARAMS, form=2, step="initial", embedding="descriptor")
    l3rs.save(tmp_path / "old", l3rs.init_meta_params(jax.random.key(0), spec), spec)
    file = tmp_path / "old" / "l3rs.json"
    written = json.loads(file.read_text())
    assert l3rs.info(tmp_path / "old") == written
    del written["spec"]["horizon_power"]
    file.write_text(json.dumps({**written, "spec": {**written["spec"], "horizon_scaling": True}}))
    assert l3rs.info(tmp_path / "old")["spec"] == spec.to_json()

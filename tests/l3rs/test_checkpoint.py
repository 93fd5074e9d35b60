"""Checkpoints: what is loaded is what was saved, or one clear sentence."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import l3rs
from l3rs.checkpoint import os_errors

PARAMS = {"a": np.ones((4, 3), np.float32), "b": np.ones(5, np.float32)}
SPEC = l3rs.Spec.create(PARAMS, ("adam", {"name": "adam", "b1": 0.5}), hidden=(4,))
INFO = {"task": "digits", "horizon": [10, 100], "results": {"speedup": 1.5}, "note": "θ ≥ 0"}


def some_theta(spec=SPEC, seed=0):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), spec))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def names(folder):
    return sorted(os.listdir(folder))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return l3rs.save(tmp_path_factory.mktemp("original") / "it", some_theta(), SPEC, INFO)


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def rewrite(checkpoint, change):
    """Change the manifest: `change` edits the parsed object."""
    file = checkpoint / "l3rs.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def sentence_of(action, *arguments, **keywords):
    """The message of the L3RSError that it raises: one line, not empty."""
    with pytest.raises(l3rs.L3RSError) as error:
        action(*arguments, **keywords)
    assert str(error.value).strip()
    assert "\n" not in str(error.value)
    return str(error.value)


# Round trip


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
    """What `init` makes, as JAX arrays, fits its spec; info is empty; missing parents are made."""
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


def test_describe(original):
    found = l3rs.info(original)
    assert set(found) == {"format", "features", "spec", "sha256", "info"}
    assert (found["format"], found["features"], found["info"]) == (1, 1, INFO)
    assert l3rs.Spec.from_json(found["spec"]) == SPEC
    assert len(found["sha256"]) == 64


def test_what_a_killed_save_left_behind_is_not_in_the_way(tmp_path, original):
    """Killed while it removed the old one, with the new one in place."""
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
    assert names(original) == ["l3rs.json", "theta"]
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


# Saving that is refused, or fails


def test_save_does_not_overwrite(checkpoint):
    sentence = sentence_of(l3rs.save, checkpoint, some_theta(seed=1), SPEC)
    assert sentence == f"{checkpoint} exists; choose another folder or pass overwrite=True"
    assert_same(l3rs.restore(checkpoint)[0], some_theta())


def test_overwrite(checkpoint):
    (checkpoint / "stale").write_text("of the old one")
    l3rs.save(checkpoint, some_theta(seed=1), SPEC, {"new": 1}, overwrite=True)
    theta, _, info = l3rs.restore(checkpoint)
    assert_same(theta, some_theta(seed=1))
    assert info == {"new": 1}
    assert names(checkpoint) == ["l3rs.json", "theta"]
    assert names(checkpoint.parent) == ["copy"]


def _without(key):
    theta = some_theta()
    del theta[key]
    return theta


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        (_without("embedding"), "theta holds ['dense_0/bias', 'dense_0/kernel', 'dense_1/bias', 'dense_1/kernel']; "),
        ({**some_theta(), "extra": np.zeros(1, np.float32)}, "'extra'"),
        (
            {**some_theta(), "embedding": np.zeros((2, 7), np.float32)},
            "theta: embedding is float32[2, 7]; its spec needs float32[2, 8]",
        ),
        ({**some_theta(), "embedding": np.zeros((2, 8))}, "theta: embedding is float64[2, 8]; its spec needs float32"),
        ({**some_theta(), "embedding": "text"}, "theta: embedding is <U4[]; its spec needs float32[2, 8]"),
        ({}, "theta holds []; its spec needs ['dense_0/bias', "),
        (None, "theta holds []"),
    ],
    ids=["lacks", "extra", "shape", "dtype", "text", "empty", "none"],
)
def test_theta_that_does_not_fit(tmp_path, theta, words):
    assert words in sentence_of(l3rs.save, tmp_path / "it", theta, SPEC)
    assert names(tmp_path) == []


def test_flattened_theta_does_not_fit(tmp_path):
    theta = {"embedding": some_theta()["embedding"]}
    for name in ("dense_0", "dense_1"):
        theta |= {f"{name}/{part}": leaf for part, leaf in some_theta()[name].items()}
    sentence_of(l3rs.save, tmp_path / "it", theta, SPEC)


@pytest.mark.parametrize("info", [{"x": np.float32(1)}, {"x": float("nan")}, {"x": {1, 2}}], ids=str)
def test_info_that_json_cannot_hold(tmp_path, info):
    with pytest.raises((TypeError, ValueError), match="JSON"):
        l3rs.save(tmp_path / "it", some_theta(), SPEC, info)
    assert names(tmp_path) == []


def _fail(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"), [(ocp.PyTreeCheckpointer, "save"), (Path, "write_text"), (Path, "rename")], ids=str
)
def test_failed_save_leaves_nothing_behind(checkpoint, monkeypatch, owner, name, overwrite):
    """And, with overwrite=True, the old one where it was."""
    target = checkpoint if overwrite else checkpoint.parent / "it"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fail)
        with pytest.raises(OSError, match="no space left"):
            l3rs.save(target, some_theta(seed=1), SPEC, overwrite=overwrite)
    assert names(checkpoint.parent) == ["copy"]
    assert_same(l3rs.restore(checkpoint)[0], some_theta())


def test_failed_replacement_keeps_the_old_one(checkpoint, monkeypatch):
    """The old folder is out of the way, and moving the new one in fails."""
    rename, calls = Path.rename, []

    def fail_the_second(self, target):
        calls.append(target)
        return _fail() if len(calls) == 2 else rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_the_second)
        with pytest.raises(OSError, match="no space left"):
            l3rs.save(checkpoint, some_theta(seed=1), SPEC, overwrite=True)
    assert_same(l3rs.restore(checkpoint)[0], some_theta())
    assert names(checkpoint.parent) == ["copy"]


def test_destination_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        l3rs.save(tmp_path / "file" / "it", some_theta(), SPEC)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_destination(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="denied"):
            l3rs.save(tmp_path / "it", some_theta(), SPEC)
        assert names(tmp_path) == []
    finally:
        tmp_path.chmod(0o700)


def test_full_disk_is_an_os_error(tmp_path):
    """TensorStore raises a ValueError that only names the code; any other ValueError is left alone."""
    with pytest.raises(OSError, match=r"No space left on device.*it") as error, os_errors(tmp_path / "it"):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing [source locations='...' os_error_code='28']")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match=r"^other$"), os_errors(tmp_path / "it"):
        raise ValueError("other")


# Damaged checkpoints


def test_not_a_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        for action in (l3rs.info, l3rs.restore, lambda p: l3rs.load(p, 10)):
            assert sentence_of(action, path) == f"{path} is not an L3RS checkpoint: it has no l3rs.json"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_paths_of_another_kind(tmp_path, kind):
    """The path is a file, such as l3rs.json itself; or the manifest is a folder."""
    if kind == "file":
        (tmp_path / "it").write_text("{}")
    else:
        (tmp_path / "it" / "l3rs.json").mkdir(parents=True)
    assert "it" in sentence_of(l3rs.info, tmp_path / "it")


def test_truncated_manifest(checkpoint):
    file = checkpoint / "l3rs.json"
    data = file.read_bytes()
    for length in (0, 1, len(data) // 4, len(data) // 2, len(data) - 3):
        file.write_bytes(data[:length])
        sentence = sentence_of(l3rs.restore, checkpoint)
        assert sentence.startswith(f"{file} is damaged: ")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\0\0", b"[]", b"null", b"5", b'"format"', b"{}"], ids=repr)
def test_manifest_of_something_else(checkpoint, data):
    (checkpoint / "l3rs.json").write_bytes(data)
    assert "l3rs.json is damaged: " in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 5_000], ids=["deep", "long number"])
def test_manifest_that_json_gives_up_on(checkpoint, data):
    (checkpoint / "l3rs.json").write_bytes(data)
    assert "l3rs.json is damaged: " in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("key", ["format", "features", "spec", "sha256", "info"])
def test_manifest_lacks_a_key(checkpoint, key):
    rewrite(checkpoint, lambda manifest: manifest.pop(key))
    assert sentence_of(l3rs.restore, checkpoint) == f"{checkpoint / 'l3rs.json'} is damaged: it lacks {key}"


@pytest.mark.parametrize("key", ["format", "features"])
@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.5, [1]], ids=repr)
def test_other_version(checkpoint, key, version):
    rewrite(checkpoint, lambda manifest: manifest.update({key: version}))
    expected = f"l3rs.json has {key} version {version}; this release reads 1 to 1: update l3rs"
    for action in (l3rs.info, l3rs.restore):
        assert sentence_of(action, checkpoint).endswith(expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unknown": 1}, "spec has fields"),
        ({"hidden": [5]}, "theta: dense_0/bias is float32[4]; its spec needs float32[5]"),
        ({"hidden": [4, 4]}, "its spec needs ['dense_0/bias', 'dense_0/kernel', 'dense_1/bias'"),
        ({"hidden": []}, "its spec needs ['dense_0/bias', 'dense_0/kernel', 'embedding']"),
        ({"layers": [["a", [4, 3]]]}, "theta: embedding is float32[2, 8]; its spec needs float32[1, 8]"),
        ({"absolute_time": True}, "dense_0/kernel is float32"),
        ({"directions": ["adam"]}, "its spec needs"),
        ({"directions": ["adam", "nope"]}, "unknown direction 'nope'; allowed are adam, sgd"),
        ({"directions": ["adam", {"name": "sgd", "x": 1}]}, "direction 'sgd' has no option 'x'; allowed are none"),
        ({"directions": ["adam", {"b1": 0.5}]}, "a direction needs a name"),
        ({"directions": []}, "spec.directions is empty"),
        ({"step": "other"}, "spec.step is 'other'; allowed are 'rms' and 'relative'"),
        ({"step_scale": 0}, "spec.step_scale is 0; it must be > 0"),
        ({"step_scale": None}, "l3rs.json is damaged: "),
        ({"loss_decays": [0.5]}, "spec.loss_decays needs two or more"),
        ({"loss_decays": 0.5}, "l3rs.json is damaged: "),
        ({"layers": None}, "l3rs.json is damaged: "),
        ({"layers": [5]}, "l3rs.json is damaged: "),
        ({"hidden": ["a"]}, "l3rs.json is damaged: "),
        ({"directions": [5]}, "l3rs.json is damaged: "),
    ],
    ids=str,
)
def test_other_spec(checkpoint, change, words):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    assert words in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [["a", [4, 3], 1], ["b", [5]]]},  # too many values to unpack
        {"directions": ["adam", ["sgd"]]},  # dictionary update sequence …
        {"directions": ["adam", {"name": []}]},  # unhashable
        {"hidden": [4.0]},  # shapes must be integers
        {"embedding_dim": 8.0},
        {"absolute_time": None},
        {"absolute_time": "no"},
    ],
    ids=str,
)
def test_spec_with_values_of_another_type(checkpoint, change):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize(
    "change",
    [{"mix_bias": "x"}, {"step_gain": None}, {"directions": ["adam", {"name": "adam", "b1": "x"}]}],
    ids=str,
)
def test_spec_with_a_word_for_a_number(checkpoint, change):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("key", ["hidden", "layers", "step"])
def test_spec_lacks_a_field(checkpoint, key):
    rewrite(checkpoint, lambda manifest: manifest["spec"].pop(key))
    sentence = sentence_of(l3rs.restore, checkpoint)
    assert "spec has fields" in sentence
    assert f"'{key}'" in sentence


@pytest.mark.parametrize("spec", [None, 5, [], "spec", [[1]]], ids=repr)
def test_spec_is_not_a_mapping(checkpoint, spec):
    rewrite(checkpoint, lambda manifest: manifest.update(spec=spec))
    assert "spec" in sentence_of(l3rs.restore, checkpoint)


def test_other_digest(checkpoint):
    rewrite(checkpoint, lambda manifest: manifest.update(sha256="0" * 64))
    sentence = sentence_of(l3rs.restore, checkpoint)
    assert sentence == f"{checkpoint / 'theta'} is damaged: its values do not have the digest that l3rs.json states"


def test_values_of_another_checkpoint(checkpoint, tmp_path):
    other = l3rs.save(tmp_path / "other", some_theta(seed=1), SPEC)
    shutil.rmtree(checkpoint / "theta")
    shutil.copytree(other / "theta", checkpoint / "theta")
    assert "is damaged: its values do not have the digest" in sentence_of(l3rs.restore, checkpoint)


def files_of(checkpoint):
    return sorted(file for file in (checkpoint / "theta").rglob("*") if file.is_file())


def refused_or_unharmed(checkpoint):
    """True if refused with an L3RSError. Any other exception, any other value, fails the test."""
    sentence = ""
    try:
        theta, _, _ = l3rs.restore(checkpoint)
    except l3rs.L3RSError as error:
        theta, sentence = None, str(error)
    if theta is not None:
        assert_same(theta, some_theta())
        return False
    assert sentence
    assert "\n" not in sentence
    return True


def flip_bytes(checkpoint, files, positions):
    """How often a checkpoint with one changed byte was refused, per file."""
    refused = {}
    for file in files:
        data = file.read_bytes()
        for position in positions(len(data)):
            file.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
            refused[file] = refused.get(file, 0) + refused_or_unharmed(checkpoint)
        file.write_bytes(data)
    assert not refused_or_unharmed(checkpoint)
    return refused


# Orbax leaves a thread behind when it fails, which complains that its event loop is gone.
orbax_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_thread
def test_a_changed_byte_in_any_file(checkpoint):
    files = files_of(checkpoint)
    refused = flip_bytes(checkpoint, files, lambda n: {0, n // 3, n // 2, n - 1})
    assert len(refused) == len(files) > 3
    assert sum(refused.values()) > 0


@orbax_thread
@pytest.mark.slow
def test_any_changed_byte_in_any_file(checkpoint):
    flip_bytes(checkpoint, [checkpoint / "l3rs.json", *files_of(checkpoint)], range)


@orbax_thread
def test_a_missing_or_empty_file(checkpoint):
    refused = 0
    for file in files_of(checkpoint):
        data = file.read_bytes()
        file.write_bytes(b"")
        refused += refused_or_unharmed(checkpoint)
        file.unlink()
        refused += refused_or_unharmed(checkpoint)
        file.write_bytes(data)
    assert refused > 0
    assert not refused_or_unharmed(checkpoint)


def test_missing_values(checkpoint):
    shutil.rmtree(checkpoint / "theta")
    assert sentence_of(l3rs.restore, checkpoint).startswith(f"{checkpoint / 'theta'} cannot be read: ")


def test_load_checks_the_horizon(original):
    assert sentence_of(l3rs.load, original, 0) == "total_steps is 0; it must be a whole number ≥ 1"


def test_nothing_in_a_checkpoint_names_the_machine_it_was_made_on(original):
    for file in original.rglob("*"):
        if file.is_file():
            assert str(original.parent).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(("version", "embedding"), [(1, "table"), (1, "descriptor")])
def test_a_checkpoint_of_every_format_steps_as_it_did(version, embedding):
    """`golden/` holds checkpoints and three steps as the code of that version made them; one loss is NaN."""
    name = f"v{version}" if embedding == "table" else f"v{version}-{embedding}"
    golden = Path(__file__).with_name("golden") / name
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
    shipped = [path.parent for path in (Path(__file__).resolve().parents[2] / "checkpoints").glob("*/l3rs.json")]
    assert shipped
    for folder in shipped:
        _, _, info = l3rs.restore(folder)
        assert {"task", "horizon", "generations", "config", "results"} <= set(info)
        assert (folder / "README.md").is_file()

"""Checkpoints by name and by URL: either what was saved is loaded, or there is one sentence."""

import os
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

import l3rs
from tests.l3rs.io.common import GOLDEN_1, ROOT, assert_golden, files, load_sentence

# Shipped


def test_shipped_names(tmp_path, monkeypatch):
    """They are found from any folder, whatever it contains; each is a checkpoint with a card."""
    monkeypatch.chdir(tmp_path)
    assert l3rs.available() == sorted(path.parent.name for path in ROOT.glob("checkpoints/*/l3rs.json"))
    assert "digits-mlp" in l3rs.available()
    for name in l3rs.available():
        assert l3rs.info(name) == l3rs.info(ROOT / "checkpoints" / name)
    l3rs.load("digits-mlp", total_steps=10)


def test_without_a_horizon_it_is_the_longest_of_meta_training(tmp_path):
    longest = l3rs.info("digits-mlp")["info"]["horizon"]["max"]
    theta, spec, _ = l3rs.restore("digits-mlp")
    params = {layer.path: np.full(layer.shape, 0.1, np.float32) for layer in spec.layers}
    steps = []
    for tx in (l3rs.load("digits-mlp", match="order"), l3rs.load("digits-mlp", longest, match="order")):
        updates, _ = jax.jit(tx.update)(params, tx.init(params), params, value=1.0)
        steps.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *steps)
    l3rs.save(tmp_path / "silent", theta, spec)
    with pytest.raises(l3rs.L3RSError, match="total_steps is missing, and the checkpoint does not state the horizon"):
        l3rs.load(tmp_path / "silent")


def test_a_horizon_beyond_that_of_meta_training_is_said():
    longest = l3rs.info("digits-mlp")["info"]["horizon"]["max"]
    with pytest.warns(UserWarning, match=f"total_steps is {longest + 1}; .* for at most {longest} steps") as warned:
        l3rs.load("digits-mlp", longest + 1)
    assert warned[0].filename == __file__


@pytest.mark.parametrize("load", [l3rs.load, l3rs.restore, l3rs.info])
def test_a_number_of_steps_in_place_of_a_checkpoint(load):
    with pytest.raises(l3rs.L3RSError, match=r"the checkpoint is 150; .*the number of steps is total_steps"):
        load(150)


def test_universal_fits_a_network_of_any_kind():
    params = {
        "stem": {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)},
        "norm": {"scale": np.ones(4, np.float32)},
        "whatever": np.ones((4, 7, 2), np.float32),
    }
    tx = l3rs.load("universal", 10)
    updates, _ = jax.jit(tx.update)(jax.tree.map(np.ones_like, params), tx.init(params), params, value=1.0)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert update.shape == param.shape
        assert 0 < np.abs(update).max() < 1


def test_a_folder_takes_precedence_over_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(GOLDEN_1, "digits-mlp")
    assert_golden("digits-mlp")


def test_no_such_name():
    assert load_sentence("digits") == (
        "digits is not an L3RS checkpoint: there is no such folder, and the shipped ones are "
        + ", ".join(l3rs.available())
    )


def test_names_in_pytorch():
    torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
    from l3rs.torch import L3RS, match_layers

    model = torch.nn.Sequential(torch.nn.Linear(196, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    assert L3RS(model.parameters(), "digits-mlp").total_steps == 500
    assert match_layers("digits-mlp", model.parameters())[-1].source == "layers/2/bias"


@pytest.mark.slow
def test_a_wheel_has_the_shipped_optimizers(tmp_path):
    """Built from the repository, unpacked, used from elsewhere."""
    setuptools = pytest.importorskip("setuptools", reason="setuptools is not installed")
    if int(setuptools.__version__.partition(".")[0]) < 77:
        pytest.skip(f"building needs setuptools 77, this is {setuptools.__version__}")
    source = tmp_path / "source"  # setuptools leaves a folder build/ behind
    for name in ("l3rs", "tasks", "metatrain", "checkpoints"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = ["pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", tmp_path / "wheels", source]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, timeout=300, cwd=tmp_path)
    (wheel,) = (tmp_path / "wheels").glob("l3rs-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        file.extractall(tmp_path / "site")
    assert not [name for name in names if name.startswith(("checkpoints", "tests"))]
    for package in ("l3rs", "tasks", "metatrain"):
        for module in (ROOT / package).rglob("*.py"):
            assert module.relative_to(ROOT).as_posix() in names
    code = "import l3rs; print(l3rs.__file__, *[name for name in l3rs.available() if l3rs.restore(name)])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "site/l3rs/__init__.py"), *l3rs.available()]


# Object stores


@pytest.fixture
def memory():
    """A folder of fsspec's store in memory, with the golden checkpoint and unrelated files in it."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    store = fsspec.filesystem("memory")
    for name, content in files(GOLDEN_1).items():
        store.pipe_file(f"/bucket/golden/{name}", content)
    store.pipe_file("/bucket/golden/other/large", b"0")
    yield store
    store.rm("/bucket", recursive=True)


def test_url(memory, monkeypatch):
    read = []
    original = type(memory).open

    def open_and_note(self, path, *args, **kwargs):
        read.append(path)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "open", open_and_note)
    assert_golden("memory://bucket/golden")
    assert read
    assert not [path for path in read if "large" in path]


def test_url_of_something_else(memory):
    url = "memory://bucket/none"
    assert load_sentence(url) == f"{url} is not an L3RS checkpoint: it has no l3rs.json"
    url = "memory://bucket/golden"
    memory.pipe_file("/bucket/golden/l3rs.json", b"{}")
    assert load_sentence(url) == f"{url}/l3rs.json is damaged: it lacks features, format, info, sha256, spec"
    memory.pipe_file("/bucket/golden/l3rs.json", (GOLDEN_1 / "l3rs.json").read_bytes())
    memory.rm("/bucket/golden/theta", recursive=True)
    assert load_sentence(url).startswith(f"{url}/theta cannot be read: ")


def test_url_that_leaves_its_folder(memory):
    memory.pipe_file("/bucket/golden/theta/../../outside", b"0")
    if "outside" not in " ".join(memory.find("/bucket/golden")):
        pytest.skip("this store has no such names")
    assert "it has a file 'theta/../../outside'" in load_sentence("memory://bucket/golden")


@pytest.mark.parametrize(
    ("missing", "url", "package"),
    [("fsspec", "memory://x", "fsspec"), ("gcsfs", "gs://bucket/x", "gcsfs"), ("s3fs", "s3://bucket/x", "s3fs")],
)
def test_missing_driver(monkeypatch, missing, url, package):
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setitem(sys.modules, missing, None)
    assert load_sentence(url) == f"{url} needs a package that is not installed: {package}"


def test_unknown_scheme():
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    assert load_sentence("nothing://x").startswith(
        "nothing://x is not a checkpoint URL: ValueError: Protocol not known"
    )


def test_store_that_does_not_answer(memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("gone")

    monkeypatch.setattr(type(memory), "isfile", fail)
    assert load_sentence("memory://bucket/golden") == "memory://bucket/golden cannot be read: RuntimeError: gone"

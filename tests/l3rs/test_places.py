"""Checkpoints by name and by URL: what arrives is what was saved, or one sentence."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest

import l3rs
from l3rs import places

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden") / "v1" / "checkpoint"
SHA256 = json.loads((GOLDEN / "l3rs.json").read_text())["sha256"]


def assert_golden(place):
    """It is the golden checkpoint, whoever reads it."""
    assert l3rs.info(place)["sha256"] == SHA256
    theta, spec, info = l3rs.restore(place)
    assert info["task"] == "golden"
    expected, expected_spec, _ = l3rs.restore(GOLDEN)
    assert spec == expected_spec
    jax.tree.map(np.testing.assert_array_equal, theta, expected)
    params = {"dense": {"kernel": np.zeros((4, 5), np.float32)}}
    assert l3rs.match_layers(place, params)[0].row == 3
    l3rs.load(place, 10).init(params)


def sentence_of(place):
    with pytest.raises(l3rs.L3RSError) as error:
        l3rs.load(place, 10)
    assert "\n" not in str(error.value)
    return str(error.value)


def files(folder=GOLDEN):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Shipped


def test_shipped_names(tmp_path, monkeypatch):
    """From anywhere, whatever is there; each is a checkpoint with a card."""
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
        updates, _ = tx.update(params, tx.init(params), params, value=1.0)
        steps.append(updates)
    jax.tree.map(np.testing.assert_array_equal, *steps)
    l3rs.save(tmp_path / "silent", theta, spec)
    with pytest.raises(l3rs.L3RSError, match="total_steps is missing, and the checkpoint does not say up to which"):
        l3rs.load(tmp_path / "silent")


def test_universal_fits_a_network_of_any_kind():
    params = {
        "stem": {"kernel": np.ones((3, 3, 1, 4), np.float32), "bias": np.zeros(4, np.float32)},
        "norm": {"scale": np.ones(4, np.float32)},
        "whatever": np.ones((4, 7, 2), np.float32),
    }
    tx = l3rs.load("universal", 10)
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params, value=1.0)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert update.shape == param.shape
        assert 0 < np.abs(update).max() < 1


def test_a_folder_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink(GOLDEN, "digits-mlp")
    assert_golden("digits-mlp")


def test_no_such_name():
    assert sentence_of("digits") == (
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
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
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
    code = "import l3rs; print(l3rs.__file__, *[l3rs.restore(name)[1].step for name in l3rs.available()])"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "site/l3rs/__init__.py"), *["rms"] * len(l3rs.available())]


# Object stores


@pytest.fixture
def memory():
    """A folder of fsspec's store in memory, with the golden checkpoint in it and what does not belong to it."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    store = fsspec.filesystem("memory")
    for name, content in files().items():
        store.pipe_file(f"/bucket/golden/{name}", content)
    store.pipe_file("/bucket/golden/other/large", b"0")
    yield store
    store.rm("/bucket", recursive=True)


def test_url(memory, monkeypatch):
    read = []
    original = type(memory).cat_file

    def cat_file(self, path, *args, **kwargs):
        read.append(path)
        return original(self, path, *args, **kwargs)

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    assert_golden("memory://bucket/golden")
    assert not [path for path in read if "large" in path]


def test_url_of_something_else(memory):
    url = "memory://bucket/none"
    assert sentence_of(url) == f"{url} is not an L3RS checkpoint: it has no l3rs.json"
    url = "memory://bucket/golden"
    memory.pipe_file("/bucket/golden/l3rs.json", b"{}")
    assert sentence_of(url) == f"{url}/l3rs.json is damaged: it lacks features, format, info, sha256, spec"
    memory.pipe_file("/bucket/golden/l3rs.json", (GOLDEN / "l3rs.json").read_bytes())
    memory.rm("/bucket/golden/theta", recursive=True)
    assert sentence_of(url).startswith(f"{url}/theta cannot be read: ")


def test_url_that_leaves_its_folder(memory):
    memory.pipe_file("/bucket/golden/theta/../../outside", b"0")
    if "outside" not in " ".join(memory.find("/bucket/golden")):
        pytest.skip("this store has no such names")
    assert "it has a file 'theta/../../outside'" in sentence_of("memory://bucket/golden")


@pytest.mark.parametrize(
    ("missing", "url", "package"),
    [("fsspec", "memory://x", "fsspec"), ("gcsfs", "gs://bucket/x", "gcsfs"), ("s3fs", "s3://bucket/x", "s3fs")],
)
def test_missing_driver(monkeypatch, missing, url, package):
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    monkeypatch.setitem(sys.modules, missing, None)
    assert sentence_of(url) == f"{url} needs a package that is not installed: {package}"


def test_unknown_scheme():
    pytest.importorskip("fsspec", reason="fsspec is not installed")
    assert sentence_of("nothing://x").startswith(
        "nothing://x is no place of a checkpoint: ValueError: Protocol not known"
    )


def test_store_that_does_not_answer(memory, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("gone")

    monkeypatch.setattr(type(memory), "isfile", fail)
    assert sentence_of("memory://bucket/golden") == "memory://bucket/golden cannot be read: RuntimeError: gone"


# The Hugging Face Hub


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The end points of the Hub that a download needs, for one repository `owner/golden` with a tag `v1`."""

    content: ClassVar = {**files(), "README.md": b"not asked for"}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        Hub.asked.append(path)
        name = path.removeprefix(f"/owner/golden/resolve/{COMMIT}/")
        if path in [f"/api/models/owner/golden/revision/{name}" for name in ("main", "v1", COMMIT)]:
            self.answer(json.dumps({"id": "owner/golden", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/owner/golden/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": self.tag(name)}
                for name, content in self.content.items()
            ]
            self.answer(json.dumps(tree).encode())
        elif name in self.content:
            headers = {
                "ETag": f'"{self.tag(name)}"',
                "X-Repo-Commit": COMMIT,
                "Content-Type": "application/octet-stream",
            }
            self.answer(self.content[name], headers)
        else:
            self.answer(b"{}", {"X-Error-Code": "RevisionNotFound"}, 404)

    do_GET = do_HEAD  # noqa: N815

    @staticmethod
    def tag(name):
        return f"{sum(name.encode()):040x}"

    def answer(self, content, headers=None, status=200):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """Runs code in a process for which a local server is the Hub."""
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    Hub.asked.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }

    def run(code, **more):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**environment, **more},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    yield run
    server.shutdown()
    server.server_close()


USE = "from tests.l3rs.test_places import assert_golden, sentence_of;"


def test_hub(hub, tmp_path):
    """The branch main, a tag, a commit; from the cache, whose files are links to blobs, when offline."""
    hub(f"{USE} assert_golden('hf://owner/golden'); assert_golden('hf://owner/golden@v1')")
    assert f"/owner/golden/resolve/{COMMIT}/l3rs.json" in Hub.asked
    assert not [path for path in Hub.asked if "README" in path]
    links = [path for path in (tmp_path / "hub").rglob("snapshots/*/theta/**/*") if path.is_symlink()]
    assert links
    assert all("blobs" in os.readlink(path) for path in links)
    n_asked = len(Hub.asked)
    hub(f"{USE} assert_golden('hf://owner/golden'); assert_golden('hf://owner/golden@{COMMIT}')", HF_HUB_OFFLINE="1")
    assert len(Hub.asked) == n_asked


def test_hub_without_it(hub):
    """A revision that is not there; nothing in the cache when offline."""
    said = hub(f"{USE} print(sentence_of('hf://owner/golden@v9'))")
    assert said.startswith("hf://owner/golden@v9 cannot be downloaded: ")
    said = hub(f"{USE} print(sentence_of('hf://owner/golden'))", HF_HUB_OFFLINE="1")
    assert said.startswith("hf://owner/golden cannot be downloaded: LocalEntryNotFoundError: ")


@pytest.mark.parametrize("url", ["hf://golden", "hf://owner/golden/sub", "hf://owner/golden@", "hf://"])
def test_names_that_the_hub_cannot_have(url):
    assert sentence_of(url) == (
        f"{url} is not a name on the Hub; allowed are hf://owner/name and hf://owner/name@revision"
    )


def test_hub_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert sentence_of("hf://owner/golden") == (
        "hf://owner/golden needs a package that is not installed: huggingface_hub"
    )


def test_errors_of_a_hub_checkpoint_name_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert sentence_of("hf://a/b") == "hf://a/b is not an L3RS checkpoint: it has no l3rs.json"
    assert places._first_line(ValueError("")) == "ValueError"

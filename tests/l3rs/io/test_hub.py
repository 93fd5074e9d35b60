"""Checkpoints on the Hugging Face Hub, with a local server in its place."""

import http.server
import json
import os
import subprocess
import sys
import threading
from typing import ClassVar

import pytest

from tests.l3rs.io.common import GOLDEN_1, ROOT, files, load_sentence

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
    """The end points of the Hub that a download needs, for one repository `owner/golden` with a tag `v1`."""

    content: ClassVar = {**files(GOLDEN_1), "README.md": b"not asked for"}
    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        Hub.asked.append(path)
        name = path.removeprefix(f"/owner/golden/resolve/{COMMIT}/")
        if path in [f"/api/models/owner/golden/revision/{name}" for name in ("main", "v1", COMMIT)]:
            siblings = [{"rfilename": name} for name in self.content]  # what older clients read
            self.answer(json.dumps({"id": "owner/golden", "sha": COMMIT, "siblings": siblings}).encode())
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


USE = "from tests.l3rs.io.common import assert_golden, load_sentence;"


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


def test_hub_without_the_checkpoint(hub):
    """A revision that does not exist; an empty cache when offline."""
    said = hub(f"{USE} print(load_sentence('hf://owner/golden@v9'))")
    assert said.startswith("hf://owner/golden@v9 cannot be downloaded: ")
    said = hub(f"{USE} print(load_sentence('hf://owner/golden'))", HF_HUB_OFFLINE="1")
    assert said.startswith("hf://owner/golden cannot be downloaded: LocalEntryNotFoundError: ")


@pytest.mark.parametrize("url", ["hf://golden", "hf://owner/golden/sub", "hf://owner/golden@", "hf://"])
def test_names_that_the_hub_does_not_allow(url):
    assert load_sentence(url) == (
        f"{url} is not a name on the Hub; allowed are hf://owner/name and hf://owner/name@revision"
    )


def test_hub_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert load_sentence("hf://owner/golden") == (
        "hf://owner/golden needs a package that is not installed: huggingface_hub"
    )


def test_errors_of_a_hub_checkpoint_name_the_hub(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load_sentence("hf://a/b") == "hf://a/b is not an L3RS checkpoint: it has no l3rs.json"

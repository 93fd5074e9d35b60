"""The site is built, and a browser shows every page: the console is silent, and nothing is too wide for it."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT
from tests.metatrain.pages import browse, needs_browser

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
pytest.importorskip("material", reason="the extra `docs` is not installed")
pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")

pytestmark = pytest.mark.slow

_DRIVER = """<!DOCTYPE html><body style="margin: 0">{frames}<script>
const text = elements => elements.slice(0, 3).map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 60))
addEventListener('load', () => {{
  const found = [...document.querySelectorAll('iframe')].map(frame => {{
    const page = frame.contentDocument, inner = frame.contentWindow.innerWidth
    const wide = [...page.querySelectorAll('.md-content *')].filter(e =>
      !e.closest('.md-typeset__scrollwrap, pre, .highlight, svg, .tabbed-labels, .md-sidebar')
      && e.getBoundingClientRect().right > inner + 1)
    return {{page: frame.dataset.page, inner, width: page.documentElement.scrollWidth,
      title: page.title, cut: text([...page.querySelectorAll('.md-typeset__scrollwrap')].filter(
        e => e.scrollWidth > e.clientWidth + 1)), wide: text(wide)}}
  }})
  document.title = JSON.stringify(found)
}})
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "built"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Silent, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _Silent(http.server.SimpleHTTPRequestHandler):
    """Serves the site without its search index: every page would build it anew, a second of computing each."""

    _INDEX = b'{"config": {"lang": ["en"], "separator": " ", "pipeline": [], "fields": {}}, "docs": []}'

    def do_GET(self) -> None:
        if not self.path.endswith("search/search_index.json"):
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(self._INDEX)

    def log_message(self, *_: object) -> None:
        pass


def test_links(site: Path) -> None:
    """What `make docs` checks; and the pages are all there."""
    command = [sys.executable, ROOT / "tools" / "site" / "check_links.py", site]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    built = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    assert {"start.html", "cards/universal.html", "reference/cli.html", "reference/configuration.html"} <= built


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_in_a_browser(site: Path, address: str, width: int, tmp_path: Path) -> None:
    pages = sorted(file.relative_to(site).as_posix() for file in site.rglob("*.html") if file.name != "driver.html")
    frame = '<iframe data-page="{0}" src="{0}" width="{1}" height="900" style="border: 0"></iframe>'
    (site / "driver.html").write_text(_DRIVER.format(frames="".join(frame.format(page, width) for page in pages)))
    options = ("--window-size=1400,1000", "--dump-dom")
    shown = browse(f"{address}/driver.html", *options, profile=tmp_path / "profile", timeout=600)
    assert "CONSOLE" not in shown.stderr, re.findall("CONSOLE.*", shown.stderr)[:5]
    title = re.search(r"<title>(\[.*?\])</title>", shown.stdout, re.DOTALL)
    assert title, shown.stderr[-2000:]
    found = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert [row["page"] for row in found] == pages
    for row in found:
        assert row["inner"] == width
        assert row["width"] <= width, row
        assert row["wide"] == [], row
        assert width < 1280 or row["cut"] == [], row  # on a phone tables scroll
        assert "l3rs" in row["title"]


@needs_browser
def test_search_in_a_folder(site: Path, tmp_path: Path) -> None:
    """A page that is opened from a folder, without a server, finds words of other pages."""
    url = f"{(site / 'start.html').as_uri()}?q=reparametrise"
    shown = browse(url, "--virtual-time-budget=20000", "--dump-dom", profile=tmp_path / "profile")
    assert "CONSOLE" not in shown.stderr, re.findall("CONSOLE.*", shown.stderr)[:5]
    results = re.findall(r'<a href="[^"]*/(\w+/[\w-]+)\.html[^"]*" class="md-search-result__link"', shown.stdout)
    assert "reference/configuration" in results

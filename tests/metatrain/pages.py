"""Checks of pages: well-formed HTML, and how a browser displays it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

_VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting while it reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def check_page(file: Path) -> Page:
    """Well-formed, self-contained, and the same in light and dark."""
    source = file.read_text()
    page = Page(source)
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values(), default=1) == 1
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not re.search(r"""(?:href|src|url\()\s*=?\s*["'(]?\s*(?:https?:)?//""", source)
    assert not re.search(r"@import|/root|/home|/work", source)
    for used in re.findall(r'(?:href="|url\()#([^")]+)', source):
        assert used in ids
    assert "@media screen and (prefers-color-scheme: dark)" in source
    assert "@media print" in source
    defined = set(re.findall(r"(--\w+):", source))
    assert set(re.findall(r"var\((--\w+)\)", source)) <= defined | {"--share", "--width"}
    for tag, attrs in page.tags:
        if tag == "svg":
            assert attrs.get("aria-hidden") or (attrs.get("role") == "img" and attrs.get("aria-label"))
        if tag == "th":
            assert attrs.get("scope") in ("row", "col")
        if tag == "html":
            assert attrs["lang"] == "en"
    return page


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_PROBE = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg, .unseen')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className);
  parent.document.title = JSON.stringify({inner: innerWidth, width: document.documentElement.scrollWidth, wide,
    paper: getComputedStyle(document.body).backgroundColor});
})</script>"""


def browse(
    page: Path | str, *options: str, profile: Path | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Chromium on a file, or on a URL with a folder for its profile."""
    assert BROWSER
    if isinstance(page, Path):
        page, profile = page.as_uri(), page.parent / "profile"
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={profile}", *options, page]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)


def check_in_a_browser(source: str, folder: Path, width: int, scheme: str) -> None:
    """With everything open, nothing overflows to the right, the console is empty, and the background is light or
    dark."""
    source = source.replace("<details>", "<details open>").replace("</main>", f"</main>{_PROBE}")
    page = folder / "page.html"
    # A frame, because a browser's window is never as narrow as a phone.
    page.write_text(
        f'<!DOCTYPE html><html style="color-scheme: light dark"><body style="margin: 0"><iframe width="{width}" '
        f'height="900" style="border: 0" srcdoc="{html.escape(source)}"></iframe></body></html>'
    )
    preferred = f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"
    shown = browse(page, "--window-size=1400,1000", preferred, "--dump-dom")
    assert "CONSOLE" not in shown.stderr
    title = re.search(r"<title>({.*?})</title>", shown.stdout)
    assert title
    found = json.loads(title[1])
    assert found["inner"] == width
    assert found["width"] <= width
    assert found["wide"] == []
    brightness = np.mean([int(x) for x in re.findall(r"\d+", found["paper"])[:3]])
    assert (brightness > 128) == (scheme == "light")


needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

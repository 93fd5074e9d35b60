"""Checks of a built site: every link within it leads somewhere, and no page loads anything from a network.

python tools/site/check_links.py build/site
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href"}


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given[name] or "" for name in ("id", "name") if name in given}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        if tag in _LOADS and given.get(_LOADS[tag]) and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given[_LOADS[tag]] or "")
        self.loads += re.findall(r"url\([\"']?([^\"')]+)", given.get("style") or "")


def problems(site: Path) -> list[str]:
    """Sentences about what is wrong, in the order of the pages."""
    site = site.resolve()
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    found = []
    for file, page in pages.items():
        name = file.relative_to(site)
        found += [f"{name} loads {url} from a network" for url in page.loads if urlsplit(url).netloc]
        for url in [*page.links, *page.loads]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc or (file.name == "404.html"):
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{name} has a link to {url}, which does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                found.append(f"{name} has a link to {url}, where there is no such section")
    for file in sorted(site.rglob("*.css")):
        for url in re.findall(
            r"(?:url\(|@import\s+)[\"']?((?:https?:)?//[^\"')\s]+)", file.read_text(encoding="utf-8")
        ):
            found.append(f"{file.relative_to(site)} loads {url} from a network")
    return list(dict.fromkeys(found))


def main(folder: str) -> int:
    found = problems(Path(folder))
    for sentence in found:
        print(sentence, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

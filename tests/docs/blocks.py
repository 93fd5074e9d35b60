"""The fenced code blocks of a Markdown page, and the comments before them that say how a test runs them.

<!-- not run: REASON -->       the block is only parsed
<!-- needs: timm, peft -->     it is run where these packages are installed
<!-- run after: STATEMENTS --> these are run before
<!-- run with: key=value … --> its `metatrain run` commands get these arguments, and are run
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_MARK = re.compile(r"\s*<!-- (not run|needs|run after|run with): (.+) -->\s*")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    title: str  # of a file, or ""
    code: str
    marks: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        needed = re.split(r",\s*", self.marks["needs"]) if "needs" in self.marks else []
        return [package for package in needed if importlib.util.find_spec(package) is None]


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, in order."""
    found, marks, lines = [], {}, enumerate(page.read_text(encoding="utf-8").splitlines(), start=1)
    for number, line in lines:
        if mark := _MARK.fullmatch(line):
            marks[mark[1]] = mark[2]
        elif fence := re.fullmatch(r"( *)```(\w+)(?: title=\"([^\"]+)\")?", line):
            body = []
            for _, inner in lines:
                if inner == f"{fence[1]}```":
                    break
                body.append(inner)
            code = textwrap.dedent("\n".join(body)) + "\n"
            found.append(Block(page, number, fence[2], fence[3] or "", code, marks))
            marks = {}
        elif line.strip():
            assert not marks, f"{page}:{number}: a comment for tests that no code block follows"
    return [block for block in found if block.language in languages]

"""Files of the repository that are also pages of the site. Links between them become links between pages."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

INCLUDED = {
    "CHANGELOG.md": "contribute/changelog.md",
    "CONTRIBUTING.md": "contribute/index.md",
    "SECURITY.md": "operate/security.md",
    "checkpoints/digits-mlp/README.md": "cards/digits-mlp.md",
    "checkpoints/resnet20-imagenet25/README.md": "cards/resnet20-imagenet25.md",
    "checkpoints/resnet8-imagenet25/README.md": "cards/resnet8-imagenet25.md",
    "checkpoints/universal/README.md": "cards/universal.md",
    "l3rs/baselines/README.md": "baselines.md",
}

_WIDE = "---\nhide: [toc]\n---\n\n"  # the tables of the cards need the width
_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]*)(#[^)\s]*)?\)")


def included_page(root: Path, source: str, page: str) -> str:
    """The text of `source` as the page `page`.

    A link to another file of the repository becomes a link to its page, or plain text if it has none.

    Raises:
      ValueError: a link leads to no file.
    """

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if not (root / file).exists():
            raise ValueError(f"{source} has a link to {target}, which does not exist")
        to = INCLUDED.get(file, file.removeprefix("docs/") if file.startswith("docs/") else None)
        return text if to is None else f"[{text}]({os.path.relpath(to, posixpath.dirname(page) or '.')}{anchor})"

    text = _LINK.sub(link, (root / source).read_text(encoding="utf-8"))
    return _WIDE + text if page.startswith("cards/") else text

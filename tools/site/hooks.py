"""Pages of the site that are made when it is built: of the code, and of files elsewhere in the repository."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from cli_page import cli_page  # noqa: E402
from configuration_page import configuration_page  # noqa: E402
from included import INCLUDED, included_page  # noqa: E402


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in `docs/`."""
    pages = {"reference/cli.md": cli_page(), "reference/configuration.md": configuration_page()}
    pages |= {page: included_page(ROOT, source, page) for source, page in INCLUDED.items()}
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files

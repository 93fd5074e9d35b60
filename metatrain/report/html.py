"""Self-contained pages from templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from l3rs.io.files import write_atomically

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("metatrain.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(file: Path, template: str, **context: Any) -> Path:
    """Fill in a template and write the page, which is also the value returned."""
    write_atomically(file, _TEMPLATES.get_template(template).render(**context))
    return file

"""Pages from templates; they need nothing but themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("metatrain.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(file: Path, template: str, **context: Any) -> Path:
    """Fill a template and write it, such that a reader finds either the page before or the whole new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".tmp")
    scratch.write_text(_TEMPLATES.get_template(template).render(**context))
    os.replace(scratch, file)
    return file

"""Pages from templates; they need nothing but themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from metatrain.evaluation.results import write_whole

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("metatrain.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_page(file: Path, template: str, **context: Any) -> Path:
    """Fill a template and write it."""
    return write_whole(file, _TEMPLATES.get_template(template).render(**context))

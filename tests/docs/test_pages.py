"""What the site's pages say of the code is complete: public names, commands, configuration keys."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import typer

import l3rs
import l3rs.baselines
import metatrain
import tasks
from metatrain.cli import app
from metatrain.config import Config
from tests.docs.blocks import ROOT

pytest.importorskip("griffe", reason="the extra `docs` is not installed")
sys.path.insert(0, str(ROOT / "tools" / "site"))

from check_links import problems
from cli_page import cli_page
from configuration_page import configuration_page, keys
from included import INCLUDED, included_page

_ELSEWHERE = {  # their meaning is in another page, or in the docstring of the function that returns them
    "BASELINES",
    "TASKS",
    "AVGradState",
    "AdaBoundState",
    "Coefficients",
    "MADAState",
    "PadamState",
    "SWATSState",
}


def test_the_reference_has_every_public_name() -> None:
    written = "\n".join(file.read_text() for file in (ROOT / "docs" / "reference").glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)", written, re.MULTILINE))
    packages = (l3rs, l3rs.baselines, tasks, metatrain)
    public = {f"{package.__name__}.{name}" for package in packages for name in set(package.__all__) - _ELSEWHERE}
    assert not public - listed


def test_every_key_has_a_meaning() -> None:
    page = configuration_page()
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| (.*) \|$", page, re.MULTILINE)
    assert {key for key, meaning in rows if not meaning.strip()} == set()
    shown = {key for key, _ in rows}
    for section, field in Config.model_fields.items():
        if not hasattr(field.annotation, "model_fields"):
            continue
        assert {f"{section}.{key}" for key in keys(field.annotation)} <= shown  # type: ignore[arg-type]
    assert {"task.starts", "task.augment.label_noise", "outer.horizon.max", "optimizer.step_scale"} <= shown


def test_every_command_and_option_has_a_meaning() -> None:
    page = cli_page()
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert section, name
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                assert option.opts[-1] in section, (name, option.opts)
    assert not re.findall(r"^\|.*\|\s*\|$", page, re.MULTILINE)


def test_links_between_files_become_links_between_pages() -> None:
    for source, page in INCLUDED.items():
        text = included_page(ROOT, source, page)
        assert text.removeprefix("---\nhide: [toc]\n---\n\n").startswith("# ")
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert "://" in target or target.endswith(".md"), (source, target)


def test_the_checker_finds_what_is_wrong(tmp_path: Any) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html">x</a><a href="a.html#no">x</a><a href="a.html#yes" id="yes">x</a><a href="https://x.org">x</a>'
        '<script src="//cdn.org/x.js"></script>'
    )
    (tmp_path / "a.css").write_text("@import url(https://fonts.org/x.css);")
    found = problems(tmp_path)
    assert len(found) == 4
    assert any("b.html" in text for text in found)
    assert any("#no" in text for text in found)
    assert any("cdn.org" in text for text in found)
    assert any("fonts.org" in text for text in found)

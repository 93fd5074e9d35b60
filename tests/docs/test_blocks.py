"""Every code block of the site and the README is run, or is marked with the reason why not."""

from __future__ import annotations

import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import typer
import yaml

from metatrain.cli import app
from metatrain.config import check_config
from tests.docs.blocks import PAGES, ROOT, Block, blocks

_TOOLS = {"cd", "export", "kubectl", "pip", "sbatch"}  # commands that are not ours
_SLOW = {"start.md", "index.md", "trust.md"}  # several networks, or updates outside of jax.jit: many small compilations


def _id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _shell() -> list[Block]:
    return [block for page in PAGES for block in blocks(page, "bash")]


def _commands(block: Block) -> list[list[str]]:
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def _pages() -> list[Any]:
    pages = [page for page in PAGES[1:] if blocks(page, "python")]
    return [pytest.param(page, id=_id(page), marks=pytest.mark.slow if page.name in _SLOW else ()) for page in pages]


@pytest.mark.parametrize("page", _pages())
def test_python(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page are one program, in one namespace; a block with a title is a file of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    missing = []
    for block in blocks(page, "python"):
        program = compile(block.code, block.name, "exec")
        if block.title:
            (tmp_path / block.title).write_text(block.code)
            monkeypatch.delitem(sys.modules, block.title.removesuffix(".py"), raising=False)
        elif block.missing():
            missing += [f"{block.name} needs {', '.join(block.missing())}"]
        elif "not run" not in block.marks:
            exec(block.marks.get("run after", ""), names)
            exec(program, names)
    if missing:
        pytest.skip("; ".join(missing))


def _readme(index: int) -> str:
    return blocks(ROOT / "README.md", "python")[index].code


def test_the_readme_in_jax(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    layers = {
        i: {"kernel": jnp.ones((a, b)) / a, "bias": jnp.zeros(b)}
        for i, (a, b) in enumerate(itertools.pairwise((196, 64, 64, 10)))
    }

    def loss_fn(params: Any, batch: Any) -> Any:
        x = batch
        for layer in params["layers"].values():
            x = x @ layer["kernel"] + layer["bias"]
        return jnp.mean(x**2)

    names: dict[str, Any] = {"params": {"layers": layers}, "batch": jnp.ones((4, 196)), "loss_fn": loss_fn}
    before = loss_fn(names["params"], names["batch"])
    exec(_readme(0), names)
    assert loss_fn(names["params"], names["batch"]) != before


def test_the_readme_in_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(196, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    x, y = torch.randn(32, 196), torch.arange(32) % 10
    names: dict[str, Any] = {"model": model, "loss_fn": torch.nn.functional.cross_entropy, "x": x, "y": y}
    exec(_readme(1), names)
    assert names["loss_fn"](model(x), y).item() < names["loss"].item()


def test_commands_that_texts_name_exist() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        text = page.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^    |`)metatrain ([a-z-]+)", text, re.MULTILINE)) <= commands, page
        assert set(re.findall(r"(?:^    |`)make ([a-z-]+)", text, re.MULTILINE)) <= targets, page


def test_a_block_that_is_not_run_says_why() -> None:
    for block in _shell():
        assert block.marks.keys() & {"not run", "run with"}, f"{block.name}: neither run nor marked"
    for page in PAGES:
        for block in blocks(page, "python", "bash"):
            assert block.marks.get("not run", "a reason").strip(), block.name


@pytest.mark.parametrize("block", _shell(), ids=lambda block: block.name)
def test_commands_and_options_exist(block: Block) -> None:
    """Whether it is run or not."""
    group: Any = typer.main.get_command(app)
    for name, *words in _commands(block):
        if name == "metatrain":
            group.commands[words[0]].make_context(words[0], words[1:])
        elif name == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        elif name == "python":
            assert (ROOT / words[0]).is_file() or importlib.util.find_spec(words[1]), words
        else:
            assert name in _TOOLS, name


@pytest.mark.parametrize("block", [b for b in _shell() if "run with" in b.marks], ids=lambda block: block.name)
def test_shell(block: Block, tmp_path: Path) -> None:
    for part in blocks(block.page, "python", "yaml"):
        if part.title:
            (tmp_path / part.title).write_text(part.code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name, command, *words in _commands(block):
        assert name == "metatrain"
        more = shlex.split(block.marks["run with"]) if command == "run" else []
        script = [sys.executable, "-m", "metatrain.cli", command, *words, *more]
        done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("runs/*/optimizer"))


def test_yaml_is_a_part_of_a_configuration() -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml")]
    assert found
    for block in found:
        check_config({"name": "x", "task": {"name": "digits"}, **yaml.safe_load(block.code)}, block.name)


def test_files_that_pages_name_exist() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(
            r"(?<![\w/.-])(?:configs|checkpoints|examples|tests|tools|l3rs|metatrain)/[\w./-]*\w", text
        ):
            assert (ROOT / name).exists(), f"{page}: {name}"

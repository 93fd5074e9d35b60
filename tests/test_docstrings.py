"""Every public name says what it is, and the examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("l3rs", "tasks", "metatrain")
FACES = ("l3rs", "l3rs.torch", "l3rs.baselines", "l3rs.baselines.iomt", "tasks", "tasks.torch", "metatrain")


def module_files() -> dict[str, Path]:
    """All modules of the three packages, by name."""
    files = (file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    names = {file: file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files}
    return {name.removesuffix(".__init__"): file for file, name in sorted(names.items())}


def imported(name: str) -> ModuleType:
    if name.startswith(("l3rs.torch", "tasks.torch")):
        pytest.importorskip("torch", reason="the extra `torch` is not installed")
    return importlib.import_module(name)


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(name, value) of what a module makes public: its functions and classes, and their public methods."""
    names = getattr(module, "__all__", None)
    if names is None:
        names = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    for name in names:
        value = getattr(module, name)
        if name.startswith("_") or not (inspect.isclass(value) or inspect.isroutine(value)):
            continue  # data, which a comment describes
        yield f"{module.__name__}.{name}", value
        if inspect.isclass(value) and value.__module__.startswith(PACKAGES):
            for method, member in vars(value).items():
                routine = inspect.isroutine(member) or isinstance(member, property | classmethod | staticmethod)
                inherited = any(hasattr(base, method) for base in value.__mro__[1:])
                if routine and not method.startswith("_") and not inherited:
                    yield f"{module.__name__}.{name}.{method}", member


@pytest.mark.parametrize("face", FACES)
def test_public_names_have_docstrings(face):
    found = dict(public(imported(face)))
    assert found
    # Python gives classes without a docstring that of their signature.
    lacking = [
        name
        for name, value in found.items()
        if not (vars(value) if inspect.isclass(value) else {"__doc__": value.__doc__}).get("__doc__")
        or str(value.__doc__).startswith(f"{name.rpartition('.')[2]}(")
    ]
    assert not lacking


def test_modules_have_docstrings():
    texts = {name: file.read_text(encoding="utf-8") for name, file in module_files().items()}
    assert not [name for name, text in texts.items() if text and not text.startswith('"""')]


EXAMPLES = [name for name, file in module_files().items() if ">>> " in file.read_text(encoding="utf-8")]


def test_there_are_examples():
    assert len(EXAMPLES) > 10


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = doctest.testmod(imported(name))
    assert result.attempted
    assert not result.failed

"""Check a release before it is published: build it, look into it, install it, and use it as a new user does.

    make release-check                                  # every Python from 3.11 to 3.13 that is here
    make release-check ARGS='--python 3.12 --extra jax'  # a part of it again

1. Build the sdist and, from it, the wheel of the last commit into dist/, and run `twine check`.
2. The wheel is smaller than 1 MB and holds every file of checkpoints/ and every module.
3. For each Python: install the wheel with an extra into a new environment, and try it from an empty folder. The pages'
   five-minute example runs with PyTorch alone and with JAX alone. Extras that are not tried are resolved.

Prints a line for each check; the exit code is 1 if one failed. Packages come from where uv is set up to take them.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

from tests.docs.blocks import blocks

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
PYTHONS = ("3.11", "3.12", "3.13")
MOST_BYTES = 1_000_000
TIMEOUT = 1800  # seconds, of any command

BASE = """
import l3rs
assert l3rs.available() == {shipped}, l3rs.available()
assert all(l3rs.restore(name) for name in l3rs.available())
try:
    l3rs.load()
except ImportError as error:
    assert "l3rs[jax]" in str(error), error
else:
    raise AssertionError("loaded without JAX")
"""
ALONE = "import importlib.util; assert importlib.util.find_spec({other!r}) is None, '{other} is installed, too'"
TINY = """
name: tiny
task: {name: digits, target: uci, init: random}
outer: {steps: 2, population: 4, horizon: {min: 2, max: 4}}
"""
RUN = "import l3rs; assert l3rs.load('runs/tiny/optimizer').init; print(l3rs.info('runs/tiny/optimizer')['spec'])"


@dataclasses.dataclass(frozen=True)
class Trial:
    """An environment with the wheel, and the commands that must succeed there, from an empty folder."""

    extra: str  # "" for none
    commands: tuple[tuple[str, ...], ...]  # the first word is a program of the environment
    also: tuple[str, ...] = ()  # packages that the commands need besides
    files: tuple[tuple[str, str], ...] = ()  # (name, content) in the folder


def trials() -> list[Trial]:
    shipped = sorted(path.name for path in (ROOT / "checkpoints").iterdir() if (path / "l3rs.json").is_file())
    starts = {"torch": python_block("import torch"), "jax": python_block("import jax\n")}
    return [
        Trial("", (("python", "-c", BASE.format(shipped=shipped)),)),
        *(
            Trial(
                extra,
                (("python", "-c", ALONE.format(other=other)), ("python", "start.py")),
                ("scikit-learn",),
                (("start.py", starts[extra]),),
            )
            for extra, other in (("torch", "jax"), ("jax", "torch"))
        ),
        Trial(
            "metatrain",
            (
                ("metatrain", "--version"),
                ("metatrain", "list-tasks"),
                ("metatrain", "run", "tiny.yaml"),
                ("metatrain", "inspect", "universal"),
                ("python", "-c", RUN),
            ),
            files=(("tiny.yaml", TINY),),
        ),
    ]


def python_block(first: str) -> str:
    """The Python code of docs/start.md in which the line `first` occurs."""
    return next(block.code for block in blocks(ROOT / "docs" / "start.md", "python") if first in block.code)


def command(*words: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """The output of a command.

    Raises:
      CheckError: it failed; the message has the end of its output.
    """
    try:
        done = subprocess.run(
            list(map(str, words)), cwd=cwd, env=env, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        shown = " ".join(str(word) if len(str(word)) < 200 else "…" for word in words)
        raise CheckError(f"{shown}\n{textwrap.indent((error.stdout or '')[-3000:], '    ')}") from None
    return done.stdout


class CheckError(Exception):
    """A check failed."""


def build() -> Path:
    """Build the last commit into dist/; returns the wheel."""
    if command("git", "status", "--porcelain"):
        print("note: there are changes that are not committed; they are not part of the release")
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:  # a clean one: setuptools leaves files in its source
        source = Path(folder)
        with tarfile.open(fileobj=_archive()) as archive:
            archive.extractall(source, filter="data")
        command(sys.executable, "-m", "build", "--installer", "uv", "--outdir", DIST, source)
    (wheel,) = DIST.glob("*.whl")
    (sdist,) = DIST.glob("*.tar.gz")
    command(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    return wheel


def _archive() -> io.BytesIO:
    return io.BytesIO(subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def check_content(wheel: Path) -> str:
    """Check the wheel's size and files; returns a summary."""
    tracked = command("git", "ls-files", "checkpoints", "l3rs", "tasks", "metatrain").split()
    modules = {name for name in tracked if name.endswith(".py")}
    optimizers = {f"l3rs/{name}" for name in tracked if name.startswith("checkpoints/")}
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    if missing := sorted((modules | optimizers) - names):
        raise CheckError(f"{wheel.name} lacks {len(missing)} files, among them {missing[0]}")
    packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if packages != {"l3rs", "tasks", "metatrain"}:
        raise CheckError(f"{wheel.name} has the packages {sorted(packages)}")
    size = wheel.stat().st_size
    if size >= MOST_BYTES:
        raise CheckError(f"{wheel.name} has {size:,} bytes; allowed are fewer than {MOST_BYTES:,}")
    return f"{size:,} bytes, {len(names)} files, {len(optimizers)} of them of shipped optimizers"


def find_python(version: str) -> str | None:
    """A Python of this version: on the path, or installed by pyenv."""
    here = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python{version}")]
    for each in filter(None, here):
        test = subprocess.run(
            [each, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if test.stdout.strip() == version:
            return str(each)
    return None


def try_out(python: str, wheel: Path, trial: Trial) -> str:
    """Install the wheel with an extra into a new environment, and run the trial's commands there."""
    with tempfile.TemporaryDirectory() as folder:
        place, empty = Path(folder) / "environment", Path(folder) / "empty"
        empty.mkdir()
        for name, content in trial.files:
            (empty / name).write_text(content, encoding="utf-8")
        uv = [sys.executable, "-m", "uv"]
        command(*uv, "venv", "--quiet", "--python", python, place)
        programs = place / ("Scripts" if os.name == "nt" else "bin")
        extra = f"[{trial.extra}]" if trial.extra else ""
        install = [*uv, "pip", "install", "--quiet", "--python", programs / "python", "-c", ROOT / "constraints.txt"]
        command(*install, f"l3rs{extra} @ {wheel.as_uri()}", *trial.also)
        kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        env = {**kept, "L3RS_CACHE": str(Path(folder) / "cache"), "HF_HUB_OFFLINE": "1"}
        output = [command(programs / first, *rest, cwd=empty, env=env) for first, *rest in trial.commands]
    return " · ".join(text.strip().splitlines()[-1] for text in output if text.strip())


def resolve(python: str, wheel: Path, extra: str) -> str:
    """Find versions of all packages of an extra, without installing them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.in"
        file.write_text(f"l3rs[{extra}] @ {wheel.as_uri()}\n")
        found = command(sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--python", python, file)
    return f"{sum('==' in line for line in found.splitlines())} packages"


def main() -> int:
    parser = argparse.ArgumentParser(description="Check a release before it is published.")
    parser.add_argument("--python", action="append", choices=PYTHONS, help="Only this version; may be repeated.")
    parser.add_argument("--extra", action="append", help="Only this extra, '' for none; may be repeated.")
    chosen = parser.parse_args()
    failed = 0

    def check(name: str, work: Callable[[], str]) -> None:
        nonlocal failed
        began = time.perf_counter()
        try:
            result = f"good: {work()}"
        except CheckError as error:
            failed += 1
            result = f"FAILED: {error}"
        print(f"{name}: {result} ({time.perf_counter() - began:.0f} s)", flush=True)

    wheel = build()
    print(f"built and checked by twine: {', '.join(sorted(file.name for file in DIST.iterdir()))}")
    check("content", lambda: check_content(wheel))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    tried = trials()
    for version in chosen.python or PYTHONS:
        python = find_python(version)
        if python is None:
            print(f"Python {version}: there is none here")
            continue
        for trial in tried:
            if chosen.extra is None or trial.extra in chosen.extra:
                name = f"Python {version}, {trial.extra or 'no extra'}, tried"
                check(name, lambda python=python, trial=trial: try_out(python, wheel, trial))
        for extra in sorted(set(extras) - {trial.extra for trial in tried}):
            if chosen.extra is None or extra in chosen.extra:
                check(
                    f"Python {version}, {extra}, resolved",
                    lambda python=python, extra=extra: resolve(python, wheel, extra),
                )
    print(f"{failed} checks failed" if failed else "all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

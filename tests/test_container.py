"""configs/cluster/Dockerfile: built where there is a builder, and read everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "configs" / "cluster" / "Dockerfile"
_INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "CMD"}


def _instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the file, with continued lines joined and without comments."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, " ".join(arguments.split())) for name, arguments in pairs]


def _copied() -> list[str]:
    """What is copied from the build's context."""
    arguments = [words for name, words in _instructions() if name == "COPY" and not words.startswith("--from=")]
    return [source for words in arguments for source in words.split()[:-1]]


def _builder() -> str | None:
    """A program that can build images here: Docker needs its daemon."""
    for name in ("docker", "podman", "buildah"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True, check=False).returncode == 0:
            return name
    return None


def test_the_image_is_not_roots_and_its_versions_are_pinned() -> None:
    instructions = _instructions()
    assert {name for name, _ in instructions} <= _INSTRUCTIONS
    users = [words for name, words in instructions if name == "USER"]
    assert users[-1] == "1000:1000"
    last_stage = max(i for i, (name, _) in enumerate(instructions) if name == "FROM")
    after = [name for name, _ in instructions[last_stage:]]
    assert after.index("USER") > max(i for i, name in enumerate(after) if name == "RUN")
    [install] = [words for name, words in instructions if "pip install" in words]
    assert "--constraint constraints.txt '.[metatrain]'" in install
    assert not re.search(r"index.url|find.links|trusted.host|https?://", DOCKERFILE.read_text())


def test_its_python_is_allowed_and_is_the_one_of_the_pinned_versions() -> None:
    [python] = [words.partition("=")[2] for name, words in _instructions() if words.startswith("PYTHON=")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={python}"
    assert "metatrain" in project["optional-dependencies"]


def test_what_it_copies_exists_and_is_not_ignored() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert sorted(kept) == sorted(_copied())
    assert all((ROOT / name).exists() for name in kept)
    assert not [path for name in kept for path in (ROOT / name).rglob(".env*")]


@pytest.mark.slow
def test_what_it_copies_is_enough_to_install_everything(tmp_path: Path) -> None:
    if tuple(map(int, version("setuptools").split(".")[:2])) < (77, 0):
        pytest.skip("setuptools 77, which builds this project, is not installed")
    source = tmp_path / "source"
    source.mkdir()
    for name in _copied():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        options = {"symlinks": True} if (ROOT / name).is_dir() else {}
        copy(ROOT / name, source / name, **options)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in ("metatrain/cli.py", "metatrain/report/templates/base.html", "l3rs/checkpoints/universal/l3rs.json"):
        assert file in names


@pytest.mark.slow
@pytest.mark.skipif(_builder() is None, reason="neither Docker, Podman nor Buildah can build an image here")
def test_the_image_builds_and_runs() -> None:
    builder = str(_builder())
    build = [builder, "bud"] if builder == "buildah" else [builder, "build"]
    subprocess.run([*build, "-f", DOCKERFILE, "-t", "l3rs-test", ROOT], check=True, timeout=1800)
    if builder != "buildah":
        command = [builder, "run", "--rm", "--network=none", "l3rs-test"]
        found = subprocess.run([*command, "id", "-u"], check=True, capture_output=True, text=True).stdout
        assert found.strip() == "1000"
        subprocess.run([*command, "metatrain", "list-tasks"], check=True)

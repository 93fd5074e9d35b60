"""What a release is made of agrees: its version everywhere, and the page that `make release-check` runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tools import release_check

ROOT = Path(__file__).parents[1]


def test_one_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = [name for name in re.findall(r"^## (.*)$", changelog, re.MULTILINE) if name != "Unreleased"]
    assert released[0].split()[0] == version
    assert f"\nversion: {version}\n" in citation


def test_the_trials_of_a_release():
    trials = {trial.extra: trial for trial in release_check.trials()}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(trials) == {"", "torch", "jax", "metatrain"}
    assert set(trials) - {""} <= set(extras)
    assert "l3rs.torch" in dict(trials["torch"].files)["start.py"]
    assert "optax" in dict(trials["jax"].files)["start.py"]
    for trial in trials.values():
        for name, text in trial.files:
            if name.endswith(".py"):
                compile(text, name, "exec")

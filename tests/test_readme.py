"""The README's own examples, run as they stand."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import typer

from metatrain.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    widths = (196, 64, 64, 10)
    layers = {
        i: {"kernel": jnp.ones((a, b)) / a, "bias": jnp.zeros(b)} for i, (a, b) in enumerate(itertools.pairwise(widths))
    }

    def loss_fn(params: dict, batch: jax.Array) -> jax.Array:
        x = batch
        for i in range(3):
            x = x @ params["layers"][i]["kernel"] + params["layers"][i]["bias"]
        return jnp.mean(x**2)

    names = {"params": {"layers": layers}, "batch": jnp.ones((4, 196)), "loss_fn": loss_fn}
    before = loss_fn(names["params"], names["batch"])
    exec(python_blocks()[0], names)
    assert loss_fn(names["params"], names["batch"]) != before


def test_the_pytorch_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    monkeypatch.chdir(ROOT)
    linear = [torch.nn.Linear(a, b) for a, b in itertools.pairwise((196, 64, 64, 10))]
    model = torch.nn.Sequential(linear[0], torch.nn.ReLU(), linear[1], torch.nn.ReLU(), linear[2])
    x, y = torch.randn(32, 196), torch.arange(32) % 10
    names = {"model": model, "loss_fn": torch.nn.functional.cross_entropy, "x": x, "y": y}
    exec(python_blocks()[1], names)
    assert names["loss_fn"](model(x), y).item() < names["loss"].item()


def test_the_users_own_task_runs(tmp_path: Path) -> None:
    """By the command itself: it lies beside the configuration, where a script does not look by itself."""
    (tmp_path / "my_task.py").write_text(python_blocks()[2])
    (tmp_path / "my.yaml").write_text("name: mine\ntask: {name: 'my_task:regression', examples: 64}\n")
    small = ["outer.steps=1", "outer.population=2", "outer.horizon.min=2", "outer.horizon.max=3"]
    script = Path(sys.executable).with_name("metatrain")
    done = subprocess.run([script, "run", "my.yaml", *small], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mine" / "optimizer").is_dir()


def test_the_baselines_example_runs() -> None:
    names: dict = {}
    exec(python_blocks()[3], names)
    params = {"w": jnp.ones(3)}
    assert float(names["mada_coefficients"](names["tx"].init(params))["b1"]) == 0.5


def test_every_command_of_the_readme_exists() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    named = set(re.findall(r"^    metatrain ([a-z-]+)", README, re.MULTILINE))
    assert named
    assert named <= commands


def test_every_file_the_readme_names_is_there() -> None:
    for name in re.findall(r"\b(?:configs|checkpoints)/[\w./-]*\w", README):
        assert (ROOT / name).exists(), name

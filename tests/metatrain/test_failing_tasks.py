"""A user's task that fails during a run: one sentence with its name, the exception and the place; nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from metatrain.config import dump_config
from tests.metatrain import failing_tasks
from tests.metatrain.commands import metatrain
from tests.metatrain.common import small_config
from tests.metatrain.failing_tasks import line

JAX, TORCH = "tests.metatrain.failing_tasks:in_jax", "tests.metatrain.torch_tasks:failing"


def failed(*words: str | Path) -> str:
    """The one sentence with which `metatrain WORDS` ends."""
    code, _, err = metatrain(*words)
    lines = [text for text in err.splitlines() if text.startswith("metatrain: ")]
    assert code == 2, err
    assert "Traceback" not in err
    assert len(lines) == 1
    return lines[0]


def saved(folder: Path) -> list[str]:
    """Generations of the checkpoints of a run."""
    return sorted(step.name for step in (folder / "state").glob("*") if step.name.isdigit())


def config(tmp_path: Path, **sections: Any) -> str:
    file = tmp_path / "config.yaml"
    few = {"population": 2, "horizon": {"min": 2, "max": 4}}
    judged = {"baselines": ["sgd"], "horizons": [2], "seeds": 1}
    sections = {"outer": few, "checkpoint": {"every": 100}, "evaluation": judged, **sections}
    file.write_text(dump_config(small_config(**sections)))
    return str(file)


@pytest.mark.parametrize("plan", ["fused", "stepwise"])
def test_a_loss_that_fails_on_a_split(plan: str, tmp_path: Path) -> None:
    file = config(tmp_path, task={"name": JAX, "part": "loss"}, execution={"plan": plan})
    sentence = failed("run", file, "--out", tmp_path / "run")
    assert all(fact in sentence for fact in (JAX, "KeyError", "label", line("loss"))), sentence
    assert not (tmp_path / "run").exists(), "a run that computed nothing is in the way of the next try"


@pytest.mark.parametrize("plan", ["fused", "stepwise"])
def test_data_that_fail_in_a_later_generation(plan: str, tmp_path: Path) -> None:
    file = config(tmp_path, task={"name": JAX, "part": "batch", "after": 60}, execution={"plan": plan})
    folder = tmp_path / "run"
    sentence = failed("run", file, "outer.steps=100", "--out", folder)
    assert all(fact in sentence for fact in ("regression", "RuntimeError", "no more rows", line("batch"))), sentence
    [generation] = saved(folder)
    assert int(generation) == len((folder / "metrics.jsonl").read_text().splitlines()) >= 1


def test_data_that_fail_in_an_evaluation(tmp_path: Path) -> None:
    file = config(tmp_path, task={"name": JAX, "part": "batch", "after": 3})
    sentence = failed("evaluate", "-", file, "--out", tmp_path / "results")
    assert all(fact in sentence for fact in ("RuntimeError", "no more rows", line("batch"))), sentence


@pytest.mark.parametrize("part", ["loss", "score", "data", "model"])
def test_parts_of_a_pytorch_task(part: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    after = {"loss": 120, "model": 4}.get(part, 30)
    file = config(tmp_path, task={"name": TORCH, "part": part, "after": after}, execution={"workers": 1})
    folder = tmp_path / "run"
    sentence = failed("run", file, "outer.steps=100", "--out", folder)
    kind = "StopIteration" if part == "data" else "ValueError"
    assert all(fact in sentence for fact in (TORCH, kind, line("torch", failing_tasks.__file__))), sentence
    [generation] = saved(folder)
    assert int(generation) == len((folder / "metrics.jsonl").read_text().splitlines()) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["local", "ray"])
def test_a_pytorch_task_on_workers(backend: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    task = {"name": TORCH, "part": "loss", "after": 60, "flag": str(tmp_path / "failed")}
    file = config(tmp_path, task=task, execution={"workers": 2, "backend": backend})
    folder = tmp_path / "run"
    sentence = failed("run", file, "outer.steps=100", "--out", folder)
    assert all(fact in sentence for fact in (TORCH, "ValueError: the loss is wrong", line("torch"))), sentence
    assert saved(folder)

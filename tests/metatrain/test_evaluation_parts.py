"""An evaluation that was interrupted goes on with the parts that it has finished."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import psutil
import pytest

import l3rs
from metatrain.config import Config, dump_config
from metatrain.evaluation import comparison
from metatrain.evaluation import parts as module
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.parts import Part, Parts
from metatrain.evaluation.records import MultiplierGrid, Results
from metatrain.evaluation.runner import Conditions
from metatrain.outer.code import current_code
from tests.metatrain.common import small_config
from tests.metatrain.quadratic import regression

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
STOPPED = "stopped; the same command continues with what each optimizer has finished"
BASELINES = [
    {"name": "adam", "learning_rate": 0.1, "label": "adam"},
    {"name": "sgd", "learning_rate": 0.1, "label": "sgd"},
]
HOW = {"horizons": [3], "seeds": 2, "schedules": ["constant"], "baselines": BASELINES, "curve_points": 1}


def config(**task: Any) -> Config:
    settings = {"A": {}, "B": {"examples": 48, **task}}
    return small_config(evaluation={**HOW, "settings": settings})


def without_times(results: Results) -> dict[str, Any]:
    records = [dataclasses.replace(record, seconds=0.0) for record in results.records]
    kept = dataclasses.replace(results, records=records, costs=[], notes=[], environment={}, config={})
    return dataclasses.asdict(kept)


def learned(seed: int) -> LearnedOptimizer:
    spec = l3rs.Spec.create(regression().params_shape(), hidden=(4,), embedding_dim=2)
    return LearnedOptimizer(l3rs.init_meta_params(jax.random.key(seed), spec), spec, False)


def run_part(parts: Parts, part: Part) -> tuple[Part, bool]:
    """The part as it is kept, and whether it was computed."""
    called: list[jax.Device] = []

    def job(device: jax.Device) -> Part:
        called.append(device)
        return part

    return parts.kept("A: l3rs", job)(jax.devices()[0]), bool(called)


def a_part() -> Part:
    """Of a real evaluation, with values that are not finite."""
    found = Results.load(Path(__file__).parent / "golden" / "results.json")
    records = [dataclasses.replace(found.records[0], loss=math.nan), *found.records[1:]]
    grid = MultiplierGrid("A", 3, [1.0, 2.0], [0.5, None], 1.0, 0.5, math.nan)
    part = Part(records, found.curves, found.paths, multipliers=[grid], tuning=found.tuning, notes=["a note"])
    assert part.paths
    return part


def test_a_part_is_what_it_was_and_a_damaged_one_is_computed_again(tmp_path: Path) -> None:
    said: list[str] = []

    def parts() -> Parts:
        return Parts(tmp_path, learned(0), config(), ["A"], said.append)

    part, computed = run_part(parts(), a_part())
    assert computed
    kept, computed = run_part(parts(), Part())
    assert repr(kept) == repr(part)  # NaN equals itself as text
    assert not computed
    [file] = (tmp_path / "parts").glob("*/*.json")
    file.write_text(file.read_text()[:1000])
    again, computed = run_part(parts(), part)
    assert computed
    assert again is part
    assert said[0] == "A: l3rs: done by an earlier start"
    assert "A: l3rs: computed again, because" in said[1]
    parts().remove()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("what", ["optimizer", "guard", "configuration", "settings", "code", "own code", "devices"])
def test_parts_of_another_evaluation_are_not_used(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, said = tmp_path / "own_optimizers.py", []
    own.write_text("def mine(rate, total_steps): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    how: dict[str, Any] = {**HOW, "baselines": ["own_optimizers:mine"]}
    optimizer, configuration, settings = learned(0), small_config(evaluation=how), ["A"]
    run_part(Parts(tmp_path / "out", optimizer, configuration, settings, said.append), Part())
    if what == "optimizer":
        optimizer = learned(1)
    elif what == "guard":
        optimizer = optimizer._replace(guard=True)
    elif what == "configuration":
        configuration = configuration.model_copy(update={"seed": 7})
    elif what == "settings":
        settings = ["A", "B"]
    elif what == "code":
        now = current_code()
        monkeypatch.setattr(module, "current_code", lambda: now.model_copy(update={"source": "other"}))
    elif what == "devices":
        monkeypatch.setattr(module, "environment", lambda: {"devices": "64 × cpu"})
    else:
        own.write_text("def mine(rate, total_steps): raise\n")
    assert said == []
    parts = Parts(tmp_path / "out", optimizer, configuration, settings, said.append)
    assert run_part(parts, Part())[1]
    assert "holds parts of another evaluation" in said[0]
    parts.remove()
    assert len([*(tmp_path / "out" / "parts").iterdir()]) == 1  # those stay


def test_an_evaluation_that_is_interrupted_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate("-", config())

    def stop(said: str) -> None:
        if said.startswith("B"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate("-", config(), log=stop, out=tmp_path)
    assert len([*(tmp_path / "parts").glob("*/*.json")]) == 2  # both baselines in A
    computed: list[str] = []
    run = comparison._run_baseline

    def recorded(name: str, baseline: Any, conditions: Conditions, device: jax.Device) -> Part:
        computed.append(conditions.setting[0])
        return run(name, baseline, conditions, device)

    monkeypatch.setattr(comparison, "_run_baseline", recorded)
    found = evaluate("-", config(), out=tmp_path)
    assert computed == ["B", "B"]
    assert without_times(found) == without_times(whole)
    assert "2 of its parts were done by an earlier start of this evaluation" in found.notes
    assert "evaluation_seconds" not in found.environment
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def started(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background process of a shell ignores it

    with log.open("wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out, preexec_fn=interruptible)


@pytest.mark.slow
def test_ctrl_c_ends_an_evaluation_of_a_pytorch_task_and_its_processes(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests.metatrain.torch_tasks import TINY

    file, out = tmp_path / "config.yaml", tmp_path / "out"
    slow = small_config(task={"name": TINY}, execution={"workers": 2}, evaluation={**HOW, "horizons": [1_000]})
    file.write_text(dump_config(slow))
    process = started(
        [sys.executable, "-m", "metatrain.cli", "evaluate", "-", str(file), "--out", str(out)], tmp_path / "log"
    )
    try:
        deadline = time.monotonic() + 240
        while not [*(out / "parts").glob("*/*.json")]:  # then the second baseline begins
            assert time.monotonic() < deadline
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        gone, alive = psutil.wait_procs(children, 10)
        assert gone
        assert not alive
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / "log").read_text().splitlines()[-1] == STOPPED


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_stopped_is_continued_by_the_same_command(tmp_path: Path, number: signal.Signals) -> None:
    hold, out, file = tmp_path / "hold", tmp_path / "out", tmp_path / "config.yaml"
    hold.touch()  # B stands still
    file.write_text(dump_config(config(hold=str(hold))))
    command = [sys.executable, "-m", "metatrain.cli", "evaluate", "-", str(file), "--out", str(out)]
    process = started(command, tmp_path / "log")
    try:
        deadline = time.monotonic() + 240
        while not hold.read_text():  # B has begun
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) != 0
    finally:
        process.kill()
        process.wait()
        hold.unlink()
    assert (STOPPED in (tmp_path / "log").read_text()) == (number == signal.SIGINT)
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "note: 2 of its parts were done by an earlier start of this evaluation" in done.stdout
    assert [entry.name for entry in out.iterdir()] == ["results.json"]
    assert len(json.loads((out / "results.json").read_text())["records"]) == 2 * 2 * 2

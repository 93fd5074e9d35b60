"""An evaluation that was interrupted goes on with the parts that it has finished."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

import l3rs
from metatrain.config import Config, dump_config
from metatrain.evaluation import comparison, parts
from metatrain.evaluation.comparison import evaluate
from metatrain.evaluation.records import Results
from tests.metatrain.common import small_config
from tests.metatrain.quadratic import regression

ROOT = Path(__file__).parents[2]
HOW = {"horizons": [2, 4], "seeds": 2, "schedules": ["constant"], "baselines": ["adam", "mada"]}


def config(**task: Any) -> Config:
    settings = {"A": {}, "B": {"examples": 48, **task}}
    return small_config(evaluation={**HOW, "settings": settings})


def without_times(results: Results) -> dict[str, Any]:
    records = [dataclasses.replace(record, seconds=0.0) for record in results.records]
    kept = dataclasses.replace(results, records=records, costs=[], notes=[], environment={}, config={})
    return dataclasses.asdict(kept)


def test_finished_parts_are_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = l3rs.Spec.create(regression().params_shape(), hidden=(4,), embedding_dim=2)
    optimizer = l3rs.save(tmp_path / "optimizer", l3rs.init_meta_params(jax.random.key(0), spec), spec)
    folder, how = tmp_path / "parts", {"multipliers": [1.0, 2.0]}
    whole = evaluate(optimizer, config(), **how)

    def stop(said: str) -> None:
        if said.startswith("B"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(optimizer, config(), log=stop, keep=folder, **how)
    files = sorted(folder.iterdir())
    assert len(files) == 4  # in A: L3RS, multiples of its steps, two baselines
    baseline = next(file for file in files if "/constant" in file.read_text())
    baseline.write_text('{"records": [')  # half of a file
    computed: list[str] = []
    run = comparison._run_baseline
    monkeypatch.setattr(
        comparison,
        "_run_baseline",
        lambda name, baseline, conditions, device: (
            computed.append(conditions.setting[0]) or run(name, baseline, conditions, device)  # type: ignore[func-returns-value]
        ),
    )
    found = evaluate(optimizer, config(), keep=folder, **how)
    assert sorted(computed) == ["A", "B", "B"]
    assert without_times(found) == without_times(whole)
    [note] = [note for note in found.notes if "earlier start" in note]
    assert note.count("A: regression: ") == 3

    computed.clear()
    evaluate(optimizer, config().model_copy(update={"seed": 7}), keep=folder, settings=["A"], **how)
    assert computed == ["A", "A"]  # another evaluation


def test_only_parts_are_deleted(tmp_path: Path) -> None:
    evaluate("-", small_config(evaluation=HOW), keep=tmp_path / "parts", horizons=[2])
    (tmp_path / "parts" / "own.json").write_text("{}")
    parts.remove_parts(tmp_path / "parts")
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["own.json"]
    (tmp_path / "parts" / "own.json").unlink()
    parts.remove_parts(tmp_path / "parts")
    parts.remove_parts(tmp_path / "parts")  # which is not there any more
    assert not (tmp_path / "parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_is_continued_by_the_same_command(tmp_path: Path, number: signal.Signals) -> None:
    hold, out, file = tmp_path / "hold", tmp_path / "out", tmp_path / "config.yaml"
    hold.touch()  # B stands still
    file.write_text(dump_config(config(hold=str(hold))))
    command = [sys.executable, "-m", "metatrain.cli", "evaluate", "-", str(file), "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}

    def interruptible() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background process of a shell ignores it

    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, preexec_fn=interruptible)
    deadline = time.monotonic() + 240
    while len([*(out / "parts").glob("*.json")]) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(60) != 0
    said = "stopped; the same command continues with what is finished"
    assert (said in (tmp_path / "log").read_text()) == (number == signal.SIGINT)
    hold.unlink()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "note: computed by an earlier start of this evaluation: A: regression: adam, A: " in done.stdout
    assert [entry.name for entry in out.iterdir()] == ["results.json"]
    assert len(json.loads((out / "results.json").read_text())["records"]) == 2 * 2 * 2 * 2

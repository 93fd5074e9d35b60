from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import l3rs
from metatrain.config import UserError, dump_config, portable
from metatrain.inner.population import LocalEvaluator
from metatrain.outer import loop as trainer
from metatrain.outer.export import export
from metatrain.outer.metrics import read_metrics
from metatrain.outer.setup import Setup
from tests.metatrain.common import REGRESSION, assert_same_theta, metrics, small_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruptions."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    assert trainer.run(small_config(), folder).finished
    return folder


def stopped_at(generation: int, folder: Path | str, **sections: dict) -> None:
    """A run whose process ends right after the checkpoint of `generation`."""
    config = small_config(**sections)
    stop = KeyboardInterrupt("at the test's wish")
    original = trainer._generation

    def interrupted(setup, evaluator, progress, *rest):
        if progress.generation == generation:
            raise stop
        return original(setup, evaluator, progress, *rest)

    trainer._generation = interrupted
    try:
        done = trainer.run(config, folder)
    finally:
        trainer._generation = original
    assert (done.finished, done.generation) == (False, generation)


def test_a_run_writes_the_documented_files(quiet: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "state", "optimizer"} <= {p.name for p in quiet.iterdir()}
    lines = [json.loads(line) for line in (quiet / "metrics.jsonl").read_text().splitlines()]
    assert [line["generation"] for line in lines] == list(range(6))
    for key in ("horizon", "meta_loss_mean", "meta_loss_best", "theta_norm", "candidate_steps_per_s", "seconds"):
        assert all(line[key] is not None for line in lines)
    assert all(2 <= line["horizon"] <= 9 for line in lines)
    assert [line["compiled"] for line in lines] == [True] + [False] * 5  # by this process
    assert len({line["horizon"] for line in lines}) > 1
    info = l3rs.info(quiet / "optimizer")["info"]
    assert info["generations"] == 6
    assert info["horizon"] == {"min": 2, "max": 9}
    assert info["candidate_steps"] == sum(4 * line["horizon"] for line in lines)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(quiet: Path, tmp_path: Path) -> None:
    trainer.run(small_config(), tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(quiet)
    assert_same_theta(tmp_path / "again" / "optimizer", quiet / "optimizer")
    trainer.run(small_config(seed=1), tmp_path / "other")
    assert metrics(tmp_path / "other") != metrics(quiet)


def test_candidates_that_do_not_differ_are_said(
    quiet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A training loss that is NaN moves nothing, so that every candidate ends where it began."""
    trainer.run(small_config(task={"poison": "inner_train"}), tmp_path / "run")
    assert "in 3 generations all candidates had the same meta-loss" in capsys.readouterr().out
    same = [line["meta_loss_mean"] == line["meta_loss_best"] for line in metrics(quiet)]
    assert not any(same)


def test_candidates_without_a_loss_are_not_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a generation has neither a mean nor a best."""
    outer = {"population": 4, "samples": 2, "max_failures": 9}
    trainer.run(small_config(task={"poison": "outer_valid"}, outer=outer), tmp_path / "run")
    assert "same meta-loss" not in capsys.readouterr().out


@pytest.mark.parametrize("generation", [1, 3, 5])
def test_ctrl_c_saves_and_resume_gives_the_uninterrupted_run(
    generation: int, quiet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Checkpoints are rare, so that only the one saved at Ctrl-C can be resumed.
    stopped_at(generation, tmp_path / "run", checkpoint={"every": 100})
    assert f"metatrain resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert trainer.resume(tmp_path / "run").finished
    assert metrics(tmp_path / "run") == metrics(quiet)
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_resume_of_a_finished_run_changes_nothing(quiet: Path, tmp_path: Path) -> None:
    shutil.copytree(quiet, tmp_path / "run")
    before = metrics(tmp_path / "run")
    assert trainer.resume(tmp_path / "run").finished
    assert metrics(tmp_path / "run") == before
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    quiet: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, damage in (("truncated", b""), ("tampered", None)):
        folder = tmp_path / name
        stopped_at(4, folder)
        victim = max((folder / "state" / "4" / "strategy" / "d").iterdir(), key=lambda f: f.stat().st_size)
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 0xFF
        victim.write_bytes(bytes(content) if damage is None else damage)
        caplog.clear()
        trainer.resume(folder)
        assert "state/4 is damaged" in caplog.text
        assert metrics(folder) == metrics(quiet)
        assert_same_theta(folder / "optimizer", quiet / "optimizer")
        assert (folder / "damaged-state-4").is_dir()  # set aside, not lost


def test_the_same_checkpoint_damaged_twice_is_set_aside_twice(quiet: Path, tmp_path: Path) -> None:
    stopped_at(4, tmp_path / "run")
    for name in ("damaged-state-6", "damaged-state-6-2"):
        trainer.resume(tmp_path / "run")
        victim = max((tmp_path / "run" / "state" / "6" / "strategy" / "d").iterdir(), key=lambda f: f.stat().st_size)
        victim.write_bytes(b"")
        export(tmp_path / "run", tmp_path / f"exported-{name}")  # it reads, and moves nothing
        assert not (tmp_path / "run" / name).exists()
        trainer.resume(tmp_path / "run")
        assert (tmp_path / "run" / name).is_dir()
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mode == (quiet / "metrics.jsonl").stat().st_mode


def test_an_error_in_the_middle_costs_no_generation(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster fails after hours: what was computed is saved, although no checkpoint was due."""
    evaluate = LocalEvaluator.evaluate

    def refuses(self: Any, state: Any, spec: Any, waiting: Any = None) -> np.ndarray:
        if spec.generation == 3:
            raise UserError("a worker cannot be set up")
        return evaluate(self, state, spec, waiting)

    monkeypatch.setattr(LocalEvaluator, "evaluate", refuses)
    with pytest.raises(UserError, match="cannot be set up"):
        trainer.run(small_config(checkpoint={"every": 100}), tmp_path / "run")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "state").iterdir() if path.name.isdigit()] == ["3"]
    trainer.resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(quiet)
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_a_killed_start_does_not_stop_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder exists with its configuration, or does not exist."""

    def killed(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "dump_config", killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(small_config(), tmp_path / "run")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert trainer.run(small_config(), tmp_path / "run", resume_run=True).finished
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o755


def test_two_processes_cannot_use_one_run(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    code = """
import sys, time
from pathlib import Path
from metatrain.outer.lock import run_lock
with run_lock(Path(sys.argv[1]), "run"):
    print("locked", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another process is using the run") as refused:
            trainer.resume(tmp_path / "run")
        assert str(tmp_path / "run") in str(refused.value)
        holder.kill()  # the system releases the lock
    assert trainer.resume(tmp_path / "run").finished
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_a_file_system_without_locks_is_used_without_one(
    quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(filelock.FileLock, "_acquire", refuses)
    trainer.run(small_config(), tmp_path / "run")
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_when_no_checkpoint_can_be_read_nothing_is_overwritten(tmp_path: Path) -> None:
    stopped_at(2, tmp_path / "run")
    for file in (tmp_path / "run" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"none of the \d+ checkpoints can be read"):
        trainer.resume(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_a_damaged_log_stops_no_resume(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    file = tmp_path / "run" / "metrics.jsonl"
    whole = file.read_bytes()
    damaged = b"\xff\xfe\x00\n[1, 2]\nnull\n" + b'{"generation": "two"}\n{"horizon": 3}\n' + b"[" * 100_000 + b"\n"
    file.write_bytes(damaged + whole)
    assert [line["generation"] for line in read_metrics(file)] == [0, 1, 2]
    trainer.resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(quiet)


def test_the_old_name_of_a_metric_is_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"generation": 0, "psi_norm": 2.5}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"generation": 0, "theta_norm": 2.5}]
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_what_may_change_on_resume(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    with pytest.raises(UserError) as refused:
        trainer.run(small_config(seed=7, outer={"sigma": 0.25}), tmp_path / "run", resume_run=True)
    for fact in ("seed was 0 and would become 7", "outer.sigma was 0.05 and would become 0.25", "checkpoint"):
        assert fact in str(refused.value)
    assert trainer.resume(tmp_path / "run", ["checkpoint.every=2", "checkpoint.keep=5"]).finished
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_a_half_written_line_of_metrics_is_written_again(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"generation": 3, "hori')
    trainer.resume(tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(quiet)


def test_a_checkpoint_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    assert portable({"a": ["/home/me/data/set/1.0", 3], "b": "set/1.0"}) == {
        "a": ["…/set/1.0", 3],
        "b": "set/1.0",
    }
    settings = {"A": {"directory": "/home/me/data/set/1.0"}}
    trainer.run(small_config(task={"name": REGRESSION}, evaluation={"settings": settings}), tmp_path / "run")
    card = (tmp_path / "run" / "optimizer" / "l3rs.json").read_text()
    assert "home" not in card
    assert "set/1.0" in card


def test_export_of_an_interrupted_run(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "exported")
    assert l3rs.info(tmp_path / "exported")["info"]["generations"] == 3
    with pytest.raises(l3rs.L3RSError, match="exists"):
        export(tmp_path / "run", tmp_path / "exported")
    export(quiet, tmp_path / "whole")
    assert_same_theta(tmp_path / "whole", quiet / "optimizer")


def test_refusals(quiet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(p.name for p in quiet.iterdir())
    monkeypatch.setattr(Setup, "build", lambda _: pytest.fail("the set-up takes minutes: refuse the folder before it"))
    with pytest.raises(UserError, match="exists; resume it with"):
        trainer.run(small_config(), quiet)
    monkeypatch.undo()
    assert sorted(p.name for p in quiet.iterdir()) == before
    with pytest.raises(UserError, match=r"not a run: it has no config\.yaml"):
        trainer.resume(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(small_config()))
    with pytest.raises(UserError, match="no checkpoint yet"):
        export(tmp_path, tmp_path / "x")


def test_generations_without_a_finite_loss_leave_the_state_and_stop_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(task={"name": "tests.metatrain.quadratic:diverging"}, outer={"max_failures": 3})
    with pytest.raises(UserError, match="3 generations in a row without a finite loss"):
        trainer.run(config, tmp_path / "run")
    assert "generation 1: no candidate has a finite loss; the state is kept" in capsys.readouterr().out
    assert [line["meta_loss_mean"] for line in metrics(tmp_path / "run")] == [None] * 3
    export(tmp_path / "run", tmp_path / "optimizer")
    setup = Setup.build(config)
    expected = setup.strategy.mean(setup.fresh().strategy)
    np.testing.assert_array_equal(l3rs.restore(tmp_path / "optimizer")[0]["embedding"], expected["embedding"])


@pytest.mark.slow
def test_kill_minus_nine_at_random_points(tmp_path: Path) -> None:
    """Real processes, killed for real, every other time while a checkpoint is being written."""
    # The run is slowed down and has a checkpoint in every generation, so that a kill is likely to hit a save.
    config = small_config(outer={"steps": 40}, task={"seconds": 0.02})
    trainer.run(config, tmp_path / "quiet")
    folder, rng = tmp_path / "run", random.Random(0)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "metatrain.cli"]
    kills = saves_hit = 0
    for attempt in range(30):
        started = (folder / "config.yaml").exists()
        words = ["resume", str(folder)] if started else ["run", str(tmp_path / "config.yaml"), "--out", str(folder)]
        process = subprocess.Popen([*command, *words], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        try:
            lines = count_lines(folder)
            while process.poll() is None and count_lines(folder) <= lines:
                time.sleep(0.01)
            time.sleep(rng.random())
            while attempt % 2 and process.poll() is None and not being_saved(folder):
                time.sleep(0.0005)
            saves_hit += being_saved(folder)
            if process.poll() is not None:
                assert process.returncode == 0
                break
            kills += 1
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert kills >= 3
    assert saves_hit >= 1
    assert metrics(folder) == metrics(tmp_path / "quiet")
    assert_same_theta(folder / "optimizer", tmp_path / "quiet" / "optimizer")


def count_lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


def being_saved(folder: Path) -> bool:
    return any("tmp" in p.name for p in (folder / "state").glob("*"))


_VARIANTS = {"name": REGRESSION, "variants": [{"examples": 48}, {"examples": 64}]}


def test_every_generation_draws_one_of_the_variants(tmp_path: Path) -> None:
    trainer.run(small_config(task=_VARIANTS), tmp_path / "quiet")
    drawn = [line["task"] for line in metrics(tmp_path / "quiet")]
    assert set(drawn) == {0, 1}
    stopped_at(3, tmp_path / "run", task=_VARIANTS)
    assert trainer.resume(tmp_path / "run").finished
    assert metrics(tmp_path / "run") == metrics(tmp_path / "quiet")
    assert_same_theta(tmp_path / "run" / "optimizer", tmp_path / "quiet" / "optimizer")


def test_variants_with_other_networks_need_a_descriptor(tmp_path: Path) -> None:
    task = {"name": REGRESSION, "variants": [{}, {"dimension": 5}]}
    with pytest.raises(UserError, match=r"different networks .*optimizer\.embedding must be descriptor"):
        trainer.run(small_config(task=task), tmp_path / "table")
    config = small_config(task=task, optimizer={"embedding": "descriptor"})
    assert trainer.run(config, tmp_path / "descriptor").finished

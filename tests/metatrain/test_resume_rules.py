"""What a resumed run checks: its folder, its code, its device, its length."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest

from metatrain.config import UserError, load_config
from metatrain.inner.population import LocalEvaluator
from metatrain.outer import loop as trainer
from metatrain.outer.code import current_code
from tests.metatrain.common import assert_same_theta, small_config
from tests.metatrain.test_trainer import stopped_at


def counters(state: Path) -> dict:
    files = (file for file in (state / "counters").rglob("*") if file.is_file())
    [text] = [text for file in files if "sha256" in (text := file.read_text(errors="replace"))]
    return json.loads(text)


@pytest.mark.parametrize("damage", ["deleted", "replaced", "emptied"])
def test_a_run_whose_folder_is_removed_stops_and_leaves_no_part_of_it(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, generation = tmp_path / "run", trainer._generation

    def vandal(setup, evaluator, progress, *rest):
        if progress.generation == 3:
            if damage == "emptied":
                for path in list(folder.iterdir()):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                shutil.rmtree(folder)
            if damage == "replaced":
                folder.mkdir()
                (folder / "config.yaml").write_text("name: other")
        return generation(setup, evaluator, progress, *rest)

    monkeypatch.setattr(trainer, "_generation", vandal)
    with pytest.raises(UserError, match="was deleted, moved or replaced") as refused:
        trainer.run(small_config(), folder)
    assert str(folder) in str(refused.value)
    left = sorted(path.name for path in folder.rglob("*")) if folder.exists() else []
    assert left == (["config.yaml"] if damage == "replaced" else [])


def test_a_run_knows_its_code_and_other_code_needs_to_be_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    stopped_at(3, folder)
    now = current_code()
    assert load_config(folder / "config.yaml").code == now
    assert counters(folder / "state" / "3")["code"] == now.model_dump()
    other = now.model_copy(update={"source": "0123456789abcdef", "l3rs": "9.9"})
    monkeypatch.setattr("metatrain.outer.code.current_code", lambda: other)
    for resume in (lambda: trainer.resume(folder), lambda: trainer.run(small_config(), folder, resume_run=True)):
        with pytest.raises(UserError) as refused:
            resume()
        for fact in (now.source, "0123456789abcdef", f"l3rs was {now.l3rs} and is now 9.9", "--allow-other-version"):
            assert fact in str(refused.value)
    with caplog.at_level(logging.WARNING):
        assert trainer.resume(folder, allow_other_version=True).finished
    assert "0123456789abcdef" in caplog.text
    assert load_config(folder / "config.yaml").code == other
    assert trainer.resume(folder).finished


def test_another_device_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stopped_at(3, tmp_path / "run")
    now = current_code()
    monkeypatch.setattr("metatrain.outer.code.current_code", lambda: now.model_copy(update={"device": "Another CPU"}))
    with caplog.at_level(logging.WARNING):
        assert trainer.resume(tmp_path / "run").finished
    assert f"the device was {now.device} and is now Another CPU" in caplog.text


def test_a_run_without_a_record_of_its_code_resumes(tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().partition("code:")[0])
    assert trainer.resume(tmp_path / "run").finished
    assert load_config(file).code == current_code()


def test_a_run_may_grow_but_not_shrink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert trainer.run(small_config(), folder).finished
    with pytest.raises(UserError, match=r"outer\.steps was 6 and would become 5.*outer\.steps may grow"):
        trainer.resume(folder, ["outer.steps=5"])
    done = trainer.resume(folder, ["outer.steps=9"])
    assert (done.finished, done.generation) == (True, 9)
    assert "outer.steps grows from 6 to 9: from generation 6 on" in capsys.readouterr().out
    assert load_config(folder / "config.yaml").outer.steps == 9
    # In two pieces or one, with a stop in between: the same result.
    other = tmp_path / "other"
    assert trainer.run(small_config(), other).finished
    stop = trainer._generation

    def interrupted(setup, evaluator, progress, *rest):
        if progress.generation == 7:
            raise KeyboardInterrupt
        return stop(setup, evaluator, progress, *rest)

    trainer._generation = interrupted
    try:
        assert not trainer.run(small_config(outer={"steps": 9}), other, resume_run=True).finished
    finally:
        trainer._generation = stop
    assert trainer.resume(other).finished
    assert_same_theta(folder / "optimizer", other / "optimizer")


def test_kinds_of_workers_devices_are_recorded_and_a_new_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = current_code().device

    def computed_on(*kinds: str) -> None:
        monkeypatch.setattr(LocalEvaluator, "report", lambda _: {"workers": 1, "devices": list(kinds)})

    folder = tmp_path / "run"
    computed_on(own)
    stopped_at(2, folder)
    assert load_config(folder / "config.yaml").code.device == own
    assert "different devices" not in capsys.readouterr().out
    computed_on("H100", own)
    trainer.resume(folder)
    assert load_config(folder / "config.yaml").code.device == f"{own} / H100"
    assert f"computed on different devices, {own} / H100; the last bits" in capsys.readouterr().out

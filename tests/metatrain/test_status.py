from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from metatrain.config import dump_config
from metatrain.outer.lock import run_lock
from metatrain.outer.status import local_status, progress
from metatrain.ray.jobs import Job, status
from metatrain.waiting import noticed
from tests.metatrain.common import small_config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 6 generations after 4: 60 s for the first, which compiles, then 2 s each."""
    (tmp_path / "config.yaml").write_text(dump_config(small_config()))
    common = {"meta_loss_mean": 0.5, "candidate_steps_per_s": 100.0, "workers": 2}
    lines = [{"generation": i, "seconds": 2.0 if i else 60.0, "compiled": not i, **common} for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_time_left_counts_no_compilation_and_only_a_run_that_goes_on_has_it(folder: Path) -> None:
    assert progress(folder, "a", "running", going=True) == (
        "a: running, generation 4/6, meta-loss 0.5000, 100 candidate-steps/s, 2 workers, about 4 s left"
    )
    assert "left" not in str(progress(folder, "a", "failed", going=False))
    for state in ("FAILED", "STOPPED", "SUCCEEDED", "PENDING"):
        assert "left" not in status(None, Job("a-1", "a", str(folder), state, "", 0.0))
    assert "left" in status(None, Job("a-1", "a", str(folder), "RUNNING", "", 0.0))


def test_a_folder_is_running_while_its_lock_is_held(folder: Path) -> None:
    assert local_status(folder, "a").startswith("a: stopped, generation 4/6")
    with run_lock(folder, "a"):
        assert "a: running, generation 4/6" in local_status(folder, "a")
    (folder / "metrics.jsonl").unlink()
    assert local_status(folder, "a") == "a: stopped, nothing computed yet"


def test_a_wait_is_named_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatrain.waiting.NOTICE_SECONDS", 0.05)
    said: list[str] = []
    with noticed("an answer", "stop it with Ctrl-C", said.append):
        time.sleep(0.3)
    assert re.fullmatch(r"waiting for an answer for \d+ s; stop it with Ctrl-C", said[0])
    with noticed("nothing", "", said.append):
        pass
    time.sleep(0.2)
    assert len(said) == 1

"""Systems without `fcntl`, `os.sched_getaffinity` and POSIX signals (macOS, Windows), simulated by removal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from metatrain.system import usable_cpus

ROOT = Path(__file__).resolve().parents[2]
# Python imports this module when it starts.
_SITECUSTOMIZE = """
import os
import signal
import sys

sys.modules["fcntl"] = None  # `import fcntl` raises ImportError
for name in ("sched_getaffinity", "process_cpu_count", "killpg", "getpgid", "setsid"):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGUSR1"):
    delattr(signal, name)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python process on such a system."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE)
    cache = {"L3RS_CACHE": os.environ.get("L3RS_CACHE", str(tmp_path / "cache"))}
    return {**os.environ, **cache, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def python(environment: dict[str, str], *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_removal_works(environment: dict[str, str]) -> None:
    code = "import os, sys; print('fcntl' in sys.modules and sys.modules['fcntl'], hasattr(os, 'sched_getaffinity'))"
    assert python(environment, "-c", code).stdout.split() == ["None", "False"]


def test_a_run_and_its_resume(environment: dict[str, str], tmp_path: Path) -> None:
    words = ["-m", "metatrain.cli", "run", "configs/demo.yaml", "outer.steps=3", "--out", tmp_path / "run"]
    assert "generation 3/3" in python(environment, *words).stdout
    assert "meta-trained for 3 generations" in python(environment, *words, "--resume").stdout


def test_the_pytorch_optimizer(environment: dict[str, str]) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = """
import torch
from l3rs.torch import L3RS
model = torch.nn.Linear(3, 2)
opt = L3RS(model.named_parameters(), "universal", total_steps=10)
for _ in range(3):
    opt.zero_grad()
    loss = model(torch.ones(4, 3)).square().mean()
    loss.backward()
    opt.step(loss=loss)
print(float(loss))
"""
    assert float(python(environment, "-c", code).stdout) > 0


def test_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable_cpus() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 3, raising=False)
    assert usable_cpus() == 3
    monkeypatch.delattr(os, "process_cpu_count")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cpus() == 1

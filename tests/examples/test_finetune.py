"""The fine-tuning examples run offline as their first lines say, and their networks learn."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "finetune_timm": ["torch"],
    "finetune_peft": ["torch", "transformers", "accelerate"],
    "finetune_lightning": ["torch", "lightning"],
    "finetune_nnx": ["flax"],
}


@pytest.mark.parametrize("name", NEEDS)
def test_it_runs_and_learns(name, monkeypatch, capsys):
    for module in NEEDS[name]:
        pytest.importorskip(module, reason=f"{module} is not installed")
    file = EXAMPLES / f"{name}.py"
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert f"python examples/{name}.py\n" in text or f"python examples/{name}.py  " in text
    monkeypatch.setattr(sys, "argv", [str(file)])
    runpy.run_path(str(file), run_name="__main__")
    first, last = re.search(r"^loss (\S+) .*?, (\S+) .*$", capsys.readouterr().out, re.MULTILINE).groups()
    assert float(last) < 0.8 * float(first)


def test_every_fine_tuning_example_is_tested():
    assert {file.stem for file in EXAMPLES.glob("finetune_*.py")} == set(NEEDS)

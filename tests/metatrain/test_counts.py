from __future__ import annotations

from pathlib import Path

from metatrain.outer.metrics import Metrics, read_metrics


def test_counts_continue_when_a_run_is_resumed(tmp_path: Path) -> None:
    """An evaluator counts from the start of its process; a run's figures from the start of the run."""
    first = Metrics(tmp_path, 0)
    for generation, lost in enumerate((0, 2, 3)):
        first.write({"generation": generation, "lost": lost, "waited": 1.5, "workers": 4})
    first.close()
    second = Metrics(tmp_path, 2)  # the state after two generations
    assert second.write({"generation": 2, "lost": 1, "waited": 0.5, "workers": 4})["lost"] == 3
    second.write({"generation": 3, "lost": 1, "waited": 0.5, "workers": 4})
    second.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["lost"] for line in lines] == [0, 2, 3, 3]
    assert [line["waited"] for line in lines] == [1.5, 1.5, 2.0, 2.0]
    assert {line["workers"] for line in lines} == {4}

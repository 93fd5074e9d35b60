"""32 real workers of four aggregators on one machine: the bits of one process, also when an aggregator is killed."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from metatrain.outer.loop import run
from metatrain.ray import groups
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.nodes import local_ray, worker_processes
from tests.metatrain.test_trainer import count_lines

_OUTER = {"steps": 8, "population": 64, "samples": 2}
_WORKERS = 32


@pytest.mark.slow
def test_aggregators_give_the_bits_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"members_per_call": 2, "plan": "fused"}
    run(small_config(task={"seconds": 1e-6}, outer=_OUTER, execution=plan), tmp_path / "quiet")  # same numbers, sooner
    monkeypatch.setattr(groups, "MANY_WORKERS", _WORKERS - 1)
    monkeypatch.setattr(groups, "GROUP_WORKERS", _WORKERS // 4)
    folder, over = tmp_path / "run", threading.Event()
    seen: dict[str, int] = {}

    def kill() -> None:
        """A worker in the second generation, an aggregator in the fifth."""
        for generation, name in ((1, r"\w*Worker"), (4, "Aggregator")):
            while count_lines(folder) < generation:
                if over.wait(0.02):
                    return
            victims = worker_processes(name)
            seen[name] = len(victims)
            os.kill(victims[0].pid, signal.SIGKILL)

    with local_ray(num_cpus=2):
        execution = {
            **plan,
            "backend": "ray",
            "workers": _WORKERS,
            "resources_per_worker": {"CPU": 2 / _WORKERS},
        }
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            run(small_config(task={"seconds": 0.1}, outer=_OUTER, execution=execution), folder)
        finally:
            over.set()
            killer.join()
    assert seen["Aggregator"] == 4
    last = metrics(folder)[-1]
    assert last["lost"] >= 1 + _WORKERS // 8  # its workers are lost with an aggregator
    for one, two in zip(metrics(folder), metrics(tmp_path / "quiet"), strict=True):
        assert one["meta_loss_mean"] == two["meta_loss_mean"]
    assert_same_theta(folder / "optimizer", tmp_path / "quiet" / "optimizer")

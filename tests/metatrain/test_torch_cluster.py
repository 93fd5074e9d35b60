"""The plan `torch` on Ray: real workers, one of them killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")

from metatrain.config import UserError, load_config
from metatrain.outer.loop import run
from tests.metatrain.common import assert_same_theta, metrics, small_config
from tests.metatrain.nodes import local_ray, worker_processes
from tests.metatrain.torch_tasks import TINY

_OUTER = {"steps": 6, "population": 6, "horizon": {"min": 3, "max": 30}}


@pytest.fixture(scope="module", autouse=True)
def _cluster() -> Iterator[None]:
    with local_ray(num_cpus=4):
        yield


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six generations in this process."""
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run(small_config(task={"name": TINY}, outer=_OUTER, execution={"workers": 1}), folder)
    return folder


@pytest.mark.parametrize(
    ("workers", "kill"),
    [pytest.param(1, False, marks=pytest.mark.slow), (2, True), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_any_number_of_workers_gives_the_bits_of_one_process(
    workers: int, kill: bool, quiet: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    execution = {"backend": "ray", "workers": workers}
    config = small_config(task={"name": TINY}, outer=_OUTER, execution=execution)
    over = threading.Event()

    def kill_one() -> None:
        """Once two generations are done."""
        while not over.wait(0.02):
            if (folder / "metrics.jsonl").exists() and len((folder / "metrics.jsonl").read_text().splitlines()) >= 2:
                os.kill(worker_processes()[0].pid, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill_one)
    if kill:
        killer.start()
    try:
        run(config, folder)
    finally:
        over.set()
        if kill:
            killer.join()
    counts = ("lost", "duplicated", "requeued", "stale", "rejected")
    lines = metrics(folder)
    assert lines[-1]["lost"] == int(kill)
    assert [{k: v for k, v in line.items() if k not in counts} for line in lines] == metrics(quiet)
    assert_same_theta(folder / "optimizer", quiet / "optimizer")
    assert load_config(folder / "config.yaml").execution.plan == "torch"


def test_a_task_that_workers_cannot_build(tmp_path: Path) -> None:
    """The driver can: `here` is an option that only its process knows."""
    from tests.metatrain import torch_tasks

    torch_tasks.ONLY_HERE.add("driver")
    config = small_config(
        task={"name": "tests.metatrain.torch_tasks:only_here"}, outer=_OUTER, execution={"backend": "ray", "workers": 1}
    )
    with pytest.raises(UserError, match=r"the task cannot be built on .*: there is nothing here"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()

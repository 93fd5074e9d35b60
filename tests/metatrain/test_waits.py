"""Every wait is bounded and names what it waits for; with a simulated clock and a simulated cluster."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from metatrain.config import ExecutionConfig, dump_config
from metatrain.outer import loop
from metatrain.outer.metrics import seconds_left
from metatrain.outer.progress import Display
from metatrain.outer.setup import Setup
from metatrain.outer.status import folder_snapshot
from metatrain.ray.fleet import Fleet
from metatrain.ray.health import FIRST_CALL_SECONDS, HANG_FACTOR, START_SECONDS, Health, Load
from metatrain.ray.waits import Waits
from metatrain.ray.worker import Worker
from metatrain.report.history import History
from metatrain.report.live import write
from metatrain.waiting import NOTICE_SECONDS, WaitError
from tests.metatrain.common import REGRESSION, small_config

BUSY = {"a": Load(0, 10)}


class Crew:
    """A simulated fleet."""

    members: tuple[str, ...] = ()
    starting = ("a", "b")

    def free_resources(self) -> str:
        return "CPU: 0 of 2 free, a worker needs 1"


def test_a_wait_for_workers_is_named_once_and_ends() -> None:
    crew, said = Crew(), list[str]()
    waits = Waits(crew, Health(), 600.0, said.append, 0.0)  # type: ignore[arg-type]
    waits.look(False, BUSY, NOTICE_SECONDS - 1)
    assert not said
    waits.look(False, BUSY, NOTICE_SECONDS)
    waits.look(False, BUSY, NOTICE_SECONDS + 1)
    assert len(said) == 1
    for fact in ("2 workers", "CPU: 0 of 2 free, a worker needs 1", "30 s", "10 min", "execution.wait_minutes"):
        assert fact in said[0]
    crew.members = ("a",)  # the wait is over
    waits.look(True, BUSY, 590.0)
    crew.members = ()
    waits.look(False, BUSY, 610.0)
    waits.look(False, BUSY, 590.0 + NOTICE_SECONDS)
    assert len(said) == 2
    with pytest.raises(WaitError, match=r"no worker .* for 10 min \(CPU: 0 of 2.*saved.*execution\.wait_minutes"):
        waits.look(False, BUSY, 1191.0)


def test_a_wait_for_answers_is_named_when_it_is_unusually_long() -> None:
    crew, said, health = Crew(), list[str](), Health()
    crew.members = ("a",)
    health.started("a", 0.0)
    waits = Waits(crew, health, 600.0, said.append, 0.0)  # type: ignore[arg-type]
    waits.look(False, BUSY, NOTICE_SECONDS)
    assert "compilation" in said[0]
    assert f"{FIRST_CALL_SECONDS:.0f} s" in said[0]
    for now in (50.0, 70.0):  # the second answer takes 20 s, without compilation
        health.answered("a", now, BUSY["a"])
        waits.look(True, BUSY, now)
    waits.look(False, BUSY, 70.0 + 2 * NOTICE_SECONDS - 1)
    assert len(said) == 1
    waits.look(False, BUSY, 70.0 + 2 * NOTICE_SECONDS)
    assert "usually 20 s" in said[1]
    assert f"{HANG_FACTOR * 20:.0f} s" in said[1]


def test_a_worker_that_hangs_in_its_set_up_is_given_up_and_asked_for_again() -> None:
    ray = mock.MagicMock()
    ray.nodes.return_value = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    ray.cluster_resources.return_value = {"CPU": 2.0}
    ray.available_resources.return_value = {}
    ray.remote.return_value.options.return_value.remote.side_effect = lambda _: mock.MagicMock()
    said: list[str] = []
    with mock.patch.dict("sys.modules", ray=ray):
        fleet = Fleet(Worker, mock.MagicMock(), ExecutionConfig(backend="ray", workers=2), 4, Health(), said.append)
    fleet.recruit(0.0)
    hung = [member.actor for member in fleet.starting.values()]
    assert len(hung) == 2
    fleet.give_up_slow_starts(START_SECONDS)
    assert not ray.kill.called
    fleet.give_up_slow_starts(START_SECONDS + 1)
    assert [call.args[0] for call in ray.kill.call_args_list] == hung
    assert "2 of the workers" in said[0]
    assert "CPU: 0 of 2 free, a worker needs 1" in said[0]
    fleet.recruit(START_SECONDS + 2)
    assert len(fleet.starting) == 2
    assert not {id(member.actor) for member in fleet.starting.values()} & set(map(id, hung))
    fleet.give_up_slow_starts(2 * START_SECONDS + 10)  # twice as long, because they may only be slow
    assert len(fleet.starting) == 2


def test_the_set_up_shows_each_step() -> None:
    said: list[str] = []
    Setup.build(small_config(task={"name": REGRESSION, "variants": [{}, {"examples": 48}]}), said.append)
    assert [line.partition(",")[0] for line in said[:2]] == ["task 1 of 2", "task 2 of 2"]
    assert said[-1].startswith("plan: fused, ")


def test_the_time_left_counts_each_compilation_once() -> None:
    assert seconds_left([], 5) is None
    assert seconds_left([(60.0, True)], 5) is None
    assert seconds_left([(60.0, True), (2.0, False), (4.0, False), (float("nan"), False)], 10) == pytest.approx(30.0)
    assert seconds_left([(63.0, True), (3.0, False)], 10, uncompiled=2) == pytest.approx(30.0 + 2 * 60)
    assert seconds_left([(1.0, False)] * 10 + [(2.0, False)] * 50, 10) == pytest.approx(20.0)  # the recent ones


def test_the_display_shows_compilation_and_a_time_left_without_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    display = Display(100)
    display.begin(0)
    common = {"meta_loss_mean": 1.0, "horizon": 5, "candidate_steps_per_s": 1.0, "workers": 2}
    seen: set[int] = set()
    for generation, (task, seconds) in enumerate([(0, 62.0), (0, 2.0), (1, 52.0), (1, 2.0)]):
        compiled = task not in seen
        seen.add(task)
        if compiled:
            display.starting([task], len(seen), 2)
        display.update({"generation": generation, "seconds": seconds, "compiled": compiled, **common})
    lines = capsys.readouterr().out.splitlines()
    assert "starting task 1 (1 of 2)" in lines[1]
    assert "starting task 2 (2 of 2)" in lines[4]
    done = [line for line in lines if "meta_loss_mean" in line]
    assert "left" not in done[0]
    assert "seconds_left=256" in done[1]  # 98 generations of 2 s, and 60 s for the other task's compilation
    assert "seconds_left=194" in done[2]
    assert "seconds_left=192" in done[3]


def test_a_runs_page_and_status_leave_compilation_out(tmp_path: Path) -> None:
    folder = tmp_path
    (folder / "config.yaml").write_text(dump_config(small_config()))
    common = {"meta_loss_mean": 0.5, "candidate_steps_per_s": 100.0, "workers": 2}
    lines = [
        {"generation": i, "seconds": seconds, "compiled": not i, **common}
        for i, seconds in enumerate((100.0, 1.0, 3.0))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert History.read(folder / "metrics.jsonl").seconds_left(6) == pytest.approx(6.0)
    assert "about 6 s left" in folder_snapshot(folder, "a", "running", going=True).line()
    (folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert History.read(folder / "metrics.jsonl").seconds_left(6) is None
    assert "left" not in folder_snapshot(folder, "a", "running", going=True).line()
    assert "about" not in write(folder).read_text().partition("<svg")[0]


def test_a_wait_that_ends_before_anything_is_saved_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_generation", mock.Mock(side_effect=WaitError("no worker")))
    with pytest.raises(WaitError):
        loop.run(small_config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""Runs as Ray jobs: a real head with its dashboard, with and without a token."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from metatrain.config import UserError, dump_config
from metatrain.log_lines import read_generation_line
from metatrain.outer.loop import run
from metatrain.ray.connection import is_loopback, require_token, split_address
from metatrain.ray.jobs import CLIENT, check_client, client, find, submit_job
from tests.metatrain.common import PATIENCE, assert_same_theta, small_config
from tests.metatrain.nodes import cluster_command, free_port, ray_nodes
from tests.metatrain.test_trainer import count_lines

ROOT = Path(__file__).parents[2]


_SECONDS = 0.4  # of a candidate: a job must still be running when the command that stops it has started


def _user_config(folder: Path, hold: str = "", **execution: object) -> Path:
    """A run of a user's task: the cluster has l3rs, but the module exists only here. See `quadratic` for `hold`."""
    (folder / "mytask.py").write_text((ROOT / "tests" / "metatrain" / "quadratic.py").read_text())
    task = {"name": "mytask:regression", "seconds": _SECONDS, "hold": hold}
    outer = {"steps": 30, "population": 4}
    config = folder / "config.yaml"
    config.write_text(dump_config(small_config(task=task, outer=outer, execution={"workers": 1, **execution})))
    return config


def _logged_generations(text: str) -> list[int]:
    """The generations in a driver's log, in which every line has time and level, without lines of Ray in between."""
    _, _, own = text.partition("Running entrypoint for job")  # after the lines of Ray's job manager
    lines = own.splitlines()[1:]
    assert [line for line in lines if not re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING) ", line)] == []
    return [found[0]["generation"] + 1 for line in lines if (found := read_generation_line(line))]


@pytest.mark.slow
def test_submit_status_logs_stop_resume(tmp_path: Path) -> None:
    hold = tmp_path / "hold"  # the run stands still while the commands about it start, however slow they are
    config, folder = _user_config(tmp_path, hold=str(hold)), tmp_path / "run"
    with ray_nodes(cpus=2, token=True, dashboard=True) as nodes:
        metatrain = cluster_command(nodes, tmp_path)
        code, out, err = metatrain("submit", config, "--out", folder)
        assert code == 0, err
        assert f"job small-1, run directory {folder}" in out
        deadline = time.monotonic() + PATIENCE
        while count_lines(folder) < 3:  # the time that is left is said from then on
            assert time.monotonic() < deadline, metatrain("logs", "small")[1]
            time.sleep(0.05)
        hold.touch()
        code, _, err = metatrain("submit", config, "--out", folder)
        assert (code, "the run small is running" in err) == (2, True), err
        code, out, err = metatrain("status", "small")
        assert code == 0, err
        assert out.startswith("small: running, generation ")
        assert "/30, meta-loss" in out
        assert "1 workers, about" in out
        hold.unlink()
        code, out, err = metatrain("stop", "small")
        assert (code, "small is stopped" in out) == (0, True), err
        assert "generations and saved" in metatrain("logs", "small")[1]
        done = max(int(step.name) for step in (folder / "state").iterdir() if step.name.isdigit())
        assert 0 < done < 30
        assert "is not running" in metatrain("stop", "small")[2]
        code, _, err = metatrain("submit", config, "--out", folder)
        assert (code, "was submitted before; resume it with --resume" in err) == (2, True), err
        code, _, err = metatrain("submit", config, "task.seconds=0.0", "--out", folder, "--resume")
        assert (code, f"task.seconds was {_SECONDS} and would become 0.0" in err) == (2, True), err
        code, out, err = metatrain("submit", config, "--out", folder, "--resume")
        assert (code, "job small-3" in out) == (0, True), err
        code, out, err = metatrain("logs", "small", "-f")
        assert (code, "generation 30/30" in out) == (0, True), err
        before, after = _logged_generations(metatrain("logs", "small-1")[1]), _logged_generations(out)
        assert before == list(range(1, done + 1))
        assert after == list(range(done + 1, 31))
        listed = metatrain("list")[1]
        assert "small-1  stopped" in listed
        assert "small-3  succeeded" in listed
        assert metatrain("status", "small")[1].startswith("small: succeeded, generation 30/30")
        assert "has no run other; its runs are small" in metatrain("status", "other")[2]
    for file in [*folder.rglob("*.json*"), *folder.rglob("*.yaml")]:
        assert nodes.env["RAY_AUTH_TOKEN"] not in file.read_text(errors="replace")
    task = {"name": small_config().task.name, "seconds": 1e-6}  # the same numbers, sooner
    run(small_config(task=task, outer={"steps": 30, "population": 4}), tmp_path / "local")
    assert_same_theta(folder / "optimizer", tmp_path / "local" / "optimizer")


@pytest.mark.slow
def test_what_a_cluster_refuses_is_one_sentence_and_nothing_is_left_running(tmp_path: Path) -> None:
    config = _user_config(tmp_path)
    with ray_nodes(cpus=2, token=True, dashboard=True) as nodes:
        wrong = cluster_command(nodes, tmp_path, RAY_AUTH_TOKEN="0" * 64)
        metatrain = cluster_command(nodes, tmp_path)
        (tmp_path / "elsewhere.py").write_text("import a_module_of_this_machine")
        for call, words, sentence in (
            (wrong, ["list"], "rejected the request"),
            (wrong, ["run", config, f"execution.address={nodes.address}", "execution.backend=ray"],
             "rejected the Ray token"),
            (metatrain, ["submit", config, "name=gpu", "execution.resources_per_worker.GPU=4"],
             "no node has that: the cluster's nodes have CPU 2, GPU 0"),
            (metatrain, ["submit", config, "name=missing", "task.name=mytask:missing"], "missing"),
            (metatrain, ["submit", config, "name=module", "task.name=elsewhere:task"], "elsewhere"),
        ):  # fmt: skip
            code, _, err = call(*words, "--out", tmp_path / "refused") if "list" not in words else call(*words)
            assert (code, sentence in err, err.count("\n")) == (2, True, 1), err
        assert "running" not in metatrain("list")[1]


@pytest.mark.slow
def test_a_cluster_without_tokens(tmp_path: Path) -> None:
    config, folder = _user_config(tmp_path), tmp_path / "run"
    with ray_nodes(cpus=2, token=False, dashboard=True) as nodes:
        metatrain = cluster_command(nodes, tmp_path)
        code, _, err = metatrain("submit", config, "task.seconds=0.0", "--out", folder)
        assert (code, "can be reached from other machines" in err) == (2, True), err
        words = ["task.seconds=0.0", "--out", folder, "--allow-unauthenticated", "--resume"]
        code, _, err = metatrain("submit", config, *words)
        assert code == 0, err
        assert "generation 30/30" in metatrain("logs", "small", "-f")[1]
        assert (folder / "optimizer").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("earlier_token", [False, True])
def test_the_sequence_of_the_readme(tmp_path: Path, earlier_token: bool) -> None:
    """`run` with Ray on this machine, then a cluster of this machine: what one leaves behind does not stop the next.

    An earlier program may have left a token, with which `ray start` turns authentication on.
    """
    config, home = _user_config(tmp_path), tmp_path / "home"
    home.mkdir()
    token = home / ".ray" / "auth_token"
    if earlier_token:
        token.parent.mkdir()
        token.write_text("0" * 64)
    with ray_nodes(cpus=2, token=None, dashboard=True, home=home) as nodes:
        metatrain = cluster_command(nodes, tmp_path)
        words = ["outer.steps=2", "task.seconds=0.0"]
        code, out, err = metatrain("run", config, *words, "execution.backend=ray", "--out", tmp_path / "own")
        assert code == 0, err
        assert re.search(r"^\S+Z INFO started Ray on this machine .* with Ray's token$", err, re.MULTILINE)
        assert token.exists() == earlier_token
        # The test's cluster listens on an address that other machines can reach.
        accepted = [] if earlier_token else ["--allow-unauthenticated"]
        code, out, err = metatrain("submit", config, *words, "--out", tmp_path / "run", *accepted)
        assert code == 0, err
        assert ("with Ray's token" in out) == earlier_token
        assert "generation 2/2" in metatrain("logs", "small", "-f")[1]  # until it ends
        code, out, err = metatrain("status", "small")
        assert (code, "generation 2/2" in out) == (0, True), err
        assert ("with Ray's token" if earlier_token else "without a token") in err
        assert metatrain("list")[0] == 0


def test_a_cluster_that_requires_a_token_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("metatrain.ray.jobs.probe", lambda *_: None)
    monkeypatch.setattr("metatrain.ray.jobs._authentication_mode", lambda _: "token")
    with pytest.raises(UserError, match=r"requires Ray's token, and there is none here.*RAY_AUTH_TOKEN"):
        client("http://127.0.0.1:8265")
    monkeypatch.setattr("metatrain.ray.jobs._authentication_mode", lambda _: "disabled")
    with pytest.raises(UserError, match="--allow-unauthenticated") as refused:
        client("http://10.0.0.5:8265")
    assert "execution.allow" not in str(refused.value)  # `list` has no such option


def test_a_cluster_that_others_can_reach_requires_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    require_token("127.0.0.1", False)
    require_token("localhost", False)
    require_token("10.0.0.5", True)
    with pytest.raises(UserError, match=r"10\.0\.0\.5 can be reached.*ray get-auth-token --generate.*allow_unauth"):
        require_token("10.0.0.5", False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    require_token("10.0.0.5", False)
    assert os.environ["RAY_AUTH_MODE"] == "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match="token authentication is off"):
        require_token("10.0.0.5", False)


def test_addresses() -> None:
    assert split_address("http://10.0.0.5:8265/") == ("10.0.0.5", 8265)
    assert split_address("[::1]:6379") == ("::1", 6379)
    assert is_loopback("::1")
    assert not is_loopback("head.example")
    with pytest.raises(UserError, match=r"'head' is not an address; write host:port"):
        split_address("head")


def test_an_address_without_an_answer_is_one_sentence(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(small_config()))
    port = free_port()
    for words in (
        ["list", "--address", f"http://127.0.0.1:{port}"],
        [
            "run",
            str(config),
            "execution.backend=ray",
            f"execution.address=127.0.0.1:{port}",
            "--out",
            str(tmp_path / "run"),
        ],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "metatrain.cli", *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 2
        assert f"no answer from 127.0.0.1:{port}" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_cluster_with_another_ray_is_one_sentence() -> None:
    class Head(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = {"version": "4", "ray_version": "2.0.0", "ray_commit": "0", "session_name": "s"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Head) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(UserError, match=r"has Ray 2\.0\.0, this machine has .*; they must be the same"):
                client(f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


def test_a_cluster_that_has_just_started_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metatrain.ray.jobs.time.sleep", lambda _: None)
    answers: list[str | Exception] = [
        *[RuntimeError("status code 500: No available agent to submit job, please try again later.")] * 2,
        "small-1",
        RuntimeError("status code 400: small-1 exists"),
    ]

    class Jobs:
        def submit_job(self, **job: str) -> str:
            assert job == {"submission_id": "small-1"}
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert submit_job(Jobs(), submission_id="small-1") == "small-1"
    with pytest.raises(UserError, match="cannot be submitted: RuntimeError: status code 400: small-1 exists"):
        submit_job(Jobs(), submission_id="small-1")
    monkeypatch.setattr("metatrain.ray.jobs._AGENT_SECONDS", -1.0)
    answers.append(RuntimeError("No available agent to submit job"))
    with pytest.raises(UserError, match="cannot be submitted: RuntimeError: No available agent"):
        submit_job(Jobs(), submission_id="small-1")


def test_a_run_that_is_called_as_another_s_job_is_found_by_its_name() -> None:
    def job(job_id: str, name: str, started: int) -> SimpleNamespace:
        about = {"l3rs_run": name, "l3rs_folder": "runs"}
        status = SimpleNamespace(value="RUNNING")
        return SimpleNamespace(submission_id=job_id, metadata=about, status=status, message="", start_time=started)

    for one, two in ((1, 2), (2, 1)):
        both = SimpleNamespace(list_jobs=lambda: [job("exp-1-1", "exp-1", one), job("exp-1", "exp", two)])  # noqa: B023
        assert [find(both, name).id for name in ("exp", "exp-1", "exp-1-1")] == ["exp-1", "exp-1-1", "exp-1-1"]
    again = SimpleNamespace(list_jobs=lambda: [job("exp-2", "exp", 9000), job("exp-1", "exp", 4000)])
    assert (find(again, "exp").started, find(again, "exp").begun) == (9.0, 4.0)


def test_a_driver_refuses_a_client_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    check_client()
    monkeypatch.setenv(CLIENT, '{"Python": "3.9", "l3rs": "0.0.1", "ray": "1.0"}')
    with pytest.raises(UserError, match=r"the cluster has Python 3\.\d+ \(yours: 3\.9\), l3rs .*they must be the same"):
        check_client()

"""Runs as Ray jobs: a real head with its dashboard, with and without a token."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from metatrain.config import UserError, dump_config, load_config
from metatrain.connection import is_loopback, require_token, split_address
from metatrain.jobs import CLIENT, check_client
from tests.metatrain.common import assert_same_theta, small_config
from tests.metatrain.nodes import Nodes, free_port, ray_nodes

ROOT = Path(__file__).parents[2]


def _command(nodes: Nodes, cwd: Path, **environment: str) -> Callable[..., tuple[int, str, str]]:
    env = {**nodes.env, "PYTHONPATH": f"{cwd}", "RAY_API_SERVER_ADDRESS": nodes.dashboard, **environment}
    env = {name: value for name, value in env.items() if value}

    def call(*words: object) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "metatrain.cli", *map(str, words)],
            capture_output=True, text=True, check=False, cwd=cwd, env=env, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    return call


@pytest.mark.slow
@pytest.mark.parametrize("token", [False, True], ids=["open", "token"])
def test_submit_status_logs_stop_resume(token: bool, tmp_path: Path) -> None:
    # The cluster has l3rs; the user's module only exists here.
    (tmp_path / "mytask.py").write_text((ROOT / "tests" / "metatrain" / "quadratic.py").read_text())
    config = tmp_path / "config.yaml"
    outer = {"steps": 30, "population": 4}
    task = {"name": "mytask:regression", "seconds": 0.2}
    execution = {"workers": 1, "allow_unauthenticated": not token}
    config.write_text(dump_config(small_config(task=task, outer=outer, execution=execution)))
    folder = tmp_path / "run"
    with ray_nodes(cpus=2, token=token, dashboard=True) as nodes:
        os.environ.pop("RAY_ADDRESS", None)
        metatrain = _command(nodes, tmp_path)
        code, out, err = metatrain("submit", config, "--out", folder)
        assert code == 0, err
        assert f"job small-1, run directory {folder}" in out
        code, _, err = metatrain("submit", config, "--out", folder)
        assert (code, "the run small is running" in err) == (2, True), err
        code, out, err = metatrain("status", "small")
        assert code == 0, err
        assert out.startswith("small: running, generation ")
        assert "/30, meta-loss" in out
        assert "1 workers, about" in out
        code, out, err = metatrain("logs", "small")
        assert (code, "generation " in out) == (0, True), err
        code, out, err = metatrain("stop", "small")
        assert code == 0, err
        assert "small is stopped" in out
        assert "generations and saved" in metatrain("logs", "small")[1]
        done = max(int(step.name) for step in (folder / "state").iterdir() if step.name.isdigit())
        assert 0 < done < 30
        assert "is not running" in metatrain("stop", "small")[2]
        code, _, err = metatrain("submit", config, "--out", folder)
        assert (code, "was submitted before; --resume" in err) == (2, True), err
        code, out, err = metatrain("submit", config, "task.seconds=0.0", "--out", folder, "--resume")
        assert (code, "with another task; only execution may change" in err) == (2, True), err
        code, out, err = metatrain("submit", config, "--out", folder, "--resume")
        assert (code, "job small-3" in out) == (0, True), err
        code, out, err = metatrain("logs", "small", "-f")
        assert (code, "generation 30/30" in out) == (0, True), err
        assert "small-1  stopped" in metatrain("list")[1]
        assert "small-3  succeeded" in metatrain("list")[1]
        assert metatrain("status", "small")[1].startswith("small: succeeded, generation 30/30")
        assert "knows no run other; it knows small" in metatrain("status", "other")[2]
        for file in [*folder.rglob("*.json*"), *folder.rglob("*.yaml")]:
            if token:
                assert nodes.env["RAY_AUTH_TOKEN"] not in file.read_text(errors="replace")
        if token:
            wrong = _command(nodes, tmp_path, RAY_AUTH_TOKEN="0" * 64)
            code, _, err = wrong("list")
            assert (code, "does not let us in" in err, err.count("\n")) == (2, True, 1), err
            code, _, err = wrong("run", config, f"execution.address={nodes.address}", "execution.backend=ray")
            assert (code, "is the Ray token the cluster's?" in err, err.count("\n")) == (2, True, 1), err

        refused = [
            (("execution.resources_per_worker={CPU: 1, GPU: 4}",), "no node has that", {}),
            (("task.name=mytask:missing",), "mytask", {}),
        ]
        for i, (overrides, sentence, environment) in enumerate(refused):
            call = _command(nodes, tmp_path, **environment)
            code, _, err = call("submit", config, f"name=bad{i}", *overrides, "--out", tmp_path / f"bad{i}")
            assert (code, sentence in err, err.count("\n")) == (2, True, 1), err
        assert "running" not in metatrain("list")[1]
    local = load_config(config, ["execution.backend=local", f"task.name={small_config().task.name}"])
    from metatrain.trainer import run

    run(local.model_copy(update={"name": "local"}), tmp_path / "local")
    assert_same_theta(folder / "optimizer", tmp_path / "local" / "optimizer")


def test_a_cluster_that_others_can_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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


def test_nobody_answers_is_one_sentence(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(small_config()))
    port = free_port()
    for words in (
        ["list", "--address", f"http://127.0.0.1:{port}"],
        ["run", str(config), "execution.backend=ray", f"execution.address=127.0.0.1:{port}"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "metatrain.cli", *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 2
        assert f"nobody answers at 127.0.0.1:{port}" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_driver_refuses_a_client_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    check_client()
    monkeypatch.setenv(CLIENT, '{"Python": "3.9", "l3rs": "0.0.1", "ray": "1.0"}')
    with pytest.raises(UserError, match=r"the cluster has Python 3\.\d+ \(yours: 3\.9\), l3rs .*both must be the same"):
        check_client()

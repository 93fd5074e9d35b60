"""`metatrain doctor`: each check, and the whole command on this machine and on a real cluster."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest

from metatrain import doctor
from metatrain.ray.node_report import NodeReport, installed_versions, report
from tests.metatrain.nodes import ray_nodes

ROOT = Path(__file__).parents[2]
_SUBJECTS = ["versions", "devices", "token", "ports", "folder of runs", "disk of the cache", "disk for temporary files"]


def _node(host: str = "a", **changed: str) -> NodeReport:
    return NodeReport(host, {**installed_versions(), **changed}, 0.0, ("127.0.0.1",), 1 << 40, None)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_versions() -> None:
    assert doctor.check_versions(installed_versions()).level == "ok"
    found = doctor.check_versions({**installed_versions(), "ray": "none"})
    assert (found.level, "ray missing" in found.advice, "pip install" in found.advice) == ("bad", True, True)


def test_versions_of_a_cluster_name_the_machine_and_both_values() -> None:
    assert doctor.check_equal_versions([_node(), _node("b")]).level == "ok"
    found = doctor.check_equal_versions([_node(), _node("b", jax="0.0.1")])
    assert found.level == "bad"
    assert f"b: jax 0.0.1 (here {installed_versions()['jax']})" in found.found
    assert "a:" not in found.found


@pytest.mark.parametrize(
    ("addresses", "token", "level", "part"),
    [
        ((), False, "ok", "no Ray is running"),
        (("127.0.0.1", "::1"), False, "ok", "loopback only"),
        (("0.0.0.0", "127.0.0.1"), False, "bad", "0.0.0.0: anyone who can reach that can run code here"),
        (("::", "10.0.0.5"), False, "bad", "10.0.0.5, ::"),
        (("0.0.0.0",), True, "ok", "needs the token"),
        (None, False, "note", "does not tell"),
    ],
)
def test_who_can_reach_the_ports(addresses: tuple[str, ...] | None, token: bool, level: str, part: str) -> None:
    found = doctor.check_ports(addresses, "this machine", token)
    assert (found.level, part in found.found) == (level, True), found
    assert bool(found.advice) == (level != "ok")
    if level == "bad":
        assert "RAY_AUTH_MODE=token" in found.advice
        assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in found.advice


def test_the_token_and_who_can_read_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_token().level == "ok"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    found = doctor.check_token()
    assert (found.level, found.advice) == ("bad", "ray get-auth-token --generate")
    token = home / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("4711")
    token.chmod(0o644)
    found = doctor.check_token()
    assert (found.level, found.advice) == ("bad", f"chmod 600 {token}")
    token.chmod(0o600)
    assert doctor.check_token().level == "ok"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "4712")
    found = doctor.check_token()
    assert (found.level, "4712" in str(found), "RAY_AUTH_MODE is token" in found.found) == ("ok", False, True)


def test_the_folder_and_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    for gib, level in ((100, "ok"), (3, "note"), (0.5, "bad")):
        monkeypatch.setattr("shutil.disk_usage", lambda _, gib=gib: usage(0, 0, int(gib * 2**30)))
        found = doctor.check_folder(tmp_path / "new" / "runs")
        assert (found.level, f"{gib:.1f} GiB" in found.found, bool(found.advice)) == (level, True, level != "ok")
        assert doctor.check_free({"a": int(gib * 2**30), "b": 1 << 40}).level == level
    (tmp_path / "file").write_text("")
    found = doctor.check_folder(tmp_path / "file" / "runs")
    assert (found.level, "is not a folder" in found.found, "--folder" in found.advice) == ("bad", True, True)


def test_a_store_is_written_and_read_back(tmp_path: Path) -> None:
    [found] = [f for f in doctor.machine(f"file://{tmp_path}/store") if f.subject == "store of runs"]
    assert found.level == "ok"
    assert not list((tmp_path / "store").iterdir())
    [found] = [f for f in doctor.machine("nonsense://store") if f.subject == "store of runs"]
    assert (found.level, "nonsense" in found.found) == ("bad", True)


def test_a_folder_that_a_machine_does_not_share(tmp_path: Path) -> None:
    probe = tmp_path / ".doctor-1"
    probe.write_text("")
    assert report("session", str(probe)).missing is None
    assert list(tmp_path.iterdir()) == [probe]
    missing = report("session", str(tmp_path / "none" / ".doctor-1")).missing
    assert missing is not None
    found = doctor.check_shared("/runs", {"b": missing})
    assert (found.level, "b: does not see the file" in found.found, "mount" in found.advice) == ("bad", True, True)
    assert doctor.check_shared("/runs", {}).level == "ok"


def test_clocks_that_differ() -> None:
    assert doctor.check_clocks({"a": 0.01, "b": -0.2}).level == "ok"
    found = doctor.check_clocks({"a": 0.01, "b": -3.0})
    assert (found.level, "b: -3.0 s" in found.found, "a:" in found.found) == ("note", True, False)
    assert doctor.check_clocks({"b": 300.0}).level == "bad"


def _doctor(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "metatrain.cli", "doctor", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def test_the_command_on_this_machine(tmp_path: Path) -> None:
    """One line a check; the exit code says whether one is bad."""
    for blocked in (False, True):
        if blocked:
            (tmp_path / "runs").write_text("")
        done = _doctor("--folder", tmp_path / "runs", HOME=str(tmp_path), RAY_AUTH_TOKEN="4711")
        lines = done.stdout.splitlines()
        assert lines[0] == "this machine:"
        assert [line[8:].partition(":")[0] for line in lines[1:]] == _SUBJECTS
        bad = [line for line in lines[1:] if line.startswith("  bad") and "ports" not in line]  # from other tests' Ray
        assert len(bad) == blocked
        assert done.returncode == any(line.startswith("  bad") for line in lines[1:])
        assert "4711" not in done.stdout


@pytest.mark.slow
def test_the_command_on_a_cluster(tmp_path: Path) -> None:
    """Directly, and as a job through the dashboard, as from a machine outside the cluster."""
    with ray_nodes(cpus=2, token=False, dashboard=True, loopback=True) as nodes:
        env = {**nodes.env, "HOME": str(tmp_path)}
        for address in (nodes.address, nodes.dashboard):
            done = _doctor("--address", address, "--folder", tmp_path / "runs", **env)
            assert done.returncode == 0, done.stdout + done.stderr
            shown = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.startswith("  ok    "))
            assert shown["  ok    machines"] == "1 answer"
            assert "loopback only" in shown["  ok    ports"]
            assert "can be written from all machines" in shown["  ok    shared folder"]
            assert shown["  ok    devices"] == "2 CPU"
            assert "equal on all machines" in shown["  ok    versions"]
            assert float(shown["  ok    clocks"].split()[1]) < 1
            assert list((tmp_path / "runs").iterdir()) == []
        (tmp_path / "file").write_text("")
        done = _doctor(
            "--address", nodes.dashboard, "--folder", tmp_path / "file", **{**nodes.env, "HOME": str(tmp_path)}
        )
        assert (done.returncode, "is not a folder" in done.stdout) == (1, True), done.stdout

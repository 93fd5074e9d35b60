"""configs/cluster/: checked as far as it can be without a cloud."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from metatrain.config import load_config
from tests.metatrain.common import PATIENCE

CLUSTER = Path(__file__).parents[1] / "configs" / "cluster"
ROOT = CLUSTER.parents[1]


# Fields of KubeRay 1.6's RayJob, as its API reference lists them, where our file has any.
_KUBERAY = {
    "spec": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint entrypointNumCpus "
    "entrypointNumGpus entrypointResources jobId managedBy metadata preRunningDeadlineSeconds rayClusterSpec "
    "runtimeEnvYAML shutdownAfterJobFinishes submissionMode submitterConfig submitterPodTemplate suspend "
    "ttlSecondsAfterFinished",
    "rayClusterSpec": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions headGroupSpec "
    "headServiceAnnotations managedBy rayVersion suspend upgradeStrategy workerGroupSpecs",
    "authOptions": "enableK8sTokenAuth mode secretName",
    "headGroupSpec": "enableIngress headService labels rayStartParams resources serviceType template",
    "workerGroupSpecs": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts rayStartParams "
    "replicas resources scaleStrategy suspend template",
}


def _ray_start_options() -> set[str]:
    """The options of `ray start` of the installed Ray."""
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts if option.startswith("--")}


def _used_options(text: str) -> set[str]:
    """The options of every `ray start` in a script, whose lines may be continued."""
    commands = re.findall(r"ray start ([^&;\n]*)", text.replace("\\\n", " "))
    assert commands
    return {option for command in commands for option in re.findall(r"--[a-z-]+", command)}


def test_the_installed_ray_is_the_pinned_one() -> None:
    """So the other tests of this file speak of that version."""
    assert f"ray=={version('ray')}\n" in (ROOT / "constraints.txt").read_text()


def test_every_option_of_ray_start_exists() -> None:
    cluster = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    start_commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    job = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())["spec"]["rayClusterSpec"]
    groups = [job["headGroupSpec"], *job["workerGroupSpecs"]]
    used = _used_options("\n".join(start_commands)) | _used_options((CLUSTER / "slurm.sh").read_text())
    used |= {f"--{name}" for group in groups for name in group["rayStartParams"]}
    assert used <= _ray_start_options()


def test_every_field_of_the_rayjob_exists() -> None:
    spec = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())["spec"]
    cluster = spec["rayClusterSpec"]
    found = {"spec": spec, "rayClusterSpec": cluster, **{k: cluster[k] for k in ("authOptions", "headGroupSpec")}}
    for name, section in [*found.items(), *(("workerGroupSpecs", group) for group in cluster["workerGroupSpecs"])]:
        assert set(section) <= set(_KUBERAY[name].split()), name
    assert cluster["rayVersion"] == version("ray")


def _overrides(command: str) -> list[str]:
    return re.findall(r"\S+\.\S+=\S+", command)


def test_the_ray_up_file_is_what_rays_launcher_accepts() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    validate_config(prepare_config(config))  # jsonschema of ray up, and its own checks
    spot = config["available_node_types"]["spot"]
    assert spot["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert command == "ray stop" or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in str(config["head_start_ray_commands"])


def test_the_rayjob_is_well_formed_and_its_command_is_ours() -> None:
    job: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay-rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    head = cluster["headGroupSpec"]["template"]["spec"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for pod in (head, group["template"]["spec"]):
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
                assert container["resources"]["requests"].keys() == container["resources"]["limits"].keys()
        assert pod["securityContext"]["runAsNonRoot"]
    # The submitter's pod and KubeRay's operator use the head's job server.
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    command = job["spec"]["entrypoint"]
    assert command.startswith("python -P -m metatrain.ray.retry 10 python -m metatrain.cli run")
    assert "--resume" in command
    assert job["spec"]["backoffLimit"] > 0
    config = load_config(ROOT / "configs" / "demo.yaml", _overrides(command))
    assert (config.execution.backend, config.execution.workers) == ("ray", "auto")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "--exclude=SC1091", CLUSTER / "slurm.sh"], check=True)


def _slurm_environment(folder: Path, driver: str) -> dict[str, str]:
    """Stand-ins for Slurm's commands, Python and `sleep` that write down how they are called.

    Args:
      folder: where to put them.
      driver: what Python does, as shell commands.
    """
    answers = {
        "scontrol": "printf 'a\\nb\\nc\\n'",
        "srun": 'case "$*" in *--ip-address*) echo "10.0.0.1 fe80::1";; esac',
        "python": driver,
        "sleep": "",
    }
    (folder / "bin").mkdir()
    for name, answer in answers.items():
        (folder / "bin" / name).write_text(f'#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n{answer}\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    return {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "a,b,c",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "16",
    }


_SLURM = ["bash", str(CLUSTER / "slurm.sh"), "configs/demo.yaml", "outer.sigma=0.1"]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(137, 0, True), (1, 3, True), (1, 10, False), (2, 0, False), (3, 0, False)]
)
def test_a_slurm_job_whose_driver_dies_is_requeued(tmp_path: Path, code: int, restarts: int, requeued: bool) -> None:
    end = "kill -9 $$" if code == 137 else f"exit {code}"
    environment = {**_slurm_environment(tmp_path, end), "SLURM_RESTART_COUNT": str(restarts)}
    assert subprocess.run(_SLURM, check=False, cwd=tmp_path, env=environment).returncode == code
    assert ("scontrol requeue 123456" in (tmp_path / "calls").read_text()) == requeued


@pytest.mark.parametrize(("sent", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_slurm_job_is_requeued_at_its_time_limit_and_not_when_cancelled(
    tmp_path: Path, sent: signal.Signals, requeued: bool
) -> None:
    """The signal comes as soon as the driver can save, whether or not the script already knows its process."""
    driver = (
        "trap 'echo saved >> \"$CALLS\"; exit 0' TERM\n"
        f"kill -{sent.name.removeprefix('SIG')} $PPID\n"
        "while true; do /bin/sleep 0.1; done"
    )
    environment, calls = _slurm_environment(tmp_path, driver), tmp_path / "calls"
    assert subprocess.run(_SLURM, check=False, cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert "\nsaved\n" in calls.read_text()
    assert ("scontrol requeue 123456" in calls.read_text()) == requeued


def test_the_slurm_script_starts_one_head_the_others_and_the_driver(tmp_path: Path) -> None:
    """Run for real, with stand-ins for Slurm's commands."""
    token = 'test -s "$RAY_AUTH_TOKEN_PATH"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"'
    subprocess.run(_SLURM, check=True, cwd=tmp_path, env=_slurm_environment(tmp_path, token))
    port = 20000 + 123456 % 20000
    head = f"ray start --head --node-ip-address=10.0.0.1 --port={port} --num-cpus=16"
    others = f"--nodes=2 --ntasks=2 --exclude=a --no-kill ray start --address=10.0.0.1:{port}"
    deadline = time.monotonic() + PATIENCE
    said = ""
    while not (head in said and others in said) and time.monotonic() < deadline:  # the script does not wait for these
        said = (tmp_path / "calls").read_text()
    assert head in said
    assert others in said
    [driver] = [line for line in said.splitlines() if line.startswith("python ")]
    assert "run configs/demo.yaml outer.sigma=0.1 execution.backend=ray" in driver
    assert driver.endswith("--out runs/demo --resume")
    assert "\n600\n" in said, "others can read the token"
    assert "requeue" not in said
    assert not list((tmp_path / "runs" / ".tokens").iterdir())
    load_config(ROOT / "configs" / "demo.yaml", _overrides(driver))

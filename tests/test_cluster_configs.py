"""configs/cluster/: checked as far as it can be without a cloud."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from metatrain.config import load_config

CLUSTER = Path(__file__).parents[1] / "configs" / "cluster"
ROOT = CLUSTER.parents[1]


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
    command = job["spec"]["entrypoint"]
    assert command.startswith("python -m metatrain.cli run")
    assert "--resume" in command
    assert job["spec"]["backoffLimit"] > 0
    config = load_config(ROOT / "configs" / "demo.yaml", _overrides(command))
    assert (config.execution.backend, config.execution.workers) == ("ray", "auto")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "--exclude=SC1091", CLUSTER / "slurm.sh"], check=True)


def test_the_slurm_script_starts_one_head_the_others_and_the_driver(tmp_path: Path) -> None:
    """Run for real, with stand-ins for Slurm's commands that write down how they are called."""
    calls = tmp_path / "calls"
    stand_in = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
    answers = {
        "scontrol": "printf 'a\\nb\\nc\\n'",
        "srun": 'case "$*" in *--ip-address*) echo "10.0.0.1 fe80::1";; esac',
        "python": 'test -s "$RAY_AUTH_TOKEN_PATH"; stat -c %a "$RAY_AUTH_TOKEN_PATH" >> "$CALLS"',
        "sleep": "",
    }
    (tmp_path / "bin").mkdir()
    for name, answer in answers.items():
        (tmp_path / "bin" / name).write_text(f"{stand_in}{answer}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text("")
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "a,b,c",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_CPUS_PER_TASK": "16",
    }
    script = ["bash", str(CLUSTER / "slurm.sh"), "configs/demo.yaml", "outer.sigma=0.1"]
    subprocess.run(script, check=True, cwd=tmp_path, env=environment)
    said = calls.read_text()
    port = 20000 + 123456 % 20000
    assert f"ray start --head --node-ip-address=10.0.0.1 --port={port} --num-cpus=16" in said
    assert f"--nodes=2 --ntasks=2 --exclude=a --no-kill ray start --address=10.0.0.1:{port}" in said
    [driver] = [line for line in said.splitlines() if line.startswith("python ")]
    assert "run configs/demo.yaml outer.sigma=0.1 execution.backend=ray" in driver
    assert driver.endswith("--out runs/demo --resume")
    assert "\n600\n" in said, "others can read the token"
    assert not list((tmp_path / "runs" / ".tokens").iterdir())
    load_config(ROOT / "configs" / "demo.yaml", _overrides(driver))

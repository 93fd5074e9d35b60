"""A worker uses only what it has reserved, and the driver of a Ray run only the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from metatrain.config import UserError, dump_config
from metatrain.inner import devices
from metatrain.outer import loop
from metatrain.ray import share as share_module
from metatrain.ray.share import Share, room, take_share, worker_share
from tests.metatrain.common import small_config

_NAMES = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A process that has not used JAX yet: the changes that a share makes, apart from the environment."""
    done: dict[str, Any] = {}
    for name in (*_NAMES, "JAX_PLATFORMS"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(share_module, "use_cores", lambda count: done.update(cores=count))
    monkeypatch.setattr(devices.jax.config, "update", lambda key, value: done.update({key: value}))
    return done


@pytest.mark.parametrize(
    ("resources", "share"),
    [
        ({"CPU": 1.0}, Share()),
        ({"CPU": 0.5}, Share(1)),
        ({"CPU": 4.0}, Share(4)),
        ({"GPU": 1.0}, Share(1, True, 1.0)),
        ({"CPU": 2.0, "GPU": 0.25}, Share(2, True, 0.25)),
        ({"CPU": 1.0, "GPU": 4.0}, Share(1, True, 1.0)),
        ({"TPU": 4.0}, Share(1, True, 1.0)),
        ({"CPU": 1.0, "big_node": 1.0}, Share()),
    ],
)
def test_a_share_follows_from_the_resources(resources: dict[str, float], share: Share) -> None:
    assert worker_share(resources) == share


def test_a_worker_without_a_device_computes_on_its_cores(process: dict[str, Any]) -> None:
    take_share(Share(3))
    assert process == {"cores": 3, "jax_platforms": "cpu"}
    assert not any(name in os.environ for name in _NAMES)


@pytest.mark.parametrize(
    ("part", "given", "fraction"),
    [
        (1.0, {}, 0.75),
        (0.25, {}, 0.1875),
        (0.25, {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, 0.225),
        (0.5, {"XLA_CLIENT_MEM_FRACTION": ".9"}, 0.45),
    ],
)
def test_a_part_of_a_gpu_is_the_same_part_of_its_memory(
    part: float, given: dict[str, str], fraction: float, process: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    take_share(Share(1, True, part))
    assert float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == pytest.approx(fraction)
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ  # JAX refuses both
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "true"
    assert "jax_platforms" not in process


@pytest.mark.usefixtures("process")
def test_the_environment_may_leave_memory_to_be_taken_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    take_share(Share(1, True, 0.5))
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_a_drivers_platform_is_not_the_workers(process: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    take_share(Share(1, True, 1.0))
    assert process == {"cores": 1, "jax_platforms": None}


@pytest.mark.parametrize(
    ("node", "resources", "workers"),
    [
        ({"CPU": 8.0, "GPU": 2.0}, {"GPU": 0.4}, 4),  # two on each GPU: a worker uses one GPU
        ({"CPU": 8.0, "GPU": 4.0}, {"CPU": 1.0, "GPU": 0.25}, 8),
        ({"CPU": 8.0, "GPU": 4.0}, {"GPU": 2.0}, 2),
        ({"CPU": 0.7}, {"CPU": 0.1}, 7),
        ({"CPU": 8.0}, {"CPU": 1.0, "GPU": 1.0}, 0),
    ],
)
def test_room_on_a_node(node: dict[str, float], resources: dict[str, float], workers: int) -> None:
    assert room(node, resources) == workers


def test_one_and_a_half_gpus_are_refused() -> None:
    with pytest.raises(UserError, match=r"execution.*resources_per_worker\.GPU is 1\.5") as refused:
        small_config(execution={"backend": "ray", "resources_per_worker": {"GPU": 1.5}})
    assert "0.25" in str(refused.value)


def test_a_driver_that_uses_a_device_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(devices.jax.config, "update", lambda key, value: told.update({key: value}))
    devices.use_cpu_only()
    assert told == {"jax_platforms": "cpu"}
    monkeypatch.setattr(devices.jax, "default_backend", lambda: "gpu")
    with pytest.raises(UserError, match=r"uses JAX on gpu already.*JAX_PLATFORMS=cpu"):
        devices.use_cpu_only()


def test_the_driver_of_a_ray_run_leaves_devices_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    monkeypatch.setattr(loop, "use_cpu_only", stop)
    config, folder = small_config(execution={"backend": "ray"}), tmp_path / "run"
    with pytest.raises(StoppedError):
        loop.run(config, folder)
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    for go_on in (lambda: loop.resume(folder), lambda: loop.run(config, folder, resume_run=True)):
        with pytest.raises(StoppedError):
            go_on()

"""The devices of this process: one per CPU core, and of which kind they are."""

from __future__ import annotations

import functools
import os
import platform
import re
from pathlib import Path

import jax

from metatrain.config import UserError
from metatrain.system import usable_cpus


def use_cores(count: int | None = None) -> None:
    """Give JAX one CPU device per core, or `count` devices, each with one thread.

    Candidates are independent: one core per candidate is faster and steadier than all cores on one
    operation. Call it before JAX is used for the first time. It does not affect accelerators.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", count or usable_cpus())


def use_cpu_only() -> None:
    """Keep JAX from the accelerators of this machine. Call it before JAX is used for the first time.

    A process that starts JAX with an accelerator reserves most of its memory.

    Raises:
      UserError: JAX uses an accelerator already.
    """
    jax.config.update("jax_platforms", "cpu")
    if (used := jax.default_backend()) != "cpu":
        raise UserError(
            f"this process uses JAX on {used} already, and a Ray run leaves accelerators to its workers: start it in a "
            "process of its own, or with JAX_PLATFORMS=cpu"
        )


@functools.cache
def device_kind() -> str:
    """The kind of this process's first device, e.g. "NVIDIA H100 80GB HBM3"; the model of a CPU, where known.

    Programs compiled for different kinds may differ in the last bits of their results.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine() or "cpu"

"""One JAX device per CPU core."""

from __future__ import annotations

import os

import jax

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

"""Making all cores of a CPU machine visible to JAX as devices."""

from __future__ import annotations

import os

import jax


def use_cores(count: int | None = None) -> None:
    """One CPU device per core (or `count` devices), each computing in one thread.

    Candidates are independent: one core per candidate is faster and steadier than all cores on one
    operation. Has an effect only before JAX is first used; with an accelerator it changes nothing.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    if "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", count or len(os.sched_getaffinity(0)))

"""The part of a machine that a worker may use: what it has reserved with Ray, and no more.

JAX takes three quarters of every device that it can see as soon as it starts. So a worker that reserves no device
computes on the CPU, and one that reserves a part of a GPU takes the same part of the GPU's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from metatrain.inner.devices import use_cores, use_cpu_only

ACCELERATORS = ("GPU", "TPU")  # Ray's names of resources; Ray hides the devices that a worker has not reserved

_MEMORY = 0.75  # of a device, as JAX takes by default; the rest is for the contexts and libraries of all workers on it
_OLD_FRACTION, _FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"  # JAX refuses both together
_PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"


class Share(NamedTuple):
    """What a worker may use.

    Attributes:
      cores: CPU cores: devices of one thread each, where there is no accelerator.
      accelerator: whether JAX may use the accelerators that Ray lets the process see.
      part: of the memory of each such device; 1 for whole devices.
    """

    cores: int = 1
    accelerator: bool = False
    part: float = 1.0


def worker_share(resources: Mapping[str, float]) -> Share:
    """The share of a worker with these resources, `execution.resources_per_worker`."""
    cores = max(int(resources.get("CPU", 1)), 1)
    if not has_accelerator(resources):
        return Share(cores)
    return Share(cores, True, min(resources.get("GPU", 1.0), 1.0))


def has_accelerator(resources: Mapping[str, float]) -> bool:
    """Whether a worker with these resources computes on an accelerator."""
    return any(resources.get(name, 0) > 0 for name in ACCELERATORS)


def actor_options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options for an actor that reserves these resources."""
    others = dict(resources)
    return {"num_cpus": others.pop("CPU", 0), "num_gpus": others.pop("GPU", 0), "resources": others}


def take_share(share: Share) -> None:
    """Keep this process to its share. Call it before JAX is used for the first time.

    A fraction of memory that the node's environment gives (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 without) is of a whole
    device; a worker takes its part of it. It takes it at once, so that no other process can, unless the environment
    has XLA_PYTHON_CLIENT_PREALLOCATE=false.
    """
    use_cores(share.cores)
    if not share.accelerator:
        use_cpu_only()
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":  # the environment of a driver that was told to leave devices alone
        jax.config.update("jax_platforms", None)
    given = os.environ.pop(_FRACTION, None) or os.environ.get(_OLD_FRACTION) or _MEMORY
    os.environ[_OLD_FRACTION] = f"{share.part * float(given):.4g}"
    os.environ.setdefault(_PREALLOCATE, "true")


def room(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """How many workers fit on a node. Parts of a GPU must be of one GPU: 0.4 of one leaves room for 2 on each."""
    fits = []
    for name, amount in resources.items():
        has = node.get(name, 0.0)
        if name == "GPU" and amount < 1:
            fits.append(int(has) * _times(1.0, amount))
        else:
            fits.append(_times(has, amount))
    return min(fits, default=0)


def _times(whole: float, part: float) -> int:
    return math.floor(whole / part + 1e-6)  # 0.7 / 0.1 is 6.999…

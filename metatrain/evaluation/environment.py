"""The machine and the versions that an evaluation ran with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib import metadata
from typing import Any

import jax

_PACKAGES = ("l3rs", "jax", "optax", "flax", "numpy")


def environment() -> dict[str, Any]:
    """Date, versions, platform and devices; everything can be written as JSON."""
    devices = jax.local_devices()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "devices": f"{len(devices)} × {devices[0].device_kind}",
    }

"""Which code and which device compute a run: equal bits are promised for equal ones only."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import l3rs
import metatrain
import tasks
from metatrain.config import CodeConfig
from metatrain.inner.devices import device_kind

_BETWEEN = " / "  # two kinds of device
_NAMES = {"l3rs": "l3rs", "jax": "JAX", "source": "the source code"}


def current_code() -> CodeConfig:
    """The code of this process, and the kind of its first device."""
    return CodeConfig(l3rs=version("l3rs"), jax=version("jax"), source=_source(), device=device_kind())


def changes(before: CodeConfig, now: CodeConfig) -> Mapping[str, str]:
    """{field: sentence} for what differs and may change the bits of a result; without the device."""
    pairs = {field: (getattr(before, field), getattr(now, field)) for field in _NAMES}
    return {field: f"{_NAMES[field]} was {a} and is now {b}" for field, (a, b) in pairs.items() if a != b}


def with_devices(code: CodeConfig, kinds: Sequence[str]) -> CodeConfig:
    """A note of the code, with these kinds added to those of the devices that have computed the run."""
    known = [kind for kind in code.device.split(_BETWEEN) if kind]
    return code.model_copy(update={"device": _BETWEEN.join(dict.fromkeys([*known, *kinds]))})


@functools.cache
def _source() -> str:
    digest = hashlib.sha256()
    for package in (l3rs, tasks, metatrain):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            content = file.read_bytes().replace(b"\r\n", b"\n")
            digest.update(f"{root.name}/{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return f"sha256-{digest.hexdigest()[:16]}"  # the prefix keeps YAML from taking it for a number

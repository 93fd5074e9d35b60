"""Which code and which device compute a run: equal bits are promised for equal ones only."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import l3rs
import metatrain
import tasks
from metatrain.config import CodeConfig, Config, UserError
from metatrain.inner.devices import device_kind

_log = logging.getLogger("metatrain")

_BETWEEN = " / "  # two kinds of device
_NAMES = {"l3rs": "l3rs", "jax": "JAX", "source": "the source code"}


def current_code() -> CodeConfig:
    """The code of this process, and the kind of its first device."""
    return CodeConfig(l3rs=version("l3rs"), jax=version("jax"), source=_source(), device=device_kind())


def code_of(config: Config, devices: str = "") -> CodeConfig:
    """The code that computes a run from here on; on Ray with these devices, until workers have named theirs."""
    code = current_code()
    return code.model_copy(update={"device": devices}) if config.execution.backend == "ray" else code


def checked_code(name: str, saved: Config, wanted: Config, allow_other_version: bool) -> CodeConfig:
    """The code that will compute the rest of a run, with a warning where its last bits may differ.

    Args:
      name: of the run's folder.
      saved, wanted: its configuration, and that with which it is resumed.
      allow_other_version: whether other code than that which began the run may go on.

    Raises:
      UserError: it may not.
    """
    now = code_of(wanted, "" if saved.code is None else saved.code.device)
    if saved.code is None:
        return now
    different = list(changes(saved.code, now).values())
    if different and not allow_other_version:
        raise UserError(
            f"{name} was begun by other code: {'; '.join(different)}; its result may differ from that of either "
            "alone: resume it with that code, or accept the difference with --allow-other-version"
        )
    if saved.code.device != now.device:
        different.append(f"the device was {saved.code.device} and is now {now.device}")
    if different:
        _log.warning("%s: %s; the last bits of its result may change", name, "; ".join(different))
    return now


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

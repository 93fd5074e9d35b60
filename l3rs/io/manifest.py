"""`l3rs.json`: what a checkpoint says about itself. Everything in it is checked before it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from l3rs.directions import direction_options
from l3rs.io.files import read_regular
from l3rs.spec import FEATURE_VERSION, L3RSError, Spec
from l3rs.theta import theta_shapes

MANIFEST = "l3rs.json"
FORMAT_VERSION = 2

# Limits of what a manifest may ask for. They are far above any optimizer that makes sense.
MAX_MANIFEST_BYTES = 4 << 20
MAX_LAYERS = 50_000  # tensors of the network that it was meta-trained on
MAX_HIDDEN = 64  # hidden layers of the MLP
MAX_WIDTH = 1 << 16  # of a hidden layer or an embedding
MAX_LIST = 64  # directions, decays, dimensions of a layer
MAX_SIZE = 1 << 48  # of a dimension of a layer
MAX_TEXT = 10_000  # characters of a layer's path or another text


class Manifest(NamedTuple):
    """A manifest that has been checked."""

    content: dict[str, Any]  # format, features, spec with the names that its fields have now, sha256, info
    spec: Spec


def make_manifest(spec: Spec, sha256: str, info: Mapping[str, Any]) -> str:
    """The text of a manifest.

    Raises:
      TypeError, ValueError: JSON cannot hold `info`.
      L3RSError: it is larger than a manifest may be.
    """
    if not isinstance(info, Mapping):
        raise L3RSError(f"info is a {type(info).__name__}; it must be a mapping")
    content: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "features": spec.form,
        "spec": spec.to_json(),
        "sha256": sha256,
        "info": dict(info),
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    if len(text) > MAX_MANIFEST_BYTES:
        raise L3RSError(f"{MANIFEST} would have {len(text)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    check_spec_limits(content["spec"], MANIFEST)
    return text


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest in `folder`.

    Raises:
      L3RSError: there is none, it is damaged, of a newer version, or beyond a limit.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(read_regular(file, MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        raise L3RSError(f"{folder} is not an L3RS checkpoint: it has no {MANIFEST}") from None
    except OSError as error:
        raise L3RSError(f"{folder} is not an L3RS checkpoint: {error.strerror or error}") from None
    except RecursionError:
        raise L3RSError(f"{file} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise L3RSError(f"{file} is damaged: {str(error)[:200]}") from None
    _check_content(content, file)
    spec = parse_spec(content["spec"], file)
    return Manifest({**content, "spec": spec.to_json()}, spec)


def _check_content(content: Any, file: Path) -> None:
    needed = {"format", "features", "spec", "sha256", "info"}
    missing = needed - set(content if isinstance(content, dict) else ())
    if missing:
        raise L3RSError(f"{file} is damaged: it lacks {', '.join(sorted(missing))}")
    for key, newest in (("format", FORMAT_VERSION), ("features", FEATURE_VERSION)):
        if type(content[key]) is not int or not 1 <= content[key] <= newest:
            version = repr(content[key])[:50]
            raise L3RSError(f"{file} has {key} version {version}; this release reads 1 to {newest}: update l3rs")
    for key in ("spec", "info"):
        if not isinstance(content[key], dict):
            raise L3RSError(f"{file} is damaged: {key} must be an object, found {_kind(content[key])}")
    if not isinstance(content["sha256"], str) or not re.fullmatch("[0-9a-f]{64}", content["sha256"]):
        raise L3RSError(f"{file} is damaged: sha256 must be a digest of 64 hexadecimal digits")


def parse_spec(data: dict[str, Any], file: Path) -> Spec:
    """The spec in a JSON object that others may have written; `file` is where it stands.

    Raises:
      L3RSError: it is damaged, or beyond a limit.
    """
    check_spec_limits(data, str(file))
    try:
        spec = Spec.from_json(data)
        theta_shapes(spec)
        for direction in spec.directions:
            direction_options(direction)
    except L3RSError as error:
        raise L3RSError(f"{file} is damaged: {str(error)[:500]}") from None
    except (TypeError, KeyError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise L3RSError(f"{file} is damaged: its spec cannot be read ({repr(error)[:200]})") from None
    return spec


def check_spec_limits(data: Mapping[str, Any], where: str) -> None:
    """Refuse a spec that asks for too much, before anything is made of it. Wrong types are left to `Spec`.

    Args:
      data: fields of a spec as JSON has them.
      where: begins the message.

    Raises:
      L3RSError: a field is beyond its limit.
    """
    limits = {"layers": MAX_LAYERS, "hidden": MAX_HIDDEN}
    for key, value in data.items():
        _check_length(value, f"{where}: spec.{key[:100]}", limits.get(key, MAX_LIST))
    for key in ("hidden", "embedding_dim"):
        for value in _items(data.get(key)) or [data.get(key)]:
            _check_number(value, f"{where}: spec.{key}", MAX_WIDTH)
    for layer in _items(data.get("layers")):
        for part in _items(layer):
            _check_length(part, f"{where}: spec.layers: a layer", MAX_LIST)
            for size in _items(part):
                _check_number(size, f"{where}: spec.layers: the size of a layer", MAX_SIZE)
    for direction in _items(data.get("directions")):
        _check_length(direction, f"{where}: spec.directions: a direction", MAX_LIST)
        for value in direction.values() if isinstance(direction, dict) else ():
            _check_number(value, f"{where}: spec.directions: an option", MAX_SIZE)


def _check_length(value: Any, what: str, limit: int) -> None:
    limit = MAX_TEXT if isinstance(value, str) else limit
    if isinstance(value, str | list | dict) and len(value) > limit:
        raise L3RSError(f"{what} has {len(value)} entries or characters; at most {limit} are allowed")


def _check_number(value: Any, what: str, limit: int) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise L3RSError(f"{what} is {value}; it must be finite")
    if isinstance(value, int) and abs(value) > limit:
        found = str(value) if abs(value) < 10**20 else f"a number of {value.bit_length()} bits"
        raise L3RSError(f"{what} is {found}; at most {limit} is allowed")


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kind(value: Any) -> str:
    names = {list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)

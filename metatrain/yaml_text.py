"""YAML as configurations use it: of bounded size, and with values as they are written.

YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90 and `on` for true. Here a number is a decimal number without
leading zeros, true and false are the only truth values, and everything else is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import yaml
from omegaconf import DictConfig, OmegaConf, grammar_parser
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from metatrain.config_errors import reason

MAX_BYTES = 1 << 18  # of a file
_MAX_VALUES = 20_000
_MAX_DEPTH = 32
_MAX_TEXT = 10_000  # characters of a value

Path = tuple[str | int, ...]  # keys and indices that lead to a value


class YamlError(ValueError):
    """The message is one sentence: what was found, and what is allowed."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}  # in place of those of YAML 1.1


_WHOLE = r"[-+]?(?:0|[1-9][0-9]*)"
_FRACTION = rf"(?:{_WHOLE}\.[0-9]*|[-+]?\.[0-9]+)(?:[eE][-+]?[0-9]+)?|{_WHOLE}[eE][-+]?[0-9]+"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("int", _WHOLE, "-+0123456789"),
    ("float", rf"{_FRACTION}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    first = [None if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), [*first, ""])


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    if double := sorted({key for key in keys if keys.count(key) > 1}):
        raise YamlError(f"the key {double[0]!r} is there twice")
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.construct_mapping = _mapping


def read_yaml(text: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A mapping with `key=value` overrides merged into it. Interpolations are not resolved.

    Raises:
      YamlError: it is not YAML, too large or too deep, no mapping, or an override cannot be read.
    """
    data = _parse(text)
    if not isinstance(data, dict):
        raise YamlError("it must hold a mapping of sections, found a list or a bare value")
    try:
        config = OmegaConf.merge(data, *map(_override, overrides))
    except YamlError:
        raise
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        raise YamlError(reason(error)) from None
    assert isinstance(config, DictConfig)
    return config


def resolve(config: DictConfig) -> dict[Any, Any]:
    """The plain values, interpolations replaced by what they stand for.

    Raises:
      YamlError: an interpolation leads nowhere, or in a circle.
    """
    try:
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise YamlError(reason(error)) from None
    except RecursionError:
        raise YamlError("its interpolations lead in a circle") from None
    assert isinstance(data, dict)
    return data


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """(path, value) of everything in mappings and lists that is neither a mapping nor a list."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def _override(override: str) -> DictConfig:
    if not isinstance(override, str):
        raise YamlError(f"{override!r:.200} is not an override; write key=value, e.g. outer.sigma=0.1")
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise YamlError(f"{override[:200]!r} is not an override; write key=value, e.g. outer.sigma=0.1")
    try:
        parsed = _parse(value)
        config = OmegaConf.create({})
        OmegaConf.update(config, key, parsed)
        return config
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, AttributeError, AssertionError) as error:
        raise YamlError(f"the override {override[:200]!r}: {reason(error)}") from None


def _parse(text: str) -> Any:
    """Plain values, checked for size, depth and the form of interpolations."""
    if len(text) > MAX_BYTES:
        raise YamlError(f"it has {len(text)} characters; at most {MAX_BYTES} are allowed")
    try:
        data = yaml.load(text, Loader=_Loader)  # a safe loader
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise YamlError(f"it cannot be read as YAML: {reason(error)}") from None
    _check(data)
    return data


def _check(data: Any) -> None:
    """Refuse what is too large to be meant. Aliases make a short file large, so values are counted as they expand."""
    pending: list[tuple[Any, Path]] = [(data, ())]
    count = 0
    while pending:
        value, path = pending.pop()
        count += 1
        if count > _MAX_VALUES:
            raise YamlError(f"it holds more than {_MAX_VALUES} values")
        if len(path) > _MAX_DEPTH:
            raise YamlError(f"it is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            if wrong := [key for key in value if not isinstance(key, str) or not key or len(key) > _MAX_TEXT]:
                where = f" in {_name(path)}" if path else ""
                raise YamlError(
                    f"{_short(wrong[0])}{where} is not a key; keys are texts of at most {_MAX_TEXT} characters"
                )
            pending += [(item, (*path, key)) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(item, (*path, index)) for index, item in enumerate(value)]
        elif isinstance(value, str):
            _check_text(value, path)
        elif not isinstance(value, int | float | None):
            kind = type(value).__name__
            raise YamlError(f"{_name(path)} is a {kind}; allowed are texts, numbers, true, false and null")


def _check_text(text: str, path: Path) -> None:
    if len(text) > _MAX_TEXT:
        raise YamlError(f"{_name(path)} has {len(text)} characters; at most {_MAX_TEXT} are allowed")
    if "${" in text:
        try:
            grammar_parser.parse(text)
        except (GrammarParseError, RecursionError):
            raise YamlError(
                f"{_name(path)} is {_short(text)}; write ${{key}} for the value of another key, "
                "or \\${ for these characters themselves"
            ) from None


def _name(path: Path) -> str:
    return ".".join(map(str, path))[:200] or "the value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"

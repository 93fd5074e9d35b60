"""Errors as one sentence: what pydantic finds wrong with a configuration, and any other error's message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_MAX_ERRORS = 5  # in one sentence
_MAX_REASON = 500  # characters

# What pydantic puts into the location of an error beside keys: the members of a union.
_MEMBERS = re.compile(r"(function-|tuple\[|literal\[|dict\[|constrained-|(bool|int|float|str)$)")


def one_sentence(errors: Sequence[Any], section: Any) -> str:
    """Errors of pydantic as one sentence; what each member of a union wants is joined by "or"."""
    found: dict[str, tuple[list[str], str]] = {}
    wrong = {error["loc"] for error in errors}
    for error in errors:
        if error["type"] == "too_short" and any(
            loc[: len(error["loc"])] == error["loc"] for loc in wrong - {error["loc"]}
        ):
            continue  # it counts the valid items only
        key = ".".join(str(part) for part in error["loc"] if not _MEMBERS.match(str(part)))
        wanted, _ = found.setdefault(key, ([], _found(error)))
        wanted.append(_wanted(error, section))
    shown = [f"{key[:300] or 'config'}: {_either(wanted)}{value}" for key, (wanted, value) in found.items()]
    more = [f"and {len(shown) - _MAX_ERRORS} more"] if len(shown) > _MAX_ERRORS else []
    return "; ".join(shown[:_MAX_ERRORS] + more)


def _either(wanted: list[str]) -> str:
    first, *others = wanted
    return " or ".join([first, *(other.removeprefix("input should be ") for other in others)])


def _wanted(error: Any, section: Any) -> str:
    match error["type"]:
        case "extra_forbidden":
            for part in error["loc"][:-1]:
                section = section.model_fields[part].annotation
            return f"unknown key; allowed here are {', '.join(section.model_fields)}"
        case "tuple_type":
            return "input should be a list in brackets, e.g. [16, 16]"
        case "dict_type" | "model_type":
            return "input should be a mapping, e.g. {key: value}"
        case "int_type":
            return "input should be a valid integer, without quotes and leading zeros"
    message = re.sub(r"^Value error, ", "", error["msg"])
    return message[0].lower() + message[1:]


def _found(error: Any) -> str:
    if error["type"] in ("value_error", "missing", "extra_forbidden"):
        return ""
    found = repr(error["input"])
    return f", found {found if len(found) <= 100 else found[:100] + '…'}"


def one_line(error: BaseException) -> str:
    """An error's whole message, without line breaks."""
    return " ".join(str(error).split())


def reason(error: BaseException) -> str:
    """The start of an error's message as one line; its type if it has no message."""
    return one_line(error)[:_MAX_REASON] or type(error).__name__

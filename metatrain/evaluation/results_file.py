"""Reading a `results.json` that others may have made: size, types and numbers are checked before anything is drawn."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from l3rs.io.files import first_line, read_regular
from metatrain.config import UserError

_MAX_BYTES = 64 << 20
_MAX_DEPTH = 20
_MAX_NAMES = 300  # settings, optimizers, horizons or seeds that differ
_MAX_TEXT = 10_000  # characters
_MAX_NUMBER = 10**15
_CONTROL = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f]")  # in a terminal they do what they like
_NAN = ("loss", "accuracy", "auc")  # fields of a record in which null stands for NaN


def read_results(file: str | Path, results: type[Any], lists: Sequence[str]) -> Any:
    """The content of a `results.json`, also one that an older version wrote.

    Args:
      file: its path.
      results: the dataclass that it becomes.
      lists: its fields that are lists of objects.

    Raises:
      UserError: the file cannot be read, or is not a `results.json`.
    """

    def checked(found: Any) -> Any:
        _check_names(found)
        return dataclasses.replace(found, meta_training=meta_training_facts(found.meta_training))

    return read_dataclass(file, results, lists, checked)


def read_dataclass(
    file: str | Path, cls: type[Any], lists: Sequence[str], checked: Callable[[Any], Any] = lambda found: found
) -> Any:
    """The content of a JSON file of results as a dataclass.

    Args:
      file: its path.
      cls: the dataclass.
      lists: its fields that are lists of objects; those that the file lacks are empty.
      checked: called with what was read, for the result; it may raise ValueError.

    Raises:
      UserError: the file cannot be read, or holds something else.
    """
    try:
        data = json.loads(read_regular(file, _MAX_BYTES))
        _check_values(data)
        if unknown := sorted(set(data) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"it has an unknown key {unknown[0]!r}")
        data["records"] = [_with_nan(record) for record in data["records"]]
        for name in lists:
            data[name] = [_with_nan(part) for part in data.get(name, ())]
        return checked(pydantic.TypeAdapter(cls).validate_python(data))
    except FileNotFoundError:
        raise UserError(f"{file} cannot be read: there is no such file") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file} is not a results.json: {where[:200]}: {first['msg'][:200]}") from None
    except RecursionError:
        raise UserError(f"{file} is not a results.json: it is nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a results.json: {first_line(error)}") from None


def meta_training_facts(info: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint's information says about its meta-training, as far as it has the right types.

    Args:
      info: anything that JSON can hold.

    Returns:
      horizon, {"min": int, "max": int}; generations and candidate_steps, int; seconds, float.
    """
    found: dict[str, Any] = {}
    horizon = info.get("horizon")
    if isinstance(horizon, dict) and all(_is_count(horizon.get(key)) for key in ("min", "max")):
        found["horizon"] = {key: horizon[key] for key in ("min", "max")}
    found |= {key: info[key] for key in ("generations", "candidate_steps") if _is_count(info.get(key))}
    seconds = info.get("seconds")
    if isinstance(seconds, int | float) and 0 <= seconds <= _MAX_NUMBER:
        found["seconds"] = seconds
    return found


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMBER


def _with_nan(fields: dict[str, Any]) -> dict[str, Any]:
    return {**fields, **{key: math.nan for key in _NAN if key in fields and fields[key] is None}}


def _check_values(data: Any) -> None:
    pending: list[tuple[Any, int]] = [(data, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
        if isinstance(value, dict):
            pending += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list):
            pending += [(item, depth + 1) for item in value]
        elif isinstance(value, str):
            if len(value) > _MAX_TEXT:
                raise ValueError(f"it has a text of {len(value)} characters; at most {_MAX_TEXT} are allowed")
            value.encode()  # half a character cannot be written to a page
            if control := _CONTROL.search(value):
                raise ValueError(f"it has a text with the control character {control[0]!r}")
        elif isinstance(value, int) and abs(value) > _MAX_NUMBER:
            raise ValueError(f"it has a number of {value.bit_length()} bits; at most {_MAX_NUMBER} is allowed")


def _check_names(results: Any) -> None:
    for field in ("setting", "optimizer", "horizon", "seed"):
        n_different = len({getattr(record, field) for record in results.records})
        if n_different > _MAX_NAMES:
            raise ValueError(f"its records have {n_different} values of {field}; at most {_MAX_NAMES} are allowed")
    if not results.records:
        raise ValueError("it has no records")
    runs = Counter((record.setting, record.optimizer, record.horizon) for record in results.records)
    every = itertools.product(results.settings(), results.optimizers(), results.horizons())
    if odd := next((run for run in every if runs[run] != results.seeds()), None):
        raise ValueError(f"it has {runs[odd]} records of {' | '.join(map(str, odd))}, but {results.seeds()} seeds")
    for record in results.records:
        if record.horizon < 1 or len(record.setting) > 300 or len(record.optimizer) > 300:
            raise ValueError("a record has a horizon below 1 or a name of more than 300 characters")

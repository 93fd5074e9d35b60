"""Tasks by name; a user's own task is `package.module:function`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from tasks.base import Task, TaskError
from tasks.digits import digits
from tasks.images import images, prepare_images
from tasks.text import prepare_text, text

TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "images": images, "text": text}


# Of tasks whose data has to be downloaded and prepared before.
PREPARATIONS: dict[str, Callable[..., list[str]]] = {"images": prepare_images, "text": prepare_text}


def prepare_task(name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Download and prepare what a task reads; returns where it is, nothing for tasks that need none.

    Raises:
      TaskError: bad options, or a missing extra.
    """
    preparation = PREPARATIONS.get(name)
    return _call(preparation, name, options) if preparation else []


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Build a task.

    Args:
      name: a name of `TASKS`, or `package.module:function` for any function that returns a `Task`.
      options: its keyword arguments.

    Raises:
      TaskError: no such task, an option it does not have, or one that it refuses.
    """
    task = _call(_find(name), name, options)
    if not isinstance(task, Task):
        raise TaskError(f"task {name!r} returned {type(task).__name__}, not a tasks.base.Task")
    return task


def _call(function: Callable[..., Any], name: str, options: Mapping[str, Any] | None) -> Any:
    """The function with these options, checked against its signature."""
    options = dict(options or {})
    allowed = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
        for option in options:
            if option not in allowed:
                raise TaskError(f"task.{option} is not an option of task {name!r}; allowed are {', '.join(allowed)}")
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in allowed.values() if p.default is p.empty and p.kind in kinds]
    if missing := [option for option in needed if option not in options]:
        raise TaskError(f"task {name!r} needs {', '.join(f'task.{option}' for option in missing)}")
    if name not in TASKS:
        return function(**options)
    try:
        return function(**options)
    except TaskError:
        raise
    except (TypeError, ValueError, AttributeError) as error:  # a number where a mapping is meant, and the like
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise TaskError(f"task {name!r} cannot be made of {shown[:500]}: {error}") from error


def _find(name: str) -> Callable[..., Task]:
    if not isinstance(name, str):
        raise TaskError(f"task.name is {name!r}; it must be a text")
    if name in TASKS:
        return TASKS[name]
    module_name, _, function = name.partition(":")
    if not function or not module_name:
        raise TaskError(f"unknown task {name!r}; allowed are {', '.join(TASKS)} and package.module:function")
    try:
        return getattr(importlib.import_module(module_name), function)
    except ImportError as error:
        raise TaskError(f"task {name!r}: {module_name} cannot be imported ({error})") from None
    except AttributeError:
        raise TaskError(f"task {name!r}: {module_name} has no function {function!r}") from None

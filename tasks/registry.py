"""Tasks by name; a user's own task is `package.module:function`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tasks.augment import Augmentation, augmented
from tasks.base import AnyTask, Aux, Task, TaskError, check_keys
from tasks.digits import digits
from tasks.features import features
from tasks.images import images, prepare_images
from tasks.text import prepare_text, text
from tasks.user_code import UserFunction, first_line, user_code

TASKS: dict[str, Callable[..., Task]] = {"digits": digits, "features": features, "images": images, "text": text}

_MAX_NAME = 200  # characters of a task's name

# Tasks whose data must be downloaded and prepared first.
PREPARATIONS: dict[str, Callable[..., list[str]]] = {"images": prepare_images, "text": prepare_text}


def prepare_task(name: str, options: Mapping[str, Any] | None = None) -> list[str]:
    """Download and prepare a task's data; returns its locations, none for a task that needs no preparation.

    Raises:
      TaskError: bad options, or a missing extra.
    """
    if name not in TASKS and ":" not in str(name):
        raise _unknown_task(name)
    preparation = PREPARATIONS.get(name)
    return _call(preparation, name, {**(options or {})}) if preparation else []


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build a task, and check it if it is the user's own.

    Args:
      name: a name of `TASKS`, or `package.module:function`. The function must declare that it returns a `Task` or a
        `tasks.torch.TorchTask` (`def my_task(…) -> Task`); it is not called otherwise.
      options: its keyword arguments. `augment`, a mapping, is not passed on: it wraps the task, see `tasks.augment`.

    Returns:
      A `Task` or a `TorchTask`.

    Raises:
      TaskError: no such task, an unknown option or a value that the task rejects, a user's own task that fails, or
        one whose functions do not return what a task needs.
    """
    task = build_task(name, options)
    if name not in TASKS:
        _check_functions(name, task)
    return task


def build_task(name: str, options: Mapping[str, Any] | None = None) -> AnyTask:
    """Build a task as `make_task`, without the check of its functions."""
    function = _find(name)
    if not isinstance(options or {}, Mapping):
        raise TaskError(f"options of task {name!r} are {options!r:.100}; they must be a mapping")
    kept = dict(options or {})
    given = kept.pop("augment", None)
    augmentation = None if given is None else Augmentation.parse(given, "task.augment")
    if augmentation is not None:
        if "batch_size" not in inspect.signature(function).parameters and augmentation.batch_size is not None:
            raise TaskError(f"task.augment.batch_size needs a task with the option batch_size; {name!r} has none")
        kept = augmentation.with_batch_size(name, kept)
    task = _call(function, name, kept)
    if not isinstance(task, AnyTask):
        raise TaskError(f"task {name!r} returned {type(task).__name__}, not a tasks.Task or tasks.torch.TorchTask")
    if not isinstance(task, Task):
        if augmentation is not None:
            raise TaskError(f"task.augment is for tasks of JAX; {name!r} is a TorchTask, whose dataset can augment")
        return dataclasses.replace(task, recipe=(name, dict(options or {})))  # type: ignore[type-var]
    if name not in TASKS:
        task = copy.copy(task)  # its class may have a constructor of its own
        for field in ("init", "batch", "loss"):
            object.__setattr__(task, field, UserFunction(name, getattr(task, field)))
    return task if augmentation is None else augmented(task, augmentation)


def _call(function: Callable[..., Any], name: str, options: Mapping[str, Any]) -> Any:
    """Call the function with these options, checked against its signature."""
    allowed = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in allowed.values()):
        check_keys(options, allowed, "task", f"an option of task {name!r}")
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p.name for p in allowed.values() if p.default is p.empty and p.kind in kinds]
    if missing := [option for option in needed if option not in options]:
        raise TaskError(f"task {name!r} needs {', '.join(f'task.{option}' for option in missing)}")
    if name not in TASKS:
        with user_code(name):
            return function(**options)
    try:
        return function(**options)
    except TaskError:
        raise
    except (TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:  # a value of another type
        shown = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise TaskError(f"task {name!r} cannot be built from {shown[:500]}: {first_line(error)}") from error


def _unknown_task(name: object) -> TaskError:
    shown = str(name)
    hint = f": for a function of that file {shown[:-3]:.100}:FUNCTION" if shown.endswith(".py") else ""
    return TaskError(f"unknown task {name!r:.100}; allowed are {', '.join(TASKS)} and package.module:function{hint}")


def _find(name: str) -> Callable[..., AnyTask]:
    if not isinstance(name, str):
        raise TaskError(f"task.name is {name!r}; it must be a string")
    if name in TASKS:
        return TASKS[name]
    module_name, _, attribute = name.partition(":")
    if not attribute or not module_name or module_name.startswith("."):
        raise _unknown_task(name)
    try:
        with user_code(name, f"{module_name} cannot be imported:"):
            module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except AttributeError:
        raise TaskError(f"task {name!r}: {module_name} has no function {attribute!r}") from None
    if _returned(function) is None:
        raise TaskError(
            f"task {name!r} does not declare that it returns a task; write `def {attribute}(…) -> Task` (tasks.Task) "
            "or `-> TorchTask` (tasks.torch.TorchTask)"
        )
    return function


def is_torch_task(name: str) -> bool:
    """Whether a task's function declares that it returns a `TorchTask`; the function is not called.

    Raises:
      TaskError: there is no such function, or it declares no task.
    """
    returned = _returned(_find(name))
    return returned is not None and not issubclass(returned, Task)


def _returned(function: Any) -> type[AnyTask] | None:
    """The kind of task of a function's return annotation; a string is looked up in its module, not evaluated."""
    if isinstance(function, type):
        return function if issubclass(function, AnyTask) else None
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function):
        return None
    function = inspect.unwrap(function)
    annotation = getattr(function, "__annotations__", {}).get("return")
    if isinstance(annotation, str):
        first, *rest = annotation.strip("'\" ").split(".")
        annotation = getattr(function, "__globals__", {}).get(first)
        for part in rest:
            annotation = getattr(annotation, part, None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, AnyTask) else None


def _check_functions(name: str, task: AnyTask) -> None:
    """Call a user's functions once, so that an error in them is reported here and not in the middle of a run."""
    if not isinstance(task.name, str) or not 0 < len(task.name) <= _MAX_NAME:
        found = repr(task.name)[:100]
        raise TaskError(f"task {name!r}: its name is {found}; it must be a text of 1 to {_MAX_NAME} characters")
    if isinstance(task, Task):
        _trace(name, task)
        return
    from tasks.torch import TorchTask
    from tasks.torch_checks import check_training

    assert isinstance(task, TorchTask)
    with user_code(name):
        check_training(task)


def _trace(name: str, task: Task) -> None:
    with user_code(name):
        params, stats = jax.eval_shape(task.init, task.data, jnp.zeros([], jnp.int32))
        batch = jax.eval_shape(task.batch, task.data, jax.random.key(0))
    if not jax.tree.leaves(params):
        raise TaskError(f"task {name!r}: its init returns no parameters")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TaskError(f"task {name!r}: parameter {jax.tree_util.keystr(path)} is {leaf.dtype}; it must be float")
    for train in (True, False):
        loss = functools.partial(lambda train, p, s, b: task.loss(p, s, b, train), train)
        with user_code(name):
            found = jax.eval_shape(loss, params, stats, batch)
        _check_loss(name, train, stats, found)


def _check_loss(name: str, train: bool, stats: Any, result: Any) -> None:
    """Raise TaskError unless `result` has the shapes of what a loss returns."""
    match result:
        case (loss, Aux() as aux) if _is_scalar(loss) and jnp.issubdtype(loss.dtype, jnp.floating):
            if not _is_scalar(aux.accuracy):
                raise TaskError(
                    f"task {name!r}: its loss returns accuracy {str(aux.accuracy)[:200]}; it must be a scalar"
                )
            if train and (found := _shapes(aux.stats)) != (wanted := _shapes(stats)):
                raise TaskError(
                    f"task {name!r}: its loss returns stats {str(found)[:200]}, its init {str(wanted)[:200]}; they "
                    "must have the same keys, shapes and dtypes"
                )
        case _:
            raise TaskError(
                f"task {name!r}: its loss must return (a scalar float, tasks.Aux), found {str(result)[:300]}"
            )


def _is_scalar(value: Any) -> bool:
    return getattr(value, "shape", None) == ()


def _shapes(tree: Any) -> dict[str, str]:
    """{path: dtype and shape} of a tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}

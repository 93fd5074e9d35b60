"""Tasks by name: a user's function is checked before it is called, and each of its errors is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from tasks import Task, TaskError, make_task, prepare_task

OWN = """
from __future__ import annotations
import functools
import jax, jax.numpy as jnp, numpy as np
import tasks
from tasks import Aux, Task, uniform_batches

called = []

def plain(examples: int = 8, fault: str = "") -> Task:
    called.append("plain")
    if fault == "call":
        raise RuntimeError("no luck\\nat all")
    if fault == "exit":
        raise SystemExit(3)
    split = {"x": np.ones((examples, 2), np.float32)}
    data = dict.fromkeys(tasks.base.SPLITS, split)

    def init(data, i):
        if fault == "params":
            return {"w": jnp.ones(2, int)}, {}
        return ({} if fault == "empty" else {"w": jnp.ones(2)}), {}

    def loss(params, stats, batch, train):
        if fault == "loss" or fault == "evaluation" and not train:
            raise KeyError("label")
        if fault == "stats":
            return jnp.mean(batch["x"] @ params["w"]), Aux({"n": jnp.ones(3)}, jnp.zeros(()))
        if fault == "accuracy":
            return jnp.mean(batch["x"] @ params["w"]), Aux(stats, jnp.ones(2))
        if fault == "scalar":
            return batch["x"] @ params["w"], Aux(stats, jnp.zeros(()))
        if fault == "aux":
            return jnp.mean(batch["x"] @ params["w"])
        return jnp.mean(batch["x"] @ params["w"]), Aux(stats, jnp.zeros(()))

    if fault == "type":
        return 5
    if fault == "unprintable":
        raise Unprintable
    if fault == "long":
        raise ValueError("x" * 100_000)
    name = None if fault == "name" else "own"
    return Task(name, data, init, uniform_batches(4), loss, {"meta_train": range(3), "held_out": range(3, 6)})

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")

def quoted() -> "tasks.Task":
    return plain()

class Sub(Task):
    pass

def sub() -> Sub:
    return plain()

part = functools.partial(plain, 6)

def unmarked():
    called.append("unmarked")

def other() -> int:
    called.append("other")

number = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_task.py").write_text(OWN)
    (tmp_path / "bad_syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "bad_import.py").write_text("x = 1\n1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_task"
    for name in ("own_task", "bad_syntax", "bad_import"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("function", ["plain", "quoted", "sub", "part"])
def test_a_function_that_declares_a_task_is_called(own: str, function: str) -> None:
    assert isinstance(make_task(f"{own}:{function}"), Task)


@pytest.mark.parametrize("function", ["unmarked", "other", "number", "np", "Aux"])
def test_any_other_function_is_never_called(own: str, function: str) -> None:
    with pytest.raises(TaskError) as error:
        make_task(f"{own}:{function}")
    assert f"{own}:{function}" in str(error.value)
    assert "-> Task" in str(error.value)
    assert not sys.modules[own].called


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("os:system", "command"),
        ("subprocess:check_output", "args"),
        ("os:popen", "cmd"),
    ],
)
def test_functions_of_the_system_are_never_called(tmp_path: Path, name: str, option: str) -> None:
    marker = tmp_path / "marker"
    with pytest.raises(TaskError, match=name):
        make_task(name, {option: f"touch {marker}"})
    assert not marker.exists()


@pytest.mark.parametrize(
    ("fault", "facts"),
    [
        ("call", ["RuntimeError", "no luck", "own_task.py:13"]),
        ("exit", ["SystemExit", "own_task.py:15"]),
        ("type", ["int", "Task"]),
        ("loss", ["KeyError", "label", "own_task.py:26"]),
        ("evaluation", ["KeyError", "label", "own_task.py:26"]),
        ("stats", ["stats", "['n']", "float32[3]"]),
        ("accuracy", ["accuracy", "(2,)", "scalar"]),
        ("name", ["name", "None", "200"]),
        ("unprintable", ["Unprintable", "own_task.py"]),
        ("long", ["ValueError", "xxx…"]),
        ("scalar", ["loss", "(4,)"]),
        ("aux", ["loss", "Aux"]),
        ("params", ["['w']", "int32"]),
        ("empty", ["init", "no parameters"]),
    ],
)
def test_errors_in_a_users_task_are_one_sentence(own: str, fault: str, facts: list[str]) -> None:
    with pytest.raises(TaskError) as error:
        make_task(f"{own}:plain", {"fault": fault})
    assert f"{own}:plain" in str(error.value)
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("nothing", {}, ["'nothing'", "digits, features, images, text", "package.module:function"]),
        ("images", {}, ["'images'", "task.target"]),
        ("text", {}, ["'text'", "task.source"]),
        ("own_task:plain", {"colour": 1}, ["task.colour", "examples"]),
        ("own_task:plain", {"examples": 0}, ["'inner_train'", "empty"]),
        ("own_task:nothing", {}, ["own_task", "'nothing'"]),
        (":f", {}, ["':f'"]),
        (".f:g", {}, ["'.f:g'"]),
        (3, {}, ["task.name", "3"]),
        ("no.such.module:f", {}, ["no.such.module", "cannot be imported"]),
        ("bad_syntax:f", {}, ["bad_syntax", "SyntaxError", "bad_syntax.py:2"]),
        ("bad_import:f", {}, ["bad_import", "ZeroDivisionError", "bad_import.py:2"]),
    ],
)
def test_bad_input_is_one_sentence(own: str, name: str, options: dict, facts: list[str]) -> None:
    del own
    with pytest.raises(TaskError) as error:
        make_task(name, options)
    assert all(fact in str(error.value) for fact in facts), error.value
    assert "\n" not in str(error.value)


def test_a_task_without_preparation_has_no_locations(own: str) -> None:
    assert prepare_task(f"{own}:plain", {"fault": "call"}) == []
    assert make_task(f"{own}:plain").params_shape()["w"].dtype == jnp.float32

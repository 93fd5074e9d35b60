"""More wrong input, beside `test_battery`: commands and options that came later, and arguments of Python functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import l3rs
import metatrain
from l3rs import L3RSError
from metatrain import UserError
from metatrain.describe import describe
from metatrain.evaluation.records import Results
from metatrain.evaluation.results_file import meta_training_facts
from metatrain.terminal import printable
from tasks import TaskError, make_task, prepare_task
from tests.metatrain.synthetic import full
from tests.metatrain.test_battery import Call, place, refused  # noqa: F401  # fixtures

LONG = "x" * 400
OWN = ("specialize", "tests.metatrain.quadratic:regression")
WORDS: tuple[tuple[str, ...], ...] = (
    *(("specialize", *more) for more in (
        (), ("nope",), ("own_code:plain",), ("own_code:fails",), ("os:system",), (":",), ("a:",), ("",),
        ("own_code:needs",), ("text",), ("digits", "colour=red"), ("text", "source.file=none.txt"),
        ("text", "batch_size"), ("text", "=1"), ("text", "source.file=text.txt", "batch_size=x"),
    )),
    *((*OWN, "--minutes", minutes) for minutes in ("0", "-1", "nan", "inf", "-inf", "x", "")),
    *((*OWN, "--start", start) for start in ("nope", "folder", "device", "pipe", "a\0", "hf://x", LONG)),
    *((*OWN, "--out", out) for out in (
        "file", "file/x", "/proc/x", "a\0", LONG, "gone/x", "device", "nowhere://x", "file:///x", "s3://bucket/x",
    )),
    (*OWN, "dimension=x"), (*OWN, "examples=0"), (*OWN, "nope=1"), (*OWN, "poison=nope"),
    *(("compare", *more) for more in (
        (), ("folder",), ("none", "adam"), ("folder", "adam"), ("file", "adam"), ("piped", "adam"), ("device", "adam"),
        (LONG, "adam"), ("a\0b", "adam"), ("", "adam"), ("gone", "adam"), ("folder", "adam", "--by", "x"),
        ("folder", "adam", "--by", ""), ("folder", "adam", "--nope"),
    )),
    *(("doctor", *more) for more in (
        ("x",), ("--nope",), ("--folder", "a\0b"), ("--address", "x"), ("--address", "http://"),
        ("--address", "127.0.0.1:1"),
    )),
    ("status",), ("status", "unfinished", "--watch", "--nope"), ("status", "folder", "-w", "--address", "127.0.0.1:1"),
    *(("submit", "good.yaml", "--retries", retries) for retries in ("-1", "1001", "x", "1.5", "")),
    *(("submit", "good.yaml", "--out", out) for out in ("~/x", "a\0", "file/x")),
    *(("evaluate", "-", "good.yaml", *more) for more in (
        ("--settings", ","), ("--schedules", ","), ("--baselines", ","), ("--baselines", " "), ("--multipliers", ""),
        ("--multipliers", ","), ("--multipliers", "1e400"), ("--horizons", ","), ("--horizons", " "),
        ("--horizons", "1," * 3000), ("--seeds", ""), ("--tuning-seeds", ""), ("evaluation.settings={a: 5}",),
        ("evaluation.settings={a: {nope: 1}}",), ("evaluation.horizons=[x]",), ("--out", "pipe"),
        ("--out", "s3://bucket/x"), ("--out", "file:///x"),
    )),
    *(("resume", "unfinished", *more) for more in (
        ("seed=2",), ("outer.steps=0",), ("nope=1",), ("--nope",), ("outer.steps=1e9",), ("name=y",), ("checkpoint=5",),
        ("execution.plan=stepwise",), ("logging.mlflow=x",),
    )),
    *(("export", *more) for more in (
        ("", "new"), ("unfinished", ""), ("unfinished", "new", "--results", ""), ("file://", "new"), ("folder", "new"),
        ("unfinished", "."), ("unfinished", "pipe"), ("unfinished", "s3://bucket/x"),
    )),
    *(("prepare", "good.yaml", task) for task in (
        "task={name: images}", "task={name: images, target: ../x}", "task={name: images, target: {folder: none}}",
        "task={name: images, target: {tfds: '../x'}}", "task.source={file: pipe, tfds: null}",
        "task.source={file: device, tfds: null}", "task.source={file: binary.yaml, tfds: null}", "task.name=nope",
    )),
    *(("inspect", *more) for more in (
        ("universal", "--match", "x"), ("universal", "--match", "path"), ("universal", "--on-unknown", "mean"),
        ("universal", "--rename", "a=b"), ("universal", "--network", "pipe"), ("universal", "--network", "device"),
        ("hf://",), ("hf://../..",), ("file:///dev",), ("zip://x",), ("reference://x",), ("data://x",), ("pipe/x",),
    )),
    *(("run", "good.yaml", "--out", out) for out in (
        "zip://x", "reference://x", "simplecache::file:///x", ".", "/", "pipe", "device", "file:///proc/x",
    )),
)  # fmt: skip


@pytest.mark.parametrize("words", WORDS, ids=lambda words: " ".join(words)[:60].replace("\0", "0"))
def test_commands(refused: Call, words: tuple[str, ...]) -> None:  # noqa: F811
    refused(*words)


def test_there_are_many() -> None:
    assert len(WORDS) >= 120


PARAMS = {"w": np.ones((3, 2), np.float32)}
SPEC = l3rs.Spec.create(PARAMS, hidden=(4,))
THETA = jax.tree.map(np.asarray, l3rs.init_meta_params(jax.random.key(0), SPEC))
FUNCTIONS: dict[str, Callable[[Any], object]] = {
    "learned_optimizer, spec": lambda x: l3rs.learned_optimizer(THETA, x, 10),
    "learned_optimizer, theta": lambda x: l3rs.learned_optimizer(x, SPEC, 10),
    "init_meta_params": lambda x: l3rs.init_meta_params(jax.random.key(0), x),
    "save, spec": lambda x: l3rs.save("nowhere", THETA, x),
    "save, theta": lambda x: l3rs.save("nowhere", x, SPEC),
    "Spec.create, directions": lambda x: l3rs.learned_optimizer(THETA, l3rs.Spec.create(PARAMS, x), 10),
    "Spec.create, direction": lambda x: l3rs.learned_optimizer(THETA, l3rs.Spec.create(PARAMS, [x]), 10),
    "Spec.create, hidden": lambda x: l3rs.Spec.create(PARAMS, hidden=x),
    "mask": lambda x: l3rs.load("universal", 10, weight_decay=0.1, mask={"w": x}).update(
        PARAMS, l3rs.load("universal", 10).init(PARAMS), PARAMS, value=1.0
    ),
    "run": metatrain.run,
    "evaluate": lambda x: metatrain.evaluate("universal", x),
    "overrides": lambda x: metatrain.load_config("good.yaml", [x]),
    "make_task": make_task,
    "prepare_task": prepare_task,
}


@pytest.mark.parametrize("value", [5, 1.5, b"x", object(), ("a",), "x"], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.usefixtures("place")
def test_functions(name: str, value: object) -> None:
    with pytest.raises((L3RSError, UserError, TaskError)) as error:
        FUNCTIONS[name](value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


HOSTILE_INFO = (
    {"results": [1]}, {"results": {"a": 5}}, {"results": {"a": {"b": 5}}}, {"results": {"a": {"b": {"c": []}}}},
    {"horizon": "x"}, {"horizon": {"min": [], "max": 3}}, {"seconds": "a day"}, {"generations": None},
    {"task": "\x1b]0;title\x07"}, {"x" * 10_000: "y" * 100_000},
)  # fmt: skip


@pytest.mark.parametrize("info", HOSTILE_INFO, ids=lambda info: str(info)[:40])
def test_any_information_of_a_checkpoint_is_shown(info: dict[str, Any], tmp_path: Path) -> None:
    l3rs.save(tmp_path / "saved", THETA, SPEC, info)
    lines = [printable(line) for line in describe(str(tmp_path / "saved"))]
    assert any("meta-parameters" in line for line in lines)
    assert not any(ord(letter) < 32 for line in lines for letter in line)
    facts = meta_training_facts(info)
    assert set(facts) <= {"horizon", "generations", "candidate_steps", "seconds"}
    assert all(isinstance(value, dict if key == "horizon" else int) for key, value in facts.items())


def test_facts_of_a_shipped_checkpoint_are_kept() -> None:
    info = l3rs.info("digits-mlp")["info"]
    assert meta_training_facts(info) == {
        key: info[key] for key in ("horizon", "generations", "candidate_steps", "seconds")
    }


@pytest.mark.parametrize("text", ["\x1b[2J", "\x1b]0;title\x07", "a\x00b", "\x9b2J", "back\x08"])
def test_names_that_control_a_terminal_are_refused_and_not_printed(
    refused: Call,  # noqa: F811
    tmp_path: Path,
    text: str,
) -> None:
    data = json.loads(full(1).save(tmp_path / "good").read_text())
    data["records"][0]["setting"] = text
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="control character"):
        Results.load(tmp_path / "results.json")
    if "\0" not in text:
        shown = refused("run", "good.yaml", f"{text}=1")
        assert not any(ord(letter) < 32 or 0x7F <= ord(letter) < 0xA0 for letter in shown)


def test_meta_training_of_results_keeps_what_has_its_type(tmp_path: Path) -> None:
    data = json.loads(full(1).save(tmp_path).read_text())
    data["meta_training"] = {"horizon": "x", "seconds": -1, "generations": 5, "candidate_steps": [], "other": 1}
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert Results.load(tmp_path / "results.json").meta_training == {"generations": 5}

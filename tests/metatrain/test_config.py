from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from metatrain.config import UserError, as_written, check_config, dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"name": "x", "task": {"name": "digits"}}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configs_are_valid_and_say_their_command(file: Path) -> None:
    config = load_config(file)
    assert config.outer.steps >= 1
    assert re.search(rf"metatrain (run|evaluate \S+) configs/{file.name}", file.read_text())


def test_overrides_are_merged_and_the_dump_reads_back(tmp_path: Path) -> None:
    file = write(tmp_path, "name: x\ntask: {name: digits, target: uci}\nouter: {sigma: 0.1}\n")
    config = load_config(file, ["outer.sigma=0.2", "outer.horizon.max=50", "task.batch_size=32", "seed=7"])
    assert (config.outer.sigma, config.outer.horizon.max, config.seed) == (0.2, 50, 7)
    assert config.task.form() == ("digits", {"target": "uci", "batch_size": 32})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_the_dump_keeps_what_yaml_and_interpolation_would_change(tmp_path: Path) -> None:
    text = 'name: x\ntask: {name: digits, far: .inf, home: "\\\\${HOME}", nested: {list: [1, 2.5, null, true]}}\n'
    config = load_config(write(tmp_path, text))
    assert config.task.form()[1]["home"] == "${HOME}"
    again = load_config(write(tmp_path, dump_config(config)))
    assert again == config
    assert again.task.form()[1]["far"] == float("inf")
    with pytest.raises(UserError, match=r"outer\.sigma: input should be a finite number, found inf"):
        load_config(write(tmp_path, text), ["outer.sigma=.inf"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outer": {"sigmma": 1}}, ["outer.sigmma: unknown key", "sigma, strategy"]),
        ({"extra": 1}, ["extra: unknown key", "task"]),
        ({"outer": {"horizon": {"mni": 1}}}, ["outer.horizon.mni", "min, max"]),
        ({"outer": {"steps": "many"}}, ["outer.steps", "integer", "'many'"]),
        ({"outer": {"steps": 0}}, ["outer.steps", "greater than or equal to 1", "found 0"]),
        ({"outer": {"horizon": {"min": 0}}}, ["outer.horizon.min", "greater than or equal to 1"]),
        ({"outer": {"horizon": {"min": 5, "max": 4}}}, ["outer.horizon", "min 5 is larger than max 4"]),
        ({"outer": {"horizon": {"power": 0.5}}}, ["outer.horizon.power", "less than or equal to 0"]),
        ({"outer": {"population": 5}}, ["population is 5", "even"]),
        ({"outer": {"population": 0}}, ["outer.population", "greater than or equal to 2"]),
        ({"execution": {"address": "10.0.0.5:6379"}}, ["execution", "10.0.0.5:6379", "execution.backend=ray"]),
        ({"outer": {"sigma": 0}}, ["outer.sigma", "greater than 0"]),
        ({"outer": {"sigma": -1.0}}, ["outer.sigma", "greater than 0", "-1.0"]),
        ({"outer": {"strategy": "cma"}}, ["outer.strategy", "open_es", "snes", "pgpe", "'cma'"]),
        ({"optimizer": {"directions": ["adamm"]}}, ["directions", "unknown direction 'adamm'", "lion"]),
        ({"optimizer": {"directions": []}}, ["directions", "at least one"]),
        ({"optimizer": {"directions": [{"name": "adam", "b3": 1}]}}, ["no option 'b3'", "b1"]),
        ({"name": "../x"}, ["name", "match pattern"]),
        ({"task": {}}, ["task.name", "required"]),
    ],
)
def test_bad_values_are_one_sentence(change: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        check_config({**GOOD, **change}, "some.yaml")
    message = str(error.value)
    assert message.startswith("some.yaml: ")
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("text", "words"),
    [("name: [", "cannot be read as YAML"), ("- a\n- b\n", "mapping of sections"), ("name: ${nowhere}", "nowhere")],
)
def test_unreadable_files(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_config(write(tmp_path, text))


def test_missing_file_folder_and_malformed_override(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="write key=value"):
        load_config(write(tmp_path, "name: x"), ["outer.sigma"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        *[(f"seed={value}", ["seed", repr(value)]) for value in ("08", "010", "1:30", "0x10", "1_000", "0o7", "1,000")],
        ("seed=true", ["seed", "integer", "True"]),
        ("seed=1.0", ["seed", "integer", "1.0"]),
        ("seed='7'", ["seed", "integer", "'7'"]),
        ("seed=!!int '08'", ["08"]),
        ("outer.sigma=true", ["outer.sigma", "number", "True"]),
        ("outer.sigma=01.5", ["outer.sigma", "'01.5'"]),
        ("logging.tensorboard=1", ["logging.tensorboard", "boolean", "found 1"]),
        ("logging.tensorboard=on", ["logging.tensorboard", "'on'"]),
        ("optimizer.hidden=16,16", ["optimizer.hidden", "[16, 16]", "'16,16'"]),
        ("optimizer.hidden=[16,true]", ["optimizer.hidden.1", "True"]),
        ("optimizer.absolute_time=1", ["optimizer.absolute_time", "found 1"]),
        ("execution.workers=x", ["execution.workers", "integer", "'auto'", "'x'"]),
        ("name=a${b", ["'a${b'", "${key}", "\\${"]),
        ("name=${b", ["'${b'"]),
        ("task.x=${nothing}", ["task.x", "nothing"]),
        ("task.x=${oc.env:L3RS_NO_SUCH_VARIABLE}", ["task.x", "L3RS_NO_SUCH_VARIABLE"]),
        ("a=[", ["a=["]),
        ("=1", ["=1", "key=value"]),
        ("outer.steps.x=1", ["outer.steps", "{'x': 1}"]),
    ],
)
def test_values_are_read_as_written(tmp_path: Path, override: str, words: list[str]) -> None:
    file = write(tmp_path, "name: x\ntask: {name: digits}\n")
    with pytest.raises(UserError) as error:
        load_config(file, [override])
    in_file = write(tmp_path, "name: x\ntask: {name: digits}\n")
    assert str(error.value).startswith(f"{in_file}: ")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_text_that_yaml_1_1_would_convert_stays_text(tmp_path: Path) -> None:
    values = {"a": "08", "b": "1:30", "c": "on", "d": "2020-01-01", "e": "0x10", "f": "1_000", "g": "=", "h": "yes"}
    file = write(tmp_path, f"name: x\ntask: {{name: digits, {', '.join(f'{k}: {v}' for k, v in values.items())}}}\n")
    config = load_config(file)
    assert config.task.form()[1] == values
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("outer.steps", "9" * 40),
        ("outer.population", 10**12),
        ("outer.horizon.max", 10**18),
        ("outer.sigma", 1e300),
        ("evaluation.seeds", 99_999_999_999),
        ("evaluation.horizons", f"[{10**18}]"),
        ("evaluation.curve_points", 10**9),
        ("checkpoint.every", 10**18),
        ("execution.workers", 10**9),
        ("seed", 2**31),
        ("name", "x" * 300),
        ("optimizer.embedding_dim", 10**9),
        ("optimizer.hidden", f"[{10**9}]"),
        ("optimizer.hidden", str([8] * 100)),
        ("optimizer.loss_decays", str([0.5] * 100)),
    ],
)
def test_implausible_numbers(tmp_path: Path, key: str, value: object) -> None:
    section, _, name = key.rpartition(".")
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, "name: x\ntask: {name: digits}\n"), [f"{key}={value}"])
    assert section in str(error.value)
    assert name in str(error.value)
    assert len(str(error.value)) < 500


ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("a: " + "[" * 3000, "deep"),
        ("{a: " * 3000, "deep"),
        ("a: " + "[" * 50 + "]" * 50, "32 levels"),
        ("a: &a [*a]", "32 levels"),
        (ALIASES, "20000 values"),
        ("a: " + "x" * 20_000, "20000 characters"),
        ("#" * 300_000, "300000 bytes"),
        ("name: x\nname: y", "'name' is there twice"),
        ("1: x", "1 is not a key"),
        ("a: !!python/object/apply:os.system [id]", "python/object/apply:os.system"),
        ("a: !!timestamp 2020-01-01", "a is a date"),
        ("a: {b: !!binary aGk=}", "a.b is a bytes"),
        ("a: \0", "character"),
        ("a: " + "${" * 3000 + "}" * 3000, "a is '${"),
        ("a: ${b}\nb: ${a}", "ecursive"),
        ("a: b\n---\nc: d", "another document"),
        ("", "a mapping of sections"),
    ],
)
def test_malicious_files(tmp_path: Path, text: str, fact: str) -> None:
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, text))
    assert fact in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_config_that_is_not_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "latin").write_bytes("name: ä".encode("latin-1"))
    for name, fact in (("pipe", "not a regular file"), ("device", "not a regular file"), ("latin", "not UTF-8")):
        with pytest.raises(UserError, match=fact):
            load_config(tmp_path / name)
    (tmp_path / "link").symlink_to(write(tmp_path, "name: x\ntask: {name: digits}\n"))
    assert load_config(tmp_path / "link").name == "x"


def test_interpolations_are_saved_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their values may be secrets."""
    monkeypatch.setenv("L3RS_TOKEN", "secret-1")
    text = (
        "name: x\nseed: 3\ntask:\n  name: digits\n  token: ${oc.env:L3RS_TOKEN}\n  again: ${task.token}\n"
        "  list: [{of: 'a-${oc.env:L3RS_TOKEN}'}]\n  number: ${seed}\nexecution: {plan: '${oc.env:L3RS_PLAN,auto}'}\n"
    )
    config = load_config(write(tmp_path, text), ["task.more=${oc.env:L3RS_TOKEN}"])
    dumped = dump_config(config)
    assert "secret" not in dumped
    assert "secret" not in str(as_written(config))
    assert "secret" not in dump_config(config.model_copy(update={"seed": 4}))
    monkeypatch.setenv("L3RS_TOKEN", "secret-2")
    options = load_config(write(tmp_path, dumped)).task.form()[1]
    assert (options["token"], options["again"], options["more"]) == ("secret-2",) * 3
    assert options["list"] == [{"of": "a-secret-2"}]
    assert options["number"] == 3
    decided = config.execution.model_copy(update={"plan": "fused"})
    assert "plan: fused" in dump_config(config.model_copy(update={"execution": decided}))

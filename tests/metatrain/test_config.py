from __future__ import annotations

from pathlib import Path

import pytest

from metatrain.config import UserError, check_config, dump_config, load_config

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
    assert f"metatrain run configs/{file.name}" in file.read_text()


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
        ({"outer": {"sigmma": 1}}, ["outer.sigmma", "unknown key", "sigma, strategy"]),
        ({"extra": 1}, ["unknown key extra", "task"]),
        ({"outer": {"horizon": {"mni": 1}}}, ["outer.horizon.mni", "min, max"]),
        ({"outer": {"steps": "many"}}, ["outer.steps", "integer", "'many'"]),
        ({"outer": {"steps": 0}}, ["outer.steps", "greater than 0", "found 0"]),
        ({"outer": {"horizon": {"min": 0}}}, ["outer.horizon.min", "greater than 0"]),
        ({"outer": {"horizon": {"min": 5, "max": 4}}}, ["outer.horizon", "min 5 is larger than max 4"]),
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

"""Damaged checkpoints are refused with one sentence, or their values are unharmed."""

import shutil
from pathlib import Path

import pytest

import l3rs
from tests.l3rs.io.common import SPEC, assert_same, rewrite, sentence_of, some_theta


def test_not_a_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        for action in (l3rs.info, l3rs.restore, lambda p: l3rs.load(p, 10)):
            assert sentence_of(action, path) == f"{path} is not an L3RS checkpoint: it has no l3rs.json"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_paths_of_another_kind(tmp_path, kind):
    """The path is a file, such as l3rs.json itself; or the manifest is a folder."""
    if kind == "file":
        (tmp_path / "it").write_text("{}")
    else:
        (tmp_path / "it" / "l3rs.json").mkdir(parents=True)
    assert "it" in sentence_of(l3rs.info, tmp_path / "it")


def test_truncated_manifest(checkpoint):
    file = checkpoint / "l3rs.json"
    data = file.read_bytes()
    for length in (0, 1, len(data) // 4, len(data) // 2, len(data) - 3):
        file.write_bytes(data[:length])
        sentence = sentence_of(l3rs.restore, checkpoint)
        assert sentence.startswith(f"{file} is damaged: ")


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\0\0", b"[]", b"null", b"5", b'"format"', b"{}"], ids=repr)
def test_manifest_of_something_else(checkpoint, data):
    (checkpoint / "l3rs.json").write_bytes(data)
    assert "l3rs.json is damaged: " in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("data", [b"[" * 100_000, b"1" * 5_000], ids=["deep", "long number"])
def test_manifest_that_the_json_parser_rejects(checkpoint, data):
    (checkpoint / "l3rs.json").write_bytes(data)
    assert "l3rs.json is damaged: " in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("key", ["format", "features", "spec", "sha256", "info"])
def test_manifest_lacks_a_key(checkpoint, key):
    rewrite(checkpoint, lambda manifest: manifest.pop(key))
    assert sentence_of(l3rs.restore, checkpoint) == f"{checkpoint / 'l3rs.json'} is damaged: it lacks {key}"


@pytest.mark.parametrize(("key", "newest"), [("format", 2), ("features", 2)])
@pytest.mark.parametrize("version", [3, 0, -1, "1", None, 1.5, True, [1]], ids=repr)
def test_other_version(checkpoint, key, newest, version):
    rewrite(checkpoint, lambda manifest: manifest.update({key: version}))
    expected = f"l3rs.json has {key} version {version!r}; this release reads 1 to {newest}: update l3rs"
    for action in (l3rs.info, l3rs.restore):
        assert sentence_of(action, checkpoint).endswith(expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unknown": 1}, "spec has fields"),
        ({"hidden": [5]}, "theta.safetensors: dense_0/bias is float32[4]; its spec needs float32[5]"),
        ({"hidden": [4, 4]}, "its spec needs ['dense_0/bias', 'dense_0/kernel', 'dense_1/bias'"),
        ({"hidden": []}, "its spec needs ['dense_0/bias', 'dense_0/kernel', 'embedding']"),
        ({"layers": [["a", [4, 3]]]}, "theta.safetensors: embedding is float32[2, 8]; its spec needs float32[1, 8]"),
        ({"absolute_time": True}, "dense_0/kernel is float32"),
        ({"directions": ["adam"]}, "its spec needs"),
        ({"directions": ["adam", "nope"]}, "unknown direction 'nope'; allowed are adam, first_moment, sgd"),
        ({"directions": ["adam", {"name": "sgd", "x": 1}]}, "direction 'sgd' has no option 'x'; allowed are none"),
        ({"directions": ["adam", {"b1": 0.5}]}, "a direction needs a name"),
        ({"directions": []}, "spec.directions is empty"),
        ({"step": "other"}, "spec.step is 'other'; allowed in form 1 are 'rms', 'relative'"),
        ({"step_scale": 0}, "spec.step_scale is 0; it must be > 0"),
        ({"step_scale": None}, "l3rs.json is damaged: "),
        ({"loss_decays": [0.5]}, "spec.loss_decays needs two or more"),
        ({"loss_decays": 0.5}, "l3rs.json is damaged: "),
        ({"layers": None}, "l3rs.json is damaged: "),
        ({"layers": [5]}, "l3rs.json is damaged: "),
        ({"hidden": ["a"]}, "l3rs.json is damaged: "),
        ({"directions": [5]}, "l3rs.json is damaged: "),
    ],
    ids=str,
)
def test_other_spec(checkpoint, change, words):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    assert words in sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [["a", [4, 3], 1], ["b", [5]]]},  # too many values to unpack
        {"directions": ["adam", ["sgd"]]},  # dictionary update sequence …
        {"directions": ["adam", {"name": []}]},  # unhashable
        {"hidden": [4.0]},  # shapes must be integers
        {"embedding_dim": 8.0},
        {"absolute_time": None},
        {"absolute_time": "no"},
    ],
    ids=str,
)
def test_spec_with_values_of_another_type(checkpoint, change):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize(
    "change",
    [{"mix_bias": "x"}, {"step_gain": None}, {"directions": ["adam", {"name": "adam", "b1": "x"}]}],
    ids=str,
)
def test_spec_with_text_for_a_number(checkpoint, change):
    rewrite(checkpoint, lambda manifest: manifest["spec"].update(change))
    sentence_of(l3rs.load, checkpoint, 10)


@pytest.mark.parametrize("key", ["hidden", "layers", "step"])
def test_spec_lacks_a_field(checkpoint, key):
    rewrite(checkpoint, lambda manifest: manifest["spec"].pop(key))
    sentence = sentence_of(l3rs.restore, checkpoint)
    assert "spec has fields" in sentence
    assert f"'{key}'" in sentence


@pytest.mark.parametrize("spec", [None, 5, [], "spec", [[1]]], ids=repr)
def test_spec_is_not_a_mapping(checkpoint, spec):
    rewrite(checkpoint, lambda manifest: manifest.update(spec=spec))
    assert "spec" in sentence_of(l3rs.restore, checkpoint)


def test_other_digest(checkpoint):
    rewrite(checkpoint, lambda manifest: manifest.update(sha256="0" * 64))
    sentence = sentence_of(l3rs.restore, checkpoint)
    assert (
        sentence
        == f"{checkpoint / 'theta.safetensors'} is damaged: its values do not have the digest that l3rs.json states"
    )


def test_values_of_another_checkpoint(checkpoint, tmp_path):
    other = l3rs.save(tmp_path / "other", some_theta(seed=1), SPEC)
    shutil.copy(other / "theta.safetensors", checkpoint)
    assert "is damaged: its values do not have the digest" in sentence_of(l3rs.restore, checkpoint)


def assert_refused_or_unharmed(checkpoint, expected):
    """Whether it was refused with an L3RSError. Any other exception, any other value, fails the test."""
    sentence = None
    try:
        theta, _, _ = l3rs.restore(checkpoint)
    except l3rs.L3RSError as error:
        sentence = str(error)
    if sentence is None:
        assert_same(theta, expected)
        return False
    assert sentence
    assert "\n" not in sentence
    return True


def flip_bytes(checkpoint, positions):
    """How often the checkpoint was refused with one changed byte in a file, by file."""
    expected, _, _ = l3rs.restore(checkpoint)
    refused = {}
    for file in sorted(file for file in checkpoint.rglob("*") if file.is_file()):
        data = file.read_bytes()
        for position in positions(len(data)):
            file.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
            refused[file.name] = refused.get(file.name, 0) + assert_refused_or_unharmed(checkpoint, expected)
        file.write_bytes(data)
    assert not assert_refused_or_unharmed(checkpoint, expected)
    return refused


# Orbax leaves a thread behind when it fails, which complains that its event loop is gone.
orbax_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_thread
def test_a_changed_byte_in_any_file(checkpoint, format_1):
    for folder in (checkpoint, format_1):
        refused = flip_bytes(folder, lambda n: {0, n // 3, n // 2, n - 1})
        assert len(refused) > 4
        assert sum(refused.values()) > 0
    assert refused["l3rs.json"] > 0


def test_any_changed_byte_of_the_values(checkpoint):
    file = checkpoint / "theta.safetensors"
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data), 7):
        file.write_bytes(data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :])
        assert "digest" in sentence_of(l3rs.restore, checkpoint)


@orbax_thread
@pytest.mark.slow
def test_any_changed_byte_in_any_file(checkpoint, format_1):
    for folder in (checkpoint, format_1):
        flip_bytes(folder, range)


@orbax_thread
def test_a_missing_or_empty_file(checkpoint, format_1):
    for folder in (checkpoint, format_1):
        expected, refused = l3rs.restore(folder)[0], []
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            data = file.read_bytes()
            for change in (lambda file: file.write_bytes(b""), Path.unlink):
                change(file)
                refused.append(assert_refused_or_unharmed(folder, expected))
            file.write_bytes(data)
        assert any(refused)
        assert not assert_refused_or_unharmed(folder, expected)


def test_missing_values(checkpoint, format_1):
    (checkpoint / "theta.safetensors").unlink()
    shutil.rmtree(format_1 / "theta")
    for file in (checkpoint / "theta.safetensors", format_1 / "theta"):
        assert sentence_of(l3rs.restore, file.parent).startswith(f"{file} cannot be read: ")

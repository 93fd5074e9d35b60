"""A small optimizer, and helpers that the tests of checkpoints share."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from l3rs.theta import theta_shapes, unflatten

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests/l3rs/golden"
GOLDEN_1 = GOLDEN / "v1" / "checkpoint"
SHA256 = json.loads((GOLDEN_1 / "l3rs.json").read_text())["sha256"]
PARAMS = {"a": np.ones((4, 3), np.float32), "b": np.ones(5, np.float32)}
SPEC = l3rs.Spec.create(PARAMS, ("adam", {"name": "adam", "b1": 0.5}), hidden=(4,))
INFO = {"task": "digits", "horizon": [10, 100], "results": {"speedup": 1.5}, "note": "θ ≥ 0"}


def some_theta(spec=SPEC, seed=0):
    rng = np.random.default_rng(seed)
    return unflatten({name: rng.normal(size=shape).astype(np.float32) for name, shape in theta_shapes(spec).items()})


def assert_same(a, b):
    """Pytrees of the same structure, with arrays of the same dtypes and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def names(folder):
    return sorted(os.listdir(folder))


def rewrite(checkpoint, change):
    """Change the manifest: `change` edits the parsed object."""
    file = checkpoint / "l3rs.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def sentence_of(action, *arguments, **keywords):
    """The message of the L3RSError that it raises: one line, not empty, not longer than a screen."""
    with pytest.raises(l3rs.L3RSError) as error:
        action(*arguments, **keywords)
    assert str(error.value).strip()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000
    return str(error.value)


def assert_golden(location):
    """Every function that reads checkpoints finds the golden one at `location`."""
    assert l3rs.info(location)["sha256"] == SHA256
    theta, spec, info = l3rs.restore(location)
    assert info["task"] == "golden"
    expected, expected_spec, _ = l3rs.restore(GOLDEN_1)
    assert spec == expected_spec
    jax.tree.map(np.testing.assert_array_equal, theta, expected)
    params = {"dense": {"kernel": np.zeros((4, 5), np.float32)}}
    assert l3rs.match_layers(location, params)[0].row == 3
    l3rs.load(location, 10).init(params)


def load_sentence(location):
    """The message with which `load` refuses a location."""
    return sentence_of(l3rs.load, location, 10)


def files(folder):
    """The content of a folder's files by name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

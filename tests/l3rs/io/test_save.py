"""Saving a checkpoint: it is written completely, or the earlier one stays."""

import errno
import os
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

import l3rs
from l3rs.io.orbax_store import os_errors
from tests.l3rs.io.common import SPEC, assert_same, names, sentence_of, some_theta


def test_save_does_not_overwrite(checkpoint):
    sentence = sentence_of(l3rs.save, checkpoint, some_theta(seed=1), SPEC)
    assert sentence == f"{checkpoint} exists; choose another folder or pass overwrite=True"
    assert_same(l3rs.restore(checkpoint)[0], some_theta())


def test_overwrite(checkpoint):
    (checkpoint / "stale").write_text("of the old one")
    l3rs.save(checkpoint, some_theta(seed=1), SPEC, {"new": 1}, overwrite=True)
    theta, _, info = l3rs.restore(checkpoint)
    assert_same(theta, some_theta(seed=1))
    assert info == {"new": 1}
    assert names(checkpoint) == ["l3rs.json", "theta", "theta.safetensors"]
    assert names(checkpoint.parent) == ["copy"]


def _without(key):
    theta = some_theta()
    del theta[key]
    return theta


@pytest.mark.parametrize(
    ("theta", "words"),
    [
        (_without("embedding"), "theta holds ['dense_0/bias', 'dense_0/kernel', 'dense_1/bias', 'dense_1/kernel']; "),
        ({**some_theta(), "extra": np.zeros(1, np.float32)}, "'extra'"),
        (
            {**some_theta(), "embedding": np.zeros((2, 7), np.float32)},
            "theta: embedding is float32[2, 7]; its spec needs float32[2, 8]",
        ),
        ({**some_theta(), "embedding": np.zeros((2, 8))}, "theta: embedding is float64[2, 8]; its spec needs float32"),
        ({**some_theta(), "embedding": "text"}, "theta: embedding is <U4[]; its spec needs float32[2, 8]"),
        ({}, "theta holds []; its spec needs ['dense_0/bias', "),
        (None, "theta holds []"),
    ],
    ids=["lacks", "extra", "shape", "dtype", "text", "empty", "none"],
)
def test_theta_that_does_not_fit(tmp_path, theta, words):
    assert words in sentence_of(l3rs.save, tmp_path / "it", theta, SPEC)
    assert names(tmp_path) == []


def test_flattened_theta_does_not_fit(tmp_path):
    theta = {"embedding": some_theta()["embedding"]}
    for name in ("dense_0", "dense_1"):
        theta |= {f"{name}/{part}": leaf for part, leaf in some_theta()[name].items()}
    sentence_of(l3rs.save, tmp_path / "it", theta, SPEC)


@pytest.mark.parametrize("info", [{"x": np.float32(1)}, {"x": float("nan")}, {"x": {1, 2}}], ids=str)
def test_info_that_json_cannot_hold(tmp_path, info):
    with pytest.raises((TypeError, ValueError), match="JSON"):
        l3rs.save(tmp_path / "it", some_theta(), SPEC, info)
    assert names(tmp_path) == []


def _fail(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("owner", "name"), [(ocp.PyTreeCheckpointer, "save"), (Path, "write_text"), (Path, "rename")], ids=str
)
def test_failed_save_leaves_nothing_behind(checkpoint, monkeypatch, owner, name, overwrite):
    """With overwrite=True, the old checkpoint stays in place."""
    target = checkpoint if overwrite else checkpoint.parent / "it"
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _fail)
        with pytest.raises(OSError, match="no space left"):
            l3rs.save(target, some_theta(seed=1), SPEC, overwrite=overwrite)
    assert names(checkpoint.parent) == ["copy"]
    assert_same(l3rs.restore(checkpoint)[0], some_theta())


def test_failed_replacement_keeps_the_old_one(checkpoint, monkeypatch):
    """The old folder has been moved aside, and moving the new one into place fails."""
    rename, calls = Path.rename, []

    def fail_the_second(self, target):
        calls.append(target)
        return _fail() if len(calls) == 2 else rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail_the_second)
        with pytest.raises(OSError, match="no space left"):
            l3rs.save(checkpoint, some_theta(seed=1), SPEC, overwrite=True)
    assert_same(l3rs.restore(checkpoint)[0], some_theta())
    assert names(checkpoint.parent) == ["copy"]


def test_destination_below_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        l3rs.save(tmp_path / "file" / "it", some_theta(), SPEC)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_destination(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match="denied"):
            l3rs.save(tmp_path / "it", some_theta(), SPEC)
        assert names(tmp_path) == []
    finally:
        tmp_path.chmod(0o700)


def test_full_disk_is_an_os_error(tmp_path):
    """TensorStore raises a ValueError that only names the code; any other ValueError is left alone."""
    with pytest.raises(OSError, match=r"No space left on device.*it") as error, os_errors(tmp_path / "it"):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing [source locations='...' os_error_code='28']")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(ValueError, match=r"^other$"), os_errors(tmp_path / "it"):
        raise ValueError("other")

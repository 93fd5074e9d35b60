"""Checkpoints for the tests of this folder."""

import shutil
from pathlib import Path

import pytest

import l3rs
from tests.l3rs.io.common import GOLDEN_1, INFO, SPEC, some_theta


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return l3rs.save(tmp_path_factory.mktemp("original") / "it", some_theta(), SPEC, INFO)


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


@pytest.fixture
def format_1(tmp_path):
    """A copy of the golden checkpoint of format 1, to damage."""
    return Path(shutil.copytree(GOLDEN_1, tmp_path / "format-1"))

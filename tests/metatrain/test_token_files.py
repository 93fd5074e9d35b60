"""Files with Ray's token."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from metatrain.ray.connection import has_token


@pytest.mark.skipif(os.name != "posix", reason="files have no such permissions here")
@pytest.mark.parametrize("named", [True, False])
def test_a_token_that_others_can_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, named: bool
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "token" if named else tmp_path / ".ray" / "auth_token"
    file.parent.mkdir(exist_ok=True)
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    else:
        assert not has_token()
    file.write_text("secret")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        assert has_token()
    assert f"chmod 600 {file}" in caplog.text
    assert "secret" not in caplog.text
    caplog.clear()
    file.chmod(0o600)
    assert has_token()
    assert not caplog.text

"""tools/mean_optimizer.py on two small optimizers."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from tools import mean_optimizer


def test_the_mean_of_two_optimizers(tmp_path: Path) -> None:
    spec = l3rs.Spec.create({"w": np.zeros((2, 3), np.float32)}, hidden=(4,), embedding_dim=2)
    thetas = [l3rs.init_meta_params(jax.random.key(seed), spec) for seed in range(2)]
    for i, theta in enumerate(thetas):
        info = {"name": f"run{i}", "generations": 2 + i, "candidate_steps": 30, "seconds": 1.5}
        l3rs.save(tmp_path / f"run{i}", theta, spec, info)
    mean_optimizer.main(*(str(tmp_path / name) for name in ("run0", "run1", "mean")))
    found, _, info = l3rs.restore(tmp_path / "mean")
    for x, y, z in zip(*map(jax.tree.leaves, (*thetas, found)), strict=True):
        np.testing.assert_allclose(z, (x + y) / 2, rtol=1e-6)
    assert info == {"name": "run0", "generations": 5, "candidate_steps": 60, "seconds": 3.0}

    other = l3rs.Spec.create({"w": np.zeros((2, 4), np.float32)}, hidden=(4,), embedding_dim=2)
    l3rs.save(tmp_path / "other", l3rs.init_meta_params(jax.random.key(0), other), other)
    with pytest.raises(SystemExit, match="different forms or for different layers"):
        mean_optimizer.main(str(tmp_path / "run0"), str(tmp_path / "other"), str(tmp_path / "never"))

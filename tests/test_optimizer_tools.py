"""tools/mean_optimizer.py and tools/rescale_optimizer.py on small optimizers."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

import l3rs
from tools import mean_optimizer, rescale_optimizer


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


def test_another_power_of_the_horizon_and_another_factor(tmp_path: Path) -> None:
    """At 100 steps the update is the factor times what it was; at 25 it is also 4^(difference of the powers) times."""
    params, grads = {"w": np.ones((2, 3), np.float32)}, {"w": np.full((2, 3), 0.1, np.float32)}
    spec = l3rs.Spec.create(params, form=2, step="initial")
    l3rs.save(tmp_path / "a", l3rs.init_meta_params(jax.random.key(0), spec), spec, {"name": "a", "results": {}})
    rescale_optimizer.main(str(tmp_path / "a"), str(tmp_path / "b"), 0.25, 1.5)
    for horizon, factor in ((100, 1.5), (25, 1.5 / np.sqrt(2))):
        was, now = (l3rs.load(tmp_path / name, horizon) for name in ("a", "b"))
        expected, found = (tx.update(grads, tx.init(params), params, value=1.0)[0]["w"] for tx in (was, now))
        np.testing.assert_allclose(found, factor * expected, rtol=1e-5)
    assert l3rs.restore(tmp_path / "b")[2] == {"name": "a", "rescaled": {"horizon_power": 0.25, "factor": 1.5}}
    with pytest.raises(SystemExit, match="the factor is 0; it must be > 0"):
        rescale_optimizer.main(str(tmp_path / "a"), str(tmp_path / "never"), 0.25, 0.0)

    form_1 = l3rs.Spec.create(params)
    l3rs.save(tmp_path / "1", l3rs.init_meta_params(jax.random.key(0), form_1), form_1)
    with pytest.raises(SystemExit, match="is of form 1"):
        rescale_optimizer.main(str(tmp_path / "1"), str(tmp_path / "never"), 0.25, 1.5)

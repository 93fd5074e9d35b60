"""Figures of single runs of MADA and IOMT."""

import jax.numpy as jnp
import optax
import pytest

import l3rs
from l3rs.baselines import iomt, mada, mada_history
from metatrain.report.coefficients import plot_coefficients
from metatrain.report.switches import plot_history


def test_coefficients(tmp_path):
    state = _trained_state()
    file = plot_coefficients(mada_history(state), tmp_path / "new", "digits")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(l3rs.L3RSError, match="there are no steps to plot"):
        plot_coefficients({"step": [], "b1": []}, tmp_path)


def _trained_state():
    """A few steps that keep their history."""
    params, tx = {"w": jnp.ones(3)}, mada(1e-2, start_step=2, history=4)
    state = tx.init(params)
    for i in range(6):
        updates, state = tx.update({"w": jnp.array([1.0, -2.0, i])}, state, params)
        params = optax.apply_updates(params, updates)
    return state


def test_stages(tmp_path):
    """Two optimizers, one of whose stages diverged."""
    stages = [
        iomt.Stage(first, 5, optimizer, {"learning_rate": 0.1}, -1.0, "initial", optimizer == "sgd", 0.1, ())
        for first, optimizer in ((0, "adam"), (5, "sgd"), (10, "adam"))
    ]
    losses = [2.0] * 6 + [1e9] * 5 + [1.0] * 5
    file = plot_history(stages, losses, tmp_path / "new", "one diverges")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(l3rs.L3RSError, match=r"3 stages and losses \(15,\)"):
        plot_history(stages, losses[1:], tmp_path)
    with pytest.raises(l3rs.L3RSError, match=r"0 stages and losses \(1,\)"):
        plot_history([], [1.0], tmp_path)

"""What optimizers did inside one run: decisions of L3RS, coefficients of MADA, switches of SWATS, stages of IOMT."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l3rs.baselines import MADAState, SWATSState, iomt, mada_coefficients
from l3rs.baselines.mada import COEFFICIENTS
from l3rs.trees import layers_of
from metatrain.evaluation.baselines import Baseline, Tuned, make_baseline
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import CoefficientPath, DecisionPath, SwitchHistory
from metatrain.evaluation.runner import Conditions, four_digits
from metatrain.inner.rollout import inner_steps
from tasks import Task

_COEFFICIENT_POINTS = 100  # steps of a run at which MADA's coefficients are kept
_DECISION_STEPS = 100  # decisions are those of a run over the horizon nearest to this

Stages = Sequence[tuple[Sequence[iomt.Stage], np.ndarray]]  # of `Runner.stages`


def decision_path(ours: LearnedOptimizer, conditions: Conditions, device: jax.Device) -> DecisionPath:
    """μ and λ at every step of the first seed's run."""
    horizon = min(conditions.horizons, key=lambda steps: abs(math.log(steps / _DECISION_STEPS)))
    task = conditions.task
    if conditions.plan == "torch":
        from metatrain.evaluation.torch_runs import torch_decisions

        return torch_decisions(ours, conditions, horizon)
    assert isinstance(task, Task)
    theta, data, samples = jax.device_put((ours.theta, task.data, conditions.samples), device)
    first = jax.tree.map(lambda x: x[0], samples)
    steps = [
        (np.asarray(carry.state.mix), np.asarray(carry.state.step_norm))
        for carry in inner_steps(task, ours.make, theta, data, first, horizon)
    ]
    mix, step_norm = (np.stack(values) for values in zip(*steps, strict=True))
    layers = layers_of(task.params_shape())
    return DecisionPath(
        setting=conditions.setting,
        horizon=horizon,
        layers=[layer.path for layer in layers],
        shapes=[list(layer.shape) for layer in layers],
        directions=[direction.name for direction in ours.spec.directions],
        mix=mix.round(4).tolist(),
        step_rms=four_digits(step_norm / np.sqrt([max(layer.size, 1) for layer in layers])).tolist(),
    )


def baseline_path(
    label: str, baseline: Baseline, rate: float, schedule: str, conditions: Conditions, device: jax.Device
) -> tuple[CoefficientPath | None, str | None]:
    """The first seed's run over the longest horizon, for optimizers that have something to show.

    Returns:
      The coefficients of a baseline with one `MADAState`, else None; and for one with one `SWATSState` a sentence
      that says when it switched to SGD, else None.
    """
    unused = Tuned(jnp.float32(0.1), jnp.int32(0))
    assert isinstance(conditions.task, Task)
    shape = conditions.task.params_shape()
    state = jax.eval_shape(lambda params: make_baseline(baseline, unused, 10).init(params), shape)
    learns, switches = (_only(state, kind) is not None for kind in (MADAState, SWATSState))
    if not learns and not switches:
        return None, None
    horizon = conditions.horizons[-1]
    kept = set(np.linspace(1, horizon, min(horizon, _COEFFICIENT_POINTS)).round().astype(int).tolist())
    hyper = jax.tree.map(lambda x: x[0], Tuned.grid([rate], schedule))
    hyper, data, samples = jax.device_put((hyper, conditions.task.data, conditions.samples), device)
    first = jax.tree.map(lambda x: x[0], samples)
    found: dict[int, dict[str, float]] = {}
    make = functools.partial(make_baseline, baseline)
    for step, carry in enumerate(inner_steps(conditions.task, make, hyper, data, first, horizon), 1):
        if learns and step in kept:
            found[step] = {name: float(x) for name, x in mada_coefficients(carry.state).items()}
    path = note = None
    if learns:
        values = {name: [round(at[name], 4) for at in found.values()] for name in COEFFICIENTS}
        path = CoefficientPath(conditions.setting, label, list(found), values)
    if switches:
        swats = _only(carry.state, SWATSState)
        did = f"switched to SGD after step {int(swats.switch_step)}" if swats.sgd else "did not switch to SGD"
        note = f"{conditions.setting}: {label} {did} in the first seed's run of {horizon} steps"
    return path, note


def _only(state: Any, kind: type) -> Any:
    """The one state of that type inside an optimizer's state; None if there is none, or several."""
    found = optax.tree.get_all_with_path(state, kind.__name__)
    return found[0][1] if len(found) == 1 else None


def switch_history(setting: str, label: str, stages: Stages) -> SwitchHistory:
    """Stages and training losses of IOMT's first run."""
    history, losses = stages[0]
    kept = [{**stage._asdict(), "seconds": round(stage.seconds, 4), "notes": list(stage.notes)} for stage in history]
    return SwitchHistory(setting, label, kept, four_digits(losses).tolist())


def stage_notes(where: str, stages: Stages) -> list[str]:
    """Sentences about IOMT's stages in all runs: how many diverged, and its controller's own notes."""
    all_stages = [stage for history, _ in stages for stage in history]
    counts = collections.Counter(
        note for stage in all_stages for note in stage.notes if not note.startswith("the loss was")
    )
    counts.update("the loss diverged" for stage in all_stages if stage.diverged)
    return [f"{where}: {note}, in {count} of {len(all_stages)} stages" for note, count in counts.items()]

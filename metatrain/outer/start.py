"""Where meta-training begins: `optimizer.start`, a checkpoint whose meta-parameters and form a run continues."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

import l3rs
from l3rs.io.checkpoint import read_spec
from l3rs.layers import Matching
from l3rs.spec import OFF_AT_ZERO, Direction, L3RSError, Spec, Theta
from l3rs.theta import multiply_steps
from metatrain.config import Config, OptimizerConfig, UserError, check_section
from metatrain.inner.network import embeddings, is_torch
from tasks.base import AnyTask

# Smaller than those of a run from new meta-parameters: what is known already should not be lost.
_OUTER_DEFAULTS = {"sigma": 0.02, "learning_rate": 0.01}


def resolve_start(config: Config, saved: OptimizerConfig | None = None) -> Config:
    """A configuration in which the form of the checkpoint `optimizer.start` is written out.

    Its fields take the place of the defaults of `optimizer`, and `outer.sigma` and `outer.learning_rate` have smaller
    defaults. A configuration without `start`, or that was resolved before, stays as it is.

    Args:
      config: of a run.
      saved: what the run that is to be resumed has saved; it stands for a checkpoint that is out of reach.

    Raises:
      UserError: `optimizer` has another form than the checkpoint, or a power for one of form 1.
      L3RSError: not a checkpoint.
    """
    optimizer = config.optimizer
    if optimizer.start is None:
        return config
    try:
        spec = read_spec(optimizer.start)
        fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.name != "layers"}
        fields["directions"] = tuple(direction.to_json() for direction in spec.directions)
    except L3RSError:
        if saved is None or saved.start != optimizer.start:
            raise
        fields = saved.spec_fields()
    if optimizer.start_horizon_power is not None:
        if fields["form"] != 2:
            raise UserError(
                f"optimizer.start_horizon_power is {optimizer.start_horizon_power}, but optimizer.start="
                f"{optimizer.start} is of form {fields['form']}, which has none"
            )
        fields["horizon_power"] = optimizer.start_horizon_power
    for name in sorted(optimizer.model_fields_set & set(fields)):
        asked, found = getattr(optimizer, name), fields[name]
        if name == "directions":
            asked, found = (tuple(map(Direction.parse, each)) for each in (asked, found))
        new = fields["form"] == 2 and name in OFF_AT_ZERO and not found
        if new or (name, found, asked) == ("embedding", "descriptor", "table"):
            fields[name] = asked
        elif asked != found:
            raise UserError(
                f"optimizer.{name} is {getattr(optimizer, name)!r}, but optimizer.start={optimizer.start} has "
                f"{fields[name]!r}; leave it out"
            )
    outer = {k: v for k, v in _OUTER_DEFAULTS.items() if k not in config.outer.model_fields_set}
    return config.model_copy(
        update={
            "optimizer": check_section(OptimizerConfig, {**optimizer.start_fields(), **fields}, "optimizer"),
            "outer": config.outer.model_copy(update=outer),
        }
    )


def start_theta(begin: OptimizerConfig, spec: Spec, task: AnyTask) -> Theta:
    """The meta-parameters of a checkpoint, for the layers of a task.

    A table begins as the embedding that the checkpoint gives to each layer, so that the optimizer takes the same steps.
    A layer that is not in a checkpoint's table gets the mean of it. A `layer_gain` begins without effect.

    Args:
      begin: its `start` is the checkpoint, with factors of its steps.
      spec: the run's spec; its embedding is the checkpoint's, or "table"; what is off in the checkpoint at zero may be
        on, and its `horizon_power` another: then its steps begin as the checkpoint's at a horizon of 100 steps alone.
      task: whose layers `spec` holds.

    Raises:
      L3RSError: not a checkpoint; or which of its layers is which is ambiguous.
    """
    assert begin.start is not None
    theta, own, _ = l3rs.restore(begin.start)
    if spec.embedding == "table":
        how = Matching(by="auto", on_unknown="mean") if own.embedding == "table" else Matching()
        # To the last bit what the inner loop computes: XLA and NumPy add in another order.
        rows: Any = embeddings(theta, own, task, how) if is_torch(task) else _by_xla(theta, own, task, how)
        theta = {**theta, "embedding": np.asarray(rows)}
    if spec.layer_gain and not own.layer_gain:
        theta = {**theta, "embedding": np.pad(theta["embedding"], ((0, 0), (0, 1)))}
    return multiply_steps(theta, spec, begin.start_multiplier, begin.start_by_role)


def _by_xla(theta: Theta, own: Spec, task: AnyTask, how: Matching) -> Any:
    return jax.jit(lambda each: embeddings(each, own, task, how))(theta)

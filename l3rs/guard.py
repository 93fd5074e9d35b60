"""The guard: Adam takes over for a while when the loss diverges. Off by default.

A learned optimizer may be used on tasks that it was not meta-trained on, and for longer. The guard watches the fastest
EMA of the loss among the features. Where it fires, the step is Adam's, from the moments that the direction has anyway.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from l3rs.spec import L3RSError, Spec

_NO_LOSS = np.finfo(np.float32).max  # not infinity: jax_debug_infs would stop at the state


@dataclasses.dataclass(frozen=True)
class Guard:
    """When Adam takes over, and for how long.

    Adam takes over when the EMA of the loss has been above its best value so far by more than `bound` · |first loss|
    for `patience` steps in a row, and at once when a loss is not finite. After `steps` steps the network decides again.

    With the defaults the guard changes no bit in three of the five settings of `configs/digits.yaml`, at horizons of
    10 to 2,500. In the other two the networks are pretrained on the target and start with a loss of about 0.1, which
    the optimizer raises at first: there the guard costs up to 0.04 of test loss at horizons up to 200, and gains up to
    0.02 past 500.

    Attributes:
      bound: how far the loss may rise, as a share of the first loss; > 0.
      patience: how many steps in a row the loss may be higher than that; ≥ 1.
      steps: how many steps Adam takes; ≥ 1.
      learning_rate: Adam's; > 0. Its step is -learning_rate · m̂ / (√v̂ + ε), not normalised.

    Raises:
      L3RSError: a value is out of range.
    """

    bound: float = 1.0
    patience: int = 10
    steps: int = 50
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("bound", "learning_rate"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise L3RSError(f"guard.{name} is {value!r}; it must be a number > 0")
        for name in ("patience", "steps"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise L3RSError(f"guard.{name} is {value!r}; it must be a whole number ≥ 1")


class GuardState(NamedTuple):
    """What the guard carries from one step to the next."""

    count: Any  # int32 [], how often Adam took over
    adam_steps: Any  # int32 [], steps that Adam took in total
    left: Any  # int32 [], steps that Adam has left, including this one
    high: Any  # int32 [], steps in a row with a loss above the bound
    best: Any  # float32 [], the lowest loss EMA; the largest number before the first loss


def make_guard(guard: bool | Guard, spec: Spec) -> Guard | None:
    """The guard that `guard=` asks for.

    Raises:
      L3RSError: `guard` is neither a bool nor a `Guard`, or Adam is not among the optimizer's directions.
    """
    if guard is False or guard is None:
        return None
    if guard is not True and not isinstance(guard, Guard):
        raise L3RSError(f"guard is {guard!r}; allowed are True, False and a l3rs.Guard")
    if not adam_share(spec).any():
        names = ", ".join(direction.name for direction in spec.directions)
        raise L3RSError(f"guard needs Adam among the optimizer's directions; this one has {names}")
    return Guard() if guard is True else guard


def adam_share(spec: Spec) -> np.ndarray:
    """float32 [P]: 1 for the first direction that is Adam, 0 for the others."""
    share = np.zeros(len(spec.directions), np.float32)
    names = [direction.name for direction in spec.directions]
    if "adam" in names:
        share[names.index("adam")] = 1
    return share


def init_guard(xp: Any) -> GuardState:
    """Before the first step; `xp` is `jax.numpy` or `numpy`."""
    zero = xp.zeros([], xp.int32)
    return GuardState(zero, zero, zero, zero, xp.asarray(_NO_LOSS, xp.float32))


def advance(guard: Guard, state: GuardState, value: Any, ema: Any, first: Any, xp: Any) -> GuardState:
    """Advance the guard by one step; Adam takes this step if `left` > 0 in the result.

    Args:
      guard: the rules.
      state: before this step.
      value: [], the loss of this step.
      ema: [], the bias-corrected EMA of the finite losses, including this one; NaN before the first.
      first: [], the first finite loss.
      xp: `jax.numpy` or `numpy`.
    """
    best = xp.where(ema < state.best, ema, state.best)
    waiting = state.left <= 1  # Adam has taken its last step
    high = xp.where(waiting & (ema > best + guard.bound * abs(first)), state.high + 1, 0)
    fires = waiting & (~xp.isfinite(value) | (high >= guard.patience))
    left = xp.where(fires, guard.steps, xp.where(waiting, 0, state.left - 1))
    return GuardState(
        count=state.count + xp.where(fires, 1, 0),
        adam_steps=state.adam_steps + xp.where(left > 0, 1, 0),
        left=left,
        high=xp.where(fires, 0, high),
        best=best,
    )


def report(state: GuardState) -> dict[str, Any]:
    """See `l3rs.guard_report`."""
    return {
        "count": int(state.count),
        "adam_steps": int(state.adam_steps),
        "active": int(state.left) > 1,
        "best_loss": float(state.best) if state.best < _NO_LOSS else math.inf,
    }

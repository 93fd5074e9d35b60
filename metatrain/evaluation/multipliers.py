"""Step multipliers: by which factor the updates of L3RS would have been best, a measure of their scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.records import L3RS, MultiplierGrid
from metatrain.evaluation.runner import Conditions, Runner
from metatrain.evaluation.tuning import PER_CALL, mean_or_inf


def multiplier_grids(
    ours: LearnedOptimizer, multipliers: Sequence[float], conditions: Conditions, device: jax.Device
) -> list[MultiplierGrid]:
    """For each horizon, the multiplier with the lowest mean inner_valid loss, and its mean test loss.

    Args:
      ours: the learned optimizer.
      multipliers: factors of all its updates, such as (0.1, 0.3, 1, 3, 10).
      conditions: of the setting; `tuning_seeds` samples choose the multiplier, all are judged on test.
      device: where the runs take place.
    """
    run, found = _multiplied(ours, conditions, device), []
    for horizon in conditions.horizons:
        losses = _losses(run, ours, multipliers, horizon, "inner_valid", conditions.tuning_seeds)
        best = best_multiplier(losses)
        records, _ = run.judge(_rows(ours, [best]), L3RS, horizon, {})
        loss, accuracy = (
            sum(values) / len(records) for values in zip(*((r.loss, r.accuracy) for r in records), strict=True)
        )
        ordered = sorted(losses)
        found.append(
            MultiplierGrid(
                conditions.setting, horizon, ordered, [losses[factor] for factor in ordered], best, loss, accuracy
            )
        )
        conditions.log(
            f"{conditions.setting}: l3rs, {horizon} steps, best of {len(ordered)} step multipliers: {best:g}"
        )
    return found


def best_multiplier(losses: dict[float, float]) -> float:
    """The multiplier with the lowest loss; among equals, as where all diverged, the one nearest to 1."""
    return min(sorted(losses), key=lambda factor: (losses[factor], abs(math.log(factor))))


def _multiplied(ours: LearnedOptimizer, conditions: Conditions, device: jax.Device) -> Runner:
    """Runs the learned optimizer with its steps multiplied; its hyper-parameters are those of `_rows`."""

    def make_by_jax(hyper: Any, horizon: jax.Array) -> optax.GradientTransformationExtraArgs:
        theta, multiplier = hyper
        return optax.with_extra_args_support(optax.chain(ours.make(theta, horizon), optax.scale(multiplier)))

    make: Any = make_by_jax
    if conditions.plan == "torch":
        from metatrain.evaluation.torch_runs import torch_multiplied

        make = torch_multiplied(ours)
    return Runner(conditions, make, device)


def _rows(ours: LearnedOptimizer, multipliers: Sequence[float]) -> Any:
    theta = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * len(multipliers)), ours.theta)
    return theta, jnp.asarray(multipliers, jnp.float32)


def _losses(
    run: Runner, ours: LearnedOptimizer, multipliers: Sequence[float], horizon: int, split: str, seeds: int
) -> dict[float, float]:
    losses: dict[float, float] = {}
    for first in range(0, len(multipliers), PER_CALL):
        some = multipliers[first : first + PER_CALL]
        scores, _ = run(_rows(ours, some), horizon, split, seeds)
        losses |= {factor: mean_or_inf(loss) for factor, loss in zip(some, scores.loss, strict=True)}
    return losses

"""Where a specialised optimizer begins: factors of a checkpoint's steps that suit the task, found before evolution.

Evolution moves every meta-parameter by a little. What a task needs first is few numbers: how far all layers should go,
and how much further or less far those of a role (input, hidden, output, norm; kernel, bias, scale).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.descriptors import roles
from l3rs.theta import multiply_steps
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.runner import Conditions, Runner, learned_maker, torch_runs_of
from metatrain.evaluation.tuning import PER_CALL, mean_or_inf
from metatrain.outer.setup import Setup
from tasks import sample

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)  # of all steps
ROLE_FACTORS = (0.25, 4.0)  # of those of a role
SAMPLES = 2  # inits and batches on which they are compared


@dataclasses.dataclass(frozen=True)
class StartFactors:
    """Of the steps of a checkpoint; see `optimizer.start_multiplier` and `optimizer.start_by_role`."""

    multiplier: float = 1.0
    by_role: Mapping[str, float] = dataclasses.field(default_factory=dict)


def find_factors(setup: Setup, horizons: Sequence[int], log: Callable[[str], None]) -> StartFactors:
    """The factors with the lowest mean meta-loss over the horizons: of all steps, then of one role after another.

    Args:
      setup: of a run that begins with a checkpoint, with a table and a `layer_gain`.
      horizons: steps of the training runs.
      log: called with a line about each search.
    """
    [task] = setup.tasks
    start, execution = setup.start, setup.config.execution
    assert start is not None
    assert execution.plan != "auto"
    keys = jax.random.split(jax.random.key(0), SAMPLES)
    with torch_runs_of(task, execution, log) as torch_runs:
        conditions = Conditions(
            setting=task.name,
            task=task,
            samples=jax.tree.map(lambda *each: jnp.stack(each), *(sample(task, key) for key in keys)),
            horizons=horizons,
            tuning_seeds=SAMPLES,
            points=1,
            plan=execution.plan,
            trainers=None,
            log=log,
            torch_runs=torch_runs,
        )
        ours = LearnedOptimizer(start, setup.spec, False)
        run = Runner(conditions, learned_maker(ours, conditions), jax.local_devices()[0])

        def losses(choices: Sequence[StartFactors]) -> list[float]:
            thetas = [multiply_steps(start, setup.spec, each.multiplier, each.by_role) for each in choices]
            rows: list[Any] = [jax.tree.map(lambda *x: jnp.stack(x), *part) for part in _parts(thetas)]
            found = [
                np.concatenate([run(part, horizon, "outer_valid")[0].loss for part in rows]) for horizon in horizons
            ]
            return [mean_or_inf(loss) for loss in np.concatenate(found, axis=1)]

        return _search(losses, [role.name for role in roles(setup.spec.layers)], log)


def _parts(thetas: Sequence[Any]) -> list[Sequence[Any]]:
    return [thetas[first : first + PER_CALL] for first in range(0, len(thetas), PER_CALL)]


def _search(
    losses: Callable[[Sequence[StartFactors]], list[float]], roles_of_layers: Sequence[str], log: Callable[[str], None]
) -> StartFactors:
    """Coordinate by coordinate: each keeps the factor with the lowest loss."""
    choices = [StartFactors(multiplier) for multiplier in MULTIPLIERS]
    found = losses(choices)
    # Among equals, as where all diverged, the one nearest to 1.
    lowest, _, best = min(
        ((loss, abs(np.log(each.multiplier)), each) for loss, each in zip(found, choices, strict=True)),
        key=lambda one: one[:2],
    )
    rows = ", ".join(f"{loss:.4g} at {each.multiplier:g}" for loss, each in zip(found, choices, strict=True))
    log(f"meta-loss by the factor of all steps: {rows}")
    each_role = list(dict.fromkeys(roles_of_layers))
    for role in each_role if len(each_role) > 1 else ():
        choices = [dataclasses.replace(best, by_role={**best.by_role, role: factor}) for factor in ROLE_FACTORS]
        found = losses(choices)
        rows = ", ".join(f"{loss:.4g} at {factor:g}" for loss, factor in zip(found, ROLE_FACTORS, strict=True))
        log(f"{lowest:.4g}; by the factor of {role}: {rows}")
        for loss, each in zip(found, choices, strict=True):
            if loss < lowest:
                lowest, best = loss, each
    return best

"""Where a specialised optimizer begins: factors of a checkpoint's steps that suit the task, found before evolution.

Evolution moves every meta-parameter by a little. What a task needs first is few numbers: how far all layers should go,
how much less far over a longer horizon, and how much further or less far those of a role (input, hidden, output, norm;
kernel, bias, scale).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import l3rs
from l3rs.descriptors import ROLE_NAMES, roles
from l3rs.scale_free import USUAL_HORIZON
from l3rs.spec import Theta
from l3rs.theta import multiply_steps
from metatrain.evaluation.learned import LearnedOptimizer
from metatrain.evaluation.multipliers import best_multiplier
from metatrain.evaluation.runner import Conditions, Runner, learned_maker, torch_runs_of
from metatrain.evaluation.tuning import PER_CALL, mean_or_inf
from metatrain.outer.setup import Setup
from tasks import sample

MULTIPLIERS = (0.25, 0.5, 1.0, 2.0)  # of all steps
HORIZON_POWERS = (0.0, 0.25, 0.5)  # of 100 over the horizon
ROLE_FACTORS = (0.25, 4.0)  # of those of a role
SAMPLES = 2  # inits and batches on which they are compared


@dataclasses.dataclass(frozen=True)
class StartFactors:
    """Of the steps of a checkpoint; see `optimizer.start_multiplier` and `optimizer.start_by_role`.

    `horizon_power` is another than the checkpoint's, or None.
    """

    multiplier: float = 1.0
    horizon_power: float | None = None
    by_role: Mapping[str, float] = dataclasses.field(default_factory=dict)


def find_factors(setup: Setup, horizons: Sequence[int], log: Callable[[str], None]) -> StartFactors:
    """The factors with the lowest mean meta-loss over the horizons.

    First that of all steps, then the power of the horizon, then one role after another.

    Args:
      setup: of a run that begins with a checkpoint, with a table; without a `layer_gain` no role has a factor.
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
            found = []
            for horizon in horizons:
                thetas = [at_horizon(horizon, start, setup.spec, each) for each in choices]
                rows: list[Any] = [jax.tree.map(lambda *x: jnp.stack(x), *part) for part in _parts(thetas)]
                found.append(np.concatenate([run(part, horizon, "outer_valid")[0].loss for part in rows]))
            return [mean_or_inf(loss) for loss in np.concatenate(found, axis=1)]

        return search(losses, setup.spec, horizons, log)


def at_horizon(horizon: int, start: Theta, spec: l3rs.Spec, factors: StartFactors) -> Theta:
    """Meta-parameters of the form `spec` that take the steps of other factors, at one horizon."""
    if factors.horizon_power is None:
        return multiply_steps(start, spec, factors.multiplier, factors.by_role)
    # In the layers' own factors, because these are outside of step_limit, as the power is.
    by_horizon = float(USUAL_HORIZON / horizon) ** (factors.horizon_power - spec.horizon_power)
    by_role = {name: factors.by_role.get(name, 1.0) * by_horizon for name in ROLE_NAMES}
    return multiply_steps(start, spec, factors.multiplier, by_role)


def turned(factors: StartFactors, power: float, spec: l3rs.Spec, horizons: Sequence[int]) -> StartFactors:
    """Factors with another power of the horizon, and the same steps at the geometric mean of the horizons."""
    middle = statistics.geometric_mean(horizons)
    multiplier = factors.multiplier * (middle / float(USUAL_HORIZON)) ** (power - spec.horizon_power)
    return dataclasses.replace(factors, multiplier=multiplier, horizon_power=power)


def searched_powers(spec: l3rs.Spec, horizons: Sequence[int]) -> list[float]:
    """The other powers of the horizon that are searched: none where layers have no factors or there is one horizon."""
    if not spec.layer_gain or len(horizons) == 1:
        return []
    return [power for power in HORIZON_POWERS if power != spec.horizon_power]


def searched_roles(spec: l3rs.Spec) -> list[str]:
    """The roles whose factors are searched: those of the layers, if there are several and the form has such factors."""
    names = list(dict.fromkeys(role.name for role in roles(spec.layers)))
    return names if spec.layer_gain and len(names) > 1 else []


def _parts(thetas: Sequence[Any]) -> list[Sequence[Any]]:
    return [thetas[first : first + PER_CALL] for first in range(0, len(thetas), PER_CALL)]


def search(
    losses: Callable[[Sequence[StartFactors]], list[float]],
    spec: l3rs.Spec,
    horizons: Sequence[int],
    log: Callable[[str], None],
) -> StartFactors:
    """Coordinate by coordinate: each keeps the factor with the lowest loss."""
    found = losses([StartFactors(multiplier) for multiplier in MULTIPLIERS])
    by_multiplier = dict(zip(MULTIPLIERS, found, strict=True))
    best = StartFactors(best_multiplier(by_multiplier))
    lowest = by_multiplier[best.multiplier]
    log(f"meta-loss with all steps {_listed(MULTIPLIERS, found)}")
    if powers := searched_powers(spec, horizons):
        choices = [turned(best, power, spec, horizons) for power in powers]
        found = losses(choices)
        log(f"meta-loss so far {lowest:.4g}; with a horizon_power of {_listed(powers, found, '')}")
        for loss, each in zip(found, choices, strict=True):
            if loss < lowest:
                lowest, best = loss, each
    for role in searched_roles(spec):
        choices = [dataclasses.replace(best, by_role={**best.by_role, role: factor}) for factor in ROLE_FACTORS]
        found = losses(choices)
        log(f"meta-loss so far {lowest:.4g}; with those of {role} {_listed(ROLE_FACTORS, found)}")
        for loss, each in zip(found, choices, strict=True):
            if loss < lowest:
                lowest, best = loss, each
    chosen = [] if best.horizon_power is None else [f"a horizon_power of {best.horizon_power:g}"]
    chosen += [f"those of {role} × {factor:g}" for role, factor in best.by_role.items()]
    log(f"meta-training begins with all steps × {', '.join([f'{best.multiplier:g}', *chosen])}: meta-loss {lowest:.4g}")
    return best


def _listed(factors: Sequence[float], losses: Sequence[float], sign: str = "× ") -> str:
    return ", ".join(f"{sign}{factor:g}: {loss:.4g}" for factor, loss in zip(factors, losses, strict=True))

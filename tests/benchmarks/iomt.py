"""The overhead of IOMT: the seconds of its controller over those of the training of a ResNet-8.

Group norm, 32 × 32, batch 32, stepwise, τ = 25 and n_ini = 20, one core. The controller compresses key
parameters, fits five Gaussian processes and asks them; the paper counts 1 % of the operations. What
bounds it: fits of the kernels, which become rarer as data grows, and grow with it.
"""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.baselines import iomt
from metatrain.evaluation.interleaved import trainers
from tasks import sample
from tests.benchmarks.stepwise import resnet8
from tests.benchmarks.timing import use_one_core

STAGES = 44  # 20 of them belong to the initial phase


def main() -> None:
    use_one_core()
    task = resnet8()
    data, chosen = jax.device_put((task.data, sample(task, jax.random.key(0))), jax.devices()[0])
    params, stats = jax.jit(task.init)(data, jnp.int32(0))
    options = iomt.Options()
    train = trainers(task, "stepwise")(options.stage_steps, options.moments, "usual")
    inputs = {"data": data, "key": chosen.key}
    train(params, stats, inputs, 1)  # compiles
    ends = [time.perf_counter()]
    result = train(
        params,
        stats,
        inputs,
        STAGES * options.stage_steps,
        controller=iomt.Controller(iomt.SPACE, options),
        after_stage=lambda *_: ends.append(time.perf_counter()),
    )
    whole = np.diff(ends)
    controller = np.array([stage.seconds for stage in result.history])
    training = whole - controller
    chosen_by = np.array([stage.chosen for stage in result.history])
    for phase in ("initial", "surrogate"):
        of = chosen_by == phase
        print(
            f"IOMT, {phase} phase, {of.sum()} stages of {options.stage_steps} steps: controller "
            f"{1e3 * controller[of].mean():.1f} ms a stage (most {1e3 * controller[of].max():.0f}), "
            f"training {1e3 * training[of].mean():.0f} ms"
        )
    print(f"controller / training: {controller.sum() / training.sum():.2%}  (wanted: ≤ 3 %)")


if __name__ == "__main__":
    main()

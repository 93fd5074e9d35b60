"""A copy of an optimizer of form 2 with another power of the horizon, and with longer or shorter steps.

    python -m tools.rescale_optimizer runs/a/optimizer runs/rescaled 0.14 1.33

The numbers are the new `horizon_power`, and the factor of its steps at a horizon of 100; the limits of a step stay
where they are. Where `metatrain evaluate --multipliers` finds factors m(T) best, they are about the old power minus the
slope of log m over log T, and m(100). What was measured of the optimizer is left out of the copy.
"""

from __future__ import annotations

import dataclasses
import sys

import l3rs
from l3rs.theta import multiply_steps


def main(optimizer: str, destination: str, horizon_power: float, factor: float) -> None:
    theta, spec, info = l3rs.restore(optimizer)
    if spec.form != 2:
        raise SystemExit(f"{optimizer} is of form {spec.form}, which has no horizon_power")
    if not factor > 0:
        raise SystemExit(f"the factor is {factor:g}; it must be > 0")
    spec = dataclasses.replace(spec, horizon_power=horizon_power)
    kept = {key: value for key, value in info.items() if key != "results"}
    info = {**kept, "rescaled": {"horizon_power": horizon_power, "factor": factor}}
    l3rs.save(destination, multiply_steps(theta, spec, factor), spec, info)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

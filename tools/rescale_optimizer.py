"""A copy of an optimizer of form 2 with another power of the horizon, and with longer or shorter steps.

    python -m tools.rescale_optimizer runs/a/optimizer runs/rescaled 0.14 1.33

The numbers are the new `horizon_power`, and the factor of its steps at a horizon of 100. Where `metatrain evaluate
--multipliers` finds factors m(T) best, they are about m(100) and the old power minus the slope of log m over log T.
"""

from __future__ import annotations

import dataclasses
import sys

import l3rs
from l3rs.theta import multiply_steps


def main(optimizer: str, destination: str, horizon_power: float, factor: float) -> None:
    theta, spec, info = l3rs.restore(optimizer)
    if spec.form != 2:
        raise SystemExit(f"{optimizer} is of form {spec.form}, whose steps do not depend on the horizon")
    spec = dataclasses.replace(spec, horizon_power=horizon_power)
    l3rs.save(destination, multiply_steps(theta, spec, factor), spec, info)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))

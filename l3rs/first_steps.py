"""A warning where an optimizer's first steps are too long for a network."""

from __future__ import annotations

import numpy as np

N_STEPS = 3  # that are watched
TOO_LONG = 0.5  # ‖Δθ‖ / ‖θ‖ of a matrix; a usual first step is 0.002 to 0.1


def too_long(step_norm: np.ndarray, usual_norm: np.ndarray, is_matrix: np.ndarray) -> str | None:
    """What to warn of, if a step moves most matrices by more than half their norm.

    Biases and layers without a usual norm are not counted: they have to move far.

    Args:
      step_norm: float [L], the norm of each layer's step.
      usual_norm: float [L], see `scale_free.expected_norm`; of a layer of zeros it is 0, but for a head with a floor.
      is_matrix: bool [L], whether a layer has two dimensions or more.
    """
    counted = is_matrix & (usual_norm > 0)
    ratios = step_norm[counted] / usual_norm[counted]
    if not ratios.size or not np.median(ratios) > TOO_LONG:
        return None
    return (
        f"a first step of L3RS changes most layers by more than half their norm (median {np.median(ratios):.2g}): this "
        f"network is unlike those of its meta-training; scale the step down (in PyTorch lr=0.1, in optax "
        f"optax.chain(…, optax.scale(0.1))), use another checkpoint, or pass guard=True"
    )

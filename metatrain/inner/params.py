"""The network parameters to judge an optimizer by."""

from __future__ import annotations

from typing import Any

import optax


def deployed_params(state: optax.OptState, params: Any) -> Any:
    """The parameters that an optimizer hands over: its average if it keeps one (schedule-free), else `params`."""
    averaging = optax.tree.get(state, "ScheduleFreeState")
    return params if averaging is None else optax.contrib.schedule_free_eval_params(averaging, params)

"""The optimizers that L3RS is compared with, each an ordinary optax transformation.

BASELINES has them by name, as functions of a learning rate (a number, traced or not, or a schedule)
and keyword options, with the defaults of their papers:

tx = BASELINES["mada"](1e-3, weight_decay=0.1)
"""

import functools
from collections.abc import Callable

import optax

from l3rs.baselines.adabound import AdaBoundState, adabound
from l3rs.baselines.avgrad import AVGradState, avgrad
from l3rs.baselines.mada import (
    MADAState,
    hyper_adam,
    mada,
    mada_coefficients,
    mada_history,
)
from l3rs.baselines.mada_step import Coefficients
from l3rs.baselines.padam import PadamState, padam
from l3rs.baselines.swats import SWATSState, swats

BASELINES: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "mada": mada,
    "hyper_adam": hyper_adam,
    "avgrad": avgrad,
    "swats": swats,
    "padam": padam,
    "adabound": adabound,
    "amsbound": functools.partial(adabound, amsbound=True),
}

__all__ = [
    "BASELINES",
    "AVGradState",
    "AdaBoundState",
    "Coefficients",
    "MADAState",
    "PadamState",
    "SWATSState",
    "adabound",
    "avgrad",
    "hyper_adam",
    "mada",
    "mada_coefficients",
    "mada_history",
    "padam",
    "swats",
]

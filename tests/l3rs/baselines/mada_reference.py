"""MADA in NumPy, from its equations, and helpers that its tests share."""

import numpy as np

from l3rs.baselines.mada import DOMAIN
from tests.l3rs.baselines.common import N

ALPHA = {"learning_rate": 0.03}
NEVER = 2**31 - 1  # a start step
INSIDE = {"b1": 0.7, "b2": 0.8, "b3": 0.4, "c": 0.6, "rho": 0.7, "gamma": 0.8}
ADAM = {"b1": 0.9, "b2": 0.95, "b3": 0.0, "c": 1.0, "rho": 1.0, "gamma": 1.0}
NEAR_ADAM = {"b1": 0.9, "b2": 0.95, "b3": 1e-3, "c": 0.999, "rho": 0.999, "gamma": 0.999}
# A frozen corner keeps only the moments that it needs; one that could move keeps them all.
FROZEN, STILL = {"learned": ()}, {"start_step": NEVER}


def no_moments():
    return {name: np.zeros(N) for name in ("m", "n", "v", "mean", "lion", "g")}


def numpy_update(q, t, g, old, x, eps=1e-6, weight_decay=0.0):
    """(update, moments after) of step t with the coefficients q, a dict."""
    b1, b2, b3 = q["b1"], q["b2"], q["b3"]
    change = g - old["g"] if t > 1 else np.zeros(N)
    m = b1 * old["m"] + (1 - b1) * g
    n = b3 * old["n"] + (1 - b3) * change
    ahead = (g + b3 * change) ** 2
    square = q["c"] * ahead + (1 - q["c"]) * (old["v"] + ahead * np.sign(ahead - old["v"]))
    v = b2 * old["v"] + (1 - b2) * square
    mean = (v + (t - 1) * old["mean"]) / t
    w = (q["rho"] * v + (1 - q["rho"]) * mean) / (1 - b2**t)
    adaptive = (m / (1 - b1**t) + b3 * n) / (np.sqrt(w) + eps)
    u = 0.95 * old["lion"] + 0.05 * g
    lion = 0.98 * old["lion"] + 0.02 * g
    direction = q["gamma"] * adaptive + (1 - q["gamma"]) * np.sign(u) + weight_decay * x
    return -q["learning_rate"] * direction, {"m": m, "n": n, "v": v, "mean": mean, "lion": lion, "g": g}


def fixed(q, rate, **options):
    """The recurrence with coefficients that do not move."""
    old = no_moments()

    def step(t, g, x):
        update, after = numpy_update({**q, "learning_rate": rate(t)}, t, g, old, x, **options)
        old.update(after)
        return update

    return step


def assert_in_domain(coefficients):
    for name, (low, high) in DOMAIN.items():
        value = np.asarray(coefficients[name])
        edge = value.dtype.type  # D's edges, in the coefficients' dtype
        assert np.all((edge(low) <= value) & (value <= edge(high))), (name, value)  # false for NaN, too

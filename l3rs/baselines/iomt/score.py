"""The score of a stage and the expected score of the next: equations 2 to 7 of IOMT, except 6."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIVERGED = -1.0  # the score of a stage that diverged


def stage_score(losses: npt.ArrayLike, alpha: float) -> float:
    """Equation 2: s in (-1, 1), larger if the losses of a stage fell faster::

        Δ_i = (l_{i-1} - l_i) / max(l_i, l_{i-1})        with mean μ and standard deviation σ
        U = (l_0 - max l) / (max(l_0, max l) τ)          L = (l_0 - min l) / (max(l_0, min l) τ)
        s = tanh((μ + U + L) / 3 + α σ)

    max l and min l do not include l_0. The denominators use absolute values, which changes nothing for
    positive losses and extends the score to negative ones.

    Args:
      losses: [τ + 1], τ ≥ 1, finite: l_0 before the stage, then after each of its steps.
      alpha: α, the weight of the spread.
    """
    values = np.asarray(losses, np.float64)
    start, after = values[0], values[1:]
    drops = _drop(values[:-1], after)
    upper, lower = _drop(start, after.max()) / len(after), _drop(start, after.min()) / len(after)
    return float(np.tanh((drops.mean() + upper + lower) / 3 + alpha * drops.std()))


def _drop(before: npt.ArrayLike, after: npt.ArrayLike) -> np.ndarray:
    """How far a loss fell, relative to the larger of both; 0 where both are 0."""
    before, after = np.asarray(before), np.asarray(after)
    larger = np.maximum(np.abs(before), np.abs(after))
    return (before - after) / np.where(larger == 0, 1, larger)


def sampling_weight(score: float, minimum: float) -> float:
    """Equation 3: the weight of an optimizer in the random choices of the initial phase.

    Args:
      score: of its last stage, in [-1, 1].
      minimum: ω_min > 0, so that every optimizer may still be drawn.
    """
    return max((score + 1) / 2, minimum)


def acquisition(
    mean: npt.ArrayLike,
    std: npt.ArrayLike,
    stage: int,
    *,
    transferability: float,
    halving: int | None,
    weight: float = 1.0,
) -> np.ndarray:
    """Equation 7: the acquisition function, e = sigmoid(s_μ + α (1 - 2^-⌊i/n⌋ ω_t) s_σ).

    Without halving, the argument of the sigmoid is equation 5; with a transferability of 0, equation
    4. As printed, the weight of the spread grows from 1 - ω_t to 1 with the stages, although the
    paper's text says that it should shrink; this function follows the equation.

    Args:
      mean, std: s_μ and s_σ, the surrogate's predictions for some choices, of one shape.
      stage: i ≥ 0, the number of stages before this one.
      transferability: ω_t, in [0, 1].
      halving: n ≥ 1, the number of stages after which ω_t counts half; None for no halving.
      weight: α; 1 for IOMT.

    Returns:
      An array of the shape of `mean`, in (0, 1).
    """
    halved = transferability * 2.0 ** -(stage // halving) if halving else transferability
    return sigmoid(np.asarray(mean, np.float64) + weight * (1 - halved) * np.asarray(std, np.float64))


def sigmoid(x: npt.ArrayLike) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return (1 + np.tanh(np.asarray(x, np.float64) / 2)) / 2

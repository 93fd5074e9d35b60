"""How well a pretrained model fits its new task: LEEP, LogME, and equation 6 of IOMT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from l3rs.baselines import common
from l3rs.baselines.iomt.score import sigmoid
from l3rs.spec import L3RSError

_TINY = 1e-12  # relative to |y|²: a lower bound for residuals and weights


def leep(source_probabilities: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """LEEP: the mean log-likelihood of the labels, predicted from the model's own classes::

        P(y, z) = 1/n Σ_{i: y_i = y} θ(x_i)_z        P(y | z) = P(y, z) / Σ_y P(y, z)
        LEEP = 1/n Σ_i log Σ_z P(y_i | z) θ(x_i)_z

    Args:
      source_probabilities: θ, [n, z], rows that add up to 1: the pretrained classifier's predictions
        for the examples, in the classes that it was trained on.
      labels: y, int [n], of the new task.

    Returns:
      A number ≤ 0; larger is better.

    Raises:
      L3RSError: shapes do not match, or rows are not probabilities.

    Reference: Nguyen et al., LEEP: A New Measure to Evaluate Transferability of Learned
    Representations, arXiv 2002.12462.
    """
    theta = np.asarray(source_probabilities, np.float64)
    classes = _classes(labels, theta, "source_probabilities")
    if not (np.all(theta >= 0) and np.allclose(theta.sum(1), 1, atol=1e-3)):  # a float16 softmax passes
        raise L3RSError("source_probabilities must be ≥ 0 with rows that add up to 1")
    joint = np.stack([theta[classes == y].sum(0) for y in range(classes.max() + 1)]) / len(theta)  # [y, z]
    marginal = joint.sum(0)
    conditional = joint / np.where(marginal == 0, 1, marginal)
    return float(np.mean(np.log(np.sum(conditional[classes] * theta, axis=1))))


def logme(features: npt.ArrayLike, labels: npt.ArrayLike, *, iterations: int = 100) -> float:
    """LogME: the maximum log evidence per example of a linear model of the labels given the features.

    For each class with its indicator y = F w + noise, w ~ N(0, 1/α) and noise ~ N(0, 1/β), MacKay's
    fixed-point iteration maximises the evidence over α and β::

        A = α I + β FᵀF     m = β A⁻¹ Fᵀ y     γ = Σ_i β σ_i² / (α + β σ_i²)
        α ← γ / mᵀm         β ← (n - γ) / |F m - y|²

    where σ_i are F's singular values; the result is the mean over classes of log p(y | F, α, β) / n.

    Args:
      features: F, [n, d]: the inputs of the pretrained model's last layer.
      labels: int [n]; each class that occurs is one problem.
      iterations: at most this many; it stops earlier when α/β changes by less than 1e-6 of itself.

    Returns:
      A number without bounds; larger is better.

    Raises:
      L3RSError: shapes do not match, or features are not finite.

    Reference: You et al., LogME: Practical Assessment of Pre-trained Models for Transfer Learning,
    arXiv 2102.11005, Algorithm 1.
    """
    F = np.asarray(features, np.float64)
    classes = _classes(labels, F, "features")
    if not np.all(np.isfinite(F)):
        raise L3RSError("features must be finite")
    u, sigma, _ = np.linalg.svd(F, full_matrices=False)
    evidences = []
    for label in range(classes.max() + 1):
        y = (classes == label).astype(np.float64)
        evidences.append(_evidence(sigma**2, u.T @ y, y @ y, F.shape, iterations) / len(F))
    return float(np.mean(evidences))


def _evidence(squares: np.ndarray, z: np.ndarray, total: float, shape: tuple[int, ...], iterations: int) -> float:
    """The maximum log evidence. `squares` are σ², z is Uᵀy, `total` is |y|², `shape` is F's."""
    n, d = shape
    ratio = 1.0  # α / β, of which m and γ are functions

    def fit(ratio: float) -> tuple[float, float, float]:
        """(γ, mᵀm, |F m - y|²)"""
        shrink = squares / (squares + ratio)
        size = np.sum(squares * (z / (squares + ratio)) ** 2)
        residual = np.sum(((1 - shrink) * z) ** 2) + max(total - z @ z, 0.0)
        return float(np.sum(shrink)), max(float(size), _TINY * total), max(float(residual), _TINY * total)

    for _ in range(iterations):
        gamma, size, residual = fit(ratio)
        alpha, beta = max(gamma, _TINY) / size, max(n - gamma, _TINY) / residual
        before, ratio = ratio, alpha / beta
        if abs(ratio - before) <= 1e-6 * before:
            break
    _, size, residual = fit(ratio)
    log_determinant = np.sum(np.log(alpha + beta * squares)) + (d - len(squares)) * np.log(alpha)
    fitted = n * np.log(beta) + d * np.log(alpha) - n * np.log(2 * np.pi)
    return float(fitted - beta * residual - alpha * size - log_determinant) / 2


def _classes(labels: npt.ArrayLike, rows: np.ndarray, name: str) -> np.ndarray:
    """The labels [n], renumbered from 0 without gaps."""
    y = np.asarray(labels)
    if rows.ndim != 2 or y.shape != rows.shape[:1] or not len(y):
        raise L3RSError(f"{name} {rows.shape} and labels {y.shape} must be [n, …] and [n], n ≥ 1")
    return np.unique(y, return_inverse=True)[1]


def transferability(accuracy: Any, metrics: Sequence[float], *, beta: Any = 0.5) -> float:
    """Equation 6: ω_t = β ω_p + (1 - β) mean_i sigmoid(ω_d^i), in [0, 1].

    Args:
      accuracy: ω_p, of the pretrained model on the new task as it is, in [0, 1].
      metrics: ω_d, such as `leep` and `logme`; at least one.
      beta: β, the weight of the accuracy, in [0, 1]; the source names no value.

    Raises:
      L3RSError: a number is out of range.

    Example:
      >>> from l3rs.baselines import iomt
      >>> probabilities, labels = [[0.9, 0.1], [0.2, 0.8]], [0, 1]
      >>> round(iomt.transferability(0.5, [iomt.leep(probabilities, labels)]), 3)
      0.464
    """
    accuracy = common.number("accuracy", accuracy, _is_share, "in [0, 1]")
    beta = common.number("beta", beta, _is_share, "in [0, 1]")
    values = np.asarray(metrics, np.float64)
    if values.ndim != 1 or not len(values) or np.any(np.isnan(values)):
        raise L3RSError(f"metrics is {metrics}; it must be one or more numbers")
    return float(beta * accuracy + (1 - beta) * np.mean(sigmoid(values)))


def _is_share(x: float) -> bool:
    return 0 <= x <= 1

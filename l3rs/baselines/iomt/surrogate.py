"""Gaussian processes that predict the score of the next stage, one for each optimizer."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from l3rs.baselines.iomt.compress import Compressor
from l3rs.baselines.iomt.extras import require
from l3rs.baselines.iomt.space import Choice

_WINDOW = 64  # stages that are kept of each optimizer
_REFIT_GROWTH = 4  # refit when there is a quarter more data than at the last fit
_REFIT_MOST = 25  # and at the latest after this many stages
_FEWEST = 3  # observations to fit a kernel to


class Observation(NamedTuple):
    """A stage as input of its optimizer's surrogate."""

    sample: list[np.ndarray]  # of the key parameters before it, see `Compressor.sample`
    features: np.ndarray  # [d], the same, compressed
    choice: int  # index in the optimizer's choices
    score: float


class Surrogates:
    """Predicts the score of the next stage for each optimizer and its hyper-parameters.

    Inputs are the compressed key parameters and the hyper-parameters, as logarithms if they span a
    factor of 10 or more. Each of the two blocks is scaled to a total variance of 1, so that neither
    dominates. The kernel is an amplitude times Matérn 5/2 with one length scale, plus noise; scores
    are standardised for each optimizer. The standard deviation is that of the expected score,
    without the noise, which more stages would not reduce.

    To save time, a stage updates one process without fitting its kernel. A kernel is fitted again, by
    maximum likelihood, when its optimizer has a quarter more stages, or 25 more; the compressor
    likewise, counting all stages. The last 64 stages of each optimizer are kept.

    Args:
      choices: of each optimizer.
      compressor: of the key parameters.

    Raises:
      L3RSError: scikit-learn is missing.
    """

    def __init__(self, choices: Sequence[Sequence[Choice]], compressor: Compressor) -> None:
        require("sklearn", "scikit-learn", "IOMT")
        import threadpoolctl  # type: ignore[import-untyped] # of scikit-learn

        self._threads = threadpoolctl.ThreadpoolController()
        self.compressor = compressor
        self._hyper_inputs = [_hyper_inputs(of_one) for of_one in choices]
        self._data: list[collections.deque[Observation]] = [collections.deque(maxlen=_WINDOW) for _ in choices]
        self._processes = [_Process() for _ in choices]
        self._stale = [True for _ in choices]
        self._seen = self._fitted = 0  # observations, in all and at the compressor's last fit

    def add(self, optimizer: int, choice: int, sample: list[np.ndarray], score: float) -> None:
        """Add the score of a stage, and the sample from before it."""
        self._data[optimizer].append(Observation(sample, self.compressor.transform([sample])[0], choice, score))
        self._processes[optimizer].seen += 1
        self._stale[optimizer] = True
        self._seen += 1

    def predict(self, sample: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Means and standard deviations of the expected scores of all choices.

        Returns:
          For each optimizer s_μ and s_σ, each [choices]. For an optimizer without stages they are
          those of all scores.
        """
        # With such small matrices threads gain nothing, and are many times slower on a busy machine.
        with self._threads.limit(limits=1):
            return self._predict(sample)

    def _predict(self, sample: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        if _due(self._seen, self._fitted):
            self.compressor.fit([observation.sample for data in self._data for observation in data])
            for data in self._data:
                features = self.compressor.transform([observation.sample for observation in data])
                renewed = [old._replace(features=row) for old, row in zip(data, features, strict=True)]
                data.clear()
                data.extend(renewed)
            self._fitted, self._stale = self._seen, [True for _ in self._stale]
        state = self.compressor.transform([sample])
        scores = np.array([observation.score for data in self._data for observation in data])
        center, spread = (scores.mean(), scores.std()) if len(scores) else (0.0, 0.0)
        spread = spread or 1.0
        predictions = []
        for i, (process, data) in enumerate(zip(self._processes, self._data, strict=True)):
            inputs = self._hyper_inputs[i]
            if not data:
                predictions.append((np.full(len(inputs), center), np.full(len(inputs), spread)))
                continue
            if self._stale[i]:
                features = np.stack([observation.features for observation in data])
                rows = np.hstack([features, inputs[[observation.choice for observation in data]]])
                process.fit(rows, np.array([observation.score for observation in data]), spread)
                self._stale[i] = False
            predictions.append(process.predict(np.hstack([np.repeat(state, len(inputs), axis=0), inputs])))
        return predictions


class _Process:
    """The Gaussian process of one optimizer."""

    def __init__(self) -> None:
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        self.seen = 0  # observations in total
        self._fitted = 0  # observations at the last fit of the kernel
        # Inputs and scores have variance 1.
        self._kernel = ConstantKernel(1.0, (0.05, 20.0)) * Matern(1.0, (0.1, 20.0), nu=2.5) + WhiteKernel(
            0.1, (1e-3, 2.0)
        )
        self._regressor: Any = None
        self._mean, self._scale = 0.0, 1.0

    def fit(self, inputs: np.ndarray, scores: np.ndarray, spread: float) -> None:
        """Fit to inputs [n, d] and scores [n], n ≥ 1. `spread` is the scores' scale if they are all equal."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor

        varied = np.ptp(scores) > 0
        self._mean, self._scale = float(scores.mean()), float(scores.std()) if varied else spread
        fit_kernel = varied and len(scores) >= _FEWEST and _due(self.seen, self._fitted)
        # If no input varies, a column of zeros takes their place.
        rows = inputs if inputs.shape[1] else np.zeros((len(inputs), 1))
        self._regressor = GaussianProcessRegressor(self._kernel, optimizer="fmin_l_bfgs_b" if fit_kernel else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # at a bound, which is common with few stages
            self._regressor.fit(rows, (scores - self._mean) / self._scale)
        if fit_kernel:
            self._kernel, self._fitted = self._regressor.kernel_, self.seen

    def predict(self, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the expected score, each [n]."""
        rows = inputs if inputs.shape[1] else np.zeros((len(inputs), 1))
        mean, std = self._regressor.predict(rows, return_std=True)
        noise = self._regressor.kernel_.k2.noise_level
        return self._mean + self._scale * mean, self._scale * np.sqrt(np.maximum(std**2 - noise, 0))


def _due(seen: int, fitted: int) -> bool:
    return seen >= fitted + min(max(fitted // _REFIT_GROWTH, 1), _REFIT_MOST)


def _hyper_inputs(choices: Sequence[Choice]) -> np.ndarray:
    """The hyper-parameters of one optimizer's choices as inputs, [choices, hyper-parameters that vary]."""
    table = np.array([list(choice.hyperparameters.values()) for choice in choices]).reshape(len(choices), -1)
    table = table[:, np.ptp(table, axis=0) > 0]
    low, high = table.min(axis=0), table.max(axis=0)
    logarithmic = (low > 0) & (high >= 10 * low)
    scaled = np.where(logarithmic, np.log(np.where(logarithmic, table, 1.0)), table)
    return (scaled - scaled.mean(axis=0)) / (scaled.std(axis=0) * np.sqrt(max(table.shape[1], 1)))

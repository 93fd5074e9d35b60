"""From the key parameters of a network to the few numbers that a surrogate reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from l3rs.baselines.iomt.extras import require
from l3rs.spec import layers_of

Layers = Sequence[Any]  # arrays, one a layer, of the same shapes at every stage
CompressorName = Literal["pca", "random_projection", "umap"]
Transform = Callable[[np.ndarray], np.ndarray]  # [n, size] -> [n, k]

_FEW = 4  # matrices: with no more than these, all are key parameters
_CLASSIFIER = re.compile(r"head|classifier|logits|output|(^|/|_)(fc|out)(_|/|$)")
_LARGEST = 4096  # numbers of a layer that are looked at
_ROUNDING = 1e-5  # a feature that varies by less than this, relative to the widest, is float32's rounding


def key_parameters(params: Any) -> list[jax.Array]:
    """The layers that describe where a network is: its classifier and the two matrices before it.

    All matrices (arrays of two dimensions or more) when they are four or fewer, as in head-only
    training or a small LoRA; all arrays when there are no matrices. The classifier is known by its
    name (head, classifier, logits, output, fc, out), and is the last matrix where no name says so;
    the order is that of the paths, numbers counted as numbers.
    """
    paths = [layer.path for layer in layers_of(params)]
    leaves = dict(zip(paths, jax.tree.leaves(params), strict=True))
    matrices = [path for path in sorted(leaves, key=_natural) if leaves[path].ndim >= 2]
    if len(matrices) <= _FEW:
        return [leaves[path] for path in matrices or paths]
    named = [path for path in matrices if _CLASSIFIER.search(path.lower())] or matrices[-1:]
    others = [path for path in matrices if path not in named]
    return [leaves[path] for path in (*others[-2:], named[-1])]


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """dense_2 before dense_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", path)]


class Compressor:
    """Key parameters as a row of features, fitted to those of past stages.

    Each layer, flattened, is a point; the stages before make a cloud of them, and the compressor
    gives each its coordinates along the directions in which the cloud is wide (PCA, UMAP), or along
    random ones. That a layer is compressed for itself is the paper's; that it is one point a stage,
    rather than a matrix of its own rows, is ours: such coordinates move as the training does.
    A layer of more than 4096 numbers is represented by as many of them, drawn once.

    Args:
      name: of the method.
      components: k ≥ 1, the features a layer; PCA has no more than the points span.
      seed: of the draws.

    Raises:
      L3RSError: the method's package is missing.
    """

    def __init__(self, name: CompressorName, components: int, seed: int) -> None:
        if name == "umap":
            require("umap", "umap-learn", "the compressor 'umap'")
        self._method, self._components, self._seed = _METHODS[name], components, seed
        self._transforms: list[Transform | None] = []
        self._mean = self._scale = np.zeros(0)

    def sample(self, layers: Layers) -> list[np.ndarray]:
        """What is looked at of each layer: float32 [≤ 4096]."""
        flat = [np.asarray(layer, np.float32).ravel() for layer in layers]
        return [x if x.size <= _LARGEST else x[_places(x.size, self._seed)] for x in flat]

    def fit(self, stages: Sequence[list[np.ndarray]]) -> None:
        """Learn from the samples of some stages. What is the same in all of them gives no features."""
        self._transforms = []
        if len(stages) >= 2:
            for rows in map(np.stack, zip(*stages, strict=True)):
                constant = not np.any(np.ptp(rows, axis=0))
                self._transforms.append(None if constant else self._method(rows, self._components, self._seed))
        raw = self._raw(stages)
        if raw.shape[1]:
            std = raw.std(axis=0)
            std = np.where(std > _ROUNDING * std.max(), std, std.max())  # noise is not blown up to features
            # All features together vary as much as one number of variance 1.
            self._mean, self._scale = raw.mean(axis=0), std * np.sqrt(raw.shape[1])
        else:
            self._mean = self._scale = np.zeros(0)

    @property
    def width(self) -> int:
        """Features in all; 0 where nothing varies."""
        return len(self._mean)

    def transform(self, stages: Sequence[list[np.ndarray]]) -> np.ndarray:
        """Features of some stages' samples, [n, width]: of mean 0 and, together, variance 1 where fitted.

        Of a single stage whose sample is not finite they are that mean.
        """
        if not stages or (len(stages) == 1 and not is_finite(stages[0])):
            return np.zeros((len(stages), self.width))
        return (self._raw(stages) - self._mean) / self._scale

    def _raw(self, stages: Sequence[list[np.ndarray]]) -> np.ndarray:
        columns = [np.zeros((len(stages), 0))]
        columns += [
            transform(np.stack([stage[i] for stage in stages])).astype(np.float64)
            for i, transform in enumerate(self._transforms)
            if transform is not None
        ]
        return np.concatenate(columns, axis=1)


def is_finite(sample: Sequence[np.ndarray]) -> bool:
    return all(np.all(np.isfinite(x)) for x in sample)


@functools.cache
def _places(size: int, seed: int) -> np.ndarray:
    """Not evenly spaced ones: those may all belong to one unit."""
    return np.sort(np.random.default_rng((seed, size)).choice(size, _LARGEST, replace=False))


def _pca(rows: np.ndarray, components: int, seed: int) -> Transform:
    from sklearn.decomposition import PCA

    fitted = PCA(min(components, *rows.shape), random_state=seed).fit(rows)
    return lambda points: (points - fitted.mean_) @ fitted.components_.T  # its own would check at length


def _random_projection(rows: np.ndarray, components: int, seed: int) -> Transform:
    from sklearn.random_projection import GaussianRandomProjection

    fitted = GaussianRandomProjection(components, random_state=seed).fit(rows)
    return lambda points: points @ fitted.components_.T


def _umap(rows: np.ndarray, components: int, seed: int) -> Transform:
    from umap import UMAP  # type: ignore[import-not-found, import-untyped, unused-ignore]

    neighbors = max(2, min(15, len(rows) - 1))
    # Its spectral start needs more points than an initial phase gives.
    return UMAP(neighbors, components, init="random", random_state=seed, n_jobs=1).fit(rows).transform


_METHODS: dict[CompressorName, Callable[[np.ndarray, int, int], Transform]] = {
    "pca": _pca,
    "random_projection": _random_projection,
    "umap": _umap,
}

"""Compress the key parameters of a network to the few features that a surrogate reads."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from l3rs.baselines.iomt.extras import require
from l3rs.descriptors import depth_order
from l3rs.trees import layers_of

Layers = Sequence[Any]  # arrays, one a layer, of the same shapes at every stage
CompressorName = Literal["pca", "random_projection", "umap"]
Transform = Callable[[np.ndarray], np.ndarray]  # [n, size] -> [n, k]

_FEW = 4  # matrices: up to this number, all are key parameters
# Words in a classifier's path: those that only a classifier has, and those that other layers may have, too.
_CLASSIFIERS = ({"head", "heads", "lm_head", "classifier", "logits", "score"}, {"output", "out", "fc"})
_ADAPTER = re.compile("lora|adapter")
FAR = 1e15  # a number beyond it counts as not finite
_LARGEST = 4096  # numbers of a layer that are sampled
_ROUNDING = 1e-5  # a feature that varies by less than this, relative to the widest, is rounding error of float32


def key_parameters(params: Any) -> list[jax.Array]:
    """The layers that describe the state of a network: its classifier and the two matrices before it.

    If there are four matrices (arrays of two or more dimensions) or fewer, as in head-only training,
    all of them; if there are none, all arrays. All low-rank adapters (paths that contain lora or
    adapter) are concatenated to one layer. The classifier is found by a word in its path (head,
    classifier, logits, score, …; else output, out or fc); if no path has one, it is the last matrix.
    The order of layers follows from their names, too, see `l3rs.descriptors.depth_order`.
    """
    paths = [layer.path.lower() for layer in layers_of(params)]
    leaves = jax.tree.leaves(params)
    matrices = [i for i in depth_order(paths) if leaves[i].ndim >= 2]
    if len(matrices) <= _FEW:
        return [leaves[i] for i in matrices] or leaves
    adapters = [i for i in matrices if _ADAPTER.search(paths[i])]
    others = [i for i in matrices if i not in adapters]
    key = [jnp.concatenate([leaves[i].ravel() for i in adapters])] if adapters else []
    if others:
        classifier = _classifier([paths[i] for i in others])
        key += [leaves[i] for i in [*(others[:classifier] + others[classifier + 1 :])[-2:], others[classifier]]]
    return key


def _classifier(paths: Sequence[str]) -> int:
    """The index of the classifier: among matrices with such a name the last of those nearest to the root."""
    parts = [re.split("[/.]", path) for path in paths]
    for words in _CLASSIFIERS:
        if named := [i for i, each in enumerate(parts) if words & set(each)]:
            return min(named, key=lambda i: (len(parts[i]), -i))
    return len(paths) - 1


class Compressor:
    """Compresses key parameters to a row of features; it is fitted to those of past stages.

    Each layer, flattened, is a point, and the past stages give a cloud of points. The features are
    the point's coordinates along the directions in which the cloud is widest (PCA, UMAP), or along
    random directions; with two stages UMAP falls back to PCA. As in the paper, each layer is
    compressed separately. Unlike the paper, a layer is one point a stage, not a matrix with its own
    rows, so that the coordinates change as training proceeds.
    A layer of more than 4096 numbers is represented by a fixed random sample of 4096.

    Args:
      name: of the method.
      components: k ≥ 1, features a layer; PCA gives no more than the points span.
      seed: of the samples and random directions.

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
        """The sampled numbers of each layer, float32 [≤ 4096]."""
        flat = [np.asarray(layer, np.float32).ravel() for layer in layers]
        return [x if x.size <= _LARGEST else x[_places(x.size, self._seed)] for x in flat]

    def fit(self, stages: Sequence[list[np.ndarray]]) -> None:
        """Fit to the samples of some stages. A layer that is the same in all of them gives no features."""
        self._transforms = []
        if len(stages) >= 2:
            for rows in map(np.stack, zip(*stages, strict=True)):
                constant = not np.any(np.ptp(rows, axis=0))
                self._transforms.append(None if constant else self._method(rows, self._components, self._seed))
        raw = self._raw(stages)
        if raw.shape[1]:
            std = raw.std(axis=0)
            std = np.where(std > _ROUNDING * std.max(), std, std.max())  # do not scale up noise
            # All features together vary as much as one number of variance 1.
            self._mean, self._scale = raw.mean(axis=0), std * np.sqrt(raw.shape[1])
        else:
            self._mean = self._scale = np.zeros(0)

    @property
    def width(self) -> int:
        """The number of features; 0 if nothing varies."""
        return len(self._mean)

    def transform(self, stages: Sequence[list[np.ndarray]]) -> np.ndarray:
        """Features of some stages' samples, [n, width]; those of `fit` have mean 0 and a total variance of 1.

        For a single stage whose sample is not finite, or exceeds 1e15, they are that mean.
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
    """Whether the methods can use a sample: they compute squares in float32."""
    return all(np.all(np.abs(x) <= FAR) for x in sample)


@functools.cache
def _places(size: int, seed: int) -> np.ndarray:
    """Indices of the sample. They are random because evenly spaced ones may all belong to one unit."""
    return np.sort(np.random.default_rng((seed, size)).choice(size, _LARGEST, replace=False))


def _pca(rows: np.ndarray, components: int, seed: int) -> Transform:
    from sklearn.decomposition import PCA

    fitted = PCA(min(components, *rows.shape), random_state=seed).fit(rows)
    return lambda points: (points - fitted.mean_) @ fitted.components_.T  # PCA.transform is slow because of its checks


def _random_projection(rows: np.ndarray, components: int, seed: int) -> Transform:
    from sklearn.random_projection import GaussianRandomProjection

    fitted = GaussianRandomProjection(components, random_state=seed).fit(rows)
    return lambda points: points @ fitted.components_.T


def _umap(rows: np.ndarray, components: int, seed: int) -> Transform:
    from umap import UMAP  # type: ignore[import-not-found, import-untyped, unused-ignore]

    if len(rows) < 3:
        return _pca(rows, components, seed)  # two points have no neighbourhoods
    neighbors = max(2, min(15, len(rows) - 1))
    # The spectral initialisation needs more points than an initial phase provides.
    return UMAP(neighbors, components, init="random", random_state=seed, n_jobs=1).fit(rows).transform


_METHODS: dict[CompressorName, Callable[[np.ndarray, int, int], Transform]] = {
    "pca": _pca,
    "random_projection": _random_projection,
    "umap": _umap,
}

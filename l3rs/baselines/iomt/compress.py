"""From the key parameters of a network to the few numbers that a surrogate reads."""

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

_FEW = 4  # matrices: with no more than these, all are key parameters
# Words of a classifier's path: such as it alone has, and such as other layers have, too.
_CLASSIFIERS = ({"head", "heads", "lm_head", "classifier", "logits", "score"}, {"output", "out", "fc"})
_ADAPTER = re.compile("lora|adapter")
FAR = 1e15  # a number beyond it counts as not finite
_LARGEST = 4096  # numbers of a layer that are looked at
_ROUNDING = 1e-5  # a feature that varies by less than this, relative to the widest, is float32's rounding


def key_parameters(params: Any) -> list[jax.Array]:
    """The layers that describe where a network is: its classifier and the two matrices before it.

    All matrices (arrays of two dimensions or more) when they are four or fewer, as in head-only
    training; all arrays when there are no matrices. Low-rank adapters (a word of the path has lora or
    adapter in it) are all looked at, end to end as one layer. The classifier is known by a word of its
    path (head, classifier, logits, score, …; else output, out or fc), and is the last matrix where no
    word says so; what comes before it is told by names, too, see `l3rs.layers.depth_order`.
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
    """Which of the matrices it is: of those that are named so the one nearest to the root, the last of these."""
    parts = [re.split("[/.]", path) for path in paths]
    for words in _CLASSIFIERS:
        if named := [i for i, each in enumerate(parts) if words & set(each)]:
            return min(named, key=lambda i: (len(parts[i]), -i))
    return len(paths) - 1


class Compressor:
    """Key parameters as a row of features, fitted to those of past stages.

    Each layer, flattened, is a point; the stages before make a cloud of them, and the compressor
    gives each its coordinates along the directions in which the cloud is wide (PCA, UMAP), or along
    random ones; of two stages UMAP's are PCA's. That a layer is compressed for itself is the paper's;
    that it is one point a stage, rather than a matrix of its own rows, is ours: such coordinates move
    as the training does.
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

        Of a single stage whose sample is not finite, or beyond 1e15, they are that mean.
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
    """Whether the methods can reckon with it: they take squares, in float32."""
    return all(np.all(np.abs(x) <= FAR) for x in sample)


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

    if len(rows) < 3:
        return _pca(rows, components, seed)  # two points have no neighbourhoods
    neighbors = max(2, min(15, len(rows) - 1))
    # Its spectral start needs more points than an initial phase gives.
    return UMAP(neighbors, components, init="random", random_state=seed, n_jobs=1).fit(rows).transform


_METHODS: dict[CompressorName, Callable[[np.ndarray, int, int], Transform]] = {
    "pca": _pca,
    "random_projection": _random_projection,
    "umap": _umap,
}

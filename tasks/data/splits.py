"""Cutting one set of examples into the four splits, always the same way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tasks.base import SPLITS

FRACTIONS = {"inner_train": 0.4, "inner_valid": 0.1, "outer_valid": 0.2, "test": 0.3}


def cut(
    images: np.ndarray, labels: np.ndarray, fractions: Mapping[str, float] = FRACTIONS
) -> dict[str, dict[str, np.ndarray]]:
    """Shuffle with a fixed seed and cut.

    Args:
      images: [N, ...].
      labels: integers [N].
      fractions: of each split; they sum to one.

    Returns:
      {split: {"image": [n, ...], "label": int32 [n]}}; no example is in two splits.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    ends = np.rint(np.cumsum([fractions[split] for split in SPLITS]) * len(labels)).astype(int)
    parts = np.split(order, ends[:-1])
    return {
        split: {"image": images[rows], "label": labels[rows].astype(np.int32)}
        for split, rows in zip(SPLITS, parts, strict=True)
    }

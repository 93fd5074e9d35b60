"""Deterministic division of one set of examples into the four splits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tasks.base import SPLITS

FRACTIONS = {"inner_train": 0.4, "inner_valid": 0.1, "outer_valid": 0.2, "test": 0.3}
TRAIN_FRACTIONS = {"inner_train": 0.7, "inner_valid": 0.1, "outer_valid": 0.2}  # when there is an official test set


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


def stratified(labels: np.ndarray, fractions: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Shuffle with a fixed seed and cut such that every part has the classes in the same proportions.

    Args:
      labels: integers [N], from 0.
      fractions: {part: its share}; they sum to one.

    Returns:
      {part: rows, integers [n]}. Classes are interleaved, so that the beginning of a part is balanced too. A part's
      size and each class's share of it are within one example of the exact fraction.
    """
    rng = np.random.default_rng(0)
    # An example's position in its class's shuffled queue, as a fraction; sorting by it interleaves the queues.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    order = np.argsort(place, kind="stable")
    ends = np.rint(np.cumsum(list(fractions.values())) * len(labels)).astype(int)
    return dict(zip(fractions, np.split(order, ends[:-1]), strict=True))

"""The mean of the meta-parameters of a run's optimizer and of one that was meta-trained on from it.

    python -m tools.mean_optimizer runs/a/optimizer runs/b/optimizer runs/mean

Its information is that of the first, with what the second's meta-training took added.
"""

from __future__ import annotations

import sys

import jax
import numpy as np

import l3rs

_ADDED = ("generations", "candidate_steps", "seconds")


def main(first: str, second: str, destination: str) -> None:
    (a, spec, info), (b, other, more) = l3rs.restore(first), l3rs.restore(second)
    if spec != other:
        raise SystemExit(f"{first} and {second} are of different forms or for different layers")
    theta = jax.tree.map(lambda x, y: ((np.asarray(x, np.float64) + y) / 2).astype(np.float32), a, b)
    l3rs.save(destination, theta, spec, {**info, **{key: info[key] + more[key] for key in _ADDED}})


if __name__ == "__main__":
    main(*sys.argv[1:])

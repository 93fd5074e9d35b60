"""Passes over the parameters, in pieces that stay in a processor's cache."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

Tensors = tuple[Tensor, ...] | list[Tensor]

# Elements of a piece. On a CPU, a piece of each array and what is computed from them stay in its cache;
# elsewhere this bounds the memory that a direction takes while it is in use.
PIECE = {"cpu": 1 << 19}
LARGE_PIECE = 1 << 24


class Bucket(NamedTuple):
    """Pieces of layers that are processed together."""

    layers: list[int]  # the layer of each piece
    arrays: list[list[Tensor]]  # params, grads, and each moment: one tensor per piece


def buckets(layers: Sequence[tuple[Tensor, ...]], most: int) -> Iterator[Bucket]:
    """Buckets of at most `most` elements; each entry of `layers` is a param, its gradient and its moments."""
    indices: list[int] = []
    pieces: list[tuple[Tensor, ...]] = []
    filled = 0
    for i, arrays in enumerate(layers):
        for piece in split(arrays, most):
            if pieces and filled + piece[0].numel() > most:
                yield Bucket(indices, [list(x) for x in zip(*pieces, strict=True)])
                indices, pieces, filled = [], [], 0
            indices.append(i)
            pieces.append(piece)
            filled += piece[0].numel()
    yield Bucket(indices, [list(x) for x in zip(*pieces, strict=True)])


def split(arrays: tuple[Tensor, ...], most: int) -> Iterator[tuple[Tensor, ...]]:
    """A layer's arrays as flat views, in pieces; only a gradient of another layout is copied."""
    param, grad, *moments = arrays
    if not param.is_contiguous():  # e.g. channels_last
        order = sorted(range(param.dim()), key=param.stride, reverse=True)
        param, grad, *moments = (x.permute(order) for x in arrays)
    if not all(x.is_contiguous() for x in (param, *moments)):  # a parameter with gaps is not flat in any order
        return iter([arrays])
    flat = (param.view(-1), grad.reshape(-1), *(moment.view(-1) for moment in moments))
    if param.numel() <= most:
        return iter([flat])
    return zip(*(x.split(most) for x in flat), strict=True)


def norms(passes: Sequence[Bucket]) -> Tensor:
    """Norms of the gradients' pieces, then of the parameters', float32 [2 · pieces]."""
    pieces = [piece for kind in (1, 0) for bucket in passes for piece in bucket.arrays[kind]]
    # The kernel widens while it reads, but does not narrow.
    pieces = [piece.float() if piece.dtype == torch.float64 else piece for piece in pieces]
    return torch.stack(torch._foreach_norm(pieces, 2, torch.float32))


def products(directions: Sequence[Tensors]) -> list[Tensor]:
    """⟨d_p, d_q⟩ for p ≤ q of each piece, in the order that `gram_matrices` reads."""
    flat = [[piece.reshape(-1) for piece in direction] for direction in directions]
    n = len(flat)
    pairs = [(p, q) for p in range(n) for q in range(p, n)]
    return [torch.dot(flat[p][i], flat[q][i]) for i in range(len(flat[0])) for p, q in pairs]


_upper_triangle = functools.cache(np.triu_indices)


def gram_matrices(products: np.ndarray, n: int, scales: Mapping[int, np.ndarray]) -> np.ndarray:
    """float32 [L, P, P] from the products of its upper triangle, [L, P (P + 1) / 2].

    Args:
      products: ⟨d_p, d_q⟩ without the scales.
      n: the number of directions, P.
      scales: of directions p, float32 [L].
    """
    rows, columns = _upper_triangle(n)
    gram = np.empty((len(products), n, n), np.float32)
    gram[:, rows, columns] = gram[:, columns, rows] = products
    for p, scale in scales.items():
        gram[:, p] *= scale[:, None]
        gram[:, :, p] *= scale[:, None]
    return gram


def first_of_each(index: np.ndarray) -> np.ndarray:
    """Where each layer's pieces begin. `index` is the layer of each piece: 0 … L - 1 in order, each at least once."""
    return np.flatnonzero(np.diff(index, prepend=-1))


def per_layer(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of the pieces' values, [pieces, K] to float32 [L, K]; they overflow where float32 does.

    `starts` is the first piece of each layer.
    """
    return np.add.reduceat(values.astype(float), starts, axis=0).astype(np.float32)


def host(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


def mean_loss(losses: Sequence[Tensor]) -> Tensor:
    """The mean over all ranks of each one's mean of the finite losses of its micro-batches in a step.

    It is not finite if a rank has none.

    All ranks must see the same loss: different features would tear their parameters apart.
    """
    loss = losses[0]
    if len(losses) > 1:
        stacked = torch.stack([*losses])
        loss = torch.where(stacked.isfinite(), stacked, torch.nan).nanmean()
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(loss)
        loss = loss / distributed.get_world_size()
    return loss

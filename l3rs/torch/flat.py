"""Small layers of one network side by side in flat buffers, which a few kernels process whole.

On a CPU, an operation on a small tensor costs more than its arithmetic. Here only three operations in C++ go through
the layers one by one: copies of the gradients and parameters into the buffers, and the addition of the update.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from l3rs.torch.directions import BaseDirection, Inputs, assign_moments, scales_of
from l3rs.torch.passes import PIECE, first_of_each, gram_matrices, per_layer

TILE = 256  # elements; a layer begins at a multiple, so that sums over tiles are sums over layers
LARGEST = 1 << 16  # elements of a layer
MOST = 1 << 22  # elements of all layers: the buffers stay allocated


State = MutableMapping[str, Any]  # of one parameter


def flat_groups(
    params: Sequence[Tensor], states: Sequence[State], directions: Sequence[BaseDirection]
) -> Iterator[list[int]]:
    """Indices of layers that are worth a `FlatLayers`; all of a group have seen the same number of gradients."""
    if params[0].device.type != "cpu" or any(getattr(direction, "eps", 1.0) == 0 for direction in directions):
        return  # without an eps, a direction is NaN in the gaps between layers
    groups: dict[int, list[int]] = {}
    filled: dict[int, int] = {}
    total = 0
    for i, (param, state) in enumerate(zip(params, states, strict=True)):
        assert param.grad is not None
        age, size = state["step"], param.numel()
        float32 = param.dtype == torch.float32 and param.grad.dtype == torch.float32
        if not float32 or not 0 < size <= LARGEST or total + size > MOST:
            continue
        if age in groups and filled[age] + size > PIECE["cpu"]:
            yield groups.pop(age)
        if age not in groups:
            groups[age], filled[age] = [], 0
        groups[age].append(i)
        filled[age] += size
        total += size
    yield from groups.values()


class FlatLayers:
    """Layers in flat buffers: the moments in their states are views.

    Args:
      params: of the layers.
      states: of the layers; it copies their moments and replaces them.
      directions: the base optimizers.
      keys: names of the moments in a state, in the order of the directions.
    """

    def __init__(
        self,
        params: list[Tensor],
        states: Sequence[State],
        directions: Sequence[BaseDirection],
        keys: Sequence[str],
    ) -> None:
        self.params = params
        self._directions = directions
        self._keys = keys
        n_tiles = [-(-param.numel() // TILE) for param in params]
        self._index = np.repeat(np.arange(len(params)), n_tiles)  # the layer of each tile
        self._starts = first_of_each(self._index)
        starts = (TILE * (np.cumsum(n_tiles) - n_tiles)).tolist()
        size = (3 + len(keys), TILE * sum(n_tiles))
        rows = torch.zeros(size, dtype=torch.float32, device="cpu")
        self._grad, self._param, self._update, *self._moments = rows.unbind()

        def views(row: Tensor) -> list[Tensor]:
            places = zip(params, starts, strict=True)
            return [_laid_out(row[start : start + param.numel()], param) for param, start in places]

        self._grad_views, self._param_views, self._update_views = map(views, (self._grad, self._param, self._update))
        moments = [views(row) for row in self._moments]
        self._views = list(zip(*moments, strict=True)) if keys else [() for _ in params]
        for state, own in zip(states, self._views, strict=True):
            for key, view in zip(keys, own, strict=True):
                state[key] = view.copy_(state[key])

    def holds(self, params: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Whether it was made of these layers, and their states still have its views."""
        if len(params) != len(self.params):
            return False
        for param, state, own, views in zip(params, states, self.params, self._views, strict=True):
            if param is not own:
                return False
            for key, view in zip(self._keys, views, strict=True):
                if state[key] is not view:
                    return False
        return True

    def squared_norms(self) -> np.ndarray:
        """Squared norms of gradients and parameters, float32 [L, 2]."""
        grads = [param.grad for param in self.params]
        torch._foreach_copy_(self._grad_views, grads)  # type: ignore[arg-type]
        torch._foreach_copy_(self._param_views, self.params)
        self._squared = self._sums([(self._grad, self._grad), (self._param, self._param)])
        return self._squared

    def gram(self, finite: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Update the moments; inner products of the directions, float32 [L, P, P]. See `Pieces.gram`."""
        for i in np.flatnonzero(~finite):
            self._grad_views[i].zero_()  # a NaN must not enter moments, which would keep it
        moments = assign_moments(self._directions, [[row] for row in self._moments])
        self._inputs = Inputs([self._param], [self._grad], moments, steps[:1])
        both = zip(self._directions, moments, strict=True)
        self._rows = [direction.advance(own, self._inputs)[0] for direction, own in both]
        self._scales = scales_of(self._directions, steps[:1])
        return gram_matrices(self._products(), len(self._rows), self._scales)

    def _products(self) -> np.ndarray:
        """⟨d_p, d_q⟩ for p ≤ q without scales, float32 [L, P (P + 1) / 2]."""
        pairs = list(itertools.combinations_with_replacement(self._rows, 2))
        products = np.empty((len(self.params), len(pairs)), np.float32)
        known, new = {self._grad: 0, self._param: 1}, []
        for i, (a, b) in enumerate(pairs):
            if a is b and a in known:
                products[:, i] = self._squared[:, known[a]]
            else:
                new.append(i)
        if new:
            products[:, new] = self._sums([pairs[i] for i in new])
        return products

    def add(self, factors: np.ndarray, decay: np.ndarray, moves: np.ndarray) -> None:
        """Add decay · θ + Σ_p factor_p d_p to the parameters θ of layers that move: float32 [L, P], [L], bool [L]."""
        update = self._update.view(-1, TILE)
        each = np.ascontiguousarray(factors[self._index].T)
        for p, scale in self._scales.items():
            each[p] *= scale
        first, *others = zip(self._rows, torch.from_numpy(each)[:, :, None], strict=True)
        torch.mul(first[0].view(-1, TILE), first[1], out=update)
        for row, factor in others:
            update.addcmul_(row.view(-1, TILE), factor)
        moving = [i for i, ok in enumerate(moves.tolist()) if ok]
        for i in np.flatnonzero(decay * moves).tolist():
            self.params[i].mul_(1 + float(decay[i]))
        if moving:
            torch._foreach_add_([self.params[i] for i in moving], [self._update_views[i] for i in moving])
        for direction, own in zip(self._directions, self._inputs.moments, strict=True):
            direction.after(own, self._inputs)
        del self._rows, self._inputs, self._scales

    def _sums(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        """⟨a, b⟩ of each layer, float32 [L, pairs]. NumPy: PyTorch may be set to multiply in bfloat16."""
        products = [np.vecdot(a.view(-1, TILE).numpy(), b.view(-1, TILE).numpy()) for a, b in pairs]
        return per_layer(np.stack(products, axis=1), self._starts)


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """A view of the shape of another tensor, and with its order of dimensions in memory."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    return flat.view([like.shape[i] for i in order]).permute(np.argsort(order).tolist())

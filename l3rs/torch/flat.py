"""Small layers of one network side by side in flat buffers, which a few kernels process whole.

On a CPU, an operation on a small tensor costs more than its arithmetic. Here only three operations in C++ go through
the layers one by one: copies of the gradients and parameters into the buffers, and the addition of the update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from l3rs.torch.directions import BaseDirection, Inputs, assign_moments
from l3rs.torch.passes import PIECE, ActiveLayer, gram_matrices, per_layer

TILE = 256  # elements; a layer begins at a multiple, so that sums over tiles are sums over layers
LARGEST = 1 << 16  # elements of a layer
MOST = 1 << 22  # elements of all layers: the buffers stay allocated


def flat_groups(layers: Sequence[ActiveLayer], directions: Sequence[BaseDirection]) -> Iterator[list[int]]:
    """Indices of layers that are worth a `FlatLayers`; all of a group have seen the same number of gradients."""
    if layers[0].param.device.type != "cpu" or any(getattr(direction, "eps", 1.0) == 0 for direction in directions):
        return  # without an eps, a direction is NaN in the gaps between layers
    groups: dict[int, list[int]] = {}
    filled: dict[int, int] = {}
    total = 0
    for i, layer in enumerate(layers):
        param, age, size = layer.param, layer.state["step"], layer.param.numel()
        float32 = param.dtype == torch.float32 and layer.grad.dtype == torch.float32
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
      layers: whose moments it copies, and replaces in their states.
      directions: the base optimizers.
      keys: names of the moments in a state, in the order of the directions.
    """

    def __init__(self, layers: Sequence[ActiveLayer], directions: Sequence[BaseDirection], keys: Sequence[str]) -> None:
        self._directions = directions
        self._keys = keys
        self._params = [layer.param for layer in layers]
        n_tiles = [-(-param.numel() // TILE) for param in self._params]
        self._index = np.repeat(np.arange(len(layers)), n_tiles)  # the layer of each tile
        starts = (TILE * (np.cumsum(n_tiles) - n_tiles)).tolist()
        size = (3 + len(keys), TILE * sum(n_tiles))
        rows = torch.zeros(size, dtype=torch.float32, device="cpu")
        self._grad, self._param, self._update, *self._moments = rows.unbind()

        def views(row: Tensor) -> list[Tensor]:
            places = zip(self._params, starts, strict=True)
            return [_laid_out(row[start : start + param.numel()], param) for param, start in places]

        self._grad_views, self._param_views, self._update_views = map(views, (self._grad, self._param, self._update))
        moments = [views(row) for row in self._moments]
        self._views = list(zip(*moments, strict=True)) if keys else [() for _ in layers]
        for layer, own in zip(layers, self._views, strict=True):
            for key, view in zip(keys, own, strict=True):
                layer.state[key] = view.copy_(layer.state[key])

    def holds(self, layers: Sequence[ActiveLayer]) -> bool:
        """Whether it was made of these layers, and their states still have its views."""
        if len(layers) != len(self._params):
            return False
        for layer, param, views in zip(layers, self._params, self._views, strict=True):
            if layer.param is not param:
                return False
            for key, view in zip(self._keys, views, strict=True):
                if layer.state[key] is not view:
                    return False
        return True

    def squared_norms(self) -> np.ndarray:
        """Squared norms of gradients and parameters, float32 [L, 2]."""
        grads = [param.grad for param in self._params]
        torch._foreach_copy_(self._grad_views, grads)  # type: ignore[arg-type]
        torch._foreach_copy_(self._param_views, self._params)
        return self._sums([(self._grad, self._grad), (self._param, self._param)])

    def gram(self, finite: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Update the moments; inner products of the directions, float32 [L, P, P]. See `Pieces.gram`."""
        for i in np.flatnonzero(~finite):
            self._grad_views[i].zero_()  # a NaN must not enter moments, which would keep it
        moments = assign_moments(self._directions, [[row] for row in self._moments])
        self._inputs = Inputs([self._param], [self._grad], moments, steps[:1])
        both = zip(self._directions, moments, strict=True)
        self._rows = [direction.advance(own, self._inputs)[0] for direction, own in both]
        n = len(self._rows)
        return gram_matrices(self._sums([(self._rows[p], self._rows[q]) for p in range(n) for q in range(p, n)]), n)

    def add(self, factors: np.ndarray, decay: np.ndarray, moves: np.ndarray) -> None:
        """Add decay · θ + Σ_p factor_p d_p to the parameters θ of layers that move: float32 [L, P], [L], bool [L]."""
        update = self._update.view(-1, TILE)
        each = torch.from_numpy(np.ascontiguousarray(factors[self._index].T))[:, :, None]
        first, *others = zip(self._rows, each, strict=True)
        torch.mul(first[0].view(-1, TILE), first[1], out=update)
        for row, factor in others:
            update.addcmul_(row.view(-1, TILE), factor)
        moving = [i for i, ok in enumerate(moves.tolist()) if ok]
        for i in np.flatnonzero(decay * moves):
            self._params[i].mul_(1 + float(decay[i]))
        if moving:
            torch._foreach_add_([self._params[i] for i in moving], [self._update_views[i] for i in moving])
        for direction, own in zip(self._directions, self._inputs.moments, strict=True):
            direction.after(own, self._inputs)
        del self._rows, self._inputs

    def _sums(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        """⟨a, b⟩ of each layer, float32 [L, pairs]. NumPy: PyTorch may be set to multiply in bfloat16."""
        products = [np.vecdot(a.view(-1, TILE).numpy(), b.view(-1, TILE).numpy()) for a, b in pairs]
        return per_layer(np.stack(products, axis=1), self._index)


def _laid_out(flat: Tensor, like: Tensor) -> Tensor:
    """A view of the shape of another tensor, and with its order of dimensions in memory."""
    if like.is_contiguous():
        return flat.view(like.shape)
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    return flat.view([like.shape[i] for i in order]).permute(np.argsort(order).tolist())

"""The layers that take part in a step, and what is prepared for them once and kept from step to step."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from l3rs import core
from l3rs.layers import NetworkFacts
from l3rs.spec import Spec
from l3rs.torch.directions import BaseDirection
from l3rs.torch.flat import FlatLayers, State, flat_groups
from l3rs.torch.pieces import Pieces
from l3rs.torch.state import SmallState, small_state


class ActiveLayers:
    """Parameters that have a gradient, in the order of the param groups.

    In networks of many small layers, Python operations on every layer cost more than the arithmetic. So all that stays
    the same while the same parameters train is prepared here, and `holds` checks in a few operations that it still is.

    Args:
      params, states: at least one parameter, and the state of each; small state and moments are replaced by views.
      facts: what is known of these layers.
      spec: the optimizer's.
      directions: the base optimizers.
      keys: names of the moments in a state, in the order of the directions.
      before: those of the last step; buffers that still fit are kept.

    Attributes:
      params, states, facts: as given.
      root_n: float32 [L], see `core.Statistics`.
      small: the small state of all layers, stacked.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[State],
        facts: NetworkFacts,
        spec: Spec,
        directions: Sequence[BaseDirection],
        keys: Sequence[str],
        before: ActiveLayers | None,
    ) -> None:
        self.params, self.states, self.facts = params, states, facts
        self.root_n = core.root_sizes([param.numel() for param in params])
        self.small = SmallState(spec, states)
        self._directions, self._keys = directions, keys
        self._prepare_buffers({} if before is None else {flat.params[0]: flat for _, flat in before._flats})
        self._kept = operator.itemgetter(*small_state(spec), *keys)
        self._values = [value for state in states for value in self._kept(state)]
        self._dtypes = self._dtypes_of(params)
        self._ages = [state["step"] for state in states]

    def _prepare_buffers(self, held: dict[Tensor, FlatLayers]) -> None:
        self._flats: list[tuple[np.ndarray, FlatLayers]] = []
        for group in flat_groups(self.params, self.states, self._directions):
            params, states = [self.params[i] for i in group], [self.states[i] for i in group]
            flat = held.get(params[0])
            if flat is None or not flat.holds(params, states):
                flat = FlatLayers(params, states, self._directions, self._keys)
            self._flats.append((np.array(group), flat))
        flat_layers = set(itertools.chain.from_iterable(each.tolist() for each, _ in self._flats))
        self._rest = np.array([i for i in range(len(self.params)) if i not in flat_layers], int)

    def holds(self, params: Sequence[Tensor], states: Sequence[State]) -> bool:
        """Whether it was made of these, and nothing of them was replaced since."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and all(map(operator.is_, states, self.states))
            and all(map(operator.is_, itertools.chain.from_iterable(map(self._kept, states)), self._values))
            and [state["step"] for state in states] == self._ages
            and self._dtypes_of(params) == self._dtypes
        )

    @staticmethod
    def _dtypes_of(params: Sequence[Tensor]) -> list[Any]:
        """What decides whether a layer can be in a flat buffer, and may change in place."""
        dtypes: list[Any] = [params[0].device]
        for param in params:
            dtypes += param.dtype, param.grad.dtype  # type: ignore[union-attr]
        return dtypes

    def count_step(self) -> np.ndarray:
        """Count a gradient for every layer; how many each has seen, including this one, float32 [L]."""
        self._ages = [age + 1 for age in self._ages]
        for state, age in zip(self.states, self._ages, strict=True):
            state["step"] = age
        return np.array(self._ages, np.float32)

    def blocks(self) -> list[tuple[np.ndarray, FlatLayers | Pieces]]:
        """What processes the layers of this step, and the indices of those that it processes."""
        if not len(self._rest):
            return [*self._flats]
        arrays = []
        for i in self._rest.tolist():
            moments = (self.states[i][key] for key in self._keys)
            arrays.append((self.params[i], self.params[i].grad, *moments))
        return [*self._flats, (self._rest, Pieces(arrays, self._directions))]

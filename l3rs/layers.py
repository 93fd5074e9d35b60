"""How a network's layers map to the checkpoint's layers, and descriptors of a layer.

With an embedding table, `match_network` finds the row of each layer; a layer without a row can have the mean of all
rows. With descriptor embeddings there is no table, and any network will do (`descriptors`). Either way a layer's
embedding is a weighted sum of the rows of theta["embedding"] (`embed`).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from l3rs.descriptors import (
    depth_order,
    descriptors,
    is_bias,
    is_head,
    n_matrices,
    natural_rms,
    scale_free_descriptors,
)
from l3rs.spec import STEP_LOG_LIMIT, L3RSError, Layer, Spec, Theta

MatchBy = Literal["auto", "path", "order"]
OnUnknown = Literal["error", "mean", "descriptor"]

_SHOWN = 6  # names in a message


class Match(NamedTuple):
    """How one network layer maps to the checkpoint's layers."""

    name: str | None  # in the network: the path of a JAX leaf, or the name of a torch parameter if it has one
    shape: tuple[int, ...]  # in the network
    row: int | None  # of the embedding table; None if the layer has no row of its own
    source: str  # the path of that row, "mean" (of all rows) or "descriptor"


@dataclasses.dataclass(frozen=True)
class Matching:
    """The rules that map a network's layers to the checkpoint's.

    Attributes:
      rename: {name in the network: path in the checkpoint}; takes precedence over the other rules.
      by: "path", by name; "order", see `match_network`; "auto", by path, or by order if no name is in the checkpoint.
      on_unknown: what to do with a layer that is not found, or has another shape: "error", or use the "mean"
        embedding. "descriptor" is for checkpoints with descriptor embeddings, where no layer is unknown.
    """

    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    by: MatchBy = "path"
    on_unknown: OnUnknown = "error"

    @classmethod
    def of(
        cls, spec: Spec, rename: Mapping[str, str] | None, by: MatchBy | str, on_unknown: OnUnknown | str
    ) -> Matching:
        """Checked rules.

        Raises:
          L3RSError: a value is not allowed, or not with this spec; `rename` names a layer that the spec lacks.
        """
        for name, value, allowed in (("match", by, MatchBy), ("on_unknown", on_unknown, OnUnknown)):
            if value not in get_args(allowed):
                raise L3RSError(f"{name} is {value!r}; allowed are {', '.join(map(repr, get_args(allowed)))}")
        if not isinstance(rename or {}, Mapping):
            raise L3RSError(
                f"rename is {rename!r}; it must be a mapping {{name in the network: path in the checkpoint}}"
            )
        if spec.embedding == "table":
            if on_unknown == "descriptor":
                raise L3RSError(
                    "on_unknown is 'descriptor', but this optimizer has an embedding table; allowed are 'error', 'mean'"
                )
            table = {layer.path: layer for layer in spec.layers}
            for name, path in (rename or {}).items():
                if path not in table:
                    raise L3RSError(
                        f"rename maps {name!r} to {path!r}, which is not in the checkpoint; {_choice(table.values())}"
                    )
        return cls(dict(rename or {}), by, on_unknown)  # type: ignore[arg-type]


class Convention(NamedTuple):
    """How a framework's names and layouts of parameters relate to the checkpoint's (Flax's)."""

    spellings: Callable[[str], Iterable[str]]  # the paths that a name may have in the checkpoint
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]  # a form of the shape that is equal in both frameworks
    alphabetical: bool  # whether layers come in the order of sorted names, see `depth_order`


JAX = Convention(lambda name: (name,), lambda shape: shape, alphabetical=True)


def match_network(
    spec: Spec,
    network: Sequence[tuple[str | None, tuple[int, ...]]],
    how: Matching,
    convention: Convention,
    taken: Iterable[str] = (),
) -> tuple[Match, ...]:
    """Map each layer of a network to a layer of the checkpoint, in the order given.

    By order, the i-th layer of a shape in `depth_order` maps to the checkpoint's i-th layer of that shape, and both
    must have equally many of them. Biases map to biases, if both sides have any.

    Args:
      spec: the optimizer's spec.
      network: name (or None) and shape of each layer.
      how: the rules.
      convention: of the network's framework.
      taken: paths in the checkpoint that are not available.

    Raises:
      L3RSError: a layer is not found or has another shape and `how.on_unknown` is "error"; `how.rename` names a
        layer that does not exist; the order is ambiguous.
    """
    names = [name for name, _ in network]
    if not_there := set(how.rename) - set(names):
        known_names = [repr(name) for name in names if name is not None]
        raise L3RSError(
            f"rename has {min(not_there)!r}, which is not a layer of the params; these are {_abridged(known_names)}"
        )
    if spec.embedding == "descriptor":
        if None in names:
            raise L3RSError(
                "this optimizer reads from a layer's name what it is and how deep: pass model.named_parameters(), or "
                "param groups of (name, parameter) pairs"
            )
        return tuple(Match(name, shape, None, "descriptor") for name, shape in network)
    rows = {layer.path: row for row, layer in enumerate(spec.layers)}
    taken = set(taken)
    table = {layer.path: layer for layer in spec.layers if layer.path not in taken}
    paths = [_by_path(name, table, how, convention) for name in names]
    by_name = any(path is not None and name not in how.rename for path, name in zip(paths, names, strict=True))
    if how.by == "order" or (how.by == "auto" and not by_name):
        _by_order(table, network, paths, how, convention)
    found, unknown = [], []
    for i, ((name, shape), path) in enumerate(zip(network, paths, strict=True)):
        if path is not None and convention.shape(shape) == convention.shape(table[path].shape):
            found.append(Match(name, shape, rows[path], path))
        else:
            found.append(Match(name, shape, None, "mean"))
            unknown.append((_called(i, name), shape, path))
    if unknown and how.on_unknown == "error":
        called, shape, path = unknown[0]
        if path is not None:
            raise _other_shape(called, shape, table[path])
        left = [layer for path, layer in table.items() if path not in paths]
        raise _unknown(called, shape, f"of the network's {len(network)}, {len(unknown)}", left)
    return tuple(found)


def _by_path(name: str | None, table: Mapping[str, Layer], how: Matching, convention: Convention) -> str | None:
    if name is None:
        return None
    if name in how.rename:
        if how.rename[name] not in table:
            raise L3RSError(
                f"rename maps {name!r} to {how.rename[name]!r}, which is not available; {_choice(table.values())}"
            )
        return how.rename[name]
    if how.by == "order":
        return None
    return next((path for path in convention.spellings(name) if path in table), None)


def _by_order(
    table: Mapping[str, Layer],
    network: Sequence[tuple[str | None, tuple[int, ...]]],
    paths: list[str | None],
    how: Matching,
    convention: Convention,
) -> None:
    """Fill in `paths` where they are None, from the layers that are not in it yet."""
    names = [name for name, _ in network]
    named = [name for name in names if name is not None]
    biases = len(named) == len(names) and any(map(is_bias, named)) and any(map(is_bias, table))

    def group(name: str | None, shape: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
        return biases and name is not None and is_bias(name), convention.shape(shape)

    free, waiting = defaultdict(list), defaultdict(list)
    for i in depth_order(list(table)):
        layer = list(table.values())[i]
        if layer.path not in paths:
            free[group(layer.path, layer.shape)].append(layer.path)
    for i in depth_order(names, convention.alphabetical):
        if paths[i] is None:
            waiting[group(*network[i])].append(i)
    for each, members in waiting.items():
        layers = free[each]
        too_many = len(members) > len(layers) > 0 and how.on_unknown != "error"
        if len(members) < len(layers) or too_many:  # ambiguous
            i = members[0]
            raise L3RSError(
                f"{_called(i, names[i])} {network[i][1]} could be any of {_abridged(layers)}: the network has "
                f"{len(members)} of this shape, and the optimizer is for one with {len(layers)}; pass all of that "
                f"network's parameters, or rename={{name: layer}}"
            )
        for i, path in zip(members, layers, strict=False):
            paths[i] = path


class NetworkFacts(NamedTuple):
    """What is known of a network's layers before training. L layers."""

    embedding: Any  # float32 [L, E], a layer's embedding
    log_factor: Any  # float32 [L], of its λ, see `Spec.layer_gain`; None without one
    natural_rms: np.ndarray  # float32 [L], see `descriptors.natural_rms`
    n_matrices: int
    is_head: bool  # see `descriptors.is_head`

    def of(self, rows: np.ndarray) -> NetworkFacts:
        """Of some of the layers; what is said of the network stays."""
        log_factor = None if self.log_factor is None else self.log_factor[rows]
        return self._replace(embedding=self.embedding[rows], log_factor=log_factor, natural_rms=self.natural_rms[rows])


def network_facts(
    theta: Theta, spec: Spec, matches: Sequence[Match], layers: Sequence[Layer], convention: Convention = JAX
) -> NetworkFacts:
    """What an optimizer needs to know of a network.

    Args:
      theta: the meta-parameters.
      spec: the spec of `theta`.
      matches: of the network's layers.
      layers: the network's layers in the checkpoint's (Flax's) layout.
      convention: of the network's framework.
    """
    rows = embedding_rows(theta, spec, matches, layers, convention)
    facts = NetworkFacts(rows, None, natural_rms(layers), n_matrices(layers), is_head(layers))
    if not spec.layer_gain:
        return facts
    log_factor = (np.float32(spec.layer_gain) * rows[:, -1]).clip(-STEP_LOG_LIMIT, STEP_LOG_LIMIT)
    return facts._replace(embedding=rows[:, :-1], log_factor=log_factor)


def embedding_rows(
    theta: Theta, spec: Spec, matches: Sequence[Match], layers: Sequence[Layer], convention: Convention = JAX
) -> Any:
    """A row of theta["embedding"] for each of a network's layers, or the weighted sum of its rows, float32 [L, ·]."""
    rows = [match.row for match in matches]
    if spec.embedding == "table" and rows == list(range(len(spec.layers))):
        return theta["embedding"]
    if spec.embedding == "table" and None not in rows:
        return theta["embedding"][np.array(rows, int)]
    return _embedding_weights(spec, rows, layers, convention) @ theta["embedding"]


def _embedding_weights(
    spec: Spec, rows: Sequence[int | None], layers: Sequence[Layer], convention: Convention
) -> np.ndarray:
    """Weights of the rows of theta["embedding"], float32 [L, R]: R layers of the table, or descriptors."""
    if spec.embedding == "descriptor":
        return scale_free_descriptors(layers) if spec.form == 2 else descriptors(layers, convention.alphabetical)
    weights = np.full((len(rows), len(spec.layers)), 1 / len(spec.layers), np.float32)
    for i, row in enumerate(rows):
        if row is not None:
            weights[i] = np.arange(len(spec.layers)) == row
    return weights


# Error messages


def _other_shape(called: str, shape: tuple[int, ...], layer: Layer) -> L3RSError:
    also = "" if called.endswith(repr(layer.path)) else f", in the checkpoint {layer.path!r},"
    return L3RSError(
        f"{called}{also} has shape {shape}; this optimizer was meta-trained on {layer.shape}, in Flax's layout; "
        f"on_unknown='mean' gives it the mean embedding"
    )


def _unknown(called: str, shape: tuple[int, ...], how_many: str, left: Sequence[Layer]) -> L3RSError:
    rename = "pass rename={name: layer} to map it, " if left else "pass "
    return L3RSError(
        f"{called} {shape} is not a layer that this optimizer was meta-trained on ({how_many} are not); "
        f"{_choice(left)}; {rename}on_unknown='mean' to give it the mean embedding, or take 'universal', which is for "
        f"any network"
    )


def _choice(left: Collection[Layer]) -> str:
    layers = [f"{layer.path} {layer.shape}" for layer in left]
    return f"the layers to choose from are {_abridged(layers)}" if layers else "no layer is left"


def _called(index: int, name: str | None) -> str:
    return f"layer {index if name is None else repr(name)}"


def _abridged(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"

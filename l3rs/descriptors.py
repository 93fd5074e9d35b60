"""What the names and shapes of a network's layers tell: kinds of tensors, depth, fans, natural sizes.

Everything here reads Flax's layout, [in, out] and [H, W, in, out], and gives the same in JAX and PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from l3rs.spec import Layer, Spec

KINDS = ("matrix", "conv", "bias", "scale", "embedding", "other")

_BIASES = {"bias", "b", "beta", "offset"}
_SCALES = {"scale", "weight", "gamma", "g"}
_HEADS_APART = {"query", "key", "value", "out"}  # of Flax's attention: kernels [in, heads, width], [heads, width, out]
_FIRST = ("stem", "embed", "patch", "pos_", "position", "cls_token", "class_token", "wte", "wpe", "token")
_LAST = {"head", "heads", "classifier", "fc", "lm_head", "logits", "score", "ln_f"}


def descriptors(layers: Sequence[Layer], alphabetical: bool = True) -> np.ndarray:
    """Descriptors of a network's layers, float32 [L, 9], from names and shapes (Flax's layout) alone.

    - 6: one-hot, the `kind` of tensor.
    - 1: depth, the position of the layer's module among the network's modules in `depth_order`, in [0, 1]. A module's
      kernel and bias have the same depth.
    - 2: fan-in and fan-out as ln(fan) / 5 - 1, in [-1, 1.5]: 1 gives -1, 150 about 0, 22,000 about 1. A kernel's fans
      are its inputs and outputs times the receptive field, an embedding's its rows and columns; a bias, a scale and
      another tensor have 1 and their size.

    These are features: a changed formula is a new feature version.
    """
    paths = [layer.path for layer in layers]
    modules = list(dict.fromkeys(module_of(paths[i]) for i in depth_order(paths, alphabetical)))
    depth = {module: i / max(len(modules) - 1, 1) for i, module in enumerate(modules)}
    rows = []
    for layer in layers:
        one_hot = [float(kind(layer.path, len(layer.shape)) == each) for each in KINDS]
        fans = [min(math.log(max(fan, 1)) / 5 - 1, 1.5) for fan in _fans(layer)]
        rows.append([*one_hot, depth[module_of(layer.path)], *fans])
    return np.array(rows, np.float32).reshape(len(layers), len(KINDS) + 3)


def kind(path: str, rank: int) -> str:
    """The kind of tensor that a parameter with this name and rank is, one of `KINDS`; the same in JAX and PyTorch.

    The last word of the path decides. A *bias* is called bias, b, beta or offset, or ends with "bias". An *embedding*
    has rank ≥ 2 and is called embed… or pos_embed…, or is the weight of a module with such a name (or wte, wpe). Of the
    rest, unless called …token, rank ≥ 3 is *conv* (a *matrix* if it is from Flax's attention, whose kernels keep heads
    apart: [in, heads, width]) and rank 2 a *matrix*; rank 1 is a *scale* if called scale, weight, gamma or g.
    Everything else is *other*. Without a name, the rank alone decides.
    """
    *modules, leaf = re.split("[/.]", path.lower())
    module = modules[-1] if modules else ""
    if leaf in _BIASES or leaf.endswith("bias"):
        return "bias"
    looked_up = "embed" in leaf or (leaf == "weight" and rank == 2 and ("emb" in module or module in ("wte", "wpe")))
    if rank >= 2 and looked_up:
        return "embedding"
    if leaf.endswith("token"):
        return "other"
    if rank >= 2:
        return "conv" if rank >= 3 and not (rank == 3 and module in _HEADS_APART) else "matrix"
    return "scale" if rank == 1 and leaf in _SCALES else "other"


def is_adapter(path: str, rank: int) -> bool:
    """Whether a parameter is one of the two matrices of a low-rank adapter that are called a and b."""
    return rank == 2 and re.split("[/.]", path.lower())[-1] in ("a", "b")


def depth_order(names: Sequence[str | None], alphabetical: bool = True) -> list[int]:
    """Indices of parameters, ordered from a network's input to its output as far as their names tell.

    This is the given order (in JAX that of the leaves, in PyTorch that in which parameters are passed), with three
    changes. (1) A layer whose name's first or second word starts with stem, embed, patch, pos_, wte … comes first, and
    one with head, classifier, fc, lm_head, ln_f … last: a dict sorts `head` before `stem`. (2) In a module, biases come
    last. (3) If the given order is `alphabetical`, as that of JAX's dicts, numbers sort by value: `block_9` comes
    before `block_10`. If any parameter has no name, the given order stays.
    """
    if None in names:
        return list(range(len(names)))
    ranks: dict[Any, int] = {}  # the order of first appearance, of modules or of the words at one position
    keys = []
    for i, name in enumerate(names):
        assert name is not None
        words = [word.lower() for word in re.split("[/.]", name)[:2]]
        stage = 1 + any(word in _LAST for word in words) - any(word.startswith(_FIRST) for word in words)
        place: tuple[Any, ...] = () if alphabetical else (ranks.setdefault(module_of(name), len(ranks)),)
        for token in re.findall(r"\d+|[^\d/.]+|[/.]", module_of(name)) if alphabetical else ():
            token = "/" if token == "." else token
            count = (0, int(token)) if token.isdecimal() else (1, ranks.setdefault((place, token), len(ranks)))
            place = (*place, count)
        keys.append((stage, place, is_bias(name), i))
    return [key[-1] for key in sorted(keys)]


class Role(NamedTuple):
    """The role of a layer in its network."""

    place: Literal["input", "hidden", "output", "norm"]
    component: Literal["kernel", "bias", "scale"]

    @property
    def name(self) -> str:
        """Such as output_kernel."""
        return f"{self.place}_{self.component}"


ROLE_NAMES = tuple(
    Role(place, component).name
    for place in ("input", "hidden", "output", "norm")
    for component in ("kernel", "bias", "scale")
)


def roles(layers: Sequence[Layer]) -> list[Role]:
    """Roles of a network's layers, from names and shapes.

    A module without a kernel (rank ≥ 2) is a norm. In `depth_order`, the last module with a kernel is the output, and
    the first one is the input, together with all that are called stem, embed, patch, pos_, …
    """
    kernels = [layer.path for layer in layers if len(layer.shape) >= 2 and kind(layer.path, len(layer.shape)) != "bias"]
    modules = [module_of(kernels[i]) for i in depth_order(kernels)]
    found = []
    for layer in layers:
        module = module_of(layer.path)
        first = any(word.startswith(_FIRST) for word in re.split("[/.]", layer.path.lower())[:2])
        component = "bias" if is_bias(layer.path) else "kernel" if len(layer.shape) >= 2 else "scale"
        if module not in modules:
            place = "norm"
        elif module == modules[-1]:
            place = "output"
        else:
            place = "input" if first or module == modules[0] else "hidden"
        found.append(Role(place, component))  # type: ignore[arg-type]
    return found


def module_of(path: str) -> str:
    """The path without its last word; the whole path if it has only one."""
    return re.sub(r"[/.][^/.]*$", "", path)


def is_bias(path: str) -> bool:
    return kind(path, 1) == "bias"


def _fans(layer: Layer) -> tuple[int, int]:
    shape = layer.shape
    match kind(layer.path, len(shape)):
        case "matrix" if len(shape) == 3 and module_of(layer.path).endswith("out"):
            return shape[0] * shape[1], shape[2]
        case "matrix":
            return shape[0], math.prod(shape[1:])
        case "conv":
            field = math.prod(shape[:-2])
            return field * shape[-2], field * shape[-1]
        case "embedding":
            return math.prod(shape[:-1]), shape[-1]
    return 1, layer.size


def n_descriptors(spec: Spec) -> int:
    """How many descriptors a layer has: its kind, and depth and fans in form 1; depth, first and last in form 2."""
    return len(_SCALE_FREE_KINDS if spec.form == 2 else KINDS) + 3


# Form 2: no sizes. A convolution is a matrix, and what a layer's names tell does not depend on its fans.

_SCALE_FREE_KINDS = ("matrix", "bias", "scale", "embedding", "other")
_BATCH_NORM = re.compile(r"(^|[/.])(bn|batch_?norm)_?\d+$")
_EMBEDDING_RMS = 0.04  # twice the usual initialization of an embedding: `natural_size` halves it
_NORM_RMS = 0.2  # of a tensor without a matrix beside it that began at zero: a norm's bias, a residual's scale


def scale_free_descriptors(layers: Sequence[Layer]) -> np.ndarray:
    """Descriptors of a network's layers in form 2, float32 [L, 8], from names alone.

    - 5: one-hot, the kind of tensor; convolutions are matrices.
    - 1: depth, the position of the layer's module among the network's modules, in [0, 1]: sorted by name, numbers by
      value, whatever the order given, so that splitting a network into groups does not change it; see `depth_order`.
      A batch norm comes behind the module with a kernel that it is numbered like: `bn1` behind `conv1`.
    - 2: whether its module is the last, and whether it is the first.
    """
    paths = [layer.path for layer in layers]
    by_name = sorted(range(len(paths)), key=lambda i: _natural_key(paths[i]))
    ordered = [by_name[i] for i in depth_order([paths[i] for i in by_name])]
    modules = _norms_behind(list(dict.fromkeys(module_of(paths[i]) for i in ordered)), layers)
    rows = []
    for layer in layers:
        kinds = [float(_scale_free_kind(layer) == each) for each in _SCALE_FREE_KINDS]
        module = module_of(layer.path)
        depth = modules.index(module) / max(len(modules) - 1, 1)
        rows.append([*kinds, depth, float(module == modules[-1]), float(module == modules[0])])
    return np.array(rows, np.float32).reshape(len(layers), len(_SCALE_FREE_KINDS) + 3)


def _norms_behind(modules: Sequence[str], layers: Sequence[Layer]) -> list[str]:
    """The modules, each numbered batch norm moved behind the module with a kernel of its parent and number."""
    kernels = {module_of(layer.path) for layer in layers if _scale_free_kind(layer) in ("matrix", "embedding")}
    numbers = {module: _parent_and_number(module) for module in modules}
    leaders = {numbers[module]: module for module in reversed(modules) if module in kernels}  # the first of a number
    place = {module: i for i, module in enumerate(modules)}

    def key(module: str) -> tuple[int, bool]:
        leader = leaders.get(numbers[module], module) if _BATCH_NORM.search(module.lower()) else module
        return place[leader], module != leader

    return sorted(modules, key=key)


def _parent_and_number(module: str) -> tuple[str, str]:
    parent, name = re.fullmatch(r"(?:(.*)[/.])?([^/.]*)", module).groups("")  # type: ignore[union-attr]
    return parent, re.findall(r"\d*$", name)[0]


def natural_rms(layers: Sequence[Layer]) -> np.ndarray:
    """The RMS that each layer's parameters usually have, up to a factor, float32 [L].

    It is 1/√fan-in for a matrix and for a bias beside one, 0.04 for an embedding and 0.2 for the rest.
    """
    fans = {module_of(layer.path): _fan_in(layer) for layer in layers if _scale_free_kind(layer) == "matrix"}
    sizes = []
    for layer in layers:
        kind_ = _scale_free_kind(layer)
        if kind_ == "matrix":
            sizes.append(1 / math.sqrt(_fan_in(layer)))
        elif kind_ == "embedding":
            sizes.append(_EMBEDDING_RMS)
        else:
            beside = fans.get(module_of(layer.path))
            sizes.append(_NORM_RMS if beside is None else 1 / math.sqrt(beside))
    return np.array(sizes, np.float32)


def n_matrices(layers: Sequence[Layer]) -> int:
    """How many of the layers are matrices or convolutions; 1 if none is, because steps are divided by it."""
    return max(sum(_scale_free_kind(layer) == "matrix" for layer in layers), 1)


def is_head(layers: Sequence[Layer]) -> bool:
    """Whether one matrix trains, and nothing else but its bias, if it has one."""
    kinds = sorted(_scale_free_kind(layer) for layer in layers)
    parents = {re.sub(r"[^/.]*$", "", layer.path) for layer in layers}  # none of a layer whose name is one word
    return kinds in (["matrix"], ["bias", "matrix"]) and len(parents) == 1


def _scale_free_kind(layer: Layer) -> str:
    rank = len(layer.shape)
    if is_adapter(layer.path, rank):
        return "matrix"
    found = kind(layer.path, rank)
    return "matrix" if found == "conv" else found


def _fan_in(layer: Layer) -> int:
    return max(_fans(layer)[0] if kind(layer.path, len(layer.shape)) != "bias" else layer.shape[0], 1)


def _natural_key(path: str) -> list[tuple[int, int, str]]:
    """Sorts numbers by value."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.findall(r"\d+|[^\d/.]+", path)]

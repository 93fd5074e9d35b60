"""Load the weights of published PyTorch networks from safetensors files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open

from tasks.base import Params, Stats, TaskError

Keys = tuple[Any, ...]  # the path of one of our arrays
Naming = Callable[[Keys], list[str]]  # the PyTorch tensors that hold it; several are concatenated on their first axis


def load_weights(source: str | Path, model_name: str, params: Params, stats: Stats) -> tuple[Params, Stats]:
    """Replace a network's arrays with those of a file.

    Reads the tensor names of torchvision, timm, transformers and akamaster/pytorch_resnet_cifar10. A head for another
    number of classes is not loaded; `params` keeps its own.

    Args:
      source: a safetensors file, or `hf://owner/name[/file]` on the Hugging Face Hub (file: model.safetensors).
      model_name: the network's name in `tasks.models.MODELS`.
      params, stats: what the model's `init` returned.

    Returns:
      (params, stats), float32.

    Raises:
      TaskError: the file is missing or not safetensors, or its tensors do not fit this network.
    """
    namings = next((namings for prefix, namings in _NAMINGS.items() if model_name.startswith(prefix)), None)
    if namings is None:
        allowed = ", ".join(f"{prefix}…" for prefix in _NAMINGS)
        raise TaskError(f"{source}: model {model_name!r} has no published weights; allowed are {allowed}")
    tensors = _read(source)
    flat_params, flat_stats = traverse_util.flatten_dict(params), traverse_util.flatten_dict(stats)
    arrays = {**flat_params, **flat_stats}  # the two name their leaves differently, so no path is in both
    # The naming scheme that matches most tensors is the file's.
    names = max(
        ({keys: naming(keys) for keys in arrays} for naming in namings),
        key=lambda names: sum(name in tensors for group in names.values() for name in group),
    )
    try:
        loaded = _converted(arrays, names, tensors)
    except TaskError as error:
        raise TaskError(f"{source} does not fit model {model_name!r}: {error}") from None
    return (
        traverse_util.unflatten_dict({keys: loaded[keys] for keys in flat_params}),
        traverse_util.unflatten_dict({keys: loaded[keys] for keys in flat_stats}),
    )


def _converted(
    arrays: Mapping[Keys, jax.Array], names: Mapping[Keys, Sequence[str]], tensors: Mapping[str, np.ndarray]
) -> dict[Keys, jax.Array]:
    """The tensors in our layout; a head for another number of classes is kept from `arrays`."""
    bias = tensors.get(names["head", "bias"][0])
    other_classes = bias is not None and bias.shape != arrays["head", "bias"].shape
    loaded = {}
    for keys, array in arrays.items():
        kept = other_classes and keys[0] == "head"
        shape = _torch_shape(array.shape, len(names[keys]))
        for name in names[keys]:
            if name not in tensors:
                raise TaskError(f"tensor {name!r} of shape {list(shape)} is missing")
            # A head that is kept may differ in the number of classes, but not in the number of features.
            if tensors[name].shape[kept:] != shape[kept:]:
                raise TaskError(f"tensor {name!r} has shape {list(tensors[name].shape)}, the model's is {list(shape)}")
        loaded[keys] = array if kept else _our_layout(np.concatenate([tensors[name] for name in names[keys]]))
    for name in sorted(tensors.keys() - {name for group in names.values() for name in group}):
        raise TaskError(f"tensor {name!r} of shape {list(tensors[name].shape)} is not one of the model's")
    return loaded


def _torch_shape(shape: Sequence[int], parts: int) -> tuple[int, ...]:
    """The shape, in PyTorch's layout, of each of the `parts` tensors that form one of our arrays."""
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(len(shape), range(len(shape)))
    rows, *rest = (shape[axis] for axis in axes)
    return (rows // parts, *rest)


def _our_layout(tensor: np.ndarray) -> jax.Array:
    """Kernels from [out, in, H, W] to [H, W, in, out], and from [out, in] to [in, out]."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.ndim, range(tensor.ndim))
    return jnp.asarray(tensor.transpose(axes), jnp.float32)


def _read(source: str | Path) -> dict[str, np.ndarray]:
    """The floating-point tensors of a safetensors file, by name."""
    path = _download(source) if str(source).startswith("hf://") else Path(source).expanduser()
    if path.exists() and not path.is_file():
        raise TaskError(f"weights {source}: not a regular file")
    try:
        # The flax framework, because numpy has no bfloat16.
        with safe_open(path, framework="flax") as file:
            # Counts of batches are not weights, and JAX has no 64-bit integers by default.
            names = [name for name in file.keys() if not name.endswith("num_batches_tracked")]  # noqa: SIM118
            tensors = {name: np.asarray(file.get_tensor(name)) for name in names}
    except FileNotFoundError:
        raise TaskError(f"weights {source}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise TaskError(f"weights {source}: not a readable safetensors file ({error})") from None
    for name, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise TaskError(f"weights {source}: tensor {name!r} is {tensor.dtype}; it must be floating point")
    # Networks that were saved from DataParallel.
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def _download(source: str | Path) -> Path:
    match = re.fullmatch(r"hf://([^/]+/[^/]+)(?:/(.+))?", str(source))
    if match is None:
        raise TaskError(f"weights {source}: not a name on the hub; allowed is hf://owner/name or hf://owner/name/file")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(match[1], match[2] or "model.safetensors"))
    except Exception as error:  # the client lets many libraries' errors through
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise TaskError(f"weights {source}: cannot be downloaded ({reason})") from None


_LEAVES: dict[Any, str] = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def _torchvision(keys: Keys, shortcut: str = "downsample", head: str = "fc") -> list[str]:
    """Names of torchvision's and timm's ResNets."""
    *module, leaf = keys
    leaf = _LEAVES.get(leaf, leaf)
    match module:
        case ["stem", kind]:
            name = {"conv": "conv1", "norm": "bn1"}[kind]
        case ["stages", stage, block, "layers", layer, kind]:
            name = f"layer{stage + 1}.{block}.{'conv' if kind == 'conv' else 'bn'}{layer + 1}"
        case ["stages", stage, block, "shortcut", kind]:
            name = f"layer{stage + 1}.{block}.{shortcut}.{['conv', 'norm'].index(kind)}"
        case _:
            name = head
    return [f"{name}.{leaf}"]


def _akamaster(keys: Keys) -> list[str]:
    return _torchvision(keys, "shortcut", "linear")


def _transformers_resnet(keys: Keys) -> list[str]:
    """Names of transformers' ResNetForImageClassification."""
    *module, leaf = keys
    leaf = _LEAVES.get(leaf, leaf)
    kind = {"conv": "convolution", "norm": "normalization"}.get(module[-1])
    match module[:-1]:
        case ["stem"]:
            name = f"resnet.embedder.embedder.{kind}"
        case ["stages", stage, block, "layers", layer]:
            name = f"resnet.encoder.stages.{stage}.layers.{block}.layer.{layer}.{kind}"
        case ["stages", stage, block, "shortcut"]:
            name = f"resnet.encoder.stages.{stage}.layers.{block}.shortcut.{kind}"
        case _:
            name = "classifier.1"
    return [f"{name}.{leaf}"]


def _timm_vit(keys: Keys) -> list[str]:
    """Names of timm's VisionTransformer."""
    *module, leaf = keys
    leaf = _LEAVES.get(leaf, leaf)
    match module:
        case []:
            return [str(leaf)]
        case ["patches"]:
            return [f"patch_embed.proj.{leaf}"]
        case ["blocks", block, layer]:
            parent = {"qkv": "attn.", "proj": "attn.", "fc1": "mlp.", "fc2": "mlp."}.get(layer, "")
            return [f"blocks.{block}.{parent}{layer}.{leaf}"]
        case _:
            return [f"{module[0]}.{leaf}"]


_TRANSFORMERS_VIT = {
    "norm1": ["layernorm_before"],
    "qkv": ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    "proj": ["attention.output.dense"],
    "norm2": ["layernorm_after"],
    "fc1": ["intermediate.dense"],
    "fc2": ["output.dense"],
}


def _transformers_vit(keys: Keys) -> list[str]:
    """Names of transformers' ViTForImageClassification, as in its files."""
    *module, leaf = keys
    leaf = _LEAVES.get(leaf, leaf)
    match module:
        case []:
            return [f"vit.embeddings.{'position_embeddings' if leaf == 'pos_embed' else leaf}"]
        case ["patches"]:
            return [f"vit.embeddings.patch_embeddings.projection.{leaf}"]
        case ["blocks", block, layer]:
            return [f"vit.encoder.layer.{block}.{name}.{leaf}" for name in _TRANSFORMERS_VIT[layer]]
        case _:
            return [{"norm": "vit.layernorm", "head": "classifier"}[module[0]] + f".{leaf}"]


_NAMINGS: dict[str, tuple[Naming, ...]] = {
    "resnet": (_torchvision, _akamaster, _transformers_resnet),
    "vit": (_timm_vit, _transformers_vit),
}

"""How parameters map to the layers of a checkpoint."""

import numpy as np
import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.descriptors import natural_rms
from l3rs.torch import L3RS, match_layers
from l3rs.torch.names import flax_layer, unwrapped
from tests.l3rs.torch.common import NAMES, SHAPES, checkpoint, parameters


def paths_of(table, params, rename=None, **rules):
    """The paths that `match_layers` finds for a table and parameters {name: shape}; numbers stand for no names."""
    spec = l3rs.Spec(tuple(l3rs.Layer(path, shape) for path, shape in table.items()))
    tensors = [torch.empty(shape) for shape in params.values()]
    named = [(name, tensor) for name, tensor in zip(params, tensors, strict=True)]
    found = match_layers(spec, tensors if isinstance(next(iter(params)), int) else named, rename=rename, **rules)
    assert [layer.shape for layer in found] == list(params.values())
    assert [layer.row for layer in found] == [
        list(table).index(layer.source) if layer.source in table else None for layer in found
    ]
    return [layer.source for layer in found]


def test_the_matrices_of_an_adapter_have_the_size_that_they_have_in_jax():
    """A is [rank, in] in PyTorch, and B [out, rank]: their natural sizes are 1/√in and 1/√rank."""
    shapes = {"q.A": (4, 32), "q.B": (16, 4), "v.a": (4, 32), "v.b": (16, 4), "w.bias": (16,)}
    found = [flax_layer(name, shape) for name, shape in shapes.items()]
    assert [layer.shape for layer in found] == [(32, 4), (4, 16), (32, 4), (4, 16), (16,)]
    np.testing.assert_allclose(natural_rms(found)[:4], [1 / np.sqrt(32), 1 / 2] * 2, rtol=1e-6)


def test_match_by_name():
    """In any order, with another word for a weight, inside DDP and torch.compile, and for a part of the layers."""
    table = {
        "b/10/bias": (4,),
        "b/10/kernel": (3, 4),
        "b/9/bias": (4,),
        "b/9/kernel": (3, 4),
        "n/scale": (4,),
        "w": (2,),
    }
    params = {"b.9.weight": (4, 3), "b.10.weight": (4, 3), "b.10.bias": (4,), "n.weight": (4,), "w": (2,)}
    expected = ["b/9/kernel", "b/10/kernel", "b/10/bias", "n/scale", "w"]
    assert paths_of(table, params) == expected
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert paths_of(table, {prefix + name: shape for name, shape in params.items()}) == expected


def test_match_by_order():
    """JAX lists b/10 before b/9 and biases before weights, torch the other way round."""
    table = {"b/10/bias": (4,), "b/10/scale": (4,), "b/9/bias": (4,), "b/9/scale": (4,), "out/kernel": (4, 2)}
    expected = ["b/9/scale", "b/9/bias", "b/10/scale", "b/10/bias", "out/kernel"]
    shapes = [(4,), (4,), (4,), (4,), (2, 4)]
    assert paths_of(table, dict(enumerate(shapes))) == expected
    names = ("x.weight", "x.bias", "y.weight", "y.bias", "z.weight")
    assert paths_of(table, dict(zip(names, shapes, strict=True))) == expected
    # with names, biases go to biases wherever they stand
    names = ("x.bias", "x.weight", "y.weight", "y.bias", "z.weight")
    assert paths_of(table, dict(zip(names, shapes, strict=True))) == [expected[i] for i in (1, 0, 2, 3, 4)]


def test_match_shapes_of_any_order():
    table = {"c/kernel": (3, 3, 2, 4), "d/kernel": (3, 3, 4, 2), "e/kernel": (18, 4)}
    params = {0: (4, 2, 3, 3), 1: (2, 4, 3, 3), 2: (4, 18)}
    assert paths_of(table, params) == ["c/kernel", "d/kernel", "e/kernel"]


def test_rename():
    """It takes precedence over names and order; a layer that it names is not matched again."""
    table = {"a/kernel": (2, 3), "b/kernel": (2, 3), "c/kernel": (2, 3)}
    params = {"x": (3, 2), "y": (3, 2), "z": (3, 2)}
    assert paths_of(table, params, {"x": "b/kernel"}) == ["b/kernel", "a/kernel", "c/kernel"]
    assert paths_of(table, params, {"x": "c/kernel", "y": "c/kernel", "z": "a/kernel"}) == [
        *("c/kernel", "c/kernel", "a/kernel")
    ]
    named = {"a.weight": (3, 2), "z": (3, 2)}
    assert paths_of(table, named, {"z": "c/kernel"}) == ["a/kernel", "c/kernel"]
    params = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in named.items()}
    opt = L3RS(params.items(), checkpoint(table), 10, rename={"z": "c/kernel"})
    assert opt.param_groups[0]["layers"] == ["a/kernel", "c/kernel"]


@pytest.mark.parametrize(
    ("params", "rename", "sentence"),
    [
        (
            {"a.weight": (3, 2), "head": (3, 2)},
            {},
            "layer 'head' (3, 2) is not a layer that this optimizer was meta-trained on "
            "(of the network's 2, 1 are not); the layers to choose from "
            "are b/bias (3,), c/bias (3,); pass rename={name: layer} to map it, "
            "on_unknown='mean' to give it the mean embedding, or take 'universal', which is for any network",
        ),
        (
            {0: (3, 2), 1: (2, 3)},
            {},
            "layer 1 (2, 3) is not a layer that this optimizer was meta-trained on "
            "(of the network's 2, 1 are not); the layers to choose from "
            "are b/bias (3,), c/bias (3,); pass rename={name: layer} to map it, "
            "on_unknown='mean' to give it the mean embedding, or take 'universal', which is for any network",
        ),
        (
            {"x": (3, 2), "y.bias": (3,)},
            {},
            "layer 'y.bias' (3,) could be any of b/bias, c/bias: the network has 1 of this shape, "
            "and the optimizer is for one with 2; pass all of that network's parameters, or rename={name: layer}",
        ),
        (
            {"a.weight": (3, 4)},
            {},
            "layer 'a.weight', in the checkpoint 'a/kernel', has shape (3, 4); "
            "this optimizer was meta-trained on (2, 3), in Flax's layout; "
            "on_unknown='mean' gives it the mean embedding",
        ),
        (
            {"x": (3, 4)},
            {"x": "a/kernel"},
            "layer 'x', in the checkpoint 'a/kernel', has shape (3, 4); this optimizer was "
            "meta-trained on (2, 3), in Flax's layout; "
            "on_unknown='mean' gives it the mean embedding",
        ),
        ({"x": (3, 2)}, {"z": "a/kernel"}, "rename has 'z', which is not a layer of the params; these are 'x'"),
        (
            {"x": (3, 2)},
            {"x": "d"},
            "rename maps 'x' to 'd', which is not in the checkpoint; the layers to choose from "
            "are a/kernel (2, 3), b/bias (3,), c/bias (3,)",
        ),
    ],
    ids=["name", "too many", "too few", "shape", "renamed shape", "rename from", "rename to"],
)
def test_match_errors(params, rename, sentence):
    with pytest.raises(l3rs.L3RSError) as error:
        paths_of({"a/kernel": (2, 3), "b/bias": (3,), "c/bias": (3,)}, params, rename)
    assert str(error.value) == sentence


def test_descriptors_of_both_layouts():
    """The same for Flax's names and shapes and for PyTorch's, so the same steps."""
    shapes = {**SHAPES, "attention/query/kernel": (4, 6), "temporal/kernel": (5, 2, 4), "pos_embed/embedding": (9, 4)}
    names = {path: NAMES.get(path, path.replace("/", ".").replace("kernel", "weight")) for path in shapes}
    names["pos_embed/embedding"] = "module.pos_embed.weight"  # as DDP calls it
    jax_layers = [l3rs.Layer(path, shape) for path, shape in shapes.items()]
    torch_shape = {2: lambda s: s[::-1], 3: lambda s: s[::-1], 4: lambda s: (s[3], s[2], s[0], s[1])}
    torch_layers = [
        flax_layer(names[path], torch_shape[len(shape)](shape) if path.endswith("kernel") else shape)
        for path, shape in shapes.items()
    ]
    np.testing.assert_array_equal(
        l3rs.layers.descriptors(torch_layers, alphabetical=False), l3rs.layers.descriptors(jax_layers)
    )


def test_descriptors_need_names():
    _, spec = made_of = checkpoint(embedding="descriptor")
    unnamed = list(parameters().values())
    for call in (lambda: L3RS(unnamed, made_of, 10), lambda: match_layers(spec, unnamed)):
        with pytest.raises(l3rs.L3RSError) as error:
            call()
        assert str(error.value) == (
            "this optimizer reads from a layer's name what it is and how deep: pass model.named_parameters(), or "
            "param groups of (name, parameter) pairs"
        )


def test_groups_do_not_change_the_descriptors():
    """A split by weight decay, or groups from head to input: the depth is that of the sorted names."""
    shapes = {
        f"block_{i}/{leaf}": (4, 4) if leaf == "kernel" else (4,) for i in range(11) for leaf in ("kernel", "bias")
    }
    params = parameters(shapes=shapes)
    made_of = checkpoint(embedding="descriptor")
    matrices, biases = ([item for item in params.items() if item[1].dim() == n] for n in (2, 1))
    splits = (
        [matrices, biases],
        [biases, matrices],
        [list(params.items())[11:][::-1], list(params.items())[:11][::-1]],
    )
    plain = L3RS(params.items(), made_of, 10)
    expected = {name: plain._facts.embedding[plain._rows[param]] for name, param in params.items()}
    for split in splits:
        opt = L3RS([{"params": group} for group in split], made_of, 10)
        for name, param in params.items():
            found = opt._facts.embedding[opt._rows[param]]
            np.testing.assert_allclose(found, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.dense.weight", "_flat_param"])
def test_sharded_parameters_are_refused_by_name(name):
    with pytest.raises(l3rs.L3RSError, match=rf"^parameter {name}\(40,\) is sharded; L3RS needs norms of whole layers"):
        L3RS([(name, torch.nn.Parameter(torch.ones(40)))], checkpoint(embedding="descriptor"), 10)


def test_prefixes_of_wrappers_do_not_count():
    for name in ("module._orig_mod.a.weight", "_orig_mod.module.a.weight", "a._checkpoint_wrapped_module.weight"):
        assert unwrapped(name) == "a/weight"


def test_match_takes_no_groups():
    with pytest.raises(l3rs.L3RSError, match="not param groups"):
        match_layers(checkpoint()[1], [{"params": [torch.zeros(1)]}])

"""The spec of an optimizer, and matching a network's parameters to its layers."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import l3rs
from l3rs.descriptors import KINDS, depth_order, descriptors, kind
from l3rs.spec import Direction, L3RSError, Layer, Spec
from l3rs.trees import layer_path, layers_of


class Pair(NamedTuple):
    left: object
    right: object


PARAMS = {"dense": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}, "head": np.zeros(())}
THETA = {"embedding": np.zeros((3, 8), np.float32)}  # of a spec for TABLE without hidden layers
THETA["dense_0"] = {"kernel": np.zeros((29, 3), np.float32), "bias": np.zeros(3, np.float32)}
TABLE = (Layer("dense/bias", (3,)), Layer("dense/kernel", (4, 3)), Layer("head", ()))


def test_layer_size():
    assert [layer.size for layer in (Layer("a", (4, 3)), Layer("a", ()), Layer("a", (2, 0)))] == [12, 1, 0]


def test_layers_are_in_leaf_order():
    assert layers_of(PARAMS) == TABLE
    assert layers_of(jax.eval_shape(lambda: PARAMS)) == TABLE  # shapes are enough


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ([np.ones(1), (np.ones(1), np.ones(1))], ["0", "1/0", "1/1"]),
        (Pair(np.ones(1), {"x": np.ones(1)}), ["left", "right/x"]),
        ({"a": None, "b": np.ones(1)}, ["b"]),
        (np.ones(1), [""]),
        ({"a": {"value": np.ones(1)}, "value": np.ones(1)}, ["a", "value"]),  # Flax's variables; a layer of that name
        ({1: np.ones(1), 2: np.ones(1)}, ["1", "2"]),
    ],
    ids=["list", "namedtuple", "none", "bare", "value", "int keys"],
)
def test_paths(params, paths):
    assert [layer.path for layer in layers_of(params)] == paths


def test_layer_path_of_keys():
    keys = (jax.tree_util.DictKey("a"), jax.tree_util.SequenceKey(0), jax.tree_util.GetAttrKey("value"))
    assert layer_path(keys) == "a/0"
    assert layer_path(keys[2:]) == "value"
    assert layer_path(()) == ""


def test_flax_states_and_plain_dicts_have_the_same_paths():
    nnx = pytest.importorskip("flax.nnx")
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert layers_of(state) == (Layer("bias", (3,)), Layer("kernel", (2, 3)))
    assert layers_of(nnx.to_pure_dict(state)) == layers_of(state)


def matched(spec, params, match="path", **rules):
    """`match_layers` with the keywords of `learned_optimizer`."""
    return l3rs.match_layers(spec, params, by=match, **rules)


def rows(table, params, **rules):
    """The row in the table for each leaf."""
    found = matched(Spec(tuple(table)), params, **rules)
    assert [(layer.name, layer.shape) for layer in found] == [(x.path, x.shape) for x in layers_of(params)]
    assert all(layer.source == ("mean" if layer.row is None else table[layer.row].path) for layer in found)
    return [layer.row for layer in found]


def test_match_is_by_path():
    assert rows(TABLE, PARAMS) == [0, 1, 2]
    assert rows(TABLE[::-1], PARAMS) == [2, 1, 0]
    assert rows(TABLE, jax.eval_shape(lambda: PARAMS)) == [0, 1, 2]  # shapes are enough


def test_match_allows_absent_layers():
    """As with frozen parameters under `optax.masked`."""
    assert rows(TABLE, {"head": np.zeros(())}) == [2]
    assert rows(TABLE, {}) == []


def test_rename():
    """It takes precedence over the paths; two layers may share a row."""
    other = {"dense": {"bias": np.zeros(3)}, "fc": {"w": np.zeros((4, 3))}, "fd": {"w": np.zeros((4, 3))}}
    assert rows(TABLE, other, rename={"fc/w": "dense/kernel", "fd/w": "dense/kernel"}) == [0, 1, 1]
    table = (*TABLE, Layer("other/bias", (3,)))
    assert rows(table, {"dense": {"bias": np.zeros(3)}}, rename={"dense/bias": "other/bias"}) == [3]


def test_match_by_order():
    """The i-th layer of a shape maps to the i-th of that shape; names do not count, but numbers in them do."""
    table = tuple(Layer(f"Dense_{i}/{leaf}", (3,)) for i in (0, 1, 10, 2) for leaf in ("bias", "scale"))
    params = [{"bias": np.zeros(3), "scale": np.zeros(3)} for _ in range(4)]
    assert rows(table, params, match="order") == [0, 1, 2, 3, 6, 7, 4, 5]
    params = {f"x{i}": {"b": np.zeros(3), "w": np.zeros(3)} for i in (1, 2, 3, 10)}  # a dict sorts x10 after x1
    assert rows(table, params, match="order") == [0, 1, 4, 5, 2, 3, 6, 7]
    assert rows(table, [np.zeros(3) for _ in range(8)], match="order") == [1, 0, 3, 2, 7, 6, 5, 4]  # biases last
    swapped = {"a": {"kernel": np.zeros((3, 4))}, "b": {"kernel": np.zeros((4, 3))}}
    assert rows((Layer("x", (4, 3)), Layer("y", (3, 4))), swapped, match="order") == [1, 0]


def test_match_auto():
    """By path if any path is known, else by order."""
    assert rows(TABLE, {"dense": {"bias": np.zeros(3)}}, match="auto") == [0]
    other = {"fc": {"b": np.zeros(3), "w": np.zeros((4, 3))}, "out": np.zeros(())}
    assert rows(TABLE, other, match="auto") == [0, 1, 2]
    with pytest.raises(L3RSError, match=r"layer 'fc' \(3,\) is not a layer"):
        rows(TABLE, {"dense": {"bias": np.zeros(3)}, "fc": np.zeros(3)}, match="auto")


def test_unknown_layers_get_the_mean():
    """A new head, and a layer that grew."""
    params = {"dense": {"kernel": np.zeros((4, 7)), "bias": np.zeros(3)}, "new": np.zeros(2)}
    assert rows(TABLE, params, on_unknown="mean") == [0, None, None]
    assert rows(TABLE, params, on_unknown="mean", rename={"new": "dense/bias"}) == [0, None, None]
    assert rows(TABLE, {"fc": np.zeros((4, 3)), "new": np.zeros((9, 9))}, match="order", on_unknown="mean") == [1, None]
    assert rows(TABLE, {}, on_unknown="mean") == []


@pytest.mark.parametrize(
    ("params", "rules", "sentence"),
    [
        (
            {"dense": {"scale": (3,)}},
            {},
            "layer 'dense/scale' (3,) is not a layer that this optimizer was meta-trained on "
            "(of the network's 1, 1 are not); the layers to choose "
            "from are dense/bias (3,), dense/kernel (4, 3), head (); pass rename={name: layer} to map it, "
            "on_unknown='mean' to give it the mean embedding, or take 'universal', which is for any network",
        ),
        (
            {"dense": {"kernel": (3, 4)}},
            {},
            "layer 'dense/kernel' has shape (3, 4); this optimizer was "
            "meta-trained on (4, 3), in Flax's layout; "
            "on_unknown='mean' gives it the mean embedding",
        ),
        (
            {"fc": (3, 4)},
            {"rename": {"fc": "dense/kernel"}},
            "layer 'fc', in the checkpoint 'dense/kernel', has shape (3, 4); this optimizer was "
            "meta-trained on (4, 3), in Flax's layout; "
            "on_unknown='mean' gives it the mean embedding",
        ),
        (
            {"fc": (4, 3)},
            {"rename": {"fd": "dense/kernel"}},
            "rename has 'fd', which is not a layer of the params; these are 'fc'",
        ),
        (
            {"fc": (4, 3)},
            {"rename": {"fc": "dense"}},
            "rename maps 'fc' to 'dense', which is not in the checkpoint; the layers to choose from "
            "are dense/bias (3,), dense/kernel (4, 3), head ()",
        ),
        (
            {"fc": (4, 3)},
            {"rename": ["fc"]},
            "rename is ['fc']; it must be a mapping {name in the network: path in the checkpoint}",
        ),
        ({}, {"match": "name"}, "match is 'name'; allowed are 'auto', 'path', 'order'"),
        ({}, {"on_unknown": "zero"}, "on_unknown is 'zero'; allowed are 'error', 'mean', 'descriptor'"),
        (
            {},
            {"on_unknown": "descriptor"},
            "on_unknown is 'descriptor', but this optimizer has an embedding table; allowed are 'error', 'mean'",
        ),
        (
            {"v": (4, 3), "w": (4, 3)},
            {"match": "order", "on_unknown": "mean"},
            "layer 'v' (4, 3) could be any of dense/kernel: the network has 2 of this shape, "
            "and the optimizer is for one with 1; pass all of that network's parameters, or rename={name: layer}",
        ),
    ],
    ids=[
        *("unknown", "shape", "renamed shape", "rename from", "rename to", "rename", "match", "on_unknown"),
        *("descriptor", "order"),
    ],
)
def test_match_errors(params, rules, sentence):
    params = jax.tree.map(np.zeros, params, is_leaf=lambda x: isinstance(x, tuple))
    for match in (
        matched,
        lambda spec, params, **rules: l3rs.learned_optimizer(THETA, spec, 1, **rules).init(params),
    ):
        with pytest.raises(L3RSError) as error:
            match(Spec(TABLE, hidden=()), params, **rules)
        assert str(error.value) == sentence


def test_match_unknown_layer_of_a_large_network():
    table = tuple(Layer(f"layer_{i}", ()) for i in range(100))
    with pytest.raises(L3RSError, match=r"are layer_0 \(\), .*, layer_5 \(\) and 94 more; pass rename"):
        rows(table, {"x": np.zeros(())})


# Descriptors


@pytest.mark.parametrize(
    ("path", "rank", "expected"),
    [
        ("dense/kernel", 2, "matrix"),
        ("fc.weight", 2, "matrix"),
        ("attention/in_proj_weight", 2, "matrix"),
        ("lora_a", 2, "matrix"),
        ("attention/query/kernel", 3, "matrix"),  # Flax's [in, heads, width]
        ("attention/query/bias", 2, "bias"),
        ("conv1.weight", 4, "conv"),
        ("conv/kernel", 3, "conv"),
        ("patch_embed/proj/kernel", 4, "conv"),
        ("patch_embed/kernel", 2, "matrix"),
        ("patch_embed.bias", 1, "bias"),
        ("in_proj_bias", 1, "bias"),
        ("norm/beta", 1, "bias"),
        ("norm/scale", 1, "scale"),
        ("bn1.weight", 1, "scale"),
        ("embed/embedding", 2, "embedding"),
        ("bert.embeddings.word_embeddings.weight", 2, "embedding"),
        ("transformer.wte.weight", 2, "embedding"),
        ("bert.embeddings.LayerNorm.weight", 1, "scale"),
        ("pos_embed", 3, "embedding"),
        ("cls_token", 3, "other"),
        ("temperature", 0, "other"),
        ("", 4, "conv"),
        ("", 2, "matrix"),
        ("", 1, "other"),
    ],
    ids=str,
)
def test_kind(path, rank, expected):
    assert kind(path, rank) == expected


def test_depth_order():
    """For the leaves of a JAX network, for the names of a PyTorch one, and for neither."""
    jax_names = ["blocks/1/norm/scale", "blocks/10/fc1/bias", "blocks/10/fc1/kernel", "blocks/2/fc1/kernel"]
    jax_names += ["cls_token", "head/bias", "head/kernel", "norm/scale", "patches/kernel", "pos_embed"]
    torch_names = ["cls_token", "pos_embed", "patches.weight", "blocks.1.norm.weight", "blocks.2.fc1.weight"]
    torch_names += ["blocks.10.fc1.weight", "blocks.10.fc1.bias", "norm.weight", "head.weight", "head.bias"]
    assert [jax_names[i] for i in depth_order(jax_names)] == [
        *("cls_token", "patches/kernel", "pos_embed", "blocks/1/norm/scale", "blocks/2/fc1/kernel"),
        *("blocks/10/fc1/kernel", "blocks/10/fc1/bias", "norm/scale", "head/kernel", "head/bias"),
    ]
    assert depth_order(torch_names, alphabetical=False) == list(range(10))
    given = ["a.conv1.weight", "a.bn1.weight", "a.conv2.weight", "a.bn2.weight"]
    assert depth_order(given, alphabetical=False) == [0, 1, 2, 3]
    assert depth_order(["b", None, "a"]) == [0, 1, 2]
    assert depth_order(["encoder.weight", "decoder.weight"]) == [0, 1]  # as given
    assert depth_order([]) == []


def test_descriptors():
    layers = (
        Layer("head/bias", (10,)),
        Layer("head/kernel", (64, 10)),
        Layer("mid/attention/out/kernel", (4, 16, 64)),
        Layer("mid/attention/query/kernel", (64, 4, 16)),
        Layer("mid/norm/scale", (64,)),
        Layer("stem/kernel", (3, 3, 8, 64)),
        Layer("stem_token", (1, 1, 64)),
        Layer("vocabulary/embedding", (10**9, 1)),
    )
    # depth: stem, stem_token, vocabulary, mid/attention/out, mid/attention/query, mid/norm, head
    expected = [
        ("bias", 6 / 6, 1, 10),
        ("matrix", 6 / 6, 64, 10),
        ("matrix", 3 / 6, 64, 64),
        ("matrix", 4 / 6, 64, 64),
        ("scale", 5 / 6, 1, 64),
        ("conv", 0 / 6, 72, 576),
        ("other", 1 / 6, 1, 64),
        ("embedding", 2 / 6, np.exp(12.5), 1),  # cut
    ]
    found = descriptors(layers)
    assert found.dtype == np.float32
    for row, (kind_, depth, fan_in, fan_out) in zip(found, expected, strict=True):
        assert KINDS[row[:6].argmax()] == kind_
        assert row[:6].sum() == 1
        np.testing.assert_allclose(row[6:], [depth, np.log(fan_in) / 5 - 1, np.log(fan_out) / 5 - 1], rtol=1e-6)
    assert descriptors(()).shape == (0, 9)
    assert np.isfinite(descriptors((Layer("", ()), Layer("a", (0, 3))))).all()
    np.testing.assert_array_equal(descriptors(layers[:1])[0, 6], 0)


def test_create_parses_directions():
    spec = Spec.create(PARAMS, ["lion", {"name": "adam", "b2": 0.9, "b1": 0.5}, Direction("sgd")], hidden=(3,))
    assert spec.layers == TABLE
    assert spec.directions == (
        Direction("lion"),
        Direction("adam", (("b1", 0.5), ("b2", 0.9))),
        Direction("sgd"),
    )
    assert spec.hidden == (3,)
    assert Spec.create(PARAMS).directions == (Direction("adam"), Direction("sgd"))


def test_direction_without_a_name():
    with pytest.raises(L3RSError, match=r"^a direction needs a name, found \{'b1': 0.9\}$"):
        Direction.parse({"b1": 0.9})


def test_a_spec_is_a_value():
    """It is comparable, hashable and frozen: it can be a static argument of jit."""
    assert Spec.create(PARAMS) == Spec.create(PARAMS)
    assert hash(Spec.create(PARAMS)) == hash(Spec.create(PARAMS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec.create(PARAMS).step = "relative"


# No field has its default, so that a field that JSON loses is noticed.
UNUSUAL = {
    "directions": ("sgd", {"name": "adam", "b1": 0.5, "eps": 1e-6}),
    "hidden": (5,),
    "embedding": "descriptor",
    "embedding_dim": 3,
    "step": "relative",
    "step_scale": 0.1,
    "step_gain": 1.0,
    "mix_bias": -1.0,
    "loss_decays": (0.1, 0.2, 0.3),
    "norm_decays": (0.0, 0.5),
    "absolute_time": True,
}
FORM_2 = {
    "directions": ("sgd", "weight_decay"),
    "form": 2,
    "step": "initial",
    "step_limit": 1.5,
    "natural_size": 0.1,
    "depth_scaling": False,
    "horizon_power": 0.25,
    "signal": False,
    "adaptation": 0.1,
    "layer_gain": 5.0,
    "decrease_limit": 0.3,
    "leverage_floor": 6.0,
    "decay_share": 0.5,
}


def test_json_round_trip():
    default, spec = Spec.create(PARAMS), Spec.create(PARAMS, **UNUSUAL)
    second = Spec.create(PARAMS, **{**UNUSUAL, "absolute_time": False, **FORM_2})
    for field in dataclasses.fields(Spec):
        unusual = second if field.name in FORM_2 else spec
        assert field.name == "layers" or getattr(unusual, field.name) != getattr(default, field.name)
    for each in (default, spec, second, Spec.create(PARAMS, hidden=())):
        assert Spec.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_json_of_format_1():
    """Format 1 had no choice of embeddings: a missing field means a table, and a table is written without the field."""
    data = Spec.create(PARAMS).to_json()
    assert "embedding" not in data
    assert Spec.from_json({**data, "embedding": "table"}) == Spec.from_json(data) == Spec.create(PARAMS)
    assert Spec.create(PARAMS, embedding="descriptor").to_json() == {**data, "embedding": "descriptor"}


def test_from_json_names_fields():
    data = Spec.create(PARAMS).to_json()
    with pytest.raises(L3RSError, match=r"spec has fields .*'extra'.*; expected are .*'absolute_time'"):
        Spec.from_json({**data, "extra": 1})
    with pytest.raises(L3RSError, match=r"expected are .*'hidden'"):
        Spec.from_json({k: v for k, v in data.items() if k != "hidden"})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layers": ()}, "spec.layers is empty: an optimizer needs at least one parameter tensor"),
        ({"layers": (Layer("a", ()), Layer("a", (2,)))}, "spec.layers: two layers have the same path"),
        ({"directions": ()}, "spec.directions is empty: at least one base optimizer is needed"),
        ({"embedding": "none"}, "spec.embedding is 'none'; allowed are 'table' and 'descriptor'"),
        ({"step": "abs"}, "spec.step is 'abs'; allowed in form 1 are 'rms', 'relative'"),
        ({"step_scale": 0.0}, "spec.step_scale is 0.0; it must be > 0"),
        ({"step_scale": -1.0}, "spec.step_scale is -1.0; it must be > 0"),
        ({"step_scale": float("nan")}, "spec.step_scale is nan; it must be a finite number"),
        ({"loss_decays": (0.9,)}, "spec.loss_decays needs two or more decays, spec.norm_decays exactly two"),
        ({"norm_decays": (0.1, 0.2, 0.3)}, "spec.loss_decays needs two or more decays, spec.norm_decays exactly two"),
        ({"loss_decays": (0.5, 1.0)}, "spec.loss_decays and spec.norm_decays must lie in [0, 1)"),
        ({"norm_decays": (-0.1, 0.5)}, "spec.loss_decays and spec.norm_decays must lie in [0, 1)"),
        ({"hidden": (4, 0)}, "spec.hidden is (4, 0); it must hold whole numbers ≥ 1"),
        ({"embedding_dim": 0}, "spec.embedding_dim is 0; it must hold whole numbers ≥ 1"),
        ({"signal": 1}, "spec.signal is 1; it must be true or false"),
        ({"form": 3}, "spec.form is 3; allowed are 1 and 2"),
        ({"form": True}, "spec.form is True; allowed are 1 and 2"),
        ({"form": 2, "step": "abs"}, "spec.step is 'abs'; allowed in form 2 are 'rms', 'relative', 'initial'"),
        (
            {"form": 2, "absolute_time": True},
            "spec.absolute_time is true; form 2 always reads log T and log t instead",
        ),
        ({"natural_size": 0.0}, "spec.natural_size is 0.0; it must be > 0"),
        ({"adaptation": 1.5}, "spec.adaptation is 1.5; it must lie in [0, 1]"),
        ({"decrease_limit": 101.0}, "spec.decrease_limit is 101.0; it must lie in [0, 100]"),
        ({"decay_share": 1.5}, "spec.decay_share is 1.5; it must lie in [0, 1]"),
        ({"leverage_floor": 101.0}, "spec.leverage_floor is 101.0; it must lie in [0, 100]"),
        (
            {"directions": (Direction("first_moment"), Direction("adam"))},
            "spec.directions: first_moment reads Adam's average; put adam before it",
        ),
    ],
    ids=str,
)
def test_fields_out_of_range(fields, sentence):
    with pytest.raises(L3RSError) as error:
        Spec(**{"layers": TABLE, **fields})
    assert str(error.value) == sentence


def test_paths_that_collide_are_refused():
    with pytest.raises(L3RSError, match="two layers have the same path"):
        Spec.create({"a/b": jnp.zeros(1), "a": {"b": jnp.zeros(1)}})

"""The spec of an optimizer, and matching a network's parameters to its layers."""

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l3rs.layers import match_layers
from l3rs.spec import Direction, L3RSError, Layer, Spec, layer_path, layers_of


class Pair(NamedTuple):
    left: object
    right: object


PARAMS = {"dense": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}, "head": np.zeros(())}
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


def test_match_is_by_path():
    assert match_layers(TABLE, PARAMS) == (0, 1, 2)
    assert match_layers(TABLE[::-1], PARAMS) == (2, 1, 0)


def test_match_lets_layers_be_absent():
    """As with frozen parameters under `optax.masked`."""
    assert match_layers(TABLE, {"head": np.zeros(())}) == (2,)
    assert match_layers(TABLE, {}) == ()


def test_match_unknown_layer():
    with pytest.raises(L3RSError) as error:
        match_layers(TABLE, {"dense": {"scale": np.zeros(3)}})
    assert str(error.value) == (
        "params have a layer 'dense/scale' that this optimizer was not meta-trained on; "
        "it knows dense/bias, dense/kernel, head"
    )


def test_match_unknown_layer_of_a_large_network():
    table = tuple(Layer(f"layer_{i}", ()) for i in range(100))
    with pytest.raises(L3RSError, match=r"it knows layer_0, .*, layer_5 and 94 more$"):
        match_layers(table, {"x": np.zeros(())})


def test_match_other_shape():
    with pytest.raises(L3RSError) as error:
        match_layers(TABLE, {"dense": {"kernel": np.zeros((3, 4))}})
    assert str(error.value) == "layer 'dense/kernel' has shape (3, 4); this optimizer was meta-trained on (4, 3)"


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
    """Equal, hashable, frozen: it can be a static argument of jit."""
    assert Spec.create(PARAMS) == Spec.create(PARAMS)
    assert hash(Spec.create(PARAMS)) == hash(Spec.create(PARAMS))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Spec.create(PARAMS).step = "relative"


# Every field other than its default: nothing may get lost on the way through JSON.
UNUSUAL = {
    "directions": ("sgd", {"name": "adam", "b1": 0.5, "eps": 1e-6}),
    "hidden": (5,),
    "embedding_dim": 3,
    "step": "relative",
    "step_scale": 0.1,
    "step_gain": 1.0,
    "mix_bias": -1.0,
    "loss_decays": (0.1, 0.2, 0.3),
    "norm_decays": (0.0, 0.5),
    "absolute_time": True,
}


def test_json_round_trip():
    default, spec = Spec.create(PARAMS), Spec.create(PARAMS, **UNUSUAL)
    for field in dataclasses.fields(Spec):
        assert field.name == "layers" or getattr(spec, field.name) != getattr(default, field.name)
    for each in (default, spec, Spec.create(PARAMS, hidden=())):
        assert Spec.from_json(json.loads(json.dumps(each.to_json()))) == each


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
        ({"step": "abs"}, "spec.step is 'abs'; allowed are 'rms' and 'relative'"),
        ({"step_scale": 0.0}, "spec.step_scale is 0.0; it must be > 0"),
        ({"step_scale": -1.0}, "spec.step_scale is -1.0; it must be > 0"),
        ({"step_scale": float("nan")}, "spec.step_scale is nan; it must be a finite number"),
        ({"loss_decays": (0.9,)}, "spec.loss_decays needs two or more decays, spec.norm_decays exactly two"),
        ({"norm_decays": (0.1, 0.2, 0.3)}, "spec.loss_decays needs two or more decays, spec.norm_decays exactly two"),
        ({"loss_decays": (0.5, 1.0)}, "spec.loss_decays and spec.norm_decays must lie in [0, 1)"),
        ({"norm_decays": (-0.1, 0.5)}, "spec.loss_decays and spec.norm_decays must lie in [0, 1)"),
        ({"hidden": (4, 0)}, "spec.hidden is (4, 0); it must hold whole numbers ≥ 1"),
        ({"embedding_dim": 0}, "spec.embedding_dim is 0; it must hold whole numbers ≥ 1"),
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

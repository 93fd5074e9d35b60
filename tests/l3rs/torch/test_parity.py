"""The PyTorch optimizer takes the same steps as the JAX optimizer."""

import copy
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.torch import L3RS, flat, match_layers, passes
from tests.l3rs.torch.common import (
    ALL,
    NAMES,
    PARITY,
    SHAPES,
    assert_near,
    assert_parity_of,
    assert_same,
    checkpoint,
    give_gradients,
    nested,
    normal,
    parameters,
    random_theta,
    torch_layout,
    train,
    values,
)


def assert_parity(
    directions, spoil=lambda *step_grads_loss: step_grads_loss[1:], steps=50, paths=tuple(SHAPES), **fields
):
    """Both optimizers, from the same start, given the same gradients and losses; past their horizon, too."""
    theta, spec = checkpoint(directions=directions, **fields)
    arrays = {path: normal(SHAPES, 0, 0.3)[path] for path in paths}
    params = {name: param for name, param in parameters().items() if name in {NAMES[path] for path in paths}}
    ours = L3RS(params.items(), (theta, spec), total_steps=40)
    tx = l3rs.learned_optimizer(theta, spec, total_steps=40)
    reference, update = nested(arrays), jax.jit(tx.update)
    state = tx.init(reference)
    order = [NAMES[layer.path] for layer in l3rs.trees.layers_of(reference)]
    rng = np.random.default_rng(1)
    with warnings.catch_warnings(action="ignore"):
        for step in range(steps):
            scale = 10 ** rng.uniform(-2, 2)
            grads = normal({path: SHAPES[path] for path in paths}, 100 + step, scale)
            grads, loss = spoil(step, grads, np.float32(3 * np.exp(-step / 20) + 0.1 * rng.normal()))
            updates, state = update(nested(grads), state, reference, value=loss)
            reference = optax.apply_updates(reference, updates)
            for path, grad in grads.items():
                params[NAMES[path]].grad = torch_layout(path, grad)
            ours.step(loss=float(loss))
            expected = {
                NAMES[path]: torch_layout(path, reference[path.split("/")[0]][path.split("/")[1]]) for path in paths
            }
            assert_near(values(params), expected, PARITY)
            decided = np.array([ours.state[params[name]]["step_norm"] for name in order])
            np.testing.assert_allclose(decided, state.step_norm, rtol=2 * PARITY)  # e^(2 out): twice a feature's error
            mix = np.stack([ours.state[params[name]]["mix"] for name in order])
            np.testing.assert_allclose(mix, state.mix, rtol=2 * PARITY)


@pytest.mark.parametrize(
    ("directions", "fields"),
    [
        (("adam", "sgd"), {}),
        (("adam", "sgd"), {"step": "relative", "step_scale": 0.02, "absolute_time": True}),
        (ALL, {}),
        (
            ({"name": "adam", "eps_root": 1e-6}, "momentum"),
            {"loss_decays": (0.5, 0.9, 0.99), "norm_decays": (0.0, 0.9)},
        ),
        (
            ("adam", "first_moment", "sgd", "weight_decay"),
            {"form": 2, "step": "initial", "step_scale": 0.02, "horizon_power": 0.2},
        ),
        (
            ("momentum", "lion", "rmsprop"),
            {"form": 2, "step": "relative", "step_scale": 0.02, "adaptation": 0.01, "layer_gain": 4.0},
        ),
        (("adam", "sgd"), {"form": 2, "step": "initial", "step_scale": 0.02, "decrease_limit": 1e-3}),
        (
            ("adam", "sgd"),
            {
                "form": 2,
                "step": "initial",
                "step_scale": 0.003,
                "leverage_floor": 30.0,
                "paths": ("conv/kernel", "conv/bias"),
            },
        ),
        (
            ("sgd", "adam", "weight_decay"),
            {
                "form": 2,
                "step": "initial",
                "step_scale": 0.02,
                "mix_bias": -1.0,
                "decay_share": 0.1,
                "paths": ("conv/kernel", "conv/bias"),
            },
        ),
    ],
    ids=[
        "adam sgd",
        "relative",
        "all",
        "eps_root",
        "form 2",
        "form 2, relative",
        "form 2, limited decrease",
        "form 2, leverage",
        "form 2, less decay",
    ],
)
def test_parity(directions, fields):
    assert_parity(directions, **fields)


@pytest.mark.parametrize(
    "directions",
    [("lion",), ("rmsprop",), ("momentum",), ("sgd",), ("adam", "weight_decay"), ({"name": "adam", "eps": 0.0},)],
    ids=str,
)
def test_parity_of_each_direction(directions):
    assert_parity(directions, steps=15)


@pytest.mark.parametrize("largest", [0, 12, flat.LARGEST], ids=str)
def test_parity_in_small_pieces(monkeypatch, largest):
    """A step is the same in whatever pieces it is done: here of at most 10 elements, several to a layer or flat."""
    monkeypatch.setitem(passes.PIECE, "cpu", 10)
    monkeypatch.setattr(flat, "LARGEST", largest)
    assert_parity(ALL, steps=10)


@pytest.mark.parametrize("largest", [0, flat.LARGEST], ids=str)
def test_parity_with_numbers_that_are_not_finite(monkeypatch, largest):
    """A layer with a NaN or a gradient too large to square, a loss of infinity: the results are JAX's."""

    def spoil(step, grads, loss):
        if step == 2:
            grads["dense/kernel"][1, 1] = np.nan
        if step == 4:
            grads["conv/kernel"][:] = 1e30
        if step in (0, 5):
            loss = np.float32(np.inf)
        return grads, loss

    monkeypatch.setattr(flat, "LARGEST", largest)
    assert_parity(ALL, spoil, steps=10)


def test_parity_with_frozen_layers():
    """Where JAX is not given a leaf, PyTorch finds no gradient."""
    assert_parity(("adam", "sgd"), steps=10, paths=("conv/kernel", "embed/embedding"))
    both, some = parameters(), parameters()
    all_of_it = L3RS(both.items(), checkpoint(), 10)
    for name in ("conv.bias", "dense.weight", "norm.weight"):
        both[name].requires_grad_(False)
    subset = {name: some[name] for name in ("conv.weight", "embed.weight")}
    part_of_it = L3RS(subset.items(), checkpoint(), 10)
    for i in range(3):
        give_gradients(subset, i)
        for name, param in subset.items():
            both[name].grad = param.grad.clone()
        all_of_it.step(loss=1.0)
        part_of_it.step(loss=1.0)
    assert_same({name: values(both)[name] for name in subset}, values(subset))
    assert_same({name: values(both)[name] for name in ("conv.bias",)}, {"conv.bias": values(parameters())["conv.bias"]})
    assert set(all_of_it.state) == {both["conv.weight"], both["embed.weight"]}


def test_bfloat16_parity():
    """Ten steps: the same bfloat16 numbers, but for a rounding here and there."""
    theta, spec = checkpoint()
    params, tx = parameters(dtype=torch.bfloat16), l3rs.learned_optimizer(theta, spec, 40)
    ours = L3RS(params.items(), (theta, spec), 40)
    reference = jax.tree.map(lambda x: x.astype(jnp.bfloat16), nested(normal(SHAPES, 0, 0.3)))
    state, update = tx.init(reference), jax.jit(tx.update)
    for step in range(10):
        grads = normal(SHAPES, step)
        updates, state = update(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), nested(grads)), state, reference, value=1.0
        )
        reference = optax.apply_updates(reference, updates)
        for path, grad in grads.items():
            params[NAMES[path]].grad = torch_layout(path, grad).bfloat16()
        ours.step(loss=1.0)
    for path, name in NAMES.items():
        module, leaf = path.split("/")
        expected = torch_layout(path, reference[module][leaf].astype(jnp.float32))
        same = (params[name].float() == expected).float().mean()
        assert same > 0.9, name
        torch.testing.assert_close(params[name].float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"form": 2, "step": "initial"}], ids=["form 1", "form 2"])
def test_unknown_parameters_have_the_mean_embedding(fields):
    """Parity with JAX for a network that has a layer more, and one of another shape."""
    theta, spec = checkpoint({path: shape for path, shape in SHAPES.items() if path != "norm/scale"}, **fields)
    spec = dataclasses.replace(
        spec, layers=tuple(l3rs.Layer(x.path, (8, 9) if x.path == "dense/kernel" else x.shape) for x in spec.layers)
    )
    params = parameters()
    found = match_layers(spec, params.items(), on_unknown="mean")
    assert {layer.name: layer.source for layer in found} == {
        **{name: path for path, name in NAMES.items()},
        "dense.weight": "mean",
        "norm.weight": "mean",
    }
    ours = assert_parity_of((theta, spec), on_unknown="mean")
    assert ours.param_groups[0]["layers"] == ["conv/kernel", "conv/bias", None, "embed/embedding", None]
    resumed = parameters()
    again = L3RS(resumed.items(), (theta, spec), 40, on_unknown="mean")
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    train(again, resumed, 1)
    with pytest.raises(l3rs.L3RSError, match=r"layer 'dense\.weight', in the checkpoint 'dense/kernel', has shape"):
        L3RS(params.items(), (theta, spec), 10)


def test_parity_with_descriptors():
    """For a network that the spec does not know; the state is saved and copied as any other."""
    theta, spec = checkpoint({"other/kernel": (2, 2)}, embedding="descriptor")
    ours = assert_parity_of((theta, spec))
    assert ours.param_groups[0]["layers"] == list(NAMES.values())
    assert {layer.source for layer in match_layers(spec, parameters().items())} == {"descriptor"}
    resumed = parameters()
    again = L3RS(resumed.items(), (theta, spec), 40)
    again.load_state_dict(copy.deepcopy(ours.state_dict()))
    params, copied = copy.deepcopy((resumed, again))
    train(again, resumed, 2)
    train(copied, params, 2)
    assert_same(values(params), values(resumed))


def test_descriptors_count_where_the_spec_has_layers_of_the_same_names():
    """A parameter at the top of a model has the same name in both frameworks, with and without a table."""
    array = normal({"w": (3, 4)}, 0)["w"]
    spec = l3rs.Spec.create({"w": array}, embedding="descriptor", hidden=(6,))
    theta = random_theta(spec)
    param = torch.nn.Parameter(torch.tensor(array.T.copy()))
    opt, tx = L3RS([("w", param)], (theta, spec), 10), l3rs.learned_optimizer(theta, spec, 10)
    reference = {"w": jnp.asarray(array)}
    updates, _ = tx.update({"w": jnp.ones((3, 4))}, tx.init(reference), reference, value=1.0)
    param.grad = torch.ones(4, 3)
    opt.step(loss=1.0)
    assert_near({"w": param.detach().T}, {"w": torch.tensor(np.array(reference["w"] + updates["w"]))}, PARITY)


FORM_2 = {"directions": ("adam", "first_moment", "sgd", "weight_decay"), "form": 2, "step": "initial"}


def form_2_run(make_groups, frozen=(), steps=6):
    """The parameters after some steps with the same gradients, however they are passed."""
    made = checkpoint(embedding="descriptor", **FORM_2)
    params = parameters()
    for name in frozen:
        params[name].requires_grad_(False)
    opt = L3RS(make_groups(params), made, total_steps=10)
    for step in range(steps):
        for i, (name, param) in enumerate(sorted(params.items())):
            if name not in frozen:
                param.grad = torch.from_numpy(np.random.default_rng(100 * step + i).normal(size=param.shape)).float()
        opt.step(loss=2.0 / (1 + step))
    return values(params)


def test_form_2_takes_the_same_steps_however_parameters_are_passed():
    """In the model's order, reversed, split into groups; frozen ones passed or left out."""
    alone = form_2_run(lambda params: params.items())

    def groups(params):
        matrices = [(name, p) for name, p in params.items() if p.dim() >= 2]
        return [{"params": [(n, p) for n, p in params.items() if p.dim() < 2]}, {"params": matrices}]

    assert_near(form_2_run(lambda params: reversed(params.items())), alone, PARITY)
    assert_near(form_2_run(groups), alone, PARITY)
    frozen = sorted(parameters())[:2]
    passed = form_2_run(lambda params: params.items(), frozen)
    left_out = form_2_run(lambda params: [(n, p) for n, p in params.items() if n not in frozen], frozen)
    assert_near(passed, left_out, PARITY)


def test_form_2_without_a_gradient_does_not_move():
    """A parameter whose gradient is exactly zero from the start, as that of LoRA's A: weight decay does not move it."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(embedding="descriptor", **FORM_2), total_steps=10)
    still, *moving = params
    before = values(params)
    for step in range(4):
        give_gradients(params, step)
        params[still].grad.zero_()
        opt.step(loss=1.0)
    after = values(params)
    np.testing.assert_array_equal(after[still], before[still])
    assert all((after[name] != before[name]).any() for name in moving)


@pytest.mark.parametrize("directions", [("adam", "sgd"), ALL], ids=["in place", "aside"])
@pytest.mark.parametrize("form", [1, 2])
def test_weight_decay(directions, form):
    """The same in both optimizers, and for half of the layers only: as a param group and as a mask."""
    fields = {"step": "initial", "embedding": "descriptor"} if form == 2 else {}
    theta, spec = checkpoint(directions=directions, form=form, **fields)
    params, reference = parameters(), nested(normal(SHAPES, 0, 0.3))
    decays = {name: name.startswith(("conv", "norm")) for name in params}
    groups = [
        {"params": [(name, params[name]) for name in params if decays[name] == each], "weight_decay": 0.5 * each}
        for each in (True, False)
    ]
    with warnings.catch_warnings(action="ignore"):
        ours = L3RS(groups, (theta, spec), 40)
    mask = {"conv": True, "norm": True, "dense": False, "embed": False}
    tx = l3rs.learned_optimizer(theta, spec, 40, weight_decay=0.5, mask=mask)
    state, update = tx.init(reference), jax.jit(tx.update)
    plain, _ = jax.jit(l3rs.learned_optimizer(theta, spec, 40).update)(reference, state, reference, value=1.0)
    decayed, _ = update(reference, state, reference, value=1.0)
    assert not np.allclose(plain["conv"]["kernel"], decayed["conv"]["kernel"])
    assert np.array_equal(plain["dense"]["kernel"], decayed["dense"]["kernel"])
    for step in range(6):
        grads = normal(SHAPES, 100 + step)
        updates, state = update(nested(grads), state, reference, value=np.float32(2 / (1 + step)))
        reference = optax.apply_updates(reference, updates)
        for path, grad in grads.items():
            params[NAMES[path]].grad = torch_layout(path, grad)
        with warnings.catch_warnings(action="ignore"):
            ours.step(loss=2 / (1 + step))
    found = {path: reference[path.split("/")[0]][path.split("/")[1]] for path in SHAPES}
    assert_near(values(params), {NAMES[path]: torch_layout(path, x) for path, x in found.items()}, PARITY)


def test_weight_decay_keyword():
    opt = assert_parity_of(checkpoint(), weight_decay=0.3)
    assert opt.param_groups[0]["weight_decay"] == 0.3

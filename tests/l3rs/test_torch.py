"""`l3rs.torch`: the numbers of the JAX optimizer, and the behaviour of a `torch.optim.Optimizer`."""

import copy
import dataclasses
import doctest
import io
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

import l3rs  # noqa: E402
import l3rs.torch  # noqa: E402
from l3rs.torch import L3RS, match_layers  # noqa: E402

ROOT = Path(__file__).parents[2]

# Two float32 implementations after 50 steps, per tensor and relative to its norm.
PARITY = 1e-5

# All kinds of tensors, in flax's layout and the names of both.
SHAPES = {
    "conv/kernel": (3, 3, 2, 4),
    "conv/bias": (4,),
    "dense/kernel": (8, 5),
    "embed/embedding": (7, 3),
    "norm/scale": (6,),
}
NAMES = {
    "conv/kernel": "conv.weight",
    "conv/bias": "conv.bias",
    "dense/kernel": "dense.weight",
    "embed/embedding": "embed.weight",
    "norm/scale": "norm.weight",
}
ALL = (
    {"name": "adam", "b1": 0.5, "b2": 0.9},
    "sgd",
    "lion",
    "rmsprop",
    {"name": "momentum", "nesterov": True},
    "weight_decay",
)


def normal(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.normal(size=shape)).astype(np.float32) for path, shape in shapes.items()}


def nested(arrays):
    """{"conv/kernel": x} as the pytree {"conv": {"kernel": x}}."""
    tree = {}
    for path, array in arrays.items():
        module, leaf = path.split("/")
        tree.setdefault(module, {})[leaf] = jnp.asarray(array)
    return tree


def torch_layout(path, array):
    """Flax's [in, out] and [H, W, in, out] as torch's [out, in] and [out, in, H, W]."""
    array = np.asarray(array)
    if path.endswith("kernel"):
        array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return torch.tensor(np.ascontiguousarray(array))


def random_theta(spec, seed=0, scale=0.4):
    """Meta-parameters far from their start: every layer decides something else."""
    shapes = jax.eval_shape(lambda: l3rs.init_meta_params(jax.random.key(0), spec))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def checkpoint(shapes=None, directions=("adam", "sgd"), **fields):
    """(theta, spec), small."""
    tree = nested({path: np.zeros(shape, np.float32) for path, shape in (shapes or SHAPES).items()})
    spec = l3rs.Spec.create(tree, directions, **{"hidden": (6,), **fields})
    return random_theta(spec), spec


def parameters(seed=0, shapes=None, dtype=torch.float32):
    """{torch name: Parameter}"""
    arrays = normal(shapes or SHAPES, seed, 0.3)
    return {
        NAMES.get(path, path.replace("/", ".")): torch.nn.Parameter(torch_layout(path, array).to(dtype))
        for path, array in arrays.items()
    }


def give_gradients(params, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for param in params.values():
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def train(opt, params, steps, first=0):
    """Some steps with gradients and losses that depend on the step's number only."""
    for i in range(first, first + steps):
        give_gradients(params, i)
        opt.step(loss=2.0 / (1 + i))


def values(params):
    return {name: param.detach().clone() for name, param in params.items()}


def assert_same(a, b):
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_near(a, b, tolerance=1e-6):
    """Per tensor, relative to its norm."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.linalg.vector_norm(a[name] - b[name]) <= tolerance * torch.linalg.vector_norm(b[name]), name


# The numbers of the JAX optimizer


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
    order = [NAMES[layer.path] for layer in l3rs.spec.layers_of(reference)]
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
    ],
    ids=["adam sgd", "relative", "all", "eps_root"],
)
def test_parity(directions, fields):
    assert_parity(directions, **fields)


@pytest.mark.parametrize("directions", [("lion",), ("rmsprop",), ("momentum",), ("adam", "weight_decay")], ids=str)
def test_parity_of_each_direction(directions):
    assert_parity(directions, steps=15)


def test_parity_in_small_pieces(monkeypatch):
    """A step is the same in whatever pieces it is done: here of at most 10 elements, several to a layer."""
    monkeypatch.setitem(l3rs.torch._PIECE, "cpu", 10)
    assert_parity(ALL, steps=10)


def test_parity_with_numbers_that_are_not_finite():
    """A layer with a NaN or a gradient too large to square, a loss of infinity: what JAX does with them."""

    def spoil(step, grads, loss):
        if step == 2:
            grads["dense/kernel"][1, 1] = np.nan
        if step == 4:
            grads["conv/kernel"][:] = 1e30
        if step in (0, 5):
            loss = np.float32(np.inf)
        return grads, loss

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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_layer_with_a_bad_gradient_stays(bad):
    """It stays, bit for bit, and the others do as they would; its moments see zeros."""
    params, zeroed = parameters(), parameters()
    opt, reference = (L3RS(each.items(), checkpoint(directions=ALL), 10) for each in (params, zeroed))
    for each, optimizer in ((params, opt), (zeroed, reference)):
        train(optimizer, each, 2)
        give_gradients(each, 2)
    params["dense.weight"].grad[0, 0] = bad
    zeroed["dense.weight"].grad.zero_()
    before = values(params)
    opt.step(loss=1.0)
    reference.step(loss=1.0)
    after = values(params)
    assert torch.equal(after["dense.weight"], before["dense.weight"])
    others = [name for name in params if name != "dense.weight"]
    assert_same({name: after[name] for name in others}, {name: values(zeroed)[name] for name in others})
    for key, moment in opt.state[params["dense.weight"]].items():
        if "/" in key:
            assert torch.equal(moment, reference.state[zeroed["dense.weight"]][key]), key
    train(opt, params, 1, first=3)
    assert not torch.equal(values(params)["dense.weight"], before["dense.weight"])


def test_direction_too_large_to_square():
    """The gradient's square is finite, that of the momentum it adds up to is not: the layer stays."""
    param = torch.nn.Parameter(torch.ones(4))
    opt = L3RS([param], checkpoint({"a/b": (4,)}, ("adam", "momentum")), 10)
    moved = []
    for _ in range(3):
        before, param.grad = param.detach().clone(), torch.full((4,), 6e18)
        opt.step(loss=1.0)
        assert bool(param.isfinite().all())
        moved.append(not torch.equal(param.detach(), before))
    assert moved == [True, False, False]


def test_parameters_that_are_not_finite_stay_as_they_are():
    """With the parameters themselves among the directions: 0 · inf would be NaN."""
    start = torch.tensor([1.0, float("inf"), 2.0, 3.0])
    param = torch.nn.Parameter(start.clone())
    opt = L3RS([param], checkpoint({"a/b": (4,)}, ("adam", "weight_decay")), 10)
    train(opt, {"w": param}, 2)
    assert torch.equal(param.detach(), start)


def even_checkpoint(shape, **fields):
    """Half gradient, half parameters, λ at its base: a network whose output layer is zero."""
    theta, spec = checkpoint({"a/b": shape}, ("sgd", "weight_decay"), mix_bias=0.0, **fields)
    return {**theta, "dense_1": jax.tree.map(np.zeros_like, theta["dense_1"])}, spec


@pytest.mark.parametrize(("tilt", "expected"), [(0.0, 0.0), (1e-4, 0.05), (0.5, 1.0)], ids=str)
def test_directions_that_cancel_are_not_blown_up(tilt, expected):
    """The mixture has norm tilt/2; below 1e-3 of the directions' length the update shrinks with it."""
    param = torch.nn.Parameter(torch.tensor([1.0, 0.0]))
    param.grad = torch.tensor([-1.0, tilt])
    opt = L3RS([param], even_checkpoint((2,), step_scale=1.0), 10)
    opt.step(loss=1.0)
    moved = torch.linalg.vector_norm(param.detach() - torch.tensor([1.0, 0.0])) / opt.state[param]["step_norm"]
    # the mixture itself is a difference of units, good to 6e-8, taken 1e3 times: 6e-5
    assert moved.item() == pytest.approx(expected, abs=2e-4)


def test_relative_step_of_a_layer_of_zeros():
    """It counts as one of RMS 1e-3."""
    param = torch.nn.Parameter(torch.zeros(5))
    param.grad = torch.ones(5)
    L3RS([param], even_checkpoint((5,), step="relative", step_scale=0.02), 10).step(loss=1.0)
    torch.testing.assert_close(param.detach(), torch.full((5,), -0.02 * 1e-3))


def test_zero_gradients_move_nothing():
    params = parameters()
    before, opt = values(params), L3RS(params.items(), checkpoint(), 10)
    for param in params.values():
        param.grad = torch.zeros_like(param)
    opt.step(loss=1.0)
    assert_same(values(params), before)


def test_empty_and_scalar_parameters():
    params = {"a.b": torch.nn.Parameter(torch.tensor(0.0)), "a.c": torch.nn.Parameter(torch.zeros(0, 3))}
    opt = L3RS(params.items(), checkpoint({"a/b": (), "a/c": (0, 3)}), 10)
    give_gradients(params, 0)
    params["a.b"].grad.fill_(-3.0)
    opt.step(loss=1.0)
    assert params["a.b"].item() == pytest.approx(
        opt.state[params["a.b"]]["step_norm"].item(), rel=1e-5
    )  # uphill is down


# Types and layouts of parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_precisions(dtype):
    """Statistics are float32, an update is that of float32 parameters, rounded once."""
    params = parameters(dtype=dtype)
    exact = {name: torch.nn.Parameter(param.detach().float()) for name, param in params.items()}
    before = values(params)
    opt, reference = (L3RS(each.items(), checkpoint(directions=ALL), 10) for each in (params, exact))
    give_gradients(params, 0)
    for name, param in params.items():
        exact[name].grad = param.grad.float()
    start = values(exact)
    opt.step(loss=torch.tensor(1.5, dtype=dtype))
    reference.step(loss=1.5)
    update = {name: (param - start[name]).to(dtype) for name, param in values(exact).items()}
    # the float32 update is known from a difference here: good to 2^-24 of the parameter
    bits = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-22}[dtype]
    assert_near(values(params), {name: before[name] + update[name] for name in params}, 2 * bits)
    assert any(not torch.equal(param.detach(), before[name]) for name, param in params.items())
    for state in opt.state.values():
        assert {x.dtype for x in state.values() if isinstance(x, torch.Tensor)} == {torch.float32}


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


def strided(x):
    """The same numbers with gaps between them."""
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1])
    return wide[..., ::2].copy_(x)


@pytest.mark.parametrize("layout", ["channels_last", "gaps", "expanded gradient", "transposed gradient"])
def test_memory_layouts(layout, monkeypatch):
    """A layout is no part of the mathematics. Pieces are small: a layer has several."""
    monkeypatch.setitem(l3rs.torch._PIECE, "cpu", 16)
    plain = parameters(1)["conv.weight"]
    start = plain.detach().clone()
    if layout == "channels_last":
        start = start.to(memory_format=torch.channels_last)
    elif layout == "gaps":
        start = strided(start)
    other = torch.nn.Parameter(start)
    assert torch.equal(other, plain)
    spec = checkpoint({"conv/kernel": SHAPES["conv/kernel"]})
    ours, reference = L3RS([other], spec, 10), L3RS([plain], spec, 10)
    for i in range(3):
        plain.grad = torch.randn(plain.shape, generator=torch.Generator().manual_seed(i))
        if layout == "expanded gradient":
            plain.grad = plain.grad[:1].expand_as(plain)
        other.grad = plain.grad
        if layout == "transposed gradient":
            other.grad = plain.grad.transpose(0, 3).contiguous().transpose(0, 3)
            assert not other.grad.is_contiguous()
        if layout == "channels_last" and i != 1:
            other.grad = plain.grad.to(memory_format=torch.channels_last)
        before = other.detach().clone()
        ours.step(loss=1.0)
        reference.step(loss=1.0)
        assert not torch.equal(other.detach(), before)
    assert other.stride() == start.stride()
    assert_near({"w": other.detach()}, {"w": plain.detach()})


def test_channels_last_is_worked_on_in_pieces():
    """As flat views: nothing of a layer's size is copied."""
    x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    pieces = list(l3rs.torch._pieces((x, x, x), 16))
    assert [piece[0].shape for piece in pieces] == [(16,)] * 6
    for param, grad, _ in pieces:
        param += 1
        assert torch.equal(grad, torch.ones(16))
    assert torch.equal(x, torch.ones(2, 3, 4, 4))


def test_default_dtype_and_device_are_left_alone():
    """A user's defaults are for the user's tensors; the meta device stands for one that is not the CPU."""
    params, reference = parameters(), parameters()
    train(L3RS(reference.items(), checkpoint(directions=ALL), 10), reference, 2)
    opt = L3RS(params.items(), checkpoint(directions=ALL), 10)
    gradients = []
    for i in range(2):
        give_gradients(params, i)
        gradients.append({name: param.grad for name, param in params.items()})
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        for i, grads in enumerate(gradients):
            for name, grad in grads.items():
                params[name].grad = grad
            opt.step(loss=2.0 / (1 + i))
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert_same(values(params), values(reference))


def test_state_size():
    """Adam's two moments and next to nothing: 2.01 numbers a parameter."""
    shapes = {
        f"layer_{i}/{leaf}": shape for i in range(10) for leaf, shape in (("kernel", (100, 99)), ("bias", (100,)))
    }
    params = parameters(shapes=shapes)
    opt = L3RS(params.items(), checkpoint(shapes), 10)
    train(opt, params, 1)
    held = sum(x.numel() for state in opt.state.values() for x in state.values() if isinstance(x, torch.Tensor))
    n = sum(param.numel() for param in params.values())
    assert n == 100_000
    assert 2 * n <= held <= 2.01 * n


# A torch.optim.Optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_continues_bit_for_bit(dtype):
    params = parameters(dtype=dtype)
    opt = L3RS(params.items(), checkpoint(directions=ALL), 10)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save({"params": values(params), "opt": opt.state_dict()}, file)
    train(opt, params, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {name: torch.nn.Parameter(x) for name, x in saved["params"].items()}
    opt = L3RS(resumed.items(), checkpoint(directions=ALL), 10)
    opt.load_state_dict(saved["opt"])
    train(opt, resumed, 3, first=3)
    assert_same(values(resumed), values(params))
    assert opt.param_groups[0]["shared"]["step"] == 6


def test_state_dict_of_another_memory_layout():
    """Moments saved for a contiguous weight go on beside a channels_last one."""
    spec = checkpoint({"conv/kernel": SHAPES["conv/kernel"]})
    plain = parameters(1)["conv.weight"]
    opt = L3RS([plain], spec, 10)
    train(opt, {"w": plain}, 2)
    other = torch.nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    resumed = L3RS([other], spec, 10)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(2):
        give_gradients({"w": plain}, i)
        other.grad = plain.grad.to(memory_format=torch.channels_last)
        opt.step(loss=1.0)
        resumed.step(loss=1.0)
    assert_near({"w": other.detach()}, {"w": plain.detach()})


def test_state_dict_is_a_copy_of_the_shared_state():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    train(opt, params, 1)
    saved = opt.state_dict()
    train(opt, params, 1, first=1)
    assert saved["param_groups"][0]["shared"]["step"] == 1


def test_state_dict_of_another_optimizer():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    other = L3RS([torch.nn.Parameter(torch.ones(4))], checkpoint({"a/b": (4,)}), 10)
    for state_dict in (torch.optim.Adam(params.values()).state_dict(), other.state_dict()):
        with pytest.raises(l3rs.L3RSError, match="the state dict is not one of an L3RS optimizer with these layers"):
            opt.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"directions": ("adam", "lion", "sgd")},
            r"has log_norms \(2, 4\) for .* this optimizer has 1/lion/exp_avg \(",
        ),
        (
            {"directions": ("adam", "weight_decay", "sgd")},
            r"log_norms \(2, 4\).* this optimizer has log_norms \(2, 5\)$",
        ),
        ({"loss_decays": (0.5, 0.9, 0.99)}, "^the state dict has 2 averages of the loss; this optimizer has 3$"),
    ],
    ids=["directions", "norms", "losses"],
)
def test_state_dict_of_another_form(fields, words):
    """It is refused, and the optimizer goes on as if it had not been tried."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(embedding="descriptor"), 10)
    theirs = parameters()
    other = L3RS(theirs.items(), checkpoint(embedding="descriptor", **fields), 10)
    train(opt, params, 1)
    train(other, theirs, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(l3rs.L3RSError, match=words):
        other.load_state_dict(opt.state_dict())
    assert other.state_dict()["param_groups"] == before["param_groups"]
    train(other, theirs, 1, first=1)


def test_state_dict_of_a_wider_network():
    theta, spec = checkpoint(embedding="descriptor")
    small, wide = ({"w": torch.nn.Parameter(torch.ones(n, 3))} for n in (2, 5))
    opt, other = L3RS(small.items(), (theta, spec), 10), L3RS(wide.items(), (theta, spec), 10)
    train(opt, small, 1)
    with pytest.raises(l3rs.L3RSError, match=r"for parameter 0 \(5, 3\); this optimizer has 0/adam/exp_avg \(5, 3\)"):
        other.load_state_dict(opt.state_dict())


def test_another_horizon_and_other_meta_parameters_are_said():
    theta, spec = checkpoint()
    opt = L3RS(parameters().items(), (theta, spec), 10)
    saved = opt.state_dict()
    with warnings.catch_warnings(action="error"):
        L3RS(parameters().items(), (theta, spec), 10).load_state_dict(saved)
    longer = L3RS(parameters().items(), (theta, spec), 20)
    with pytest.warns(UserWarning, match="saved with total_steps=10, not 20; those of this optimizer count") as found:
        longer.load_state_dict(saved)
    assert len(found) == 1
    assert longer.state_dict()["param_groups"][0]["shared"]["total_steps"] == 20
    with pytest.warns(UserWarning, match="saved with other meta-parameters"):
        L3RS(parameters().items(), (random_theta(spec, seed=1), spec), 10).load_state_dict(saved)


def test_state_that_was_moved():
    """Lightning moves every tensor of a state to the parameters' device, or dtype."""
    runs = []
    for moves in (False, True):
        params = parameters()
        opt = L3RS(params.items(), checkpoint(), 10)
        train(opt, params, 2)
        for state in opt.state.values() if moves else ():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = Elsewhere(value) if key in opt._small_state() else value
        train(opt, params, 2, first=2)
        runs.append(values(params))
    assert_same(*runs)


class Elsewhere(torch.Tensor):
    """As a tensor on another device: it has no `numpy` before it has been fetched."""

    @staticmethod
    def __new__(cls, x):
        return x.as_subclass(cls)

    def numpy(self, **_):
        raise TypeError("can't convert device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def float(self):
        return self


def test_deepcopy_and_pickle_protocol():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    train(opt, params, 2)
    copied_params, copied = copy.deepcopy((params, opt))
    train(opt, params, 2, first=2)
    assert not torch.equal(copied_params["conv.weight"], params["conv.weight"])
    train(copied, copied_params, 2, first=2)
    assert_same(values(copied_params), values(params))


def deltas(lr, **groups_lr):
    """How far each parameter goes in one step."""
    params = parameters()
    before = values(params)
    named = [{"params": [item], "lr": groups_lr.get(item[0].replace(".", "_"), lr)} for item in params.items()]
    opt = L3RS(named, checkpoint(), 10)
    train(opt, params, 1)
    return {name: param - before[name] for name, param in values(params).items()}


def test_lr_is_a_factor_on_the_step():
    """Of each group; the difference of two parameters is good to 2^-23 of the parameter."""
    whole, half = deltas(1.0), deltas(0.5, norm_weight=0.0)
    assert torch.count_nonzero(half.pop("norm.weight")) == 0
    assert torch.count_nonzero(whole.pop("norm.weight")) > 0
    assert_near({name: 2 * delta for name, delta in half.items()}, whole, 1e-4)


def test_lr_schedulers():
    params, reference = parameters(), parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    fixed = L3RS(reference.items(), checkpoint(), 10, lr=torch.tensor(0.25))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.25)
    give_gradients(params, 0, scale=0.0)  # a step that moves nothing
    give_gradients(reference, 0, scale=0.0)
    opt.step(loss=1.0)
    fixed.step(loss=1.0)
    scheduler.step()
    train(opt, params, 1)
    train(fixed, reference, 1)
    assert_same(values(params), values(reference))
    assert opt.param_groups[0]["lr"] == 0.25


def test_param_groups_are_one_optimizer():
    """Groups and their order change nothing; each parameter's layer is said in its group."""
    params, grouped = parameters(), parameters()
    train(L3RS(params.items(), checkpoint(), 10), params, 3)
    items = list(grouped.items())
    opt = L3RS([{"params": items[3:]}, {"params": items[:3]}], checkpoint(), 10)
    train(opt, grouped, 3)
    assert_near(values(grouped), values(params))
    assert [group["layers"] for group in opt.param_groups] == [list(SHAPES)[3:], list(SHAPES)[:3]]


def test_step_with_a_closure():
    params, reference = parameters(), parameters()
    opt, other = (L3RS(each.items(), checkpoint(), 10) for each in (params, reference))

    def loss_of(params):
        return sum((param**2).sum() for param in params.values())

    def closure():
        opt.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    for _ in range(3):
        returned = opt.step(closure)
        other.zero_grad()
        loss = loss_of(reference)
        loss.backward()
        assert other.step(loss=loss) is loss
        assert torch.equal(returned, loss)
    assert_same(values(params), values(reference))
    assert params["conv.bias"].grad is not None


def test_observed_losses_are_averaged():
    """Gradient accumulation: of two micro-batches the mean, each only once."""
    params, reference = parameters(), parameters()
    opt, other = (L3RS(each.items(), checkpoint(), 10) for each in (params, reference))
    for i, losses in enumerate(((1.0, torch.tensor([3.0], requires_grad=True)), (np.float32(2.0), 5))):
        give_gradients(params, i)
        give_gradients(reference, i)
        for loss in losses:
            opt.observe(loss)
        assert opt.step() is None
        other.step(loss=sum(float(torch.as_tensor(loss).detach()) for loss in losses) / 2)
    assert_same(values(params), values(reference))
    assert opt.param_groups[0]["shared"] == other.param_groups[0]["shared"]
    with pytest.raises(l3rs.L3RSError):
        opt.step()


def test_an_observed_loss_is_what_it_was():
    """`loss /= 4` after it, the usual way to accumulate, is not the loss."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    give_gradients(params, 0)
    loss = torch.tensor(3.0)
    opt.observe(loss)
    loss /= 4
    opt.step()
    assert opt.param_groups[0]["shared"]["first_loss"] == 3.0


@pytest.mark.parametrize(("losses", "mean"), [([1.0, float("inf"), 3.0], 2.0), ([float("nan")], None)], ids=str)
def test_losses_that_are_not_finite_do_not_spoil_others(losses, mean):
    """A step that GradScaler skipped leaves its infinite loss behind."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    give_gradients(params, 0)
    for loss in losses:
        opt.observe(loss)
    opt.step()
    shared = opt.param_groups[0]["shared"]
    assert (shared["losses"], shared["first_loss"]) == ((0, 0.0) if mean is None else (1, mean))


def test_a_step_that_is_refused_leaves_no_loss_behind():
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    opt = L3RS(embedding.named_parameters(), checkpoint({"embed/embedding": (7, 3)}), 10)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(l3rs.L3RSError, match="is sparse"):
        opt.step(loss=100.0)
    embedding.weight.grad = embedding.weight.grad.to_dense()
    opt.step(loss=1.0)
    assert opt.param_groups[0]["shared"]["first_loss"] == 1.0


def test_a_batch_that_is_skipped():
    """Lightning's training_step may return None: there is neither a loss nor a gradient."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    before = values(params)
    assert opt.step(lambda: None) is None
    assert opt.param_groups[0]["shared"]["step"] == 0
    assert_same(values(params), before)


def test_observed_losses_go_before_a_closures():
    """Lightning's closure returns the loss of the last micro-batch, divided by their number."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    give_gradients(params, 0)

    def closure():
        opt.observe(3.0)
        return 0.5

    assert opt.step(closure) == 0.5
    assert opt.param_groups[0]["shared"]["first_loss"] == 3.0
    opt.step(lambda: 0.5)
    assert opt.param_groups[0]["shared"]["losses"] == 2


def test_everything_frozen():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    before = values(params)
    assert opt.step(loss=1.0) == 1.0
    assert_same(values(params), before)
    assert not opt.state
    assert opt.param_groups[0]["shared"]["step"] == 0


def test_add_param_group():
    """A layer that is thawed later starts its own statistics; the clock is the training's."""
    params = parameters()
    first = {name: param for name, param in params.items() if name != "dense.weight"}
    opt = L3RS(first.items(), checkpoint(), 10)
    train(opt, first, 2)
    opt.add_param_group({"params": [("dense.weight", params["dense.weight"])], "lr": 0.5})
    alone = {"dense.weight": torch.nn.Parameter(params["dense.weight"].detach().clone())}
    # at a layer's first step its averages are its norms, whatever their decays
    fresh = L3RS(alone.items(), checkpoint(norm_decays=(0.0, 0.0)), 10, lr=0.5)
    fresh.param_groups[0]["shared"] = dict(opt.param_groups[0]["shared"])
    give_gradients(params, 2)
    alone["dense.weight"].grad = params["dense.weight"].grad
    opt.step(loss=0.5)
    fresh.step(loss=0.5)
    assert_near({"dense.weight": params["dense.weight"].detach()}, values(alone))
    assert opt.param_groups[1]["layers"] == ["dense/kernel"]
    assert opt.state[params["dense.weight"]]["step"] == 1
    assert opt.param_groups[0]["shared"]["step"] == 3


def test_add_param_group_that_is_not_known():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    with pytest.raises(l3rs.L3RSError) as error:
        opt.add_param_group({"params": [("head.weight", torch.nn.Parameter(torch.zeros(2, 9)))]})
    assert str(error.value) == (
        "layer 'head.weight' (2, 9) is none that this optimizer was meta-trained on; no layer is left; "
        "on_unknown='mean' gives it the mean embedding"
    )
    assert len(opt.param_groups) == 1
    train(opt, params, 1)  # and it goes on


def test_add_param_group_under_another_name():
    params = parameters()
    opt = L3RS({name: p for name, p in params.items() if name != "dense.weight"}.items(), checkpoint(), 10)
    group = {"params": [("fc.weight", params["dense.weight"])], "rename": {"fc.weight": "dense/kernel"}}
    opt.add_param_group(group)
    assert "rename" in group  # the caller's own
    assert opt.param_groups[1]["layers"] == ["dense/kernel"]
    assert "rename" not in opt.state_dict()["param_groups"][1]


def test_horizon():
    """Past it, the optimizer warns once; None is what the checkpoint was meta-trained on."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 2)
    with warnings.catch_warnings(action="error"):
        train(opt, params, 2)
    with pytest.warns(UserWarning, match="step 3 is past total_steps=2") as found:
        train(opt, params, 2, first=2)
    assert len(found) == 1

    model = torch.nn.Sequential(torch.nn.Linear(196, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 10))
    assert L3RS(model.parameters(), ROOT / "checkpoints/digits-mlp").total_steps == 500


@pytest.mark.parametrize("total_steps", [0, -3, 0.5, float("nan"), "100", True, 10**10])
def test_total_steps_below_one(total_steps):
    with pytest.raises(l3rs.L3RSError) as error:
        L3RS(parameters().items(), checkpoint(), total_steps)
    assert str(error.value) == f"total_steps is {total_steps}; it must be a whole number ≥ 1"


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda opt: opt.step(),
            r"^L3RS reads the loss: call step\(loss=loss\), step\(closure\), or observe\(loss\) before step\(\)$",
        ),
        (lambda opt: opt.step(lambda: None), "^L3RS reads the loss"),
        (lambda opt: opt.step(torch.tensor(1.0)), r"^step takes the loss by its name: step\(loss=loss\)$"),
        (lambda opt: opt.step(lambda: 1.0, loss=1.0), "^step takes a closure or a loss, not both$"),
        (lambda opt: opt.observe(torch.ones(2)), r"^the loss is torch.float32\[2\]; it must be one real number$"),
        (lambda opt: opt.observe("1"), "^the loss is '1'; it must be a number or a tensor of one$"),
    ],
)
def test_losses_that_are_none(call, words):
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    give_gradients(params, 0)
    before = values(params)
    with pytest.raises(l3rs.L3RSError, match=words):
        call(opt)
    assert_same(values(params), before)


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(7, 3, sparse=True)
    opt = L3RS(embedding.named_parameters(), checkpoint({"embed/embedding": (7, 3)}), 10)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(l3rs.L3RSError) as error:
        opt.step(loss=1.0)
    assert str(error.value) == (
        "the gradient of 'embed/embedding' (7, 3) is sparse; L3RS takes dense ones, e.g. of nn.Embedding(sparse=False)"
    )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([torch.zeros(4, dtype=torch.complex64)], r"^parameter \(4,\) is complex; L3RS takes real ones$"),
        (
            [torch.zeros(4), torch.zeros(5, device="meta")],
            "^parameters are on cpu, meta; they must all be on one device$",
        ),
    ],
    ids=["complex", "devices"],
)
def test_parameters_that_cannot_be(params, words):
    with pytest.raises(l3rs.L3RSError, match=words):
        L3RS([torch.nn.Parameter(param) for param in params], checkpoint({"a/b": (4,), "a/c": (5,)}), 10)


def test_other_errors_of_construction(tmp_path):
    theta, spec = checkpoint()
    for arguments, words in (
        (((theta, spec),), "total_steps is missing, and the checkpoint does not say"),
        (((theta, dataclasses.replace(spec, hidden=(7,))), 10), "its spec needs float32"),
        ((tmp_path / "none", 10), "is not an L3RS checkpoint"),
    ):
        with pytest.raises(l3rs.L3RSError, match=words):
            L3RS(parameters().items(), *arguments)
    with pytest.raises(l3rs.L3RSError, match=r"^lr is -1; it must be a number ≥ 0$"):
        L3RS(parameters().items(), (theta, spec), 10, lr=-1)


def test_every_direction_is_there():
    assert set(l3rs.torch._DIRECTIONS) == set(l3rs.directions.DIRECTIONS)
    spec = dataclasses.replace(checkpoint()[1], directions=(l3rs.Direction("adan"), l3rs.Direction("sgd")))
    with pytest.raises(l3rs.L3RSError, match="unknown direction 'adan'"):
        L3RS(parameters().items(), (random_theta(spec), spec), 10)


# Which parameter is which layer


def paths_of(table, params, rename=None, **rules):
    """`match` for a table and parameters given as {name: shape}; names that are numbers are none."""
    spec = l3rs.Spec(tuple(l3rs.Layer(path, shape) for path, shape in table.items()))
    tensors = [torch.empty(shape) for shape in params.values()]
    named = [(name, tensor) for name, tensor in zip(params, tensors, strict=True)]
    found = match_layers(spec, tensors if isinstance(next(iter(params)), int) else named, rename=rename, **rules)
    assert [layer.shape for layer in found] == list(params.values())
    assert [layer.row for layer in found] == [
        list(table).index(layer.source) if layer.source in table else None for layer in found
    ]
    return [layer.source for layer in found]


def test_match_by_name():
    """Whatever the order, with another word for a weight, inside DDP and torch.compile, and only some of them."""
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
    """It goes before the names and before the order; what it names is not given away again."""
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
            "layer 'head' (3, 2) is none that this optimizer was meta-trained on; the layers to choose from "
            "are a/kernel (2, 3), b/bias (3,), c/bias (3,); rename={name: layer} says which it is, "
            "on_unknown='mean' gives it the mean embedding",
        ),
        (
            {0: (3, 2), 1: (2, 3)},
            {},
            "layer 1 (2, 3) is none that this optimizer was meta-trained on; the layers to choose from "
            "are a/kernel (2, 3), b/bias (3,), c/bias (3,); rename={name: layer} says which it is, "
            "on_unknown='mean' gives it the mean embedding",
        ),
        (
            {"x": (3, 2), "y.bias": (3,)},
            {},
            "layer 'y.bias' (3,) could be any of b/bias, c/bias: there are 1 of its shape; "
            "pass all of the model's parameters, or named ones and rename={name: layer}",
        ),
        (
            {"a.weight": (3, 4)},
            {},
            "layer 'a.weight', in the checkpoint 'a/kernel', has shape (3, 4); "
            "this optimizer was meta-trained on (2, 3)",
        ),
        (
            {"x": (3, 4)},
            {"x": "a/kernel"},
            "layer 'x', in the checkpoint 'a/kernel', has shape (3, 4); this optimizer was meta-trained on (2, 3)",
        ),
        ({"x": (3, 2)}, {"z": "a/kernel"}, "rename has 'z', which is no layer of the params; they are 'x'"),
        (
            {"x": (3, 2)},
            {"x": "d"},
            "rename says 'x' is 'd'; the layers to choose from are a/kernel (2, 3), b/bias (3,), c/bias (3,)",
        ),
    ],
    ids=["name", "too many", "too few", "shape", "renamed shape", "rename from", "rename to"],
)
def test_match_errors(params, rename, sentence):
    with pytest.raises(l3rs.L3RSError) as error:
        paths_of({"a/kernel": (2, 3), "b/bias": (3,), "c/bias": (3,)}, params, rename)
    assert str(error.value) == sentence


def test_unknown_parameters_have_the_mean_embedding():
    """Parity with JAX for a network that has a layer more, and one of another shape."""
    theta, spec = checkpoint({path: shape for path, shape in SHAPES.items() if path != "norm/scale"})
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


def test_descriptors_of_both_layouts():
    """The same for Flax's names and shapes and for PyTorch's, so the same steps."""
    shapes = {**SHAPES, "attention/query/kernel": (4, 6), "temporal/kernel": (5, 2, 4), "pos_embed/embedding": (9, 4)}
    names = {path: NAMES.get(path, path.replace("/", ".").replace("kernel", "weight")) for path in shapes}
    names["pos_embed/embedding"] = "module.pos_embed.weight"  # as DDP calls it
    jax_layers = [l3rs.Layer(path, shape) for path, shape in shapes.items()]
    torch_shape = {2: lambda s: s[::-1], 3: lambda s: s[::-1], 4: lambda s: (s[3], s[2], s[0], s[1])}
    torch_layers = [
        l3rs.torch._flax_layer(names[path], torch_shape[len(shape)](shape) if path.endswith("kernel") else shape)
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
            "descriptor embeddings are read off the layers' names: pass model.named_parameters()"
        )


def test_groups_do_not_change_what_a_layer_is_described_by():
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
    (plain,) = L3RS(params.items(), made_of, 10)._embeddings
    expected = dict(zip(params, plain, strict=True))
    for split in splits:
        opt = L3RS([{"params": group} for group in split], made_of, 10)
        for group, found in zip(split, opt._embeddings, strict=True):
            for (name, _), embedding in zip(group, found, strict=True):
                np.testing.assert_allclose(embedding, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", ["_fsdp_wrapped_module.dense.weight", "_flat_param"])
def test_sharded_parameters_are_refused_by_name(name):
    with pytest.raises(l3rs.L3RSError, match=rf"^parameter {name}\(40,\) is sharded; L3RS reads norms of whole layers"):
        L3RS([(name, torch.nn.Parameter(torch.ones(40)))], checkpoint(embedding="descriptor"), 10)


def test_wrappers_words_do_not_count():
    for name in ("module._orig_mod.a.weight", "_orig_mod.module.a.weight", "a._checkpoint_wrapped_module.weight"):
        assert l3rs.torch._unwrapped(name) == "a/weight"


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


def assert_parity_of(made_of, steps=10, **rules):
    """Ten steps of both optimizers with the network of `SHAPES`; the torch one."""
    params, reference = parameters(), nested(normal(SHAPES, 0, 0.3))
    ours, tx = L3RS(params.items(), made_of, 40, **rules), l3rs.learned_optimizer(*made_of, 40, **rules)
    state, update = tx.init(reference), jax.jit(tx.update)
    for step in range(steps):
        grads = normal(SHAPES, 100 + step)
        updates, state = update(nested(grads), state, reference, value=np.float32(2 / (1 + step)))
        reference = optax.apply_updates(reference, updates)
        for path, grad in grads.items():
            params[NAMES[path]].grad = torch_layout(path, grad)
        ours.step(loss=2 / (1 + step))
    expected = {
        name: torch_layout(path, reference[path.split("/")[0]][path.split("/")[1]]) for path, name in NAMES.items()
    }
    assert_near(values(params), expected, PARITY)
    return ours


def test_match_takes_no_groups():
    with pytest.raises(l3rs.L3RSError, match="not param groups"):
        match_layers(checkpoint()[1], [{"params": [torch.zeros(1)]}])


# Among PyTorch's own


class Small(torch.nn.Module):
    """A tensor of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 4)
        self.conv = torch.nn.Conv1d(4, 6, 3)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11)

    def forward(self, x):  # int64 [B, 8] to float32 [B, 11]
        x = self.conv(self.embed(x).mT).mean(-1)
        return self.head(self.norm(x))

    def loss(self, seed, forward=None):
        x = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(seed))
        logits = self(x) if forward is None else forward(x)
        return torch.nn.functional.cross_entropy(logits, x[:, 0])


def small_checkpoint():
    shapes = {name.replace(".", "/"): tuple(param.shape) for name, param in Small().named_parameters()}
    return checkpoint(shapes)


def small_optimizer(model):
    return L3RS(model.named_parameters(), small_checkpoint(), 10)


def fit(model, opt, steps=4):
    for seed in range(steps):
        opt.zero_grad()
        loss = model.loss(seed)
        loss.backward()
        opt.step(loss=loss)
    return dict(model.state_dict())


def test_grad_scaler():
    """A scale that is a power of two changes nothing; a step with an infinite gradient is skipped."""
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed)
        scaler.scale(loss).backward()
        scaler.step(opt, loss=loss)
        scaler.update()
    assert_same(dict(model.state_dict()), fit(reference, small_optimizer(reference)))

    before = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    loss = model.loss(4)
    scaler.scale(loss).backward()
    model.head.bias.grad[0] = float("inf")
    scaler.step(opt, loss=loss)
    scaler.update()
    assert_same(dict(model.state_dict()), dict(before))
    assert opt.param_groups[0]["shared"]["step"] == 4
    assert scaler.get_scale() == 2.0**9


def test_compile():
    """A compiled model and a compiled step; the step itself stays as it is (backend: without a compiler)."""
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    forward = torch.compile(model, backend="aot_eager")
    step = torch.compile(opt.step, backend="aot_eager")

    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed, forward)
        loss.backward()
        step(loss=loss)
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


def test_compiled_training_step():
    """Forward, backward and step in one compiled function, which is compiled once."""
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    compiled = []

    def backend(graph, example_inputs):
        del example_inputs
        compiled.append(graph)
        return graph

    @torch.compile(backend=backend)
    def training_step(x):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), x[:, 0])
        loss.backward()
        opt.step(loss=loss)

    counts = []
    for seed in range(4):
        training_step(torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(seed)))
        counts.append(len(compiled))
    assert counts[-1] == counts[1] > 0
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


@pytest.mark.slow  # a C++ compiler at work
def test_compile_with_inductor():
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    try:
        forward = torch.compile(model)
        model.loss(0, forward)
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    step = torch.compile(opt.step)
    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed, forward)
        loss.backward()
        step(loss=loss)
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


def worker(rank, folder):
    """One of two ranks: its own batches, its own losses."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Small()
    opt = small_optimizer(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(4):
        opt.zero_grad()
        loss = model.loss(2 * step + rank, parallel)
        loss.backward()
        if step % 2:
            opt.step(loss=loss)
        else:
            opt.observe(loss)
            opt.step()
    torch.save({"model": model.state_dict(), "shared": opt.param_groups[0]["shared"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    """DDP in two processes is one process with both batches: same parameters, bit for bit, on both ranks."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(dict(ranks[0]["model"]), dict(ranks[1]["model"]))
    assert ranks[0]["shared"] == ranks[1]["shared"]

    model = Small()
    opt = small_optimizer(model)
    for step in range(4):
        opt.zero_grad()
        loss = (model.loss(2 * step) + model.loss(2 * step + 1)) / 2
        loss.backward()
        opt.step(loss=loss)
    assert_near(dict(ranks[0]["model"]), dict(model.state_dict()), 1e-5)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Small()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(l3rs.L3RSError, match=r"^parameter embed.weight\(11, 4\) is sharded; .*: use DDP$"):
            small_optimizer(model)
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_checkpoint_of_the_state():
    """torch.distributed.checkpoint keys the state by the parameters' names; nothing of ours is in its way."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, resumed = Small(), Small()
    opt, other = small_optimizer(model), small_optimizer(resumed)
    untouched = Small()
    fresh = get_optimizer_state_dict(untouched, small_optimizer(untouched))
    fit(model, opt, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    assert set(saved["state"]) == set(dict(model.named_parameters()))
    assert {key: set(state) for key, state in fresh["state"].items()} == {k: set(s) for k, s in saved["state"].items()}
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, saved)
    assert_same(fit(resumed, other, 2), fit(model, opt, 2))


def test_docstring_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = doctest.testmod(l3rs.torch)
    assert found.attempted > 0
    assert found.failed == 0


def test_a_shipped_checkpoint_trains():
    """Sixty steps on random labels: half the loss."""
    torch.manual_seed(0)
    linear = torch.nn.Linear
    model = torch.nn.Sequential(linear(196, 64), torch.nn.ReLU(), linear(64, 64), torch.nn.ReLU(), linear(64, 10))
    opt = L3RS(model.parameters(), ROOT / "checkpoints/digits-mlp", total_steps=60)
    x, y = torch.randn(64, 196), torch.randint(10, (64,))
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_torch():
    code = "import sys; sys.modules['torch'] = None; import l3rs; import l3rs.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: l3rs.torch needs torch: pip install l3rs[torch]"
    assert "During handling" not in done.stderr

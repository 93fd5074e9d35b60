"""Dtypes, memory layouts and the size of the state."""

import pytest
import torch

from l3rs.torch import L3RS, flat, passes
from tests.l3rs.torch.common import (
    ALL,
    SHAPES,
    assert_near,
    assert_same,
    checkpoint,
    give_gradients,
    parameters,
    train,
    values,
)


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


def strided(x):
    """The same numbers with gaps between them."""
    wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1])
    return wide[..., ::2].copy_(x)


@pytest.mark.parametrize("layout", ["channels_last", "gaps", "expanded gradient", "transposed gradient"])
@pytest.mark.parametrize("largest", [0, flat.LARGEST], ids=["pieces", "flat"])
def test_memory_layouts(layout, largest, monkeypatch):
    """The layout does not change the numbers. Pieces are small, so that a layer has several."""
    monkeypatch.setitem(passes.PIECE, "cpu", 16)
    monkeypatch.setattr(flat, "LARGEST", largest)
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
    """It is read as flat views: nothing as large as a layer is copied."""
    x = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    pieces = list(passes.split((x, x, x), 16))
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
    """Adam's two moments and little else: 2.01 numbers a parameter."""
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

"""Non-finite, zero and cancelling gradients; empty and scalar parameters."""

import jax
import numpy as np
import pytest
import torch

from l3rs.torch import L3RS
from tests.l3rs.torch.common import ALL, assert_same, checkpoint, give_gradients, parameters, train, values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_layer_with_a_bad_gradient_stays(bad):
    """It stays unchanged, bit for bit, and the others are not affected; its moments see zeros."""
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
    """The gradient's square is finite, that of the momentum that it accumulates to is not: the layer stays."""
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

"""Losses, learning rates and param groups of a step."""

import numpy as np
import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.torch import L3RS
from tests.l3rs.torch.common import (
    SHAPES,
    assert_near,
    assert_same,
    checkpoint,
    give_gradients,
    parameters,
    train,
    values,
)


def deltas(lr, **groups_lr):
    """How far each parameter moves in one step."""
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
    """Groups and their order change nothing; each parameter's layer is named in its group."""
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
    """A step that GradScaler skips leaves an infinite loss."""
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
        "layer 'head.weight' (2, 9) is not a layer that this optimizer was meta-trained on "
        "(of the network's 1, 1 are not); no layer is left; "
        "pass on_unknown='mean' to give it the mean embedding, or take 'universal', which is for any network"
    )
    assert len(opt.param_groups) == 1
    train(opt, params, 1)  # and training continues


def test_add_param_group_under_another_name():
    params = parameters()
    opt = L3RS({name: p for name, p in params.items() if name != "dense.weight"}.items(), checkpoint(), 10)
    group = {"params": [("fc.weight", params["dense.weight"])], "rename": {"fc.weight": "dense/kernel"}}
    opt.add_param_group(group)
    assert "rename" in group  # the caller's own
    assert opt.param_groups[1]["layers"] == ["dense/kernel"]
    assert "rename" not in opt.state_dict()["param_groups"][1]

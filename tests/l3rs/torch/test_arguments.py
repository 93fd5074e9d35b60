"""Arguments that L3RS checks, and its errors."""

import dataclasses
import warnings

import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.torch import L3RS, directions
from tests.l3rs.torch.common import (
    ROOT,
    assert_same,
    checkpoint,
    give_gradients,
    parameters,
    random_theta,
    train,
    values,
)


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
            r"^L3RS needs the loss: call step\(loss=loss\), .*, or observe\(loss\) before .*optimizer.observe\(loss\)$",
        ),
        (lambda opt: opt.step(lambda: None), "^L3RS needs the loss"),
        (lambda opt: opt.step(torch.tensor(1.0)), r"^pass the loss by keyword: step\(loss=loss\)$"),
        (
            lambda opt: opt.step(lambda: 1.0, loss=1.0),
            "^step takes a closure that returns a loss, or a loss, not both$",
        ),
        (lambda opt: opt.observe(torch.ones(2)), r"^the loss is torch.float32\[2\]; it must be one real number$"),
        (lambda opt: opt.observe(True), "^the loss is True; it must be a number or a tensor of one$"),
        (lambda opt: opt.observe(1j), "^the loss is 1j; it must be a number or a tensor of one$"),
        (lambda opt: opt.observe(torch.tensor(1j)), r"^the loss is torch.complex64\[\]; it must be one real number$"),
        (lambda opt: opt.observe(torch.tensor(True)), r"^the loss is torch.bool\[\]; it must be one real number$"),
        (lambda opt: opt.observe("1"), "^the loss is '1'; it must be a number or a tensor of one$"),
    ],
)
def test_invalid_losses(call, words):
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
        "the gradient of 'embed/embedding' (7, 3) is sparse; L3RS needs dense ones, e.g. nn.Embedding(sparse=False)"
    )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ([torch.zeros(4, dtype=torch.complex64)], r"^parameter \(4,\) is complex; L3RS needs real parameters$"),
        (
            [torch.zeros(4), torch.zeros(5, device="meta")],
            "^parameters are on cpu, meta; they must all be on one device$",
        ),
        ([torch.zeros(4, device="meta")], "^the parameters are on the meta device, where they have no values"),
    ],
    ids=["complex", "devices", "meta"],
)
def test_unsupported_parameters(params, words):
    with pytest.raises(l3rs.L3RSError, match=words):
        L3RS([torch.nn.Parameter(param) for param in params], checkpoint({"a/b": (4,), "a/c": (5,)}), 10)


def test_other_errors_of_construction(tmp_path):
    theta, spec = checkpoint()
    for arguments, words in (
        (((theta, spec),), "total_steps is missing, and the checkpoint does not state"),
        (((theta, dataclasses.replace(spec, hidden=(7,))), 10), "its spec needs float32"),
        ((tmp_path / "none", 10), "is not an L3RS checkpoint"),
    ):
        with pytest.raises(l3rs.L3RSError, match=words):
            L3RS(parameters().items(), *arguments)
    with pytest.raises(l3rs.L3RSError, match=r"^lr is -1; it must be a number ≥ 0$"):
        L3RS(parameters().items(), (theta, spec), 10, lr=-1)


def test_every_direction_is_there():
    assert set(directions.DIRECTIONS) == set(l3rs.directions.OPTIONS)
    spec = dataclasses.replace(checkpoint()[1], directions=(l3rs.Direction("adan"), l3rs.Direction("sgd")))
    with pytest.raises(l3rs.L3RSError, match="unknown direction 'adan'"):
        L3RS(parameters().items(), (random_theta(spec), spec), 10)


def test_lazy_modules():
    model = torch.nn.Sequential(torch.nn.LazyLinear(5))
    made_of = checkpoint({"dense/kernel": (8, 5), "dense/bias": (5,)})
    for params in (model.named_parameters(), model.parameters(), [{"params": model.parameters()}]):
        with pytest.raises(l3rs.L3RSError, match="has no shape yet; pass a batch through the model"):
            L3RS(params, made_of, 10)
    model(torch.zeros(2, 8))
    assert L3RS(model.named_parameters(), made_of, 10).param_groups[0]["layers"] == ["dense/kernel", "dense/bias"]


@pytest.mark.parametrize("key", ["weight_decya", "betas", "momentum", "layers", "shared"])
def test_unknown_keys_of_param_groups(key):
    params = parameters()
    with pytest.raises(l3rs.L3RSError, match=f"a param group has '{key}'; allowed are params, lr, weight_decay"):
        L3RS([{"params": params.items(), key: 0.9}], checkpoint(), 10)
    first, *others = params.items()
    opt = L3RS([first], checkpoint(), 10, match="path")
    with pytest.raises(l3rs.L3RSError, match=f"a param group has '{key}'"):
        opt.add_param_group({"params": others, key: 0.9})
    assert len(opt.param_groups) == 1


def test_labels_of_param_groups():
    """Lightning names groups, and schedulers keep the initial rate in them."""
    opt = L3RS([{"params": parameters().items(), "name": "all", "initial_lr": 1.0}], checkpoint(), 10)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step), last_epoch=3)


def test_renaming_in_a_param_group():
    """Only for a group that is added later: the first groups are matched together."""
    with pytest.raises(l3rs.L3RSError, match=r"L3RS\(…, rename=…\)"):
        L3RS([{"params": parameters().items(), "rename": {}}], checkpoint(), 10)


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "0.1", None, True])
@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_options_that_are_not_allowed(name, value):
    for arguments in (
        ((parameters().items(),), {name: value}),
        (([{"params": parameters().items(), name: value}],), {}),
    ):
        with pytest.raises(l3rs.L3RSError, match=rf"^{name} is .*; it must be a number ≥ 0$"):
            L3RS(*arguments[0], checkpoint(), 10, **arguments[1])


def test_a_learning_rate_for_adam_warns_once():
    params = parameters()
    for groups, lr in ((params.items(), 1e-3), ([{"params": params.items(), "lr": 1e-3}], 1.0)):
        with pytest.warns(UserWarning, match="lr is 0.001.*multiplies the learned step") as found:
            L3RS(groups, checkpoint(), 10, lr=lr)
        assert len(found) == 1
    with warnings.catch_warnings(action="error"):
        for lr in (0.0, 0.05, torch.tensor(1.0)):
            L3RS(params.items(), checkpoint(), 10, lr=lr)


def test_universal_does_not_warn_of_a_new_head():
    """Its steps are long on purpose, with few inputs and small ones; a hundred times as long they are too long."""
    torch.manual_seed(0)
    x = 0.01 * torch.randn(64, 40)
    y = (x @ torch.randn(40, 10)).argmax(1)

    def change(lr):
        head = torch.nn.Linear(40, 10)
        opt, before = L3RS(head.named_parameters(), total_steps=100, lr=lr), head.weight.detach().clone()
        loss = torch.nn.functional.cross_entropy(head(x), y)
        loss.backward()
        opt.step(loss=loss.detach())
        return float((head.weight.detach() - before).norm() / before.norm())

    with warnings.catch_warnings(action="error"):
        assert change(1.0) > 1
    with pytest.warns(UserWarning, match="more than half their norm"):
        change(100.0)


def test_first_steps_that_are_too_long():
    """One warning, in the first steps only."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(step_scale=1.0), 10)
    with pytest.warns(UserWarning, match=r"more than half their norm .* lr=0.1") as found:
        train(opt, params, 3)
    assert len(found) == 1
    with warnings.catch_warnings(action="error"):
        params = parameters()
        train(L3RS(params.items(), checkpoint(step_scale=1e-3), 10), params, 3)

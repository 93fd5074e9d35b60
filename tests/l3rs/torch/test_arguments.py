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
            r"^L3RS needs the loss: call step\(loss=loss\), step\(closure\), or observe\(loss\) before step\(\)$",
        ),
        (lambda opt: opt.step(lambda: None), "^L3RS needs the loss"),
        (lambda opt: opt.step(torch.tensor(1.0)), r"^pass the loss by keyword: step\(loss=loss\)$"),
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
    ],
    ids=["complex", "devices"],
)
def test_parameters_that_cannot_be(params, words):
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

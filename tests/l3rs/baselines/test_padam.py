"""Padam against its recurrence in NumPy, and against the optimizers that it equals for p = 0 and p = 1/2."""

import inspect

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l3rs
from l3rs.baselines import padam
from tests.l3rs.baselines.common import (
    DEAD,
    EXACT,
    STEPS,
    N,
    Recurrence,
    decaying,
    decaying_at,
    error,
    fading,
    follow,
    follow_numpy,
)


def recurrence(rate, b1=0.9, b2=0.999, p=0.125, eps=1e-8):
    moments, largest = Recurrence(), np.zeros(N)

    def step(t, g, x):
        del x
        np.maximum(largest, moments.second(g, b2), out=largest)
        return -rate(t) * moments.first(g, b1) / (np.sqrt(largest) + eps) ** (2 * p)

    return step


@pytest.mark.parametrize("p", [0.0, 0.125, 0.4, 0.5])
def test_recurrence(p):
    found, _ = follow(padam(0.05, p=p))
    assert error(found, follow_numpy(recurrence(lambda _: 0.05, p=p))) < EXACT


def test_recurrence_with_a_schedule_and_other_arguments():
    found, _ = follow(padam(decaying, 0.5, 0.8, 0.3, eps=1e-3))
    expected = follow_numpy(recurrence(decaying_at, 0.5, 0.8, 0.3, 1e-3))
    assert error(found, expected) < EXACT


def test_the_maximum_matters():
    """The large gradients come first: without the maximum the later steps would be larger."""

    found, states = follow(padam(0.05, b2=0.5, p=0.5), gradient=fading)
    np.testing.assert_allclose(states[-1].nu_max["b"], 50.0, rtol=1e-12)  # (1-β2)·10², rounded
    np.testing.assert_allclose(found[-1], -0.05 * states[-1].mu["b"][0] / np.sqrt(50), rtol=1e-8)  # ε


def test_one_half_is_amsgrad():
    """The AMSGrad of the paper, without bias corrections, which optax can leave out."""
    if "bias_correction_mu" not in inspect.signature(optax.amsgrad).parameters:
        pytest.skip("this optax cannot leave out the corrections")
    reference = optax.amsgrad(0.05, 0.9, 0.99, bias_correction_mu=False, bias_correction_nu=False)
    expected, _ = follow(reference)
    found, _ = follow(padam(0.05, 0.9, 0.99, 0.5))
    assert error(found, expected) < EXACT


def test_zero_is_sgd_with_momentum():
    found, states = follow(padam(0.05, p=0))
    expected, _ = follow(optax.sgd(0.05 * (1 - 0.9), momentum=0.9))
    assert error(found, expected) < EXACT
    assert states[-1].nu["b"][0] > 0  # not because there was nothing to adapt to


@pytest.mark.parametrize("p", [0, 0.125, 0.5])
def test_no_gradient_no_step(p):
    found, _ = follow(padam(0.05, p=p))
    assert not found[:, list(DEAD)].any()


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5])
def test_pytorch_optimizer(p):
    """Its PAdam takes no maximum and corrects biases: the gradients grow, so that the maximum is the
    last value, and a schedule brings the corrections."""
    theirs = pytest.importorskip("pytorch_optimizer", reason="the comparison needs pytorch_optimizer")
    torch = pytest.importorskip("torch")
    b1, b2 = 0.9, 0.99

    def schedule(count):
        t = count + 1.0
        return 0.05 * jnp.sqrt(1 - b2**t) / (1 - b1**t)

    def growing(t, x):
        return 1.05**t * np.linspace(-1, 2, len(x)) + 0 * x

    found, _ = follow(padam(schedule, b1, b2, p, eps=1e-8), gradient=growing)
    weight = torch.nn.Parameter(torch.zeros(N, dtype=torch.float64))
    optimizer = theirs.PAdam([weight], lr=0.05, betas=(b1, b2), partial=p, eps=1e-8)
    expected = []
    for t in range(1, STEPS + 1):
        before = weight.detach().numpy().copy()
        weight.grad = torch.tensor(growing(t, before))
        optimizer.step()
        expected.append(weight.detach().numpy() - before)
    assert error(found, np.stack(expected)) < 1e-9  # both float64; the updates are differences of weights


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"p": 0.6}, r"p is 0.6; it must be one number in \[0, 0.5\]"),
        ({"p": -0.1}, "p is -0.1"),
        ({"b1": 1}, "b1 is 1"),
        ({"b2": [0.9, 0.99]}, "b2 is"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"learning_rate": None}, "learning_rate is None"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(l3rs.L3RSError, match=sentence):
        padam(**{"learning_rate": 0.1, **arguments})

"""Accelerate wraps the optimizer: a loss goes to the optimizer inside."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")

import l3rs  # noqa: E402
from l3rs.torch import L3RS  # noqa: E402
from tests.integrations.common import untrained  # noqa: E402


@pytest.fixture(autouse=True)
def own_state():
    """Accelerate keeps its state in the process: a Trainer of an earlier test that ended an epoch would end every
    accumulation here."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_prepared_optimizer(micro_batches):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    made_of = untrained({name: param.detach().numpy() for name, param in model.named_parameters()})
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=micro_batches)
    opt = L3RS(model.named_parameters(), made_of, 8)
    model, opt = accelerator.prepare(model, opt)
    x, losses = torch.randn(16, 8), []
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    for _ in range(8 * micro_batches):
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            opt.optimizer.observe(loss)
            opt.step()
            opt.zero_grad()
        losses.append(loss.item())
    shared = opt.optimizer.param_groups[0]["shared"]
    assert shared["step"] == shared["losses"] == 8
    assert shared["first_loss"] == pytest.approx(losses[0])
    assert losses[-1] < losses[0]


def test_the_error_says_how():
    model = torch.nn.Linear(8, 3)
    made_of = untrained({name: param.detach().numpy() for name, param in model.named_parameters()})
    accelerator = accelerate.Accelerator(cpu=True)
    model, opt = accelerator.prepare(model, L3RS(model.named_parameters(), made_of, 8))
    accelerator.backward(model(torch.randn(2, 8)).sum())
    with pytest.raises(l3rs.L3RSError, match=r"Accelerate .*optimizer\.optimizer\.observe\(loss\)"):
        opt.step()

"""Lightning calls `step(closure)`, which gives the optimizer the loss."""

from __future__ import annotations

import importlib

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")

import l3rs  # noqa: E402


@pytest.fixture(scope="module")
def modules():
    pytest.importorskip("lightning", reason="lightning is not installed")
    return importlib.import_module("tests.integrations.lightning_modules")


def test_automatic_optimization(modules):
    model, shared = modules.fit(modules.Classifier(), max_epochs=10)
    assert shared["step"] == shared["losses"] == len(model.losses) == 40
    assert shared["first_loss"] == pytest.approx(model.losses[0])
    assert sum(model.losses[-4:]) < 0.8 * sum(model.losses[:4])


def test_accumulated_batches(modules):
    model, shared = modules.fit(modules.Observing(), max_epochs=2, accumulate_grad_batches=2)
    assert shared["step"] == shared["losses"] == 4
    assert shared["first_loss"] == pytest.approx((model.losses[0] + model.losses[1]) / 2)


def test_batches_that_are_skipped(modules):
    model, shared = modules.fit(modules.Skipping(), max_epochs=2)
    assert shared["step"] == shared["losses"] == len(model.losses) == 4


def test_resuming(modules, tmp_path):
    """Two epochs, a Lightning checkpoint and two more epochs equal four epochs, bit for bit."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    whole, shared = modules.fit(modules.Classifier(), max_epochs=4)
    saving = ModelCheckpoint(tmp_path, save_last=True)
    modules.fit(modules.Classifier(), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    resumed, again = modules.fit(modules.Classifier(), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert again == shared
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_half_precision(modules):
    """With a gradient scaler, Lightning calls the closure itself, and the optimizer sees only reported losses."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def half(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return modules.fit(model, max_epochs=4, plugins=[plugin])

    model, shared = half(modules.Observing())
    assert shared["step"] == shared["losses"] == len(model.losses) == 16
    assert sum(model.losses[-4:]) < sum(model.losses[:4])
    with pytest.raises(l3rs.L3RSError, match=r"^L3RS needs the loss: .* observe\(loss\) before step"):
        half(modules.Classifier())


@pytest.mark.parametrize("observes", [False, True])
def test_manual_optimization(modules, observes):
    model, shared = modules.fit(modules.Manual(observes), max_epochs=2)
    assert shared["step"] == shared["losses"] == len(model.losses) == 8
    assert shared["first_loss"] == pytest.approx(model.losses[0])

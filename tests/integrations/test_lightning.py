"""Lightning calls `step(closure)`, which gives the optimizer the loss."""

from __future__ import annotations

import logging
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

import l3rs  # noqa: E402
from l3rs.torch import L3RS  # noqa: E402
from tests.integrations.common import untrained  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
        self.losses = []

    def training_step(self, batch):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        params = {name: torch.zeros(param.shape) for name, param in self.net.named_parameters()}
        return L3RS(self.net.named_parameters(), untrained({k: v.numpy() for k, v in params.items()}), 40)


def fit(model, **arguments):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=generator)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())
    resumed = arguments.pop("ckpt_path", None)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **arguments},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of workers
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16), ckpt_path=resumed)
    (opt,) = trainer.optimizers
    return model, opt.param_groups[0]["shared"]


def test_automatic_optimization():
    model, shared = fit(Classifier(), max_epochs=10)
    assert shared["step"] == shared["losses"] == len(model.losses) == 40
    assert shared["first_loss"] == pytest.approx(model.losses[0])
    assert sum(model.losses[-4:]) < 0.8 * sum(model.losses[:4])


class Observing(Classifier):
    """Reports its losses itself: with accumulation, Lightning's closure returns only the last one, scaled down."""

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.optimizers().observe(loss)
        return loss


def test_accumulated_batches():
    model, shared = fit(Observing(), max_epochs=2, accumulate_grad_batches=2)
    assert shared["step"] == shared["losses"] == 4
    assert shared["first_loss"] == pytest.approx((model.losses[0] + model.losses[1]) / 2)


class Skipping(Classifier):
    """Skips every other batch, as Lightning allows."""

    def training_step(self, batch, index):
        return super().training_step(batch) if index % 2 else None


def test_batches_that_are_skipped():
    model, shared = fit(Skipping(), max_epochs=2)
    assert shared["step"] == shared["losses"] == len(model.losses) == 4


def test_resuming(tmp_path):
    """Two epochs, a Lightning checkpoint and two more epochs equal four epochs, bit for bit."""
    whole, shared = fit(Classifier(), max_epochs=4)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    fit(Classifier(), max_epochs=2, enable_checkpointing=True, callbacks=[saving])
    resumed, again = fit(Classifier(), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert again == shared
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_half_precision():
    """With a gradient scaler, Lightning calls the closure itself, and the optimizer sees only reported losses."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    def half(model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
        return fit(model, max_epochs=4, plugins=[plugin])

    model, shared = half(Observing())
    assert shared["step"] == shared["losses"] == len(model.losses) == 16
    assert sum(model.losses[-4:]) < sum(model.losses[:4])
    with pytest.raises(l3rs.L3RSError, match=r"^L3RS needs the loss: .* observe\(loss\) before step"):
        half(Classifier())


class Manual(Classifier):
    """Manual optimization: Lightning adds a closure that returns nothing to `step`."""

    def __init__(self, observes):
        super().__init__()
        self.automatic_optimization, self.observes = False, observes

    def training_step(self, batch):
        opt, loss = self.optimizers(), super().training_step(batch)
        opt.zero_grad()
        self.manual_backward(loss)
        if self.observes:
            opt.observe(loss)
            opt.step()
        else:
            opt.step(loss=loss)


@pytest.mark.parametrize("observes", [False, True])
def test_manual_optimization(observes):
    model, shared = fit(Manual(observes), max_epochs=2)
    assert shared["step"] == shared["losses"] == len(model.losses) == 8
    assert shared["first_loss"] == pytest.approx(model.losses[0])

"""Lightning: it calls `step(closure)`, so the loss arrives by itself."""

from __future__ import annotations

import logging
import warnings

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")

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
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of workers
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=16))
    (opt,) = trainer.optimizers
    return model, opt.param_groups[0]["shared"]


def test_automatic_optimization():
    model, shared = fit(Classifier(), max_epochs=10)
    assert shared["step"] == shared["losses"] == len(model.losses) == 40
    assert shared["first_loss"] == pytest.approx(model.losses[0])
    assert sum(model.losses[-4:]) < 0.8 * sum(model.losses[:4])


class Observing(Classifier):
    """Says its losses itself: with accumulation, Lightning's closure returns the last one, divided by their number."""

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.optimizers().optimizer.observe(loss)
        return loss


def test_accumulated_batches():
    model, shared = fit(Observing(), max_epochs=2, accumulate_grad_batches=2)
    assert shared["step"] == shared["losses"] == 4
    assert shared["first_loss"] == pytest.approx((model.losses[0] + model.losses[1]) / 2)

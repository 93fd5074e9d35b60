"""Lightning modules and their training for test_lightning.py, which imports them late: Lightning takes seconds."""

from __future__ import annotations

import logging
import warnings

import lightning
import torch

from l3rs.torch import L3RS
from tests.integrations.common import untrained

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


class Observing(Classifier):
    """Reports its losses itself: with accumulation, Lightning's closure returns only the last one, scaled down."""

    def training_step(self, batch):
        loss = super().training_step(batch)
        self.optimizers().observe(loss)
        return loss


class Skipping(Classifier):
    """Skips every other batch, as Lightning allows."""

    def training_step(self, batch, index):
        return super().training_step(batch) if index % 2 else None


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

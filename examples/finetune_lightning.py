"""Fine-tune with Lightning and L3RS: `configure_optimizers` returns the optimizer, and that is all.

python examples/finetune_lightning.py
"""

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from l3rs.torch import L3RS


class Classifier(lightning.LightningModule):
    """Any network; `losses` are those of all steps."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.losses = network, []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.network(x), y)
        self.losses.append(loss.item())
        return loss  # Lightning passes it to the optimizer

    def configure_optimizers(self) -> L3RS:
        return L3RS(self.named_parameters(), total_steps=self.trainer.estimated_stepping_batches)


def make_data(count: int = 128) -> TensorDataset:
    """Points [count, 8] in four quadrants of their first two coordinates."""
    x = torch.randn(count, 8)
    return TensorDataset(x, 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


def fine_tune(network: nn.Module, data: TensorDataset, epochs: int) -> list[float]:
    """Train for `epochs` epochs; returns the losses of all steps."""
    model = Classifier(network)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(data, batch_size=16, shuffle=True))
    return model.losses


if __name__ == "__main__":
    lightning.seed_everything(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    losses = fine_tune(network, make_data(), epochs=8)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} after {len(losses)} steps")

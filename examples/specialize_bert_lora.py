"""An optimizer for LoRA on a BERT classifier: `metatrain specialize examples.specialize_bert_lora:task --minutes 30`.

Offline, a tiny BERT with random weights learns which words a sentence holds. With a network: model=bert-base-uncased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from tasks.torch import TorchTask

_TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SPLITS = ("train", "inner_valid", "outer_valid", "test")


class LoRA(nn.Module):
    """A frozen linear layer plus B A x, with B zero at first (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def task(model: str = "", rank: int = 4, batch_size: int = 16, examples: int = 128) -> TorchTask:
    """Train adapters of the attention's query and value, and the classifier."""

    def start(_: int) -> nn.Module:  # the adapters and the classifier are new for each seed
        make = BertForSequenceClassification
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # the "pretrained" weights are the same for all seeds
            network = make.from_pretrained(model, num_labels=2) if model else make(BertConfig(**_TINY, num_labels=2))
        network.bert.requires_grad_(False)
        network.classifier.reset_parameters()
        for layer in network.bert.encoder.layer:
            attention = layer.attention.self
            attention.query, attention.value = LoRA(attention.query, rank), LoRA(attention.value, rank)
        return network

    data: dict[str, Any] = {name: _sentences(examples, seed) for seed, name in enumerate(_SPLITS)}
    return TorchTask("BERT with LoRA", start, **data, batch_size=batch_size)


def _sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Twelve words each; the label says whether more than half of them are from the vocabulary's first half."""
    words = torch.randint(1, 64, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": (row < 32).float().mean().gt(0.5).long()} for row in words]

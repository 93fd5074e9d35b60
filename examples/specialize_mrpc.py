"""An optimizer for LoRA on a small BERT with random weights that learns whether two sentences say the same.

    metatrain specialize examples.specialize_mrpc:task file=mrpc_train.tsv --minutes 30 --steps 100

FILE is a list of the Microsoft Research Paraphrase Corpus: columns Quality, #1 String and #2 String, separated by tabs.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from examples.specialize_bert_lora import LoRA
from tasks.torch import TorchTask
from tasks.torch_data import text_splits

_SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64}
_LENGTH = 20  # words of a sentence


def task(file: str, rank: int = 4, batch_size: int = 16) -> TorchTask:
    """Train adapters of all linear layers of the encoder, and the classifier."""
    splits, classes = text_splits(file, _numbers, ("#1 String", "#2 String"), "Quality")

    def start(_: int) -> nn.Module:  # the adapters and the classifier are new for each seed
        with torch.random.fork_rng([]):
            torch.manual_seed(0)  # the frozen weights are the same for all seeds
            shape = BertConfig(**_SIZES, num_hidden_layers=2, num_attention_heads=2)
            network = BertForSequenceClassification(shape)
        network.bert.requires_grad_(False)
        network.classifier = nn.Linear(64, classes)
        for layer in network.bert.encoder.layer:
            attention = layer.attention.self
            for module, name in (
                *((attention, name) for name in ("query", "key", "value")),
                *((part, "dense") for part in (layer.attention.output, layer.intermediate, layer.output)),
            ):
                setattr(module, name, LoRA(getattr(module, name), rank))
        return network

    return TorchTask("BERT with LoRA on MRPC", start, **splits, batch_size=batch_size)


def _numbers(first: Sequence[str], second: Sequence[str]) -> dict[str, Tensor]:
    """Numbers of the words of both sentences; a word's type says whether the other sentence has it, too."""
    words = [
        [[zlib.crc32(word.lower().encode()) % 1020 + 2 for word in text.split()[:_LENGTH]] for text in pair]
        for pair in zip(first, second, strict=True)
    ]
    rows = [([1, *a, 1, *b], [0, *(int(w in b) for w in a), 0, *(int(w in a) for w in b)]) for a, b in words]
    ids, types = (torch.tensor([row[i] + [0] * (2 * _LENGTH + 2 - len(row[i])) for row in rows]) for i in (0, 1))
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": types}

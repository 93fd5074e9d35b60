"""An optimizer for a text classifier: `metatrain specialize examples.specialize_text:task --minutes 30`.

With a network: model=distilbert-base-uncased file=mrpc.tsv text='["#1 String", "#2 String"]' label=Quality, a file with
a header and an example a line. Offline, a tiny BERT with random weights reads made-up sentences, a number for a word.
"""

from __future__ import annotations

import functools
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from tasks.torch import TorchTask
from tasks.torch_data import text_splits

_TINY = functools.partial(
    BertConfig, vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
)
_WORDS = {"good": ["fine", "lovely", "clear"], "bad": ["dull", "broken", "vague"]}


def task(model: str = "", file: str = "", text: tuple[str, ...] = ("text",), label: str = "label") -> TorchTask:
    """Train the whole of a classifier of one or two texts."""

    def tokenize(*texts: list[str]) -> dict[str, Tensor]:
        if not model:
            return _numbers(*texts)
        how = {"padding": "max_length", "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return AutoTokenizer.from_pretrained(model)(*texts, **how)

    with tempfile.TemporaryDirectory() as folder:
        splits, classes = text_splits(file or _made_up(Path(folder, "sentences.tsv")), tokenize, text, label)

    def start(_: int) -> nn.Module:  # a fresh head from each seed: PyTorch's generator is seeded with it
        if model:
            return AutoModelForSequenceClassification.from_pretrained(model, num_labels=classes)
        return AutoModelForSequenceClassification.from_config(_TINY(num_labels=classes))

    return TorchTask(model or "tiny BERT", start, **splits, batch_size=16)


def _numbers(texts: list[str], length: int = 16) -> dict[str, Tensor]:
    rows = [[zlib.crc32(word.encode()) % 511 + 1 for word in text.split()[:length]] for text in texts]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def _made_up(path: Path) -> str:
    rng = np.random.default_rng(0)
    kinds = ["good", "bad"] * 120
    lines = [f"{kind}\tit was {rng.choice(_WORDS[kind])} and {rng.choice(_WORDS[kind])}" for kind in kinds]
    path.write_text("\n".join(["label\ttext", *lines]), encoding="utf-8")
    return str(path)

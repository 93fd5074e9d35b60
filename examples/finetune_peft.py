"""Fine-tune a language model with LoRA, the Trainer of transformers, and L3RS.

    python examples/finetune_peft.py bert-base-uncased    # its published weights
    python examples/finetune_peft.py                      # offline: a tiny BERT with random weights

Adapters are PEFT's. Where PEFT is not installed, all of the model is trained. The texts are made up: the words of
each class are from another half of the vocabulary.
"""

import sys
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from l3rs.torch import L3RS, observe_trainer

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}


def make_model(name: str) -> torch.nn.Module:
    if name:
        return BertForSequenceClassification.from_pretrained(name, num_labels=2)
    return BertForSequenceClassification(BertConfig(**TINY, initializer_range=0.1, num_labels=2))


def adapt(model: torch.nn.Module) -> torch.nn.Module:
    """Freeze the model except for its classifier, and add adapters to the queries and values."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError:
        return model
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))


def make_texts(count: int) -> list[dict]:
    labels = torch.randint(2, (count,)).tolist()
    return [{"input_ids": 32 * label + torch.randint(32, (12,)), "labels": label} for label in labels]


def fine_tune(model: torch.nn.Module, texts: list[dict], steps: int, folder: str) -> list[float]:
    """Train for `steps` steps; returns the mean loss of each ten."""
    opt = L3RS(model.named_parameters(), total_steps=steps)
    args = TrainingArguments(
        folder, max_steps=steps, lr_scheduler_type="constant", logging_steps=10, report_to=[], save_strategy="no"
    )  # a constant lr: the learned step follows a schedule of its own
    trainer = Trainer(model, args, train_dataset=texts, optimizers=(opt, None))
    observe_trainer(trainer).train()  # passes each loss to the optimizer
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    torch.manual_seed(0)
    model = adapt(make_model("".join(sys.argv[1:])))
    with tempfile.TemporaryDirectory() as folder:
        losses = fine_tune(model, make_texts(256), steps=60, folder=folder)
    print(f"loss {losses[0]:.3f} in the first ten steps, {losses[-1]:.3f} in the last")

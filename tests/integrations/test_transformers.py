"""Hugging Face's Trainer: a BERT learns to recognise paraphrases, and the optimizer sees every loss."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch", reason="the extra `torch` is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `torch` is not installed")
pytest.importorskip("accelerate", reason="Trainer needs accelerate, which is not installed")

import l3rs  # noqa: E402
from l3rs.torch import L3RS, observe_trainer  # noqa: E402
from tests.integrations.common import SHARED, untrained  # noqa: E402

MRPC = SHARED / "text" / "mrpc_train.tsv"
WORDS, LENGTH = 512, 48


def sentence_pairs(n: int) -> list[tuple[int, str, str]]:
    """(is a paraphrase, sentence, sentence) from Microsoft's paraphrase corpus if available, otherwise made up."""
    if MRPC.is_file():
        header, *lines = MRPC.read_text(encoding="utf-8").splitlines()
        columns = [header.lstrip("\ufeff").split("\t").index(name) for name in ("Quality", "#1 String", "#2 String")]
        rows = [[line.split("\t")[i] for i in columns] for line in lines[:n]]
        return [(int(quality), first, second) for quality, first, second in rows]
    rng = random.Random(0)
    pairs = []
    for _ in range(n):
        words = [f"word{rng.randrange(99)}" for _ in range(12)]
        same = rng.random() < 0.6
        pairs.append((int(same), " ".join(words), " ".join(words if same else reversed(words))))
    return pairs


def dataset(n: int) -> list[dict[str, object]]:
    """Tokens are hashed words: 0 pads, 1 separates."""

    def tokens(text: str) -> list[int]:
        return [2 + sum(map(ord, word)) % (WORDS - 2) for word in text.lower().split()][: LENGTH // 2 - 1]

    examples = []
    for label, first, second in sentence_pairs(n):
        ids = [*tokens(first), 1, *tokens(second)]
        padding = LENGTH - len(ids)
        mask = [1] * len(ids) + [0] * padding
        examples.append({"input_ids": ids + [0] * padding, "attention_mask": mask, "labels": label})
    return examples


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=WORDS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


def optimizer(model: torch.nn.Module, steps: int) -> L3RS:
    """With descriptor embeddings, which fit any network."""
    return L3RS(
        model.named_parameters(),
        untrained({"any": {"kernel": torch.zeros(2, 2)}}, embedding="descriptor"),
        steps,
    )


def trainer(model: torch.nn.Module, opt: torch.optim.Optimizer, folder: object, **arguments: object) -> object:
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        seed=0,
        **arguments,
    )
    return transformers.Trainer(model, args, train_dataset=dataset(256), optimizers=(opt, None))


def losses_of(run: object) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_fine_tuning(tmp_path):
    """In sixty steps the loss falls, and the optimizer sees the losses that the Trainer logs."""
    model = bert()
    opt = optimizer(model, 60)
    run = observe_trainer(trainer(model, opt, tmp_path, max_steps=60, per_device_train_batch_size=32))
    run.train()
    shared, losses = opt.param_groups[0]["shared"], losses_of(run)
    assert len(losses) == shared["step"] == shared["losses"] == 60
    assert shared["first_loss"] == pytest.approx(losses[0], rel=1e-3)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    groups = {layer.name: layer.source for layer in l3rs.torch.match_layers(opt.spec, model.named_parameters())}
    assert set(groups.values()) == {"descriptor"}


def test_gradient_accumulation(tmp_path):
    """Two micro-batches of 16 equal a batch of 32: the same losses reach the optimizer, which takes the same steps."""
    found = []
    for size, micro_batches in ((32, 1), (16, 2)):
        model = bert()
        opt = optimizer(model, 6)
        run = trainer(
            model,
            opt,
            tmp_path,
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=micro_batches,
        )
        run.model_accepts_loss_kwargs = False  # BERT takes `num_items_in_batch`, and leaves it
        observe_trainer(run).train()
        found.append((opt.param_groups[0]["shared"], losses_of(run)))
    (whole, losses), (parts, losses_of_parts) = found
    assert parts["step"] == whole["step"] == 6
    assert parts["loss_ema"] == pytest.approx(whole["loss_ema"], rel=1e-4)
    assert losses_of_parts == pytest.approx(losses, rel=1e-3)  # the Trainer rounds what it logs


def test_resuming(tmp_path):
    """Two steps, a Trainer checkpoint and two more steps equal four steps, bit for bit."""
    finals = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        arguments = {"max_steps": 4, "per_device_train_batch_size": 8}
        model = bert()
        if stops:
            first = trainer(model, optimizer(model, 4), folder, **arguments)
            first.args.save_strategy, first.args.save_steps = transformers.trainer_utils.SaveStrategy.STEPS, 2
            observe_trainer(first).train()
            model = bert()
        opt = optimizer(model, 4)
        run = observe_trainer(trainer(model, opt, folder, **arguments))
        run.train(resume_from_checkpoint=str(folder / "checkpoint-2") if stops else None)
        assert opt.param_groups[0]["shared"]["step"] == 4
        finals.append(model.state_dict())
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


def test_evaluation_is_not_observed(tmp_path):
    model = bert()
    opt = optimizer(model, 4)
    run = trainer(model, opt, tmp_path, max_steps=4, per_device_train_batch_size=8)
    observe_trainer(run).train()
    run.evaluate(eval_dataset=dataset(16))
    assert not opt._observed
    assert opt.param_groups[0]["shared"]["losses"] == 4


def test_another_optimizer(tmp_path):
    model = bert()
    run = observe_trainer(
        trainer(model, torch.optim.SGD(model.parameters(), 0.1), tmp_path, max_steps=1, per_device_train_batch_size=8)
    )
    with pytest.raises(l3rs.L3RSError) as error:
        run.train()
    assert str(error.value) == (
        "the trainer's optimizer is SGD; observe_trainer is for Trainer(…, optimizers=(L3RS(…), None))"
    )


def test_without_observing(tmp_path):
    """The Trainer itself passes no loss, which the first step reports."""
    model = bert()
    run = trainer(model, optimizer(model, 1), tmp_path, max_steps=1, per_device_train_batch_size=8)
    with pytest.raises(l3rs.L3RSError, match=r"^L3RS needs the loss"):
        run.train()

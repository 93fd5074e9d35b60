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


def trainer(
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    folder: object,
    data: object = None,
    options: dict[str, object] | None = None,
    **arguments: object,
) -> object:
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
    data = dataset(256) if data is None else data
    return transformers.Trainer(model, args, train_dataset=data, optimizers=(opt, None), **(options or {}))


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


def gpt(vocabulary: int = WORDS) -> torch.nn.Module:
    """A causal language model: it divides its loss by the Trainer's `num_items_in_batch`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0.0, attn_pdrop=0.0,
        embd_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def sentences(n: int) -> list[dict[str, object]]:
    """Sentences of different lengths, so that a mean over micro-batches is not a mean over tokens."""
    return [
        {"input_ids": each["input_ids"], "labels": [t if t and i < 8 + 5 * (k % 8) else -100 for i, t in ids]}
        for k, each in enumerate(dataset(n))
        for ids in [list(enumerate(each["input_ids"]))]
    ]


class Ours(torch.nn.Module):
    """A model from outside transformers, which takes no keywords but its inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = torch.nn.EmbeddingBag(WORDS, 16), torch.nn.Linear(16, 2)

    def forward(self, input_ids, labels):
        logits = self.head(self.embedding(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def per_item(outputs, labels, num_items_in_batch=None):
    """A `compute_loss_func` that divides by the number of items."""
    return torch.nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize(
    ("make", "data", "options"),
    [(bert, dataset, {}), (gpt, sentences, {}), (Ours, dataset, {}), (bert, dataset, {"compute_loss_func": per_item})],
    ids=["BERT ignores the items", "GPT divides by them", "own model", "own loss"],
)
def test_gradient_accumulation(tmp_path, make, data, options):
    """The optimizer sees the plain loss of a batch, in however many micro-batches it comes."""
    found = []
    for size, micro_batches in ((32, 1), (8, 4)):
        model = make()
        opt = optimizer(model, 3)
        arguments = {"max_steps": 3, "per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        run = trainer(model, opt, tmp_path, data(256), options, **arguments)
        observe_trainer(run).train()
        found.append(opt.param_groups[0]["shared"])
    whole, parts = found
    assert parts["step"] == whole["step"] == parts["losses"] == 3
    assert parts["first_loss"] == pytest.approx(whole["first_loss"], rel=1e-4)
    # BERT's gradients are the sum over micro-batches, so that its later steps differ.
    assert parts["loss_ema"] == pytest.approx(whole["loss_ema"], rel=0.05)


def test_a_training_step_without_compute_loss(tmp_path):
    class Own(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):  # noqa: ARG002
            loss = model(**inputs)[0]
            loss.backward()
            return loss.detach()

    model = bert()
    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
    run = observe_trainer(Own(model, args, train_dataset=dataset(8), optimizers=(optimizer(model, 1), None)))
    with pytest.raises(l3rs.L3RSError, match=r"does not call compute_loss.*observe\(loss\)"):
        run.train()


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

"""A TorchTask in one process: initial states, batches, seeds, scores, and errors."""

from __future__ import annotations

import math
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from tasks import TaskError, make_task  # noqa: E402
from tasks.torch import TorchTask, accuracy, fetch  # noqa: E402
from tasks.torch_checks import check_training  # noqa: E402
from tasks.torch_training import Training, deterministic, step_seed  # noqa: E402
from tasks.user_code import UserFunction  # noqa: E402
from tests.metatrain.torch_tasks import TINY, Examples, Mlp, splits, tiny  # noqa: E402

KEY = (7, 9)


@pytest.fixture(autouse=True)
def _inside() -> Iterator[None]:
    with deterministic():
        yield


def task(model: Any = lambda _: Mlp(), **fields: Any) -> TorchTask:
    return TorchTask("mine", **{"model": model, "batch_size": 8, **splits(), **fields})


def descend(training: Training, init: int, steps: int) -> tuple[list[float], tuple[float, float]]:
    """Losses of plain gradient descent, and the score at its end."""
    params = [param for _, param in training.start(init)]
    sgd, losses = torch.optim.SGD(params, 0.1), []
    for step in range(steps):
        sgd.zero_grad()
        loss = training.loss(KEY, step)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses, training.score("outer_valid")


def test_import_tasks_does_not_import_torch() -> None:
    code = "import sys, tasks; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_run_starts_again_in_the_same_model() -> None:
    """With dropout, batch norm's statistics and noise from three generators, the second run equals the first, bit for
    bit."""
    training = Training(tiny())
    first = descend(training, 3, 5)
    model = training.model
    other = descend(training, 4, 5)
    assert training.model is not model  # of another init
    again = descend(training, 3, 5)
    model = training.model
    assert descend(training, 3, 5) == again == first != other
    assert training.model is model  # not loaded again
    assert len(set(first[0])) == 5


def test_earlier_runs_do_not_matter() -> None:
    with deterministic():
        expected = descend(Training(tiny()), 3, 4)
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        assert descend(Training(tiny()), 3, 4) == expected


def test_settings_and_generators_are_restored() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    with deterministic():
        descend(Training(tiny()), 0, 1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), torch.get_num_threads()) == before[1:]


def test_an_epoch_holds_every_example_once() -> None:
    rows = torch.arange(20)
    training = Training(task(train=TensorDataset(rows, rows), batch_size=6))
    epochs = [[training.batch(KEY, 3 * e + i)[0] for i in range(3)] for e in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [6, 6, 6]
        assert len(set(torch.cat(epoch).tolist())) == 18
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    assert not torch.equal(training.batch((7, 8), 0)[0], epochs[0][0])
    assert torch.equal(training.batch(KEY, 4)[0], epochs[1][1])  # a function of key and step, not of earlier draws


def test_a_function_draws_batches() -> None:
    training = Training(task(train=lambda generator: generator.initial_seed()))
    assert training.batch(KEY, 5) == step_seed(KEY, 5)
    assert len({step_seed(key, step) for key in (KEY, (9, 7)) for step in (0, 1, 2)}) == 6


def test_score_is_the_mean_over_all_examples() -> None:
    own = task(eval_batch_size=7)  # 48 examples: the last batch is smaller
    training = Training(own)
    training.start(0)
    loss, accuracy = training.score("test")
    x, y = own.test.tensors
    with torch.no_grad():
        logits = training.model(x)
    assert not training.model.training
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, y).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == y).float().mean().item())


def test_labels_of_tokens_have_no_accuracy() -> None:
    """A causal language model shifts them in its loss, and -100 is none."""
    logits, labels = torch.zeros(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    assert math.isnan(accuracy({"logits": logits}, {"input_ids": labels, "labels": labels}))
    assert accuracy({"logits": logits[:, 0]}, {"labels": labels[:, 0]}) == 1


def test_a_custom_score_gets_the_split() -> None:
    own = task(score=lambda _, data: (len(data), torch.tensor(0.5)))
    training = Training(own)
    training.start(0)
    assert training.score("test") == (48, 0.5)
    training = Training(task(score=lambda *_: 1.0))
    training.start(0)
    with pytest.raises(TaskError, match=r"score returned float; it must be \(loss, metric\)"):
        training.score("test")


class _Returns(nn.Module):
    """A classifier that returns a mapping, as models of `transformers` do, from keyword arguments."""

    def __init__(self, with_loss: bool = True, name: str = "logits") -> None:
        super().__init__()
        self.linear, self.with_loss, self.name = nn.Linear(6, 3), with_loss, name

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.linear(x)
        if labels is None or not self.with_loss:
            return {self.name: logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_datasets_of_mappings_and_models_that_return_mappings() -> None:
    data = {name: Examples(split, 0.0, as_dict=True) for name, split in splits().items()}
    found = check_training(task(lambda _: _Returns(), **data))
    assert math.isfinite(found.loss)
    assert 0 <= found.metric <= 1
    assert check_training(task(lambda _: _Returns())).loss > 0  # tuples: the logits are found
    with pytest.raises(TaskError, match="the model returns no loss for a batch with x, labels"):
        check_training(task(lambda _: _Returns(False), **data))


def test_modes_of_modules() -> None:
    seen = []

    def model(_: int) -> nn.Module:
        network = Mlp()
        network.body[1].eval()  # frozen batch norm
        return network

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        seen.append((network.training, network.body[1].training, network.body[3].training))
        return nn.functional.cross_entropy(network(batch[0]), batch[1])

    training = Training(task(model, loss=loss))
    descend(training, 0, 1)
    assert seen == [(True, False, True), (False, False, False)]
    seen.clear()
    descend(Training(task(lambda _: Mlp().eval(), loss=loss)), 0, 1)  # as from_pretrained returns it
    assert seen == [(True, True, True), (False, False, False)]


def test_frozen_parameters_do_not_train_and_tied_ones_are_one() -> None:
    names = [name for name, _ in Training(tiny(freeze=True)).start(0)]
    assert names == ["head.weight", "head.bias"]

    def tied(_: int) -> nn.Module:
        network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        network[1].weight = network[0].weight
        return network

    assert [name for name, _ in Training(task(tied)).start(0)] == ["0.weight", "0.bias", "1.bias"]


def test_a_changed_frozen_parameter_leads_to_a_new_model() -> None:
    training = Training(tiny(freeze=True))
    training.start(0)
    model = training.model
    with torch.no_grad():
        model.body[0].weight.add_(1)
    training.start(0)
    assert training.model is not model


def test_autocast() -> None:
    seen = []

    def loss(network: nn.Module, batch: Any) -> torch.Tensor:
        logits = network(batch[0])
        seen.append(logits.dtype)
        return nn.functional.cross_entropy(logits, batch[1])

    assert check_training(task(loss=loss, autocast=torch.bfloat16)).loss > 0
    assert set(seen) == {torch.bfloat16}


def _shared(_: int) -> nn.Module:
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = nn.Parameter(network[0].weight.detach())
    return network


def _frozen(_: int) -> nn.Module:
    return Mlp().requires_grad_(False)


class _TakesImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(image)


def _always(network: nn.Module) -> Any:
    return lambda _: network


class _Dicts(torch.utils.data.Dataset):
    """Examples whose names are not those of the model's arguments."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, _: int) -> dict[str, Any]:
        return {"image": torch.ones(6), "label": 1}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": lambda _: "net"}, r"model\(0\) returned str; it must be a torch.nn.Module"),
        ({"model": _shared}, "parameters 0.weight and 1.weight share memory"),
        ({"model": _frozen}, "no parameter of the model trains"),
        ({"model": lambda _: Mlp().to("meta")}, "is on meta, but the task's device is cpu"),
        ({"model": lambda _: Mlp().to(torch.complex64)}, "must be a real float"),
        ({"model": _always(Mlp())}, r"model\(i\) returns parameter body.0.weight of an earlier network again"),
        ({"model": lambda _: _Returns(False, "scores")}, "the model returns a mapping with scores: float32.*loss=…"),
        ({"loss": lambda m, b: m(b[0])}, "loss returned float32.8, 3.; it must be one number"),
        ({"loss": lambda m, b: m(b[0]).sum().detach()}, "does not depend on a parameter that trains"),
        ({"loss": lambda m, b: m(b[0]).sum() * math.nan}, "the loss of batch 1 is nan"),
        ({"train": lambda _: {"x": torch.ones(2)}, "model": lambda _: nn.Linear(6, 3)}, None),
    ],
)
def test_refused_before_a_run(fields: dict[str, Any], sentence: str | None) -> None:
    with pytest.raises(TaskError if sentence else TypeError, match=sentence or "a batch is a mapping with x: float32"):
        check_training(task(**fields))


@pytest.mark.parametrize(
    "fields", [{"model": lambda _: _Returns(False, "scores")}, {"loss": lambda m, b: m(b[0])}], ids=["default", "own"]
)
def test_an_error_names_the_task_once(fields: dict[str, Any]) -> None:
    own = task(**fields)
    with pytest.raises(TaskError) as error:
        check_training(own)
    assert str(error.value).count(f"task {own.name!r}: ") == 1


def test_a_mapping_that_does_not_fit_the_model_says_how_it_is_called() -> None:
    with pytest.raises(TypeError, match=r"'label'.*without loss=….*keyword arguments.*a mapping with image: .*label: "):
        check_training(task(lambda _: _TakesImages(), train=_Dicts()))
    own = task(
        lambda _: _TakesImages(),
        train=_Dicts(),
        outer_valid=_Dicts(),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch["image"]), batch["label"]),
    )
    assert check_training(own).loss > 0


def test_an_error_of_the_loss_says_what_the_model_returned() -> None:
    own = task(lambda _: _Returns(), loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(
        TypeError, match=r"the model returns a mapping with 'logits'.*a batch is a list of float32\[8, 6\]"
    ):
        check_training(own)


@pytest.mark.parametrize(
    ("labels", "fact"),
    [
        (torch.full((48,), 7), r"logits float32\[8, \d\] and labels int64\[8\] failed: Target 7 is out of bounds"),
        (torch.zeros(48, 2, dtype=torch.long), r"labels int64\[8, 2\] failed: "),
    ],
    ids=["too large", "two each"],
)
def test_labels_that_the_default_loss_cannot_take(labels: Tensor, fact: str) -> None:
    with pytest.raises(TaskError, match=fact + ".*without loss=…"):
        check_training(task(train=TensorDataset(torch.zeros(48, 6), labels)))


def test_an_error_within_a_library_names_its_line() -> None:
    """The last line of the user's own is better, but there is none when a library's model fails."""
    model = nn.Linear(2, 2)
    with pytest.raises(TaskError, match=r"mine.*TypeError.*linear\.py:\d+\)$"):
        UserFunction("mine", model)("no tensor")
    with pytest.raises(TaskError, match=r"mine.*TypeError.*test_torch\.py:\d+\)$"):
        UserFunction("mine", lambda: model("no tensor"))()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model": Mlp()}, "model is a network; it must be a function"),
        ({"device": "gpu"}, "device is 'gpu'; it must be one of PyTorch's"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 100}, "batch_size is 100, but train has 48 examples"),
        ({"train": 3}, "train is int; it must be a map-style dataset"),
        ({"test": []}, "test is list; it must be a map-style dataset with at least one example"),
        ({"pools": {"meta_train": [0]}}, "no inits in pool 'held_out'"),
    ],
)
def test_refused_when_built(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(TaskError, match=sentence):
        task(**fields)


def test_a_task_is_sent_by_name() -> None:
    """Its lambdas cannot be pickled, and do not have to be."""
    sent = pickle.loads(pickle.dumps(make_task(TINY, {"noise": 0.2})))
    assert sent.recipe == (TINY, {"noise": 0.2})
    assert descend(Training(sent), 1, 2) == descend(Training(tiny(noise=0.2)), 1, 2)
    with pytest.raises(TaskError, match="cannot be sent to another process: it needs a function that returns it"):
        pickle.dumps(tiny())


def test_make_task_checks_and_names_the_line() -> None:
    name = f"{__name__}:broken"
    with pytest.raises(TaskError, match=rf"{name}.*boom.*test_torch.py:\d+"):
        make_task(name)
    with pytest.raises(TaskError, match=r"task.augment is for tasks of JAX"):
        make_task(TINY, {"augment": {}})


def broken() -> TorchTask:
    """A task whose loss raises."""

    def loss(*_: Any) -> torch.Tensor:
        raise RuntimeError("boom")

    return task(loss=loss)


def test_fetch_equals_collation() -> None:
    data = splits()["train"]
    whole, single = fetch(data, [3, 1], torch.utils.data.default_collate), [data[3], data[1]]
    assert all(map(torch.equal, whole, torch.utils.data.default_collate(single)))
    assert all(map(torch.equal, whole, fetch(Examples(data, 0.0), [3, 1], torch.utils.data.default_collate)))

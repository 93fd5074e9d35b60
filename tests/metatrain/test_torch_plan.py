"""The plan `torch`: it computes the same as JAX's plans, and the same bits in one process and in several."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

import l3rs  # noqa: E402
from l3rs.theta import multiply_steps  # noqa: E402
from metatrain.config import Config, UserError  # noqa: E402
from metatrain.inner.network import task_layers  # noqa: E402
from metatrain.inner.population import LocalEvaluator  # noqa: E402
from metatrain.inner.processes import ProcessEvaluator  # noqa: E402
from metatrain.inner.rollout import fused_rollout, learned  # noqa: E402
from metatrain.inner.torch_rollout import LearnedTorch, torch_rollout, torch_steps  # noqa: E402
from metatrain.outer.loop import resume, run  # noqa: E402
from metatrain.outer.setup import Setup  # noqa: E402
from metatrain.waiting import Wait  # noqa: E402
from tasks import TaskSample, make_task  # noqa: E402
from tasks.torch import TorchTask  # noqa: E402
from tasks.torch_training import Training, step_seed  # noqa: E402
from tests.metatrain.common import REGRESSION, assert_same_theta, metrics, small_config  # noqa: E402
from tests.metatrain.test_trainer import stopped_at  # noqa: E402
from tests.metatrain.torch_tasks import TINY, tiny  # noqa: E402

_SAMPLE = TaskSample(jax.numpy.int32(3), jax.random.key_data(jax.random.key(4)))


def torch_config(**sections: Any) -> Config:
    """Six generations of the tiny task, in this process."""
    execution = {"workers": 1, **sections.pop("execution", {})}
    task = {"name": TINY, **sections.pop("task", {})}
    return small_config(task=task, execution=execution, **sections)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quiet") / "run"
    run(torch_config(), folder)
    return folder


def digits_in_torch(steps: int) -> tuple[Any, TorchTask]:
    """The task `digits` from random inits, in JAX and in PyTorch, with the same weights, data and batches."""
    own = make_task("digits", {"init": "random", "model": {"name": "mlp", "hidden": [32, 32]}, "target": "uci"})

    def tensors(batch: Any) -> list[torch.Tensor]:
        image = np.array(batch["image"]).reshape(len(batch["image"]), -1)
        return [torch.from_numpy(image), torch.from_numpy(np.array(batch["label"], np.int64))]

    key = jax.random.wrap_key_data(_SAMPLE.key)
    batches = {
        step_seed(_SAMPLE.key.tolist(), step): tensors(own.batch(own.data, jax.random.fold_in(key, step)))
        for step in range(steps)
    }

    def model(init: int) -> nn.Module:
        params, _ = own.init(own.data, jax.numpy.int32(init))
        layers = params["layers"]
        modules: list[nn.Module] = []
        for name in sorted(layers):
            kernel, bias = (torch.from_numpy(np.array(layers[name][leaf])) for leaf in ("kernel", "bias"))
            linear = nn.Linear(*kernel.shape)
            linear.weight.data, linear.bias.data = kernel.T.contiguous(), bias
            modules.append(linear)
        network = nn.Module()
        network.layers = nn.ModuleList(modules)
        network.forward = lambda x: _forward(network, x)
        return network

    data = {name: TensorDataset(*tensors(own.data[name])) for name in ("inner_valid", "outer_valid", "test")}
    return own, TorchTask("digits", model, lambda g: batches[g.initial_seed()], **data)


def _forward(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in network.layers[:-1]:
        x = layer(x).relu()
    return network.layers[-1](x)


def test_the_same_meta_loss_as_jax() -> None:
    own, other = digits_in_torch(30)
    spec = l3rs.Spec.create(own.params_shape(), directions=("adam", "sgd", "weight_decay"))
    assert {(x.path, x.shape) for x in task_layers(other)} == {(x.path, x.shape) for x in spec.layers}
    theta = jax.tree.map(np.asarray, l3rs.init_meta_params(jax.random.key(0), spec))
    splits = ("outer_valid", "test")
    rollout = jax.jit(fused_rollout(own, learned(spec), splits))
    expected = rollout(theta, own.data, _SAMPLE, np.int32(30))
    start = rollout(theta, own.data, _SAMPLE, np.int32(0))["outer_valid"].loss
    found = torch_rollout(Training(other), LearnedTorch(spec), splits)(theta, {}, _SAMPLE, 30)
    for split in splits:
        assert float(found[split].loss) == pytest.approx(float(expected[split].loss), abs=1e-4)
        assert float(found[split].accuracy) == pytest.approx(float(expected[split].accuracy), abs=1e-6)
    assert expected["outer_valid"].loss < start - 0.5  # the run learns something


def test_points_along_a_run() -> None:
    setup = Setup.build(torch_config())
    theta = setup.strategy.mean(setup.fresh().strategy)
    rollout = torch_rollout(Training(setup.tasks[0]), LearnedTorch(setup.spec), ())
    scores = rollout(theta, {}, _SAMPLE, 6, ("test",), [0, 2, 6, 6])["test"]
    assert scores.loss.shape == scores.accuracy.shape == (4,)
    assert scores.loss[2] == scores.loss[3] == rollout(theta, {}, _SAMPLE, 6, ("test",))["test"].loss
    assert len(set(scores.loss.tolist())) == 3
    steps = list(torch_steps(setup.tasks[0], LearnedTorch(setup.spec), theta, _SAMPLE, 6))
    assert len(steps) == 6


def test_a_candidate_may_take_any_step(recwarn: pytest.WarningsRecorder) -> None:
    setup = Setup.build(torch_config())
    theta = multiply_steps(setup.strategy.mean(setup.fresh().strategy), setup.spec, 1e4)
    with pytest.warns(UserWarning, match="a first step of L3RS"):
        steps_alone(theta, setup.spec)
    recwarn.clear()
    torch_rollout(Training(setup.tasks[0]), LearnedTorch(setup.spec), ("test",))(theta, {}, _SAMPLE, 3)
    assert not recwarn.list


def steps_alone(theta: Any, spec: l3rs.Spec) -> None:
    """Two steps as a user takes them."""
    model = tiny().model(0)
    optimizer = LearnedTorch(spec)(theta, list(model.named_parameters()), 3)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step(loss=torch.tensor(1.0))


def test_layers_are_named_as_in_flax() -> None:
    layers = {layer.path: layer.shape for layer in task_layers(tiny())}
    assert layers == {
        "body/0/kernel": (6, 5),
        "body/0/bias": (5,),
        "body/1/scale": (5,),
        "body/1/bias": (5,),
        "head/kernel": (5, 3),
        "head/bias": (3,),
    }


def test_processes_give_the_bits_of_one_and_survive_a_kill_and_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup.build(torch_config(outer={"population": 6}))
    state = setup.fresh().strategy
    local = setup.evaluator(print)
    assert isinstance(local, LocalEvaluator)
    expected = [local.evaluate(state, setup.generation(n)) for n in range(4)]
    local.close()
    assert len({*expected[0][0].tolist()}) == 6
    assert np.isfinite(expected).all()
    news: list[str] = []
    processes = ProcessEvaluator(setup.tasks, setup.spec, setup.config.outer, 2, news.append)
    try:
        np.testing.assert_array_equal(processes.evaluate(state, setup.generation(0)), expected[0])
        np.testing.assert_array_equal(processes.evaluate(state, setup.generation(1)), expected[1])
        victim = next(iter(processes._processes._workers.values())).process
        os.kill(victim.pid, signal.SIGKILL)
        victim.join()
        np.testing.assert_array_equal(processes.evaluate(state, setup.generation(2)), expected[2])
        assert processes.report() == {"workers": 2, "lost": 1}
        assert "exit code -9" in news[0]
        monkeypatch.setattr("metatrain.inner.processes._HANG_SECONDS", 4.0)
        monkeypatch.setattr(Wait, "is_notice_due", lambda wait, now: wait.seconds(now) > 1)
        victim = next(worker.process for worker in processes._processes._workers.values() if worker.started)
        os.kill(victim.pid, signal.SIGSTOP)
        np.testing.assert_array_equal(processes.evaluate(state, setup.generation(3)), expected[3])
        assert any(f"process {victim.pid} " in line and "replaced after 4 s" in line for line in news)
        assert not victim.is_alive()
    finally:
        processes.close()


def test_a_run_resumes_bit_for_bit(quiet: Path, tmp_path: Path) -> None:
    stopped_at(3, tmp_path / "run", task={"name": TINY}, execution={"workers": 1})
    assert resume(tmp_path / "run").finished
    assert metrics(tmp_path / "run") == metrics(quiet)
    assert_same_theta(tmp_path / "run" / "optimizer", quiet / "optimizer")


def test_the_optimizer_loads_in_both_frameworks(quiet: Path) -> None:
    model = tiny().model(0)
    optimizer = l3rs.torch.L3RS(model.named_parameters(), quiet / "optimizer")
    assert optimizer.param_groups[0]["layers"][:2] == ["body/0/kernel", "body/0/bias"]
    params: dict[str, Any] = {"body": {"0": {}, "1": {}}, "head": {}}
    for layer in task_layers(tiny()):
        *modules, leaf = layer.path.split("/")
        node = params
        for module in modules:
            node = node[module]
        node[leaf] = jax.numpy.ones(layer.shape)
    assert l3rs.load(quiet / "optimizer").init(params)


@pytest.mark.parametrize(
    ("task", "plan", "sentence"),
    [
        ({}, "fused", "execution.plan is fused; tiny is a task of PyTorch: allowed are auto and torch"),
        ({"name": REGRESSION}, "torch", "execution.plan is torch; regression is a task of JAX"),
        ({"variants": [{}, {"name": REGRESSION}]}, "auto", "mix tasks of JAX and of PyTorch"),
    ],
)
def test_a_plan_that_does_not_fit_the_task(task: dict[str, Any], plan: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        Setup.build(torch_config(task=task, execution={"plan": plan}))

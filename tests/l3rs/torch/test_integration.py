"""L3RS with GradScaler, torch.compile, DDP and distributed checkpoints."""

import copy
import subprocess
import sys

import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.torch import L3RS
from tests.l3rs.torch.common import (
    ROOT,
    assert_near,
    assert_same,
    checkpoint,
)


class Small(torch.nn.Module):
    """A tensor of every kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(11, 4)
        self.conv = torch.nn.Conv1d(4, 6, 3)
        self.norm = torch.nn.LayerNorm(6)
        self.head = torch.nn.Linear(6, 11)

    def forward(self, x):  # int64 [B, 8] to float32 [B, 11]
        x = self.conv(self.embed(x).mT).mean(-1)
        return self.head(self.norm(x))

    def loss(self, seed, forward=None):
        x = torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(seed))
        logits = self(x) if forward is None else forward(x)
        return torch.nn.functional.cross_entropy(logits, x[:, 0])


def small_checkpoint():
    shapes = {name.replace(".", "/"): tuple(param.shape) for name, param in Small().named_parameters()}
    return checkpoint(shapes)


def small_optimizer(model):
    return L3RS(model.named_parameters(), small_checkpoint(), 10)


def fit(model, opt, steps=4):
    for seed in range(steps):
        opt.zero_grad()
        loss = model.loss(seed)
        loss.backward()
        opt.step(loss=loss)
    return dict(model.state_dict())


def test_grad_scaler():
    """A scale that is a power of two changes nothing; a step with an infinite gradient is skipped."""
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed)
        scaler.scale(loss).backward()
        scaler.step(opt, loss=loss)
        scaler.update()
    assert_same(dict(model.state_dict()), fit(reference, small_optimizer(reference)))

    before = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    loss = model.loss(4)
    scaler.scale(loss).backward()
    model.head.bias.grad[0] = float("inf")
    scaler.step(opt, loss=loss)
    scaler.update()
    assert_same(dict(model.state_dict()), dict(before))
    assert opt.param_groups[0]["shared"]["step"] == 4
    assert scaler.get_scale() == 2.0**9


def test_compile():
    """A compiled model and a compiled step; the step itself stays as it is (backend: without a compiler)."""
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    forward = torch.compile(model, backend="aot_eager")
    step = torch.compile(opt.step, backend="aot_eager")

    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed, forward)
        loss.backward()
        step(loss=loss)
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


def test_compiled_training_step():
    """Forward, backward and step in one compiled function, which is compiled once."""
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    compiled = []

    def backend(graph, example_inputs):
        del example_inputs
        compiled.append(graph)
        return graph

    @torch.compile(backend=backend)
    def training_step(x):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), x[:, 0])
        loss.backward()
        opt.step(loss=loss)

    counts = []
    for seed in range(4):
        training_step(torch.randint(11, (5, 8), generator=torch.Generator().manual_seed(seed)))
        counts.append(len(compiled))
    assert counts[-1] == counts[1] > 0
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


@pytest.mark.slow  # a C++ compiler at work
def test_compile_with_inductor():
    torch._dynamo.reset()
    model, reference = Small(), Small()
    opt = small_optimizer(model)
    try:
        forward = torch.compile(model)
        model.loss(0, forward)
    except Exception as error:
        pytest.skip(f"torch.compile does not work here: {error}")
    step = torch.compile(opt.step)
    for seed in range(4):
        opt.zero_grad()
        loss = model.loss(seed, forward)
        loss.backward()
        step(loss=loss)
    assert_near(dict(model.state_dict()), fit(reference, small_optimizer(reference)), 1e-5)


def worker(rank, folder):
    """One of two ranks: its own batches, its own losses."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = Small()
    opt = small_optimizer(model)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(4):
        opt.zero_grad()
        loss = model.loss(2 * step + rank, parallel)
        loss.backward()
        if step % 2:
            opt.step(loss=loss)
        else:
            opt.observe(loss)
            opt.step()
    torch.save({"model": model.state_dict(), "shared": opt.param_groups[0]["shared"]}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    """DDP in two processes is one process with both batches: same parameters, bit for bit, on both ranks."""
    torch.multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(dict(ranks[0]["model"]), dict(ranks[1]["model"]))
    assert ranks[0]["shared"] == ranks[1]["shared"]

    model = Small()
    opt = small_optimizer(model)
    for step in range(4):
        opt.zero_grad()
        loss = (model.loss(2 * step) + model.loss(2 * step + 1)) / 2
        loss.backward()
        opt.step(loss=loss)
    assert_near(dict(ranks[0]["model"]), dict(model.state_dict()), 1e-5)


def test_sharded_parameters_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Small()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(l3rs.L3RSError, match=r"^parameter embed.weight\(11, 4\) is sharded; .*: use DDP$"):
            small_optimizer(model)
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_checkpoint_of_the_state():
    """torch.distributed.checkpoint keys the state by the parameters' names; the optimizer's state fits that."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, resumed = Small(), Small()
    opt, other = small_optimizer(model), small_optimizer(resumed)
    untouched = Small()
    fresh = get_optimizer_state_dict(untouched, small_optimizer(untouched))
    fit(model, opt, 2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt))
    assert set(saved["state"]) == set(dict(model.named_parameters()))
    assert {key: set(state) for key, state in fresh["state"].items()} == {k: set(s) for k, s in saved["state"].items()}
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, saved)
    assert_same(fit(resumed, other, 2), fit(model, opt, 2))


def test_a_shipped_checkpoint_trains():
    """Sixty steps on random labels: half the loss."""
    torch.manual_seed(0)
    linear = torch.nn.Linear
    model = torch.nn.Sequential(linear(196, 64), torch.nn.ReLU(), linear(64, 64), torch.nn.ReLU(), linear(64, 10))
    opt = L3RS(model.parameters(), ROOT / "checkpoints/digits-mlp", total_steps=60)
    x, y = torch.randn(64, 196), torch.randint(10, (64,))
    losses = []
    for _ in range(60):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step(loss=loss)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_without_torch():
    code = "import sys; sys.modules['torch'] = None; import l3rs; import l3rs.torch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == "ImportError: l3rs.torch needs torch: pip install 'l3rs[torch]' ('.[torch]' in a checkout)"
    )
    assert "During handling" not in done.stderr

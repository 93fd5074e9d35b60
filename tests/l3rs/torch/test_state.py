"""`state_dict`, `load_state_dict`, copies."""

import copy
import io
import warnings

import pytest
import torch

import l3rs
import l3rs.torch
from l3rs.torch import L3RS
from l3rs.torch.state import small_state
from tests.l3rs.torch.common import (
    ALL,
    SHAPES,
    assert_near,
    assert_same,
    checkpoint,
    give_gradients,
    parameters,
    random_theta,
    train,
    values,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_continues_bit_for_bit(dtype):
    params = parameters(dtype=dtype)
    opt = L3RS(params.items(), checkpoint(directions=ALL), 10)
    train(opt, params, 3)
    file = io.BytesIO()
    torch.save({"params": values(params), "opt": opt.state_dict()}, file)
    train(opt, params, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {name: torch.nn.Parameter(x) for name, x in saved["params"].items()}
    opt = L3RS(resumed.items(), checkpoint(directions=ALL), 10)
    opt.load_state_dict(saved["opt"])
    train(opt, resumed, 3, first=3)
    assert_same(values(resumed), values(params))
    assert opt.param_groups[0]["shared"]["step"] == 6


def test_state_dict_of_another_memory_layout():
    """Moments saved for a contiguous weight go on beside a channels_last one."""
    spec = checkpoint({"conv/kernel": SHAPES["conv/kernel"]})
    plain = parameters(1)["conv.weight"]
    opt = L3RS([plain], spec, 10)
    train(opt, {"w": plain}, 2)
    other = torch.nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    resumed = L3RS([other], spec, 10)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(2):
        give_gradients({"w": plain}, i)
        other.grad = plain.grad.to(memory_format=torch.channels_last)
        opt.step(loss=1.0)
        resumed.step(loss=1.0)
    assert_near({"w": other.detach()}, {"w": plain.detach()})


def test_state_dict_is_a_copy_of_the_shared_state():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    train(opt, params, 1)
    saved = opt.state_dict()
    train(opt, params, 1, first=1)
    assert saved["param_groups"][0]["shared"]["step"] == 1


def test_state_dict_of_other_groups_names_the_layers():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(embedding="descriptor"), 10)
    train(opt, params, 1)
    split = [{"params": [item for item in params.items() if (item[1].ndim > 1) == large]} for large in (False, True)]
    with pytest.raises(l3rs.L3RSError, match=r"has layer '.*' as parameter \d; .* there: .* groups"):
        L3RS(split, checkpoint(embedding="descriptor"), 10).load_state_dict(opt.state_dict())


def test_state_dict_of_another_optimizer():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    other = L3RS([torch.nn.Parameter(torch.ones(4))], checkpoint({"a/b": (4,)}), 10)
    for theirs, sentence in (
        (torch.optim.Adam(params.values()), "the state dict is that of another optimizer than L3RS"),
        (other, "the state dict is of an L3RS optimizer with other layers"),
    ):
        with pytest.raises(l3rs.L3RSError, match=sentence):
            opt.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"directions": ("adam", "lion", "sgd")},
            r"has log_norms \(2, 4\) for .* this optimizer has 1/lion/exp_avg \(",
        ),
        (
            {"directions": ("adam", "weight_decay", "sgd")},
            r"log_norms \(2, 4\).* this optimizer has log_norms \(2, 5\)$",
        ),
        ({"form": 2, "step": "initial"}, r"this optimizer has memory \(11,\)$"),
        ({"loss_decays": (0.5, 0.9, 0.99)}, "^the state dict has 2 averages of the loss; this optimizer has 3$"),
    ],
    ids=["directions", "norms", "form", "losses"],
)
def test_state_dict_of_another_form(fields, words):
    """It is refused, and the optimizer continues as if nothing had been loaded."""
    params = parameters()
    opt = L3RS(params.items(), checkpoint(embedding="descriptor"), 10)
    theirs = parameters()
    other = L3RS(theirs.items(), checkpoint(embedding="descriptor", **fields), 10)
    train(opt, params, 1)
    train(other, theirs, 1)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(l3rs.L3RSError, match=words):
        other.load_state_dict(opt.state_dict())
    assert other.state_dict()["param_groups"] == before["param_groups"]
    train(other, theirs, 1, first=1)


def test_state_dict_of_a_wider_network():
    theta, spec = checkpoint(embedding="descriptor")
    small, wide = ({"w": torch.nn.Parameter(torch.ones(n, 3))} for n in (2, 5))
    opt, other = L3RS(small.items(), (theta, spec), 10), L3RS(wide.items(), (theta, spec), 10)
    train(opt, small, 1)
    with pytest.raises(l3rs.L3RSError, match=r"for parameter 0; this optimizer has 0/adam/exp_avg \(5, 3\)"):
        other.load_state_dict(opt.state_dict())


def test_warns_of_another_horizon_and_other_meta_parameters():
    theta, spec = checkpoint()
    opt = L3RS(parameters().items(), (theta, spec), 10)
    saved = opt.state_dict()
    with warnings.catch_warnings(action="error"):
        L3RS(parameters().items(), (theta, spec), 10).load_state_dict(saved)
    longer = L3RS(parameters().items(), (theta, spec), 20)
    with pytest.warns(UserWarning, match="saved with total_steps=10, not 20") as found:
        longer.load_state_dict(saved)
    assert len(found) == 1
    assert longer.state_dict()["param_groups"][0]["shared"]["total_steps"] == 20
    with pytest.warns(UserWarning, match="saved with other meta-parameters"):
        L3RS(parameters().items(), (random_theta(spec, seed=1), spec), 10).load_state_dict(saved)


def test_state_that_was_moved():
    """Lightning moves every tensor of a state to the parameters' device, or dtype."""
    runs = []
    for moves in (False, True):
        params = parameters()
        opt = L3RS(params.items(), checkpoint(), 10)
        train(opt, params, 2)
        for state in opt.state.values() if moves else ():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    state[key] = Elsewhere(value) if key in small_state(opt.spec) else value
        train(opt, params, 2, first=2)
        runs.append(values(params))
    assert_same(*runs)


class Elsewhere(torch.Tensor):
    """Behaves as a tensor on another device: it has no `numpy` before it is copied to the CPU."""

    @staticmethod
    def __new__(cls, x):
        return x.as_subclass(cls)

    def numpy(self, **_):
        raise TypeError("can't convert device type tensor to numpy")

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def float(self):
        return self


def test_deepcopy_and_pickle_protocol():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    train(opt, params, 2)
    copied_params, copied = copy.deepcopy((params, opt))
    train(opt, params, 2, first=2)
    assert not torch.equal(copied_params["conv.weight"], params["conv.weight"])
    train(copied, copied_params, 2, first=2)
    assert_same(values(copied_params), values(params))


@pytest.mark.parametrize("embedding", ["table", "descriptor"])
def test_state_of_another_order(embedding):
    """torch matches states by position; layers of equal shapes would be swapped silently."""
    shapes = {"a/kernel": (3, 3), "b/kernel": (3, 3)}
    made_of = checkpoint(shapes, embedding=embedding)
    params = parameters(shapes=shapes)
    opt = L3RS(params.items(), made_of, 10)
    train(opt, params, 2)
    saved = opt.state_dict()
    swapped = L3RS(reversed(parameters(shapes=shapes).items()), made_of, 10)
    with pytest.raises(l3rs.L3RSError, match=r"has layer 'a/kernel' as parameter 0; this optimizer has 'b/kernel'"):
        swapped.load_state_dict(saved)
    assert not swapped.state
    wrapped = {f"module._orig_mod.{name}": param for name, param in parameters(shapes=shapes).items()}
    L3RS(wrapped.items(), made_of, 10).load_state_dict(saved)


def test_state_of_another_order_with_mean_embeddings():
    """Layers that are not in the table are compared by the names of their parameters."""
    shapes = {"x/kernel": (3, 3), "y/kernel": (3, 3)}
    made_of = checkpoint({"a/kernel": (3, 3)})
    options = {"on_unknown": "mean", "match": "path"}
    saved = L3RS(parameters(shapes=shapes).items(), made_of, 10, **options).state_dict()
    swapped = L3RS(reversed(parameters(shapes=shapes).items()), made_of, 10, **options)
    with pytest.raises(l3rs.L3RSError, match="has layer 'x/kernel' as parameter 0"):
        swapped.load_state_dict(saved)


def test_state_saved_before_there_was_weight_decay():
    params = parameters()
    opt = L3RS(params.items(), checkpoint(), 10)
    train(opt, params, 1)
    saved = opt.state_dict()
    del saved["param_groups"][0]["weight_decay"]
    resumed = L3RS(params.items(), checkpoint(), 10)
    resumed.load_state_dict(saved)
    train(resumed, params, 1, first=1)

"""convert(drop_bias=True): biases that the norm behind them cancels in training."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from stacks import apart, scatter, seeded, stacks
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torch_bn

C = 4

# As for fusing, float64 on both sides, and up to seven layers that may multiply by 316 each.
ROUNDING = 1e-7


def drop(model: nn.Module, fuse: bool = False) -> list[str]:
    report: list[str] = []
    assert torch_bn.convert(model, fuse=fuse, drop_bias=True, report=report) is model
    return [line for line in report if "bias" in line]


class Net(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.dense, self.norm, self.own = nn.Linear(3, C), nn.BatchNorm1d(C), forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


DENSE = {"Linear": lambda: nn.Linear(3, C), "Conv1d": lambda: nn.Conv1d(3, C, 2, padding=1)}


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("dense", DENSE)
def test_a_bias_moves_into_the_running_mean(dense: str, tracked: bool, fuse: bool) -> None:
    norm = nn.BatchNorm1d(C, track_running_stats=tracked)
    model = nn.Sequential(DENSE[dense](), norm, nn.ReLU()).double()
    scatter(model)
    plain = copy.deepcopy(model)
    running_mean = norm.running_mean
    lines = drop(model, fuse)
    where = "has it in its running_mean" if tracked else "cancels it"
    assert lines == [f"0: bias dropped, 1 {where}"]
    assert "0.bias" not in model.state_dict()
    assert model[0].bias is None
    if tracked:
        assert norm.running_mean is running_mean
        assert torch.equal(running_mean, plain[1].running_mean - plain[0].bias)
    for training in (False, True, False):
        x = torch.randn((6, 3) if dense == "Linear" else (6, 3, 5), dtype=torch.float64)
        model.train(training)
        plain.train(training)
        assert apart(model(x), plain(x)) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_rounded_once(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 999), nn.BatchNorm1d(999)).to(dtype)
    model[1].running_mean.normal_()
    model[0].bias.data = torch.randn(999)  # more digits than the mean has
    want = (model[1].running_mean.double() - model[0].bias.double()).to(dtype)
    assert len(drop(model)) == 1
    assert torch.equal(model[1].running_mean, want)


def test_before_a_layer_written_fused() -> None:
    assert drop(nn.Sequential(nn.Linear(3, C), torch_bn.BatchNormReLU1d(C))) == [
        "0: bias dropped, 1 has it in its running_mean"
    ]
    assert drop(nn.Sequential(nn.Linear(3, C), torch_bn.ReLUBatchNorm1d(C))) == []


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("between", [nn.ReLU, nn.Dropout, nn.Identity])
def test_not_across_another_layer(between: type, fuse: bool) -> None:
    model = nn.Sequential(nn.Linear(3, C), between(), nn.BatchNorm1d(C))
    assert drop(model, fuse) == []
    assert model[0].bias is not None


def test_a_layer_without_bias_is_not_spoken_of() -> None:
    assert drop(nn.Sequential(nn.Linear(3, C, bias=False), nn.BatchNorm1d(C))) == []


def test_only_on_request() -> None:
    model = torch_bn.convert(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C)), fuse=True)
    assert model[0].bias is not None


# ------------------------------------------------------------------------------------------------
# What is left alone
# ------------------------------------------------------------------------------------------------


def with_hook(index: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    model[index].register_forward_hook(lambda *args: None)
    return model


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Linear(C, C))
    model[2].bias = model[0].bias
    return model


def shared() -> nn.Sequential:
    dense = nn.Linear(C, C)
    return nn.Sequential(dense, nn.BatchNorm1d(C), dense)


def parametrised(index: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    parametrize.register_parametrization(model[index], "weight", nn.Identity())
    return model


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    model[1].eval()
    return model


KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook of the Linear": (lambda: with_hook(0), "0: bias kept, 0 has hooks"),
    "hook of the norm": (lambda: with_hook(1), "0: bias kept, 1 has hooks"),
    "tied": (tied, "0: bias kept, 0 has a parameter that another layer has too"),
    "shared": (shared, "0, 2: bias kept, 0, 2 is shared"),
    "parametrised Linear": (lambda: parametrised(0), "0: bias kept, 0 is parametrised"),
    "parametrised norm": (lambda: parametrised(1), "0: bias kept, 1 is parametrised"),
    "derived": (
        lambda: nn.Sequential(Scaled(3, C), nn.BatchNorm1d(C)),
        "0: bias kept, 0 is of a derived class",
    ),
    "frozen": (frozen, "0: bias kept, 1 is in evaluation, and cancels nothing"),
    "channels elsewhere": (  # (N, L, C): the norm is over L
        lambda: nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(5)),
        "0: bias kept, 1 has another number of channels",
    ),
    "used elsewhere": (
        lambda: Net(lambda m, x: m.norm(h := m.dense(x)) + h),
        "dense: bias kept, the value between is used elsewhere",
    ),
    "read": (
        lambda: Net(lambda m, x: m.norm(m.dense(x)) + m.dense.bias),
        "dense: bias kept, dense has its parameters read by the model's forward",
    ),
    "statistics read": (
        lambda: Net(lambda m, x: m.norm(m.dense(x)) + m.norm.running_mean),
        "dense: bias kept, norm has its parameters read by the model's forward",
    ),
    "in training alone": (
        lambda: Net(lambda m, x: m.norm(m.dense(x)) if m.training else m.dense(x)),
        "dense: bias kept, they do not always follow each other",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_kept_with_the_reason(case: str) -> None:
    make, line = KEPT[case]
    model = make()
    state = copy.deepcopy(model.state_dict())
    assert drop(model) == [line]
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_traced_model() -> None:
    model = Net(lambda m, x: m.norm(m.dense(x)).relu()).double()
    plain = copy.deepcopy(model)
    assert drop(model) == ["dense: bias dropped, norm has it in its running_mean"]
    x = torch.randn(6, 3, dtype=torch.float64)
    assert apart(model(x), plain(x)) < ROUNDING
    assert apart(model.eval()(x), plain.eval()(x)) < ROUNDING


# ------------------------------------------------------------------------------------------------
# All together
# ------------------------------------------------------------------------------------------------


def test_an_optimizer_goes_on_working() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 2)).double()
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.01) for each in (model, plain)]
    bias = model[0].bias
    assert len(drop(model, fuse=True)) == 1
    # The optimizer still has the bias; without a gradient it leaves it alone.
    before = bias.detach().clone()
    for x in torch.randn(5, 8, 3, dtype=torch.float64):
        for each, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
    assert torch.equal(bias, before)
    for name in ("0.weight", "1.weight", "1.bias", "3.weight", "3.bias", "1.running_var"):
        assert apart(model.state_dict()[name], plain.state_dict()[name]) < ROUNDING, name


def test_a_bias_stays_where_evaluation_takes_another_way() -> None:
    model = Net(lambda m, x: m.norm(m.dense(x) if m.training else m.dense(x).tanh()))
    assert drop(model) == ["dense: bias kept, they do not always follow each other"]
    assert model.dense.bias is not None


def test_round_trip_of_state_dicts() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    drop(model)
    other = nn.Sequential(nn.Linear(3, C, bias=False), nn.BatchNorm1d(C))
    other.load_state_dict(model.state_dict())
    assert list(other.state_dict()) == list(model.state_dict())


@settings(max_examples=60)
@given(stacks())
def test_any_stack_computes_the_same(drawn: tuple[nn.Sequential, tuple[int, ...]]) -> None:
    model, shape = drawn
    plain = copy.deepcopy(model)
    lines = drop(model, fuse=True)
    cancels = (nn.BatchNorm1d, torch_bn.BatchNorm1d, torch_bn.BatchNormReLU1d)
    expected = [
        index
        for index, (a, b) in enumerate(itertools.pairwise(plain))
        if getattr(a, "bias", None) is not None
        and isinstance(a, (nn.Linear, nn.Conv1d))
        and type(b) in cancels
    ]
    assert len(lines) == len(expected)
    assert all(model[index].bias is None for index in expected)
    for training in (False, True, False):
        model.train(training)
        plain.train(training)
        x = torch.randn(shape, dtype=torch.float64)
        assert apart(seeded(model, x), seeded(plain, x)) < ROUNDING

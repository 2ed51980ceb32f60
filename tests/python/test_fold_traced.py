"""fold on models with a forward of their own, seen through torch.fx."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from folded import EXACT, agree, fold
from stacks import apart, scatter
from torch import Tensor, nn

import torch_bn

C = 4


class Net(nn.Module):
    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.dense, self.norm, self.act = nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()
        self.last = nn.Linear(C, C)
        self.listed, self.own = [self.dense, self.norm], forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


def through_a_list(m: nn.Module, x: Tensor) -> Tensor:
    for layer in m.listed:
        x = layer(x)
    return x


TRACED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "before": (lambda m, x: F.relu(m.norm(m.dense(x))), "folded into dense"),
    "dropout": (
        lambda m, x: m.norm(F.dropout(m.dense(x), 0.5, m.training)).exp(),
        "folded into dense",
    ),
    "flatten": (lambda m, x: m.norm(torch.flatten(m.dense(x), 1)), "folded into dense"),
    "after": (lambda m, x: m.last(m.norm(m.dense(x).tanh()).flatten(1)), "folded into last"),
    "a list": (through_a_list, "folded into dense"),
    "dropout that stays": (
        lambda m, x: m.norm(F.dropout(m.dense(x), 0.0, True)),
        "made a multiply-add",
    ),
    "used elsewhere": (lambda m, x: m.norm(h := m.dense(x)) + h, "made a multiply-add"),
    "used elsewhere, after": (
        lambda m, x: m.last(h := m.norm(m.dense(x).tanh())) + h,
        "made a multiply-add",
    ),
    "Linear called twice": (
        lambda m, x: m.norm(m.dense(x)) + m.dense(x + 1),
        "made a multiply-add",
    ),
    "norm called twice": (
        lambda m, x: m.norm(m.dense(x)) + m.norm(m.last(m.dense(x))),
        "made a multiply-add",
    ),
    "weight read": (lambda m, x: m.norm(m.dense(x)) + m.dense.weight.sum(), "made a multiply-add"),
    "not traced": (
        lambda m, x: m.norm(m.dense(x)) if x.sum() < 1e9 else x,
        "made a multiply-add",
    ),
}


@pytest.mark.parametrize("case", TRACED)
def test_traced_models(case: str) -> None:
    forward, words = TRACED[case]
    _, report = agree(Net(forward), 6, 3)
    assert report[-1] == f"norm: torch.nn.BatchNorm1d {words}"
    assert len(report) == (2 if case == "not traced" else 1)


def test_a_norm_whose_buffers_are_read_stays() -> None:
    model = Net(lambda m, x: m.norm(m.dense(x)) + m.norm.running_mean)
    folded, report = fold(model)
    assert report == [
        "norm: left alone, the model's forward reads its parameters or buffers",
    ]
    x = torch.randn(5, 3)
    assert torch.equal(folded(x), model.eval()(x))


def test_the_result_of_convert() -> None:
    model = Net(lambda m, x: m.last(F.relu(m.norm(m.dense(x))))).double()
    scatter(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    want = copy.deepcopy(model).eval()(x)
    graph = torch_bn.convert(model, fuse=True)
    folded = torch_bn.fold(graph)
    assert type(folded.norm) is nn.ReLU
    assert apart(folded(x), want) < EXACT
    chain = nn.Sequential(nn.Linear(3, C), nn.ReLU(), nn.BatchNorm1d(C), nn.Linear(C, 2)).double()
    scatter(chain)
    want = copy.deepcopy(chain).eval()(x)
    folded = torch_bn.fold(torch_bn.convert(chain, fuse=True, drop_bias=True))
    assert [type(each).__name__ for each in folded] == ["Linear", "Identity", "ReLU", "Linear"]
    assert apart(folded(x), want) < EXACT

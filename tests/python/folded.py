"""What the tests of folding have in common."""

from __future__ import annotations

import copy

import torch
from stacks import apart, scatter
from torch import nn

import torch_bn

EXACT = 1e-12  # float64: some sums of 1e-16 in another order


def fold(model: nn.Module) -> tuple[nn.Module, list[str]]:
    scatter(model)
    report: list[str] = []
    return torch_bn.fold(model, report=report), report


def agree(model: nn.Module, *shape: int) -> tuple[nn.Module, list[str]]:
    """Fold in float64, and compare over a batch."""
    model = model.double()
    folded, report = fold(model)
    x = torch.randn(shape, dtype=torch.float64)
    assert apart(folded(x), copy.deepcopy(model).eval()(x)) < EXACT
    assert not any(isinstance(each, nn.BatchNorm1d) for each in folded.modules())
    return folded, report

"""What the tests of the layer in the place of torch's have in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torch_bn

C = 4
LAYERS = [nn.BatchNorm1d, torch_bn.BatchNorm1d]
# Float64 sums of at most 64 values of size one, in another order.
FLOAT64 = {"rtol": 0.0, "atol": 1e-12}

layers = pytest.mark.parametrize("layer_class", LAYERS, ids=["builtin", "ours"])


def assert_same_state(layer: nn.Module, other: nn.Module) -> None:
    state, other_state = layer.state_dict(), other.state_dict()
    assert list(state) == list(other_state)
    for name, value in state.items():
        assert value.dtype == other_state[name].dtype
        if value.is_floating_point():
            assert torch.allclose(value, other_state[name], **FLOAT64), name
        else:
            assert torch.equal(value, other_state[name]), name


def trained(layer_class: type, **options: Any) -> nn.Module:
    layer = layer_class(C, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.linspace(0.5, 2, C))
    layer(torch.linspace(-3, 1, 8 * C).reshape(8, C).to(layer.running_mean.dtype))
    return layer

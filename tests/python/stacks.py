"""Random small Sequential stacks, and what their conversions are judged by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_bn

WIDTHS = st.integers(2, 5)
NORMS = (nn.BatchNorm1d, torch_bn.BatchNorm1d)
FUSED = (torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d)


@st.composite
def stacks(draw: st.DrawFn, tracked: bool = False) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A float64 model with trained-looking parameters and statistics, and its input's shape."""
    is_3d = draw(st.booleans())
    width = draw(WIDTHS)
    shape = (6, width, 7) if is_3d else (6, width)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    layers: list[nn.Module] = []
    length = 7
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["dense", "dense", "norm", "norm", "fused", "relu", "other"]))
        if kind == "dense":
            new, bias = draw(WIDTHS), draw(st.booleans())
            if is_3d:
                padding = draw(st.integers(0, 1))
                length += 2 * padding - 1
                layers.append(nn.Conv1d(width, new, 2, padding=padding, bias=bias))
            else:
                layers.append(nn.Linear(width, new, bias=bias))
            width = new
        elif kind in ("norm", "fused"):
            options: dict[str, Any] = {
                "affine": draw(st.booleans()),
                "bias": draw(st.booleans()),
                "momentum": draw(st.sampled_from([0.1, None])),
                "track_running_stats": tracked or draw(st.booleans()),
            }
            cls = draw(st.sampled_from(NORMS if kind == "norm" else FUSED))
            layers.append(cls(width, **options))
        elif kind == "relu":
            # After another ReLU an in-place one is refused by autograd.
            may = bool(layers) and isinstance(layers[-1], (nn.Linear, nn.Conv1d, *NORMS[:1]))
            may = may and not isinstance(layers[-1], FUSED)
            layers.append(nn.ReLU(inplace=may and draw(st.booleans())))
        else:
            layers.append(draw(st.sampled_from([nn.Dropout(0.3), nn.Identity()])))
        if is_3d and length > 1 and draw(st.integers(0, 5)) == 0:
            layers.append(nn.Flatten())
            width, is_3d = width * length, False
    model = nn.Sequential(*layers).double()
    scatter(model)
    return model, shape


def scatter(model: nn.Module) -> None:
    """Give every norm a weight, bias and statistics that are not where they began."""
    with torch.no_grad():
        for module in model.modules():
            if not isinstance(module, nn.BatchNorm1d):
                continue
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.normal_()
            if module.running_var is not None:
                module.running_var.uniform_(0.5, 2)


def seeded(model: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The model's output, with the dropout masks of always the same seed."""
    torch.manual_seed(1)
    return model(x.clone())  # an in-place ReLU may come first


def apart(got: Tensor, want: Tensor) -> float:
    """max |got - want| over max |want|; over 1 if that is less."""
    assert got.shape == want.shape
    got, want = got.detach(), want.detach()
    if want.numel() == 0:
        return 0.0
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))

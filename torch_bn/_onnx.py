"""ONNX export: the standard's batch normalisation in place of our operator.

The exporter decomposes what it finds in an exported program. Our operator, when it is asked for its
parts during an ONNX export, is torch's batch norm; at all other times it is what C++ says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey

from torch_bn import _library as _library  # its loading registers the operators

_PARTS = DispatchKey.CompositeImplicitAutograd
_operator = torch.ops.torch_bn.batch_norm.default


@_operator.py_impl(_PARTS)
def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
) -> Tensor:
    statistics = (running_mean, running_var, num_batches_tracked)
    result: Tensor
    if not torch.onnx.is_in_onnx_export():
        result = _operator._op_dk(_PARTS, input, weight, bias, *statistics, training, momentum, eps)
        return result
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor = 0.0 if momentum is None else momentum
    return torch.batch_norm(
        input, weight, bias, running_mean, running_var, training, factor, eps, False
    )

"""ONNX export: the standard's batch normalisation in place of our operators.

The exporter decomposes what it finds in an exported program. Our operators, when asked for their
parts during an ONNX export, are torch's batch norm and ReLU; at all other times what C++ says.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._ops import OpOverload

from torch_bn import _serve

_PARTS = DispatchKey.CompositeImplicitAutograd


def _register(operator: OpOverload, relu: int) -> None:
    """Make the parts of one of the operators :func:`_standard` during an ONNX export."""

    @operator.py_impl(_PARTS)
    def _(
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
        arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked)
        settings = (training, momentum, eps)
        if torch.onnx.is_in_onnx_export():
            return _standard(*arguments, *settings, relu)
        result: Tensor = operator._op_dk(_PARTS, *arguments, *settings)
        return result


def _standard(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: int,
) -> Tensor:
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor = 0.0 if momentum is None else momentum
    if relu == _serve.RELU_BEFORE:
        input = torch.relu(input)
    output = torch.batch_norm(
        input, weight, bias, running_mean, running_var, training, factor, eps, False
    )
    return torch.relu(output) if relu == _serve.RELU_AFTER else output


for _relu, _operator in enumerate(_serve.OPERATORS):
    _register(_operator, _relu)

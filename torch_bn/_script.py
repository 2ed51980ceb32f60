"""Batch norm as TorchScript can compile it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_norm(  # pragma: no cover: TorchScript compiles it, Python never runs it
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
    """The public operators on CPU, torch's own batch norm elsewhere. For ``relu`` see _serve."""
    if not input.is_cpu or input.dim() < 2 or input.dim() > 3:
        factor = 0.0 if momentum is None else momentum
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
            if momentum is None:
                factor = 1.0 / float(num_batches_tracked)
        x = torch.relu(input) if relu == 2 else input
        y = F.batch_norm(x, running_mean, running_var, weight, bias, training, factor, eps)
        return torch.relu(y) if relu == 1 else y
    statistics = (running_mean, running_var, num_batches_tracked)
    settings = (training, momentum, eps)
    if relu == 1:
        result: Tensor = torch.ops.torch_bn.batch_norm_relu(
            input, weight, bias, *statistics, *settings
        )
    elif relu == 2:
        result = torch.ops.torch_bn.relu_batch_norm(input, weight, bias, *statistics, *settings)
    else:
        result = torch.ops.torch_bn.batch_norm(input, weight, bias, *statistics, *settings)
    return result


def layer(  # pragma: no cover: TorchScript compiles it, Python never runs it
    virtual_batch_size: int | None,
    channels_last: bool,
    relu: int,
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
    """The layer with its options."""
    transposed = channels_last and input.dim() == 3
    x = input.transpose(1, 2) if transposed else input
    if virtual_batch_size is not None and relu == 2:
        x = torch.relu(x)
    statistics = (running_mean, running_var, num_batches_tracked)
    settings = (training, momentum, eps)
    if virtual_batch_size is None:
        result = batch_norm(x, weight, bias, *statistics, *settings, relu)
    else:
        result = torch.ops.torch_bn.ghost_batch_norm(
            x, weight, bias, *statistics, *settings, virtual_batch_size
        )
        if relu == 1:
            result = torch.relu(result)
    return result.transpose(1, 2).contiguous() if transposed else result

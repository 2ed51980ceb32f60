"""Ghost batch norm: who serves a call in training, as in :mod:`torch_bn._serve`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_variadic

from torch_bn import _serve

_operator = torch.ops.torch_bn.ghost_batch_norm.default


def check_size(virtual_batch_size: Any) -> None:
    """Refuse what is neither None nor a positive integer."""
    if virtual_batch_size is None:
        return
    if not isinstance(virtual_batch_size, int) or isinstance(virtual_batch_size, bool):
        raise TypeError(
            "virtual_batch_size should be an integer or None, but got "
            f"{type(virtual_batch_size).__name__}"
        )
    if virtual_batch_size < 1:
        raise ValueError(f"virtual_batch_size should be positive, but got {virtual_batch_size}")


def bounds(rows: int, values_per_row: int, virtual_batch_size: int) -> list[tuple[int, int]]:
    """First row and end of every chunk: those of ``torch.split``, but that a last chunk of a
    single value per channel, which has no variance, joins the one before."""
    starts = list(range(0, max(rows, 1), virtual_batch_size))
    if len(starts) > 1 and (rows - starts[-1]) * values_per_row == 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], rows], strict=True))


def batch_norm(
    virtual_batch_size: int,
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
    """Each chunk of rows normalised by its own statistics, in training.

    Raises what the ordinary layer raises, for the whole or a chunk; then no buffer has changed.
    """
    check_size(virtual_batch_size)
    tensors = (input, running_mean, running_var, weight, bias)
    statistics = (running_mean, running_var, num_batches_tracked)
    arguments = (input, weight, bias, *statistics, training, momentum, eps)
    result: Tensor
    to_torch = False
    if has_torch_function_variadic(*tensors) or _serve._tracing_state() is not None:
        to_torch = _serve._belongs_to_torch(tensors)
        if not to_torch and any(isinstance(each, Proxy) for each in tensors):
            result = _operator(*arguments, virtual_batch_size)
            return result
    if not to_torch and (input.is_cpu or input.is_meta):
        try:
            result = _operator(*arguments, virtual_batch_size)
            return result
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            if _serve._is_final(error, tensors, num_batches_tracked, momentum, eps):
                raise
    # The first chunk is refused, if any is: it is the largest, or as large as the others.
    rest = arguments[1:]
    length = input.size(2) if input.dim() == 3 else 1
    chunks = bounds(input.size(0), length, virtual_batch_size)
    return torch.cat([_serve.batch_norm(input[begin:end], *rest) for begin, end in chunks])

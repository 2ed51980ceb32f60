"""Sequences: padded steps left out, and channels as the last dimension.

The steps that count are gathered into an (R, C) matrix, which is normalised as any other and spread
again; all in differentiable operators, so that every order of derivative follows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from torch_bn import _ghost, _serve

# What the layer passes besides its input: weight, bias, running statistics, counter, whether the
# batch's own statistics normalise it, momentum, eps.
_Rest: TypeAlias = tuple[
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    bool,
    float | None,
    float,
]
_BY_BATCH = 5

# The words of torch.nn.functional.batch_norm.
_SINGLE = "Expected more than 1 value per channel when training, got input size"


def batch_norm(
    input: Tensor,
    rest: _Rest,
    virtual_batch_size: int | None,
    channels_last: bool,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """The layer's arithmetic on (N, C, L), or with ``channels_last`` on (N, L, C).

    Raises what the ordinary layer raises, for the steps that count; then no buffer has changed.
    """
    if lengths is not None or mask is not None:
        steps = _steps_that_count(input, channels_last, lengths, mask)
        return _masked(input, rest, virtual_batch_size, channels_last, steps)
    if channels_last and input.dim() == 3:
        return _channels_last(input, rest, virtual_batch_size)
    return _normalise(input, rest, virtual_batch_size)


def _normalise(input: Tensor, rest: _Rest, virtual_batch_size: int | None) -> Tensor:
    if virtual_batch_size is None:
        return _serve.batch_norm(input, *rest)
    return _ghost.batch_norm(virtual_batch_size, input, *rest)


# ------------------------------------------------------------------------------------------------
# Channels last
# ------------------------------------------------------------------------------------------------


def _channels_last(input: Tensor, rest: _Rest, virtual_batch_size: int | None) -> Tensor:
    rows, length, channels = input.shape
    if rest[_BY_BATCH] and rows * length == 1:
        raise ValueError(f"{_SINGLE} {input.shape}")
    # A matrix of steps without a copy, as of contiguous sequences and of slices of their channels.
    if length > 0 and (input.is_contiguous() or input.stride(0) == length * input.stride(1)):
        of_steps = None if virtual_batch_size is None else virtual_batch_size * length
        result = _normalise(input.flatten(0, 1), rest, of_steps)
        return result.view(rows, length, channels)
    # The kernels read any strides in place; what they wrote is put in order.
    return _normalise(input.transpose(1, 2), rest, virtual_batch_size).transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------------
# Padded steps
# ------------------------------------------------------------------------------------------------


def _steps_that_count(input: Tensor, channels_last: bool, lengths: Any, mask: Any) -> Tensor:
    """A bool tensor (N, L) of what was given; refused if it does not fit the input."""
    if lengths is not None and mask is not None:
        raise ValueError("expected lengths or mask, but got both")
    if input.dim() != 3:
        raise ValueError(f"expected 3D input with lengths or mask (got {input.dim()}D input)")
    rows, length = input.size(0), input.size(1 if channels_last else 2)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask should be a bool tensor, but got {_kind(mask)}")
        if mask.shape != (rows, length):
            raise ValueError(
                f"mask should have the input's size (N, L) = ({rows}, {length}), but got "
                f"{tuple(mask.shape)}"
            )
        return mask
    integer = isinstance(lengths, Tensor) and not (
        lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool
    )
    if not integer:
        raise TypeError(f"lengths should be an integer tensor, but got {_kind(lengths)}")
    if lengths.shape != (rows,):
        raise ValueError(
            f"lengths should have the input's size (N) = ({rows},), but got {tuple(lengths.shape)}"
        )
    lengths = lengths.long()  # the wider unsigned types have no comparisons
    words = f"lengths should be in [0, L] = [0, {length}]"
    fit = ((lengths >= 0) & (lengths <= length)).all()
    if is_compiling():
        torch._assert_async(fit, words)
    elif not fit:
        least, most = int(lengths.min()), int(lengths.max())
        raise ValueError(f"{words}, but got {least if least < 0 else most}")
    steps: Tensor = torch.arange(length, device=lengths.device) < lengths.unsqueeze(1)
    return steps


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _masked(
    input: Tensor,
    rest: _Rest,
    virtual_batch_size: int | None,
    channels_last: bool,
    steps: Tensor,
) -> Tensor:
    sequences = input if channels_last else input.transpose(1, 2)  # (N, L, C)
    index = steps.flatten().nonzero().squeeze(1)
    packed = sequences.flatten(0, 1).index_select(0, index)
    if not rest[_BY_BATCH]:
        result = _serve.batch_norm(packed, *rest)
    else:
        pieces = [packed]
        if virtual_batch_size is not None:
            _ghost.check_size(virtual_batch_size)
            pieces = _chunks(packed, steps, virtual_batch_size)
        for piece in pieces:
            if is_compiling():  # the number of steps is not known yet
                torch._check(  # type: ignore[no-untyped-call]
                    piece.size(0) > 1, lambda: f"{_SINGLE} of too few steps"
                )
            elif piece.size(0) < 2:
                raise ValueError(f"{_SINGLE} {piece.shape}")
        results = [_serve.batch_norm(piece, *rest) for piece in pieces]
        result = results[0] if len(results) == 1 else torch.cat(results)
    # Zeros for the padded steps, whatever is in the input there. Adding to zeros is the fastest of
    # the ways to write rows here, and one that vmap knows.
    spread = result.new_zeros(steps.numel(), result.size(1)).index_add_(0, index, result)
    spread = spread.view(*steps.shape, result.size(1))
    return spread if channels_last else spread.transpose(1, 2).contiguous()


def _chunks(packed: Tensor, steps: Tensor, virtual_batch_size: int) -> list[Tensor]:
    """The steps that count of so many sequences each; fewer than two of the last chunk join the
    chunk before, as a last row of a single value does in :mod:`torch_bn._ghost`."""
    counts = [int(part.sum()) for part in torch.split(steps, virtual_batch_size)]
    if len(counts) > 1 and counts[-1] < 2:
        last = counts.pop()
        counts[-1] += last
    return list(torch.split(packed, counts))

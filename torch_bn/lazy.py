"""The layer that learns its number of channels from its first input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_bn.modules import BatchNorm1d, _set_own_options

__all__ = ["LazyBatchNorm1d"]


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """A :class:`torch_bn.BatchNorm1d` whose ``num_features`` is the first input's ``size(1)``.

    Before that it holds uninitialised parameters and buffers; by its first call it becomes a
    :class:`torch_bn.BatchNorm1d`, class included. See
    :class:`torch.nn.modules.lazy.LazyModuleMixin` for what may be done with it until then.

    Args:
        eps: added to the variance; positive.
        momentum: share of each batch in the running statistics, or None for their cumulative
            average.
        affine: whether there are a learnable weight and bias.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        device: of parameters and buffers.
        dtype: of parameters and running statistics.
        bias: whether there is a learnable bias (if ``affine``).
        virtual_batch_size: as of :class:`torch_bn.BatchNorm1d`.
        channels_last: likewise. Then ``num_features`` is the first input's ``size(-1)``.

    Shape:
        - Input, lengths, mask and output: as of :class:`torch_bn.BatchNorm1d`

    Raises:
        IndexError: in forward, for a first input of one dimension.
        ValueError: as :class:`torch_bn.BatchNorm1d`; likewise TypeError, RuntimeError and
            NotImplementedError.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.LazyBatchNorm1d()
        >>> layer(torch.randn(8, 5)).shape
        torch.Size([8, 5])
        >>> layer
        BatchNorm1d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    cls_to_become = BatchNorm1d
    __constants__ = BatchNorm1d.__constants__
    virtual_batch_size: int | None = None
    channels_last: bool = False

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        virtual_batch_size: int | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        _set_own_options(self, virtual_batch_size, channels_last)

    def initialize_parameters(self, input: Tensor, *_: Any, **__: Any) -> None:
        """Take the number of channels from the first input, before the forward has checked it."""
        by_position = self.channels_last and input.dim() == 3
        super().initialize_parameters(input.transpose(1, 2) if by_position else input)

    extra_repr = BatchNorm1d.extra_repr

    # A module's call fetches its forward before the hook that makes it a BatchNorm1d runs.
    forward = BatchNorm1d.forward
    _step_by_step = BatchNorm1d._step_by_step

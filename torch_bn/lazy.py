"""The layer that learns its number of channels from its first input."""

from __future__ import annotations

import torch

from torch_bn.modules import BatchNorm1d

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

    Shape:
        - Input: (N, C) or (N, C, L), float32, float64, bfloat16 or float16
        - Output: the input's shape and dtype, contiguous

    Raises:
        ValueError: in forward, for an input that is neither 2D nor 3D, or one value per channel
            in training.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.LazyBatchNorm1d()
        >>> layer(torch.randn(8, 5)).shape
        torch.Size([8, 5])
        >>> layer
        BatchNorm1d(5, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """

    cls_to_become = BatchNorm1d

    # A module's call fetches its forward before the hook that makes it a BatchNorm1d runs.
    forward = BatchNorm1d.forward
    _step_by_step = BatchNorm1d._step_by_step

"""Batch norm together with the ReLU beside it, as one operation."""

from __future__ import annotations

from torch import Tensor
from torch._jit_internal import is_scripting

from torch_bn import _serve
from torch_bn.modules import BatchNorm1d

__all__ = ["BatchNormReLU1d", "ReLUBatchNorm1d"]


class BatchNormReLU1d(BatchNorm1d):
    r"""Batch normalization and then a ReLU, as one operation.

    .. math:: y = \max\left(0, \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} \cdot
        \mathrm{weight} + \mathrm{bias}\right)

    (Ioffe and Szegedy 2015, section 3.2, put the normalization before the nonlinearity.) In place
    of ``Sequential(BatchNorm1d(C), ReLU())``: values, gradients, statistics and what happens to NaN
    and zero are those of the two, but forward and backward make no more sweeps over memory than the
    normalization alone, and nothing but the input and two numbers per channel is kept for the
    backward. It computes the ReLU's mask again, by the instructions of the forward.

    Constructor, parameters, buffers, ``state_dict``, what is raised, and ``running_mean`` and
    ``running_var``, which are those of the input, are those of :class:`torch_bn.BatchNorm1d`. With
    ``virtual_batch_size``, ``channels_last``, ``lengths`` or ``mask`` the ReLU is an operation of
    its own.

    Shape:
        - Input: (N, C) or (N, C, L), float32, float64, bfloat16 or float16
        - Output: the input's shape and dtype, contiguous

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.BatchNormReLU1d(2)
        >>> x = torch.tensor([[99.0, 0.0], [101.0, 4.0]])
        >>> layer(x).tolist()
        [[0.0, 0.0], [0.9999949932098389, 0.9999987483024597]]
    """

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalise ``input``, then apply the ReLU; arguments are those of the base class."""
        if not is_scripting():  # noqa: SIM102  (it stands alone for TorchScript)
            if lengths is None and mask is None:
                result: Tensor = _serve.layer(self, input, 1)
                if result is not NotImplemented:
                    return result
        return self._step_by_step(input, lengths, mask, 1)


class ReLUBatchNorm1d(BatchNorm1d):
    r"""A ReLU and then batch normalization, as one operation.

    .. math:: y = \frac{\max(0, x) - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} \cdot
        \mathrm{weight} + \mathrm{bias}

    In place of ``Sequential(ReLU(), BatchNorm1d(C))``, in the same way as
    :class:`torch_bn.BatchNormReLU1d`; only the input of the ReLU is kept for the backward.
    Statistics, running ones included, are those of max(0, x).

    Constructor, parameters, buffers, ``state_dict`` and what is raised are those of
    :class:`torch_bn.BatchNorm1d`.

    Shape:
        - Input: (N, C) or (N, C, L), float32, float64, bfloat16 or float16
        - Output: the input's shape and dtype, contiguous

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.ReLUBatchNorm1d(1)
        >>> layer(torch.tensor([[-7.0], [2.0]])).tolist()
        [[-0.9999949932098389], [0.9999949932098389]]
    """

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Apply the ReLU to ``input``, then normalise; arguments are those of the base class."""
        if not is_scripting():  # noqa: SIM102  (it stands alone for TorchScript)
            if lengths is None and mask is None:
                result: Tensor = _serve.layer(self, input, 2)
                if result is not NotImplemented:
                    return result
        return self._step_by_step(input, lengths, mask, 2)

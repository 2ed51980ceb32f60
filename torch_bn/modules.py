"""The layers: subclasses of torch's, with another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._jit_internal import is_scripting
from torch.fx import Proxy

from torch_bn import _ghost, _script, _sequences, _serve

__all__ = ["BatchNorm1d"]


def _set_own_options(layer: Any, virtual_batch_size: int | None, channels_last: bool) -> None:
    """The options that torch's layer lacks; an ordinary layer has the attributes of torch's."""
    _ghost.check_size(virtual_batch_size)
    if virtual_batch_size is not None:
        layer.virtual_batch_size = virtual_batch_size
    if channels_last:
        layer.channels_last = True


class BatchNorm1d(torch.nn.BatchNorm1d):
    r"""Batch normalization over an (N, C) or (N, C, L) input, in place of torch's own layer.

    Constructor, parameters, buffers, ``state_dict`` and behaviour are those of
    :class:`torch.nn.BatchNorm1d`; the arithmetic is this library's. It is right to a few
    roundings of the result whatever the mean of the data, and gives the same bits on every number
    of threads.

    Args:
        num_features: number of channels C of the input.
        eps: added to the variance; positive.
        momentum: share of each batch in the running statistics, or None for their cumulative
            average.
        affine: whether there are a learnable weight and bias.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        device: of parameters and buffers; torch's own implementation serves others than CPU.
        dtype: of parameters and running statistics.
        bias: whether there is a learnable bias (if ``affine``).
        virtual_batch_size: rows of a chunk of ghost batch norm, or None for the whole batch. In
            training, chunks of so many consecutive rows (of dimension 0) are normalised each by its
            own statistics, and move the running statistics one after the other, each counted in
            ``num_batches_tracked``. The last chunk may be shorter; a last row of a single value per
            channel joins the chunk before. May be set anew at any time.
        channels_last: whether sequences are (N, L, C) and not (N, C, L). May be set anew at any
            time.

    Shape:
        - Input: (N, C) or (N, C, L), with ``channels_last`` (N, C) or (N, L, C); float32, float64,
          bfloat16 or float16
        - Lengths: (N), of any integer type, in [0, L]
        - Mask: (N, L), bool
        - Output: the input's shape and dtype, contiguous

    Raises:
        ValueError: for a ``virtual_batch_size`` that is not positive; in forward, for an input that
            is neither 2D nor 3D, one value per channel (of the batch, or of a chunk) in training,
            or an ``eps`` that is not positive; for ``lengths`` or a ``mask`` of another size, out
            of range, beside each other, or beside a 2D input.
        TypeError: for a ``virtual_batch_size`` that is no integer, ``lengths`` that are no integer
            tensor or a ``mask`` that is no bool tensor.
        RuntimeError: in forward, for another number of channels or a dtype that does not fit.
        NotImplementedError: in forward, for an integer or complex input.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.BatchNorm1d(2)
        >>> x = torch.tensor([[99.0, 0.0], [101.0, 4.0]])
        >>> layer(x).tolist()
        [[-0.9999949932098389, -0.9999987483024597], [0.9999949932098389, 0.9999987483024597]]
        >>> layer.running_mean
        tensor([10.0000,  0.2000])
        >>> ghost = torch_bn.BatchNorm1d(1, virtual_batch_size=2)
        >>> ghost(torch.tensor([[0.0], [8.0], [100.0], [104.0]])).flatten().round(decimals=3)
        tensor([-1.,  1., -1.,  1.], grad_fn=<RoundBackward1>)
        >>> ghost.num_batches_tracked
        tensor(2)
        >>> sequences = torch.tensor([[[1.0, 2.0, 3.0]], [[2.0, 0.0, 0.0]]])
        >>> y = torch_bn.BatchNorm1d(1, eps=0.5)(sequences, lengths=torch.tensor([3, 1]))
        >>> y.detach()
        tensor([[[-1.,  0.,  1.]],
        <BLANKLINE>
                [[ 0.,  0.,  0.]]])
    """

    __constants__ = [  # noqa: RUF012
        *torch.nn.BatchNorm1d.__constants__,
        "virtual_batch_size",
        "channels_last",
    ]

    # Of the class, so that layers have them that were pickled without, or made by a change of
    # class.
    virtual_batch_size: int | None = None
    channels_last: bool = False

    def __init__(
        self,
        num_features: int,
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
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        _set_own_options(self, virtual_batch_size, channels_last)

    def extra_repr(self) -> str:
        """The options of torch's layer, and those of ours that are set."""
        # Of a lazy layer too, for which super() would not do.
        text: str = torch.nn.BatchNorm1d.extra_repr(self)  # type: ignore[no-untyped-call]
        if self.virtual_batch_size is not None:
            text += f", virtual_batch_size={self.virtual_batch_size}"
        if self.channels_last:
            text += f", channels_last={self.channels_last}"
        return text

    def forward(
        self, input: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalise ``input``; in training, update the running statistics and their counter.

        Args:
            input: see the class.
            lengths: of padded sequences, how many steps count in each.
            mask: which steps count, True for those that do. The others are left out of the
                statistics, whatever they hold; they are zero in the result, and get no gradient.
        """
        if not is_scripting():  # noqa: SIM102  (it stands alone for TorchScript)
            if lengths is None and mask is None:
                result: Tensor = _serve.layer(self, input, 0)
                if result is not NotImplemented:
                    return result
        return self._step_by_step(input, lengths, mask, 0)

    def _step_by_step(
        self, input: Tensor, lengths: Tensor | None, mask: Tensor | None, relu: int
    ) -> Tensor:
        """The forward in Python, with or without a ReLU in the same sweeps (see _serve)."""
        # TorchScript leaves out the branch not taken, but only where is_scripting() stands alone.
        if is_scripting():  # noqa: SIM114
            self._check_input_dim(input)
        elif not isinstance(input, Proxy):  # FX does not know the rank while it traces
            self._check_input_dim(input)
        training = bool(self.training)
        # In training without tracking the statistics are left alone; in evaluation without them
        # the batch's own are used. Both as in torch.
        uses_running = not training or self.track_running_stats
        running_mean = self.running_mean if uses_running else None
        running_var = self.running_var if uses_running else None
        arguments = (
            input,
            self.weight,
            self.bias,
            running_mean,
            running_var,
            self.num_batches_tracked if training and self.track_running_stats else None,
            training or (running_mean is None and running_var is None),
            self.momentum,
            self.eps,
        )
        virtual_batch_size = self.virtual_batch_size if training else None
        if is_scripting():
            if lengths is not None or mask is not None:
                raise RuntimeError("torch_bn: lengths and mask are not served in TorchScript")
            return _script.layer(virtual_batch_size, self.channels_last, relu, *arguments)
        else:
            # FX gives every argument of the layer that it traces by itself a proxy, given or not.
            if isinstance(lengths, Proxy) and lengths.tracer.root is self:
                lengths = None
            if isinstance(mask, Proxy) and mask.tracer.root is self:
                mask = None
            of_sequences = self.channels_last or lengths is not None or mask is not None
            if not of_sequences and virtual_batch_size is None:
                return _serve.batch_norm(*arguments, relu)
            # With these a ReLU is an operation of its own.
            if relu == _serve.RELU_BEFORE:
                arguments = (torch.relu(input), *arguments[1:])
            if of_sequences or virtual_batch_size is None:
                y = _sequences.batch_norm(
                    arguments[0],
                    arguments[1:],
                    virtual_batch_size,
                    self.channels_last,
                    lengths,
                    mask,
                )
            else:
                y = _ghost.batch_norm(virtual_batch_size, *arguments)
            return torch.relu(y) if relu == _serve.RELU_AFTER else y

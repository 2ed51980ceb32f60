"""The layers whose batch lies in several processes, over torch.distributed."""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from torch_bn import _serve
from torch_bn.fused import BatchNormReLU1d, ReLUBatchNorm1d
from torch_bn.modules import BatchNorm1d

__all__ = ["SyncBatchNorm1d", "SyncBatchNormReLU1d", "SyncReLUBatchNorm1d"]

_ProcessGroup: TypeAlias = Any  # dist.ProcessGroup, which torch does not always have

_sync_batch_norm = torch.ops.torch_bn.sync_batch_norm.default


class SyncBatchNorm1d(BatchNorm1d):
    r"""A :class:`torch_bn.BatchNorm1d` with the statistics of all processes' batches together.

    It is for models that are trained by several processes on CPU, one
    :class:`torch.nn.parallel.DistributedDataParallel` in each. In training, a forward gathers each
    process's number of rows, mean and variance, and a backward two sums per channel, each in one
    collective whose parts every process adds up in the order of the ranks. So all processes hold
    the same running statistics, to the bit. Local batches may differ in size, and be empty.
    Evaluation does not communicate. Without ``torch.distributed``, or in a group of one process,
    it is a :class:`torch_bn.BatchNorm1d`.

    As torch's own :class:`torch.nn.SyncBatchNorm` it gives weight and bias the gradients of the
    local rows; DistributedDataParallel averages them. It has no second derivative.

    The first forward in training makes sure that all processes mean the same (layer, channels,
    dtypes, momentum, eps), and raises in all of them if not. With the environment variable
    ``TORCH_BN_SYNC_DEBUG=1`` every forward does.

    Args:
        num_features: number of channels C of the input.
        eps: added to the variance; positive.
        momentum: share of each batch in the running statistics, or None for their cumulative
            average.
        affine: whether there are a learnable weight and bias.
        track_running_stats: whether running statistics are kept, and used in evaluation.
        process_group: the processes whose batches belong together; all of them when None.
        device: of parameters and buffers.
        dtype: of parameters and running statistics.
        bias: whether there is a learnable bias (if ``affine``).

    Shape:
        - Input: (N, C) or (N, C, L), float32, float64, bfloat16 or float16; N may be 0
        - Output: the input's shape and dtype, contiguous

    Raises:
        ValueError: in forward, for an input that is neither 2D nor 3D, one value per channel in
            all processes together in training, an ``eps`` that is not positive, or a
            ``virtual_batch_size`` or ``channels_last`` that was set.
        RuntimeError: in forward, for another number of channels, a dtype that does not fit, a
            group that is gone, or when the processes do not do the same; in forward and backward,
            when the collective fails because a process has ended, or does not come within the
            group's timeout.
        NotImplementedError: for an integer or complex input, a second derivative, or the
            transforms of :mod:`torch.func`.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.SyncBatchNorm1d(2)
        >>> layer(torch.tensor([[99.0, 0.0], [101.0, 4.0]])).tolist()
        [[-0.9999949932098389, -0.9999987483024597], [0.9999949932098389, 0.9999987483024597]]
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: _ProcessGroup | None = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.process_group = process_group

    # These three have values here for layers whose class was changed without a constructor's call.

    # By its name, so that layers can be copied and pickled; the name of no group is "".
    _group_name: str | None = None
    # The name in messages, and by which the processes tell their layers apart: that in the model,
    # or a number in the order of first use.
    _sync_name: str = ""
    # Where its ReLU is: 0 nowhere, 1 after the normalization, 2 before it.
    _relu: int = _serve.NO_RELU
    # The group whose processes have made sure that they mean the same.
    _agreed_with: str = ""

    @property
    def process_group(self) -> _ProcessGroup | None:
        """The processes whose batches belong together; all of them when None.

        Raises:
            RuntimeError: if the group has ended, or this process is not in it.
        """
        if self._group_name is None:
            return None
        try:
            return torch._C._distributed_c10d._resolve_process_group(self._group_name)  # type: ignore[arg-type]
        except RuntimeError:
            raise RuntimeError(
                f"SyncBatchNorm1d '{self._sync_name}': there is no process group "
                f"'{self._group_name}' with this process in it"
            ) from None

    @process_group.setter
    def process_group(self, group: _ProcessGroup | None) -> None:
        # A process gets a number in place of a group that it is not in.
        self._group_name = None if group is None else getattr(group, "group_name", "")

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Normalise ``input``; in training, by the statistics of all processes."""
        group = self._group() if self.training else None
        if group is None:
            return super().forward(input)
        if self.channels_last or self.virtual_batch_size is not None:
            raise ValueError("SyncBatchNorm1d has neither virtual_batch_size nor channels_last")
        if not input.is_cpu:
            raise RuntimeError(
                f"SyncBatchNorm1d expected its input on CPU (got {input.device}); "
                "torch.nn.SyncBatchNorm serves other devices"
            )
        name, tracks = group.group_name, self.track_running_stats
        if not self._sync_name:
            self._sync_name = _next_number(name)
        # Tracing runs this once on no data, and not in step with the other processes.
        agree = not is_compiling() and (self._agreed_with != name or _checks_every_call())
        result: Tensor = _sync_batch_norm(
            input,
            self.weight,
            self.bias,
            self.running_mean if tracks else None,
            self.running_var if tracks else None,
            self.num_batches_tracked if tracks else None,
            self.momentum,
            self.eps,
            name,
            group.size(),
            self._sync_name,
            agree,
            self._relu,
        )
        if agree:
            self._agreed_with = name
        return result

    def _group(self) -> _ProcessGroup | None:
        """The group to share statistics with; None where there is nobody else."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group: Any = dist.group.WORLD if self._group_name is None else self.process_group
        return group if group.size() > 1 else None

    def __getstate__(self) -> dict[str, Any]:
        """Copies make sure anew that all processes mean the same."""
        return {**self.__dict__, "_agreed_with": ""}


class SyncBatchNormReLU1d(SyncBatchNorm1d, BatchNormReLU1d):  # type: ignore[misc]  # forward
    r"""A :class:`torch_bn.BatchNormReLU1d` with the statistics of all processes' batches together.

    Normalization and then a ReLU as one operation; otherwise, and in its arguments, shapes and what
    it raises, like :class:`torch_bn.SyncBatchNorm1d`.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.SyncBatchNormReLU1d(2)
        >>> layer(torch.tensor([[99.0, 0.0], [101.0, 4.0]])).tolist()
        [[0.0, 0.0], [0.9999949932098389, 0.9999987483024597]]
    """

    _relu = _serve.RELU_AFTER


class SyncReLUBatchNorm1d(SyncBatchNorm1d, ReLUBatchNorm1d):  # type: ignore[misc]  # forward
    r"""A :class:`torch_bn.ReLUBatchNorm1d` with the statistics of all processes' batches together.

    A ReLU and then normalization as one operation; otherwise, and in its arguments, shapes and what
    it raises, like :class:`torch_bn.SyncBatchNorm1d`.

    Example:
        >>> import torch, torch_bn
        >>> layer = torch_bn.SyncReLUBatchNorm1d(1)
        >>> layer(torch.tensor([[-7.0], [2.0]])).tolist()
        [[-0.9999949932098389], [0.9999949932098389]]
    """

    _relu = _serve.RELU_BEFORE


_numbers: dict[str, int] = {}


def _next_number(group: str) -> str:
    _numbers[group] = _numbers.get(group, 0) + 1
    return f"number {_numbers[group]}"


def _checks_every_call() -> bool:
    return os.environ.get("TORCH_BN_SYNC_DEBUG", "") not in ("", "0")


# The layers of several processes and those of one.
_ALONE: dict[type[Any], type[Any]] = {
    SyncBatchNorm1d: BatchNorm1d,
    SyncBatchNormReLU1d: BatchNormReLU1d,
    SyncReLUBatchNorm1d: ReLUBatchNorm1d,
}


def _forget_others(layer: Any) -> None:
    """Take from a layer what only those of several processes have, after a change of its class."""
    for name in ("_group_name", "_sync_name", "_agreed_with"):
        vars(layer).pop(name, None)

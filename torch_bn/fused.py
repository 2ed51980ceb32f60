"""Batch norm and ReLU as one layer."""

from __future__ import annotations

from torch import Tensor

from torch_bn.modules import BatchNorm1d

__all__ = ["BatchNormReLU1d", "ReLUBatchNorm1d"]


class BatchNormReLU1d(BatchNorm1d):
    """Batch norm, then ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """``relu(bn(input))``."""
        return super().forward(input).relu()


class ReLUBatchNorm1d(BatchNorm1d):
    """ReLU, then batch norm."""

    def forward(self, input: Tensor) -> Tensor:
        """``bn(relu(input))``."""
        return super().forward(input.relu())

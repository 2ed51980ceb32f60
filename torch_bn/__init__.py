"""BatchNorm1d for PyTorch on CPU: fast, exact, and the same bits on every thread count.

>>> import torch, torch_bn
>>> layer = torch_bn.BatchNorm1d(3)
>>> layer(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])).detach()
tensor([[-1.0000,  0.0000,  1.0000],
        [ 1.0000,  0.0000, -1.0000]])
"""

from __future__ import annotations

from torch_bn import _onnx as _onnx
from torch_bn import diagnostics, functional
from torch_bn._library import __version__, build_info, cmake_prefix_path
from torch_bn.conversion import convert, convert_sync, revert
from torch_bn.folding import fold
from torch_bn.fused import BatchNormReLU1d, ReLUBatchNorm1d
from torch_bn.lazy import LazyBatchNorm1d
from torch_bn.lean import lean
from torch_bn.modules import BatchNorm1d
from torch_bn.sync import SyncBatchNorm1d, SyncBatchNormReLU1d, SyncReLUBatchNorm1d

__all__ = [
    "BatchNorm1d",
    "BatchNormReLU1d",
    "LazyBatchNorm1d",
    "ReLUBatchNorm1d",
    "SyncBatchNorm1d",
    "SyncBatchNormReLU1d",
    "SyncReLUBatchNorm1d",
    "__version__",
    "build_info",
    "cmake_prefix_path",
    "convert",
    "convert_sync",
    "diagnostics",
    "fold",
    "functional",
    "lean",
    "revert",
]

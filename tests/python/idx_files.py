"""IDX files, the format of MNIST, for the tests of what reads them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch
from torch import Tensor


def header(*shape: int) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


def contents(values: Tensor) -> bytes:
    return header(*values.shape) + values.numpy().tobytes()


def write_images(folder: Path, zipped: tuple[str, ...] = ()) -> Path:
    """210 training and 50 test images of 4 by 4, easily told apart; some prefixes compressed."""
    source = torch.Generator().manual_seed(0)
    for prefix, count in (("train", 210), ("t10k", 50)):
        labels = torch.randint(10, (count,), generator=source, dtype=torch.uint8)
        images = torch.randint(80, (count, 4, 4), generator=source, dtype=torch.uint8)
        images.view(count, 16)[torch.arange(count), labels.long()] += 150
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{kind}-ubyte"
            if prefix in zipped:
                path.with_suffix(".gz").write_bytes(gzip.compress(contents(values)))
            else:
                path.write_bytes(contents(values))
    return folder

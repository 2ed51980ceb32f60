"""Prints, as JSON, the instruction set in use and a digest of results for many problems.

The same bits everywhere means the same digests: tests run it with other environments.
"""

from __future__ import annotations

import hashlib
import json

import torch

import torch_bn

SHAPES = [(2, 1), (64, 100), (129, 33), (5000, 17), (1, 3, 70), (6, 40, 129), (128, 8, 64)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def digest(shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> str:
    generator = torch.Generator().manual_seed(1)
    # Integers, scaled exactly: torch's own randn and linspace differ between its instruction sets.
    x, g = (
        torch.randint(-(2**20), 2**20, shape, generator=generator).mul(2.0**-18).add(3).to(dtype)
        for _ in range(2)
    )
    layer = torch_bn.BatchNorm1d(shape[1], dtype=dtype).train(training)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(shape[1]) % 7 * 0.5 - 1)
        layer.bias.copy_(torch.arange(shape[1]) % 5 * 0.25)
    x.requires_grad_()
    y = layer(x)
    y.backward(g)
    digest = hashlib.sha256()
    for tensor in (y, x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()):
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digests() -> dict[str, str]:
    return {
        f"{shape} {dtype} {'train' if training else 'eval'}": digest(shape, dtype, training)
        for shape in SHAPES
        for dtype in DTYPES
        for training in (True, False)
    }


if __name__ == "__main__":
    print(json.dumps({"isa": torch_bn.build_info()["isa"], "digests": digests()}))

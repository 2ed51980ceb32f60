"""The output's error and the bits of other implementations in training, beside ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

import torch_bn

HEADING = ("implementation", "64x64, mean 0", "4097x64, mean 100", "1048576x16, mean 1e4", "bits")
DATA = ((64, 64, 0.0), (4097, 64, 100.0), (1048576, 16, 1e4))
THREADS = (1, 2, 3, 4)

_Forward: TypeAlias = Callable[[Tensor], Tensor]


def _compiled(x: Tensor) -> Tensor:
    torch.compiler.reset()  # compiled code keeps the number of threads that it was compiled with
    result: Tensor = torch.compile(torch.nn.BatchNorm1d(x.shape[1]))(x)
    return result


def _onednn(x: Tensor) -> Tensor:
    layer = torch.nn.BatchNorm2d(x.shape[1])
    return layer(x[:, :, None, None].to_mkldnn()).to_dense()[:, :, 0, 0]


_FORWARDS: dict[str, _Forward] = {
    "torch_bn": lambda x: torch_bn.BatchNorm1d(x.shape[1])(x),
    "torch.nn": lambda x: torch.nn.BatchNorm1d(x.shape[1])(x),
    "torch.compile": _compiled,
    "oneDNN (mkldnn tensors)": _onednn,
}


def _wanted(x: Tensor) -> Tensor:
    wide = x.double()
    return (wide - wide.mean(0)) / (wide.var(0, unbiased=False) + 1e-5).sqrt()


def _error(y: Tensor, want: Tensor) -> float:
    return float((y - want).abs().max() / want.abs().max())


@torch.no_grad()
def _line(name: str, forward: _Forward, sets: list[tuple[Tensor, Tensor]]) -> list[str]:
    cells, same, threads = [name], True, torch.get_num_threads()
    try:
        for x, want in sets:
            results = []
            for count in THREADS:
                torch.set_num_threads(count)
                results.append(forward(x))
            cells.append(f"{max(_error(y, want) for y in results):.1e}")
            same = same and all(torch.equal(y, results[0]) for y in results)
    except RuntimeError as error:  # no compiler, or a torch built without oneDNN
        reason = str(error).splitlines()[0][:80]
        return [name, *[f"absent: {reason}"] * (len(HEADING) - 1)]
    finally:
        torch.set_num_threads(threads)
    missing = ["not measured"] * (len(DATA) - len(sets))
    return [*cells, *missing, "the same" if same else "differ"]


def compare(quick: bool) -> list[list[str]]:
    """A line for each implementation: its largest errors, and whether threads change bits."""
    generator = torch.Generator().manual_seed(0)
    data = DATA[:2] if quick else DATA
    inputs = [torch.randn(n, c, generator=generator) + mean for n, c, mean in data]
    sets = [(x, _wanted(x)) for x in inputs]
    return [_line(name, forward, sets) for name, forward in _FORWARDS.items()]

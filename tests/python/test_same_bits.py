"""The same bits on every number of threads, instruction set and run, and for other strides."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import torch_bn

SCRIPT = Path(__file__).with_name("bits.py")
ISAS = torch_bn.build_info()["isas_built"]


def start(**variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCH_BN_ISA", "ATEN_CPU_CAPABILITY")}
    return subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**kept, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@functools.cache
def digests_of(**variables: str) -> tuple[str, dict[str, str]]:
    done = start(**variables)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return found["isa"], found["digests"]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    if isa not in torch_bn.build_info()["isas_supported"]:
        pytest.skip(f"this processor has no {isa}")
    ran, found = digests_of(TORCH_BN_ISA=isa)
    assert ran == isa
    _, want = digests_of()
    assert found == want


@pytest.mark.parametrize(
    ("capability", "isa"), [("default", ISAS[0]), ("avx2", "avx2"), ("avx512", "avx512")]
)
def test_torchs_own_limit_is_honoured(capability: str, isa: str) -> None:
    if isa not in torch_bn.build_info()["isas_supported"]:
        pytest.skip(f"this processor or build has no {isa}")
    ran, found = digests_of(ATEN_CPU_CAPABILITY=capability)
    assert ran == isa
    assert found == digests_of()[1]


def test_our_own_variable_wins() -> None:
    assert digests_of(ATEN_CPU_CAPABILITY="default", TORCH_BN_ISA=ISAS[-1])[0] == ISAS[-1]


def test_an_unknown_name_is_an_error_that_lists_the_valid_ones() -> None:
    done = start(TORCH_BN_ISA="sse9")
    assert done.returncode != 0
    assert "TORCH_BN_ISA=sse9: unknown instruction set; valid names are " + ", ".join(ISAS) in (
        done.stderr
    )


def test_a_second_run() -> None:
    assert json.loads(start().stdout)["digests"] == digests_of()[1]


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize(
    "shape", [(2, 9), (64, 300), (1031, 77), (70_001, 3), (6, 40, 129)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_thread_counts(shape: tuple[int, ...], training: bool) -> None:
    x, g = torch.randn(shape), torch.randn(shape)
    found = []
    for threads in (1, 2, 3, 4, 8):
        torch.set_num_threads(threads)
        found.append(results(x, g, training))
    for each in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, found[0], strict=True))


def results(x: Tensor, g: Tensor, training: bool = True) -> list[Tensor]:
    layer = torch_bn.BatchNorm1d(x.shape[1], dtype=x.dtype).train(training)
    x = x.detach().requires_grad_()
    y = layer(x)
    (grad_input, *rest) = torch.autograd.grad(y, (x, layer.weight, layer.bias), g)
    return [y.detach(), grad_input, *rest, *layer.buffers()]


LAYOUTS = {
    "row slice": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
    "column slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "every second column": lambda x: torch.stack([x, x + 1], 2).flatten(1, 2)[:, ::2],
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "offset by one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
# Where the channels lie innermost and lines are long, sums are taken in another order: see
# test_channels_last_of_long_lines.
CHANNELS_LAST = {
    "channels last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "length first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
}
SEQUENCE_LAYOUTS = {
    "every second step": lambda x: torch.stack([x, x + 1], 3).flatten(2, 3)[..., ::2],
    "samples slice": lambda x: torch.stack([x, x + 1], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(300, 45), (5, 7)], ids=str)
def test_matrix_layouts(layout: str, training: bool, shape: tuple[int, int]) -> None:
    check_layout(shape, LAYOUTS[layout], training)


@pytest.mark.parametrize("layout", SEQUENCE_LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 40, 129), (2, 3, 5)], ids=str)
def test_sequence_layouts(layout: str, training: bool, shape: tuple[int, int, int]) -> None:
    check_layout(shape, SEQUENCE_LAYOUTS[layout], training)


@pytest.mark.parametrize("layout", CHANNELS_LAST)
@pytest.mark.parametrize("training", [True, False])
def test_channels_last_of_short_lines(layout: str, training: bool) -> None:
    check_layout((6, 40, 31), CHANNELS_LAST[layout], training)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("layout", CHANNELS_LAST)
def test_channels_last_of_long_lines(layout: str) -> None:
    """Another order of the sums, the same on every number of threads."""
    x, g = torch.randn(6, 40, 129), torch.randn(6, 40, 129)
    contiguous = results(x, g)
    x = CHANNELS_LAST[layout](x)
    torch.set_num_threads(1)
    want = results(x, g)
    torch.set_num_threads(2)
    for got, alone, other in zip(results(x, g), want, contiguous, strict=True):
        assert torch.equal(got, alone)
        # The sums differ by roundings of double, which may round a float32 coefficient the other
        # way: results may lie two spacings apart.
        assert (got - other).abs().max() <= 2**-22 * other.abs().max()


def check_layout(shape: tuple[int, ...], relaid: object, training: bool) -> None:
    """Input and gradient in every mix of a layout and the contiguous one give the same bits."""
    assert callable(relaid)
    x, g = torch.randn(shape), torch.randn(shape)
    want = results(x, g, training)
    other_x, other_g = relaid(x), relaid(g)
    assert torch.equal(other_x, x)
    assert other_x.stride() != x.stride() or other_x.storage_offset() != 0
    for pair in ((other_x, g), (x, other_g), (other_x, other_g)):
        assert all(torch.equal(a, b) for a, b in zip(results(*pair, training), want, strict=True))


def test_expanded_input_and_gradient() -> None:
    row, column = torch.randn(1, 6), torch.randn(50, 1)
    for x, g in (
        (row.expand(50, 6), torch.randn(50, 6)),
        (column.expand(50, 6), row.expand(50, 6)),
    ):
        want = results(x.contiguous(), g.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(results(x, g), want, strict=True))

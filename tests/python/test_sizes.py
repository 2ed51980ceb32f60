"""Empty, tiny and huge inputs; and no copy of an input, whatever its layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import torch_bn


@pytest.mark.parametrize(
    "shape", [(0, 4), (0, 4, 3), (2, 4, 0), (3, 0), (2, 0, 5), (0, 0)], ids=str
)
@pytest.mark.parametrize("training", [True, False])
def test_empty(shape: tuple[int, ...], training: bool) -> None:
    layer = torch_bn.BatchNorm1d(shape[1]).train(training)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(shape))
    assert torch.equal(layer.weight.grad, torch.zeros(shape[1]))
    assert torch.equal(layer.bias.grad, torch.zeros(shape[1]))
    # Nothing was seen, so nothing was learnt; the counter counts calls, as in torch.
    assert torch.equal(layer.running_mean, torch.zeros(shape[1]))
    assert torch.equal(layer.running_var, torch.ones(shape[1]))
    assert layer.num_batches_tracked.item() == int(training)


def test_empty_agrees_with_torch() -> None:
    for shape in ((0, 4), (2, 4, 0)):
        ours, theirs = torch_bn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
        assert ours(torch.randn(shape)).shape == theirs(torch.randn(shape)).shape
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)


def test_one_row_in_evaluation() -> None:
    x = torch.randn(1, 5)
    layer = torch_bn.BatchNorm1d(5, eps=0.75).eval()
    layer.running_var.fill_(0.25)
    assert torch.equal(layer(x), x)


@pytest.mark.parametrize("rows", [2, 3, 7, 127, 131, 8191, 16411])
@pytest.mark.parametrize("channels", [1, 2, 31, 61, 257])
def test_prime_sizes(rows: int, channels: int) -> None:
    x = torch.randn(rows, channels)
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    got = torch_bn.functional.batch_norm(x, None, None, training=True)
    # Four roundings to float32: centred, scale, product, sum. The bias is what the first leaves of
    # the mean, so small that its own does not count.
    assert (got - want).abs().max() <= 4 * 2.0**-24 * want.abs().max()


def available_memory() -> int:
    """In bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@pytest.mark.parametrize("layout", ["rows", "length"])
def test_more_than_two_to_the_31_elements(layout: str) -> None:
    needed = 11 << 30
    if available_memory() < needed:
        pytest.skip("needs 11 GiB of free memory")
    # A view of few elements that reads +-1/2 in turn: var is 1/4, invstd with eps = 3/4 is 1, and
    # every result is exact.
    signs = torch.tensor([0.5, -0.5], dtype=torch.bfloat16)
    if layout == "length":
        x = signs.repeat(1 << 15).expand((1 << 15) + 1, 1, 1 << 16)
    else:
        rows, channels = (1 << 25) + 2, 64
        x = signs.repeat((rows + channels) // 2).as_strided((rows, channels), (1, 1))
    assert x.numel() > 1 << 31
    x.requires_grad_()
    weight = torch.ones(x.shape[1], requires_grad=True)
    y = torch_bn.functional.batch_norm(x, None, None, weight, training=True, eps=0.75)
    check_equal_in_parts(y.detach(), x.detach())
    if layout == "length":  # the other's gradient would need the memory twice
        (grad_weight,) = torch.autograd.grad(y, weight, x.detach())
        assert grad_weight.item() == x.numel() / 4


def check_equal_in_parts(y: Tensor, x: Tensor) -> None:
    """The whole at once would take memory for a third array."""
    size = -(-len(y) // 64)
    for part, want in zip(y.split(size), x.split(size), strict=True):
        if not torch.equal(part, want):
            pytest.fail("a value is not the exact one")


LAYOUTS = {
    "transposed": lambda: torch.randn(64, 512).t(),
    "expanded": lambda: torch.randn(1, 64).expand(512, 64),
    "sliced": lambda: torch.randn(512, 128)[:, ::2],
    "channels last": lambda: torch.randn(8, 64, 64).transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_no_copy_of_the_input(layout: str, training: bool) -> None:
    x = LAYOUTS[layout]()
    g = LAYOUTS[layout]()
    channels = x.shape[1]
    layer = torch_bn.BatchNorm1d(channels).train(training)
    x.requires_grad_()

    def allocated(call: object) -> int:
        assert callable(call)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        return sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())

    statistics = 2 * channels * 8
    outputs: list[Tensor] = []
    layer(x)
    assert allocated(lambda: outputs.append(layer(x))) == x.numel() * 4 + statistics
    gradients = (x.numel() + 2 * channels) * 4
    inputs = (x, layer.weight, layer.bias)
    assert allocated(lambda: torch.autograd.grad(outputs[0], inputs, g)) == gradients

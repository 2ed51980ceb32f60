"""The layer against float64 and against torch's, and what the build says of itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import torch_bn

SHAPES = [(2, 1), (64, 100), (129, 33), (5, 3), (4, 5, 6), (1, 3, 8), (3, 70, 200)]
# One rounding of a result to float32 is 2^-24 = 6e-8. Four of the largest are promised of outputs
# and grad_inputs. An output has those of the centred value, the scale, their product, the bias and
# the sum, which are not all at their worst at once; of a grad_input's some are of smaller terms.
# Sums are in double and rounded once, running statistics again: float64 does not round the old.
FLOAT32 = {"output": 2.5e-7, "grad_input": 2.5e-7}
FLOAT32_SUMS = 1.2e-7
# Sums of at most 600 rows in float64, in another order.
FLOAT64 = 1e-13


def fill(layer: torch.nn.BatchNorm1d) -> None:
    """Give parameters and running statistics values that differ from channel to channel."""
    ranges = {
        "weight": (0.5, 2),
        "bias": (-1, 2),
        "running_mean": (-0.25, 0.5),
        "running_var": (0.5, 2),
    }
    for name, (first, last) in ranges.items():
        tensor = getattr(layer, name)
        if tensor is not None:
            with torch.no_grad():
                tensor.copy_(torch.linspace(first, last, layer.num_features))


def run(layer: torch.nn.BatchNorm1d, x: Tensor, g: Tensor) -> dict[str, Tensor | None]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(g)
    return {
        "output": y.detach(),
        "grad_input": x.grad,
        "grad_weight": None if layer.weight is None else layer.weight.grad,
        "grad_bias": None if layer.bias is None else layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def error(name: str, got: Tensor, want: Tensor, g: Tensor) -> float:
    """Max |got - want| over the scale of want, or of its terms where they may cancel."""
    scale = want.abs().max().item()
    if name.startswith("grad"):
        scale = max(scale, g.double().abs().max().item())
    return (got.double() - want).abs().max().item() / scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.75, "eps": 0.5},
    ],
    ids=str,
)
def test_agrees_with_float64(
    shape: tuple[int, ...], training: bool, dtype: torch.dtype, options: dict[str, object]
) -> None:
    x, g = (torch.randn(shape) * 2 + 3).to(dtype), torch.randn(shape).to(dtype)
    ours = torch_bn.BatchNorm1d(shape[1], dtype=dtype, **options).train(training)
    theirs = torch.nn.BatchNorm1d(shape[1], dtype=torch.float64, **options).train(training)
    fill(ours)
    theirs.load_state_dict(ours.state_dict())
    for _ in range(2):  # the second batch sees what the first left
        got, want = run(ours, x, g), run(theirs, x.double(), g.double())
        for name, value in want.items():
            if value is None:
                assert got[name] is None
                continue
            bound = FLOAT32.get(name, FLOAT32_SUMS) if dtype == torch.float32 else FLOAT64
            assert error(name, got[name], value, g) <= bound, name
            assert got[name].dtype == dtype
    if ours.track_running_stats:
        assert torch.equal(ours.num_batches_tracked, theirs.num_batches_tracked)


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(4096, 16) + 1e4
    want = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    got = torch_bn.functional.batch_norm(x, None, None, training=True)
    assert error("output", got, want, x) <= FLOAT32["output"]


def test_exact_data_give_exact_results() -> None:
    # Distances of 1/2 from a mean on a dyadic grid: var = 1/4, invstd = 1 with eps = 3/4, and
    # every sum is exact in any order.
    mean = torch.arange(-8.0, 8.0)
    x = mean + torch.tensor([0.5, -0.5]).repeat(150)[:, None]
    layer = torch_bn.BatchNorm1d(16, eps=0.75, momentum=0.5)
    assert torch.equal(layer(x), x - mean)
    assert torch.equal(layer.running_mean, mean / 2)
    assert torch.equal(layer.running_var, torch.full((16,), (1 + 75 / 299) / 2))


def test_state_dict_loads_both_ways() -> None:
    ours, theirs = torch_bn.BatchNorm1d(4), torch.nn.BatchNorm1d(4)
    ours(torch.randn(8, 4))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    again = torch_bn.BatchNorm1d(4)
    again.load_state_dict(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert isinstance(ours, torch.nn.BatchNorm1d)
    assert repr(ours) == repr(theirs)


def test_two_forwards_before_one_backward() -> None:
    layer, reference = torch_bn.BatchNorm1d(3).double(), torch.nn.BatchNorm1d(3).double()
    first, second = torch.randn(2, 6, 3, dtype=torch.double).requires_grad_()
    for each in (layer, reference):
        (each(first).pow(3).sum() + each(second).exp().sum()).backward()
    assert torch.allclose(layer.weight.grad, reference.weight.grad, rtol=0, atol=1e-12)


def test_other_ranks_of_the_functional_are_torchs() -> None:
    x = torch.randn(4, 3, 5, 5)
    want = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert torch.equal(torch_bn.functional.batch_norm(x, None, None, training=True), want)


def test_build_info() -> None:
    info = torch_bn.build_info()
    assert info["version"] == torch_bn.__version__
    assert info["torch_version"].startswith("2.13.")
    assert info["isa"] in info["isas_supported"]
    assert set(info["isas_supported"]) <= set(info["isas_built"])
    assert info["openmp"] >= 201511

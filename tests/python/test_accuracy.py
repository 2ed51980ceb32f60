"""Accuracy against float64, at the ends of the number range, and in 16 bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_bn
from accuracy import Row, bound, measure, representable
from errors import QUANTITIES, Problem, errors, make_problem, mean_over_std, run


@pytest.mark.parametrize("shape", [(2, 7), (3, 300), (64, 100), (4097, 3), (32, 6, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, 1e4, 1e6])
def test_every_bound_of_the_table(shape: tuple[int, ...], dtype: torch.dtype, mean: float) -> None:
    for std in (1e-2, 1.0, 1e3):
        if representable(mean, std, dtype):
            rows = list(measure(dtype, shape, mean, std))
            assert {row.quantity for row in rows} == set(QUANTITIES)
            assert [row for row in rows if not row.holds] == []


def test_a_bound_can_fail() -> None:
    """The table would show the builtin's errors as failures if they were ours."""
    rows = list(measure(torch.float32, (4097, 3), 1e4, 1.0))
    as_ours = [Row(**{**vars(row), "ours": row.builtin}) for row in rows]
    assert any(not row.holds for row in as_ours)


def test_a_million_rows() -> None:
    problem = make_problem((1_048_576, 2), 1e4, 1.0)
    found = errors(run(torch_bn.BatchNorm1d, problem), problem)
    assert all(found[name] <= bound(problem, name) for name in QUANTITIES), found


def normalised(x: Tensor, **options: object) -> Tensor:
    return torch_bn.functional.batch_norm(x, None, None, training=True, **options)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1.0, 1e8, 3e38, -1e30, 1e-30, 1e-42])
@pytest.mark.parametrize("rows", [2, 3, 129, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_gives_exactly_the_bias(constant: float, rows: int, dtype: torch.dtype) -> None:
    bias = torch.randn(3, dtype=dtype)
    y = normalised(torch.full((rows, 3), constant, dtype=dtype), bias=bias)
    assert torch.equal(y, bias.expand(rows, 3))


@pytest.mark.parametrize("scale", [1e30, 3e38, 1e-30, 1e-42])
def test_scales_at_the_ends_of_float32(scale: float) -> None:
    x = torch.tensor([[1.0], [-1.0]]).repeat(50, 1) * scale
    d = x.double()
    y = normalised(x)
    # The mean is 0, which leaves two roundings, of the scale and of the product: for these data
    # less than one of 6e-8, or than half the spacing of subnormals, 7e-46.
    want = d / (d.square().mean() + 1e-5).sqrt()
    assert torch.allclose(y.double(), want, rtol=6.1e-8, atol=7.1e-46)
    assert y.abs().min() > 0


def test_subnormals_are_lost_only_on_request() -> None:
    # eps small enough for the variance of subnormal data to count.
    x = torch.tensor([[1e-42], [-1e-42]]).repeat(20_000, 2)
    tiny = 1e-90
    assert (normalised(x, eps=tiny).abs() > 0.99).all()
    assert torch.set_flush_denormal(True)
    try:
        # In every thread's share, not only in the calling thread's.
        assert (normalised(x, eps=tiny) == 0).all()
    finally:
        torch.set_flush_denormal(False)
    assert (normalised(x, eps=tiny).abs() > 0.99).all()


@pytest.mark.parametrize("shape", [(2, 3), (130, 37), (20_000, 2), (4, 5, 64)], ids=str)
def test_exact_data(shape: tuple[int, ...]) -> None:
    """Pairs around a mean on a dyadic grid: every sum is exact, in any order.

    With distances of 1/2, var is 1/4; eps = 3/4 makes invstd 1. The gradient is the input, so
    that sum(g * xhat) = rows / 4 and grad_input = g - mean - (x - mean) / 4 are exact as well.
    """
    rows = torch.empty(shape).transpose(1, -1).numel() // shape[1]
    signs = torch.tensor([0.5, -0.5]).repeat(rows // 2)
    mean = torch.arange(shape[1]) * 64.0 - 32
    matrix = mean[:, None] + signs
    x = matrix.t().contiguous()
    if len(shape) == 3:
        x = matrix.view(shape[1], shape[0], shape[2]).transpose(0, 1).contiguous()
    x.requires_grad_()
    layer = torch_bn.BatchNorm1d(shape[1], eps=0.75, momentum=1.0)
    y = layer(x)
    spread = mean if len(shape) == 2 else mean[:, None]
    assert torch.equal(y, x - spread)
    assert torch.equal(layer.running_mean, mean)
    assert torch.equal(layer.running_var, torch.full_like(mean, rows / 4 / (rows - 1)))
    y.backward(x.detach())
    assert torch.equal(layer.weight.grad, torch.full_like(mean, rows / 4))
    assert torch.equal(layer.bias.grad, mean * rows)
    assert torch.equal(x.grad, (x - spread) * 0.75)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_channel_leaves_the_others_alone(bad: float, training: bool) -> None:
    good = make_problem((300, 40), 1.0, 2.0, training=training)
    x = good.x.clone()
    x[7, 5] = bad
    broken = Problem(**{**vars(good), "x": x})
    want, got = run(torch_bn.BatchNorm1d, good), run(torch_bn.BatchNorm1d, broken)
    others = torch.arange(40) != 5
    for name in QUANTITIES:
        assert torch.equal(got[name][..., others], want[name][..., others]), name
    assert not got["y"][7, 5].isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("params", ["alone", "float32"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(64, 100), (300, 7), (8, 5, 33)], ids=str)
def test_16_bits_are_the_rounded_float32_result(
    dtype: torch.dtype, params: str, training: bool, shape: tuple[int, ...]
) -> None:
    own = dtype if params == "alone" else torch.float32
    problem = make_problem(shape, 3.0, 2.0, training=training)

    def results(input_dtype: torch.dtype, parameter_dtype: torch.dtype) -> list[Tensor]:
        """On the same values, all of which 16 bits can hold."""
        parameters = (problem.running_mean, problem.running_var, problem.weight, problem.bias)
        mean, var, weight, bias = (p.to(own).to(parameter_dtype) for p in parameters)
        x, g = (t.to(dtype).to(input_dtype) for t in (problem.x, problem.grad_output))
        for variable in (x, weight, bias):
            variable.requires_grad_()
        y = torch_bn.functional.batch_norm(x, mean, var, weight, bias, training)
        grads = torch.autograd.grad(y, (x, weight, bias), g)
        return [y, grads[0], *grads[1:], mean, var]

    got, want = results(dtype, own), results(torch.float32, torch.float32)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == (dtype if i < 2 else own)
        assert torch.equal(a, b.to(a.dtype))


def test_16_bit_statistics_are_wide() -> None:
    # 4,096 rows around 256: a sum in bfloat16 stalls at 65,536, a square overflows float16's range.
    for dtype in (torch.bfloat16, torch.float16):
        x = (256 + 2 * torch.randint(-4, 5, (4096, 3))).to(dtype)
        layer = torch_bn.BatchNorm1d(3, momentum=1.0)
        layer(x)
        want = torch.var(x.double(), 0)
        # float32 running statistics: one rounding.
        assert torch.allclose(layer.running_var.double(), want, rtol=6.1e-8, atol=0)


def test_float64_against_long_double() -> None:
    problem = make_problem((4097, 5), 1e4, 1.0, dtype=torch.float64)
    found = errors(run(torch_bn.BatchNorm1d, problem), problem, np.longdouble)
    assert max(found.values()) <= 1e-14 * (1 + mean_over_std(problem))

"""Any shape, layout, type, flag and scale against float64."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_bn
from errors import QUANTITIES, Problem, errors

# float32 values from here on are themselves subnormal, with fewer digits to compare.
SMALLEST = 1e-30


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], fill: Tensor) -> Tensor:
    """`fill` (contiguous, of `shape`) with other strides: permuted, spaced out, or expanded."""
    order = draw(st.permutations(range(len(shape))))
    spacing = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    offset = draw(st.integers(0, 3))
    strides = [0] * len(shape)
    step = 1
    for d in reversed(order):
        strides[d] = step * spacing[d]
        step = strides[d] * shape[d]
    storage = fill.new_full((offset + step + 1,), math.nan)
    view = storage.as_strided(shape, strides, offset)
    view.copy_(fill)
    return view


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, dict[str, bool]]:
    shape = draw(
        st.tuples(st.integers(2, 300), st.integers(1, 70))
        | st.tuples(st.integers(2, 9), st.integers(1, 40), st.integers(1, 70))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    std = 10.0 ** draw(st.integers(-8, 12))
    mean = std * draw(st.sampled_from([0.0, 1.0, -10.0, 1e3]))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    problem = Problem(
        x=draw(layouts(shape, (normal(*shape) * std + mean).to(dtype))),
        grad_output=draw(layouts(shape, normal(*shape).to(dtype))),
        weight=(normal(shape[1]) if draw(st.booleans()) else torch.ones(shape[1])).to(dtype),
        bias=(normal(shape[1]) if draw(st.booleans()) else torch.zeros(shape[1])).to(dtype),
        running_mean=(normal(shape[1]) * std + mean).to(dtype),
        running_var=(normal(shape[1]).square() * std * std + SMALLEST).to(dtype),
        training=draw(st.booleans()),
    )
    flags = {name: draw(st.booleans()) for name in ("weight", "bias", "statistics")}
    return problem, flags


@given(problems())
def test_any_problem(drawn: tuple[Problem, dict[str, bool]]) -> None:
    problem, given_flags = drawn
    if not given_flags["weight"]:
        problem = Problem(**{**vars(problem), "weight": torch.ones_like(problem.weight)})
    if not given_flags["bias"]:
        problem = Problem(**{**vars(problem), "bias": torch.zeros_like(problem.bias)})
    mean, var = problem.running_mean.clone(), problem.running_var.clone()
    has_statistics = given_flags["statistics"] or not problem.training
    x = problem.x.detach().requires_grad_()
    weight = problem.weight.clone().requires_grad_() if given_flags["weight"] else None
    bias = problem.bias.clone().requires_grad_() if given_flags["bias"] else None
    y = torch_bn.functional.batch_norm(
        x,
        mean if has_statistics else None,
        var if has_statistics else None,
        weight,
        bias,
        problem.training,
    )
    y.backward(problem.grad_output)
    assert y.is_contiguous()
    results = {"y": y.detach(), "grad_input": x.grad, "running_mean": mean, "running_var": var}
    results["grad_weight"] = None if weight is None else weight.grad
    results["grad_bias"] = None if bias is None else bias.grad
    known = {name: value for name, value in results.items() if value is not None}
    if not has_statistics:
        del known["running_mean"], known["running_var"]
    substitute = Tensor([math.nan])
    found = errors({n: known.get(n, substitute) for n in QUANTITIES}, problem)
    for name in known:
        # float32: four roundings of 6e-8. Outputs and grad_inputs have a few more that are not all
        # at their worst at once; a sum has one, against a scale that is one channel's root of
        # squares while the sum itself may be a few times larger. float64 is compared with float64
        # arithmetic here, whose own error with a mean of 1e3 std is of the order of 1e-13 times
        # the rows' share.
        limit = 2.5e-7 if problem.x.dtype == torch.float32 else 1e-11
        assert found[name] <= limit, name

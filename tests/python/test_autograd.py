"""Derivatives of every order, and the operators as torch's own checkers see them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_bn

SHAPES = [(6, 3), (3, 2, 4)]


def functional(training: bool, channels: int) -> Callable[..., Tensor]:
    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean = torch.linspace(-1, 1, channels, dtype=x.dtype)
        var = torch.linspace(0.5, 1, channels, dtype=x.dtype)
        return torch_bn.functional.batch_norm(x, mean, var, weight, bias, training)

    return call


def arguments(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.randn(size, dtype=torch.double, requires_grad=True)
        for size in (shape, shape[1], shape[1])
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(shape: tuple[int, ...], training: bool) -> None:
    call = functional(training, shape[1])
    assert gradcheck(call, arguments(shape), check_undefined_grad=True)
    assert gradgradcheck(call, arguments(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("without", [(1,), (2,), (1, 2)])
def test_gradcheck_without_parameters(training: bool, without: tuple[int, ...]) -> None:
    full = functional(training, 3)
    values = list(arguments((5, 3)))

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return full(*(None if i in without else next(rest) for i in range(3)))

    kept = [value for i, value in enumerate(values) if i not in without]
    assert gradcheck(call, kept)
    assert gradgradcheck(call, kept)


def test_third_derivative() -> None:
    x = torch.randn(5, 2, dtype=torch.double, requires_grad=True)

    def definition(x: Tensor) -> Tensor:
        centred = x - x.mean(0)
        return centred * (centred.square().mean(0) + 1e-5).rsqrt()

    def third(normalise: Callable[[Tensor], Tensor]) -> Tensor:
        value = normalise(x).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * torch.arange(10.0).view(5, 2)).sum()
        return value

    ours = third(lambda x: torch_bn.functional.batch_norm(x, None, None, training=True))
    # The same function in float64, written another way: what differs is rounding, amplified by
    # three differentiations of a function whose derivatives are of the order of 100.
    assert torch.allclose(ours, third(definition), rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (3, 4, 5)], ids=str)
def test_opcheck(training: bool, shape: tuple[int, ...]) -> None:
    channels = shape[1]
    x = torch.randn(shape, requires_grad=True)
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    mean, var, counter = torch.zeros(channels), torch.ones(channels), torch.tensor(0)
    forward = (x, weight, bias, mean, var, counter, training, 0.1, 1e-5)
    torch.library.opcheck(torch.ops.torch_bn.batch_norm.default, forward)
    torch.library.opcheck(torch.ops.torch_bn._batch_norm_forward.default, forward)
    _, stats = torch.ops.torch_bn._batch_norm_forward(*forward)
    backward = (torch.randn(shape, requires_grad=True), x, weight, stats, training, 1e-5)
    for mask in ([True, True, True], [True, False, False], [False, True, True]):
        torch.library.opcheck(torch.ops.torch_bn.batch_norm_backward.default, (*backward, mask))


def test_functorch_takes_the_decomposition() -> None:
    x = torch.randn(6, 3, dtype=torch.double)

    def loss(x: Tensor) -> Tensor:
        return torch_bn.functional.batch_norm(x, None, None, training=True).pow(3).sum()

    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(x), want, rtol=0, atol=1e-12)
    tangent = torch.randn_like(x)
    _, got = torch.func.jvp(loss, (x,), (tangent,))
    assert torch.allclose(got, (want * tangent).sum(), rtol=0, atol=1e-12)


def test_statistics_that_require_grad_are_refused() -> None:
    x, mean = torch.randn(4, 2), torch.zeros(2, requires_grad=True)
    words = "not differentiable with respect to argument 'running_mean'"
    with pytest.raises(RuntimeError, match=words):
        torch_bn.functional.batch_norm(x, mean, torch.ones(2), training=False)

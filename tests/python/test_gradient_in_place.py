"""No gradient that anybody may still read is overwritten by grad_input.

That one which nobody will read is overwritten, the C++ tests show: Python's hooks would keep it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_bn

SHAPE = (40, 24)


def layer() -> torch_bn.BatchNorm1d:
    made = torch_bn.BatchNorm1d(SHAPE[1])
    with torch.no_grad():
        made.weight.copy_(torch.linspace(0.5, 2, SHAPE[1]))
    return made


def gradient_of(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of x where g goes into the layer's backward; g is the user's and stays."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer()(x), x, g)
    return gradient


def test_a_gradient_that_the_user_passed_is_left_alone() -> None:
    x, g = torch.randn(SHAPE, requires_grad=True), torch.randn(SHAPE)
    before = g.clone()
    y = layer()(x)
    y.backward(g)
    assert torch.equal(g, before)


def test_a_retained_graph_gives_the_same_twice() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    loss = (layer()(x) * torch.randn(SHAPE)).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def keep_in_hook(y: Tensor, kept: list[Tensor]) -> None:
    y.register_hook(kept.append)


def retain(y: Tensor, kept: list[Tensor]) -> None:
    y.retain_grad()
    y.register_hook(lambda grad: None)


def keep_view(y: Tensor, kept: list[Tensor]) -> None:
    y.register_hook(lambda grad: kept.append(grad[1:]))


def keep_storage(y: Tensor, kept: list[Tensor]) -> None:
    y.register_hook(lambda grad: kept.append(torch.empty(0).set_(grad.untyped_storage())))


def keep_in_node(y: Tensor, kept: list[Tensor]) -> None:
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: kept.extend(grads))


def keep_alias(y: Tensor, kept: list[Tensor]) -> None:
    y.register_hook(lambda grad: kept.append(grad.detach()))


KEEPERS = {
    each.__name__: each
    for each in (keep_in_hook, retain, keep_view, keep_alias, keep_storage, keep_in_node)
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_a_gradient_that_is_kept_is_left_alone(keeper: str) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    factor = torch.randn(SHAPE)
    y = layer()(x)
    kept: list[Tensor] = []
    KEEPERS[keeper](y, kept)
    (y * factor).sum().backward()
    if y.retains_grad:
        assert y.grad is not None
        kept.append(y.grad)
    (found,) = kept
    assert torch.equal(found.flatten(), factor.flatten()[-found.numel() :])
    assert x.grad is not None
    assert torch.equal(x.grad, gradient_of(x, factor))


def test_a_gradient_asked_for_is_left_alone() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    factor = torch.randn(SHAPE)
    y = layer()(x)
    of_y, of_x = torch.autograd.grad((y * factor).sum(), [y, x])
    assert torch.equal(of_y, factor)
    assert torch.equal(of_x, gradient_of(x, factor))


@pytest.mark.parametrize("branches", [2, 3])
def test_one_gradient_for_several_branches(branches: int) -> None:
    # Addition hands the same tensor to all of its inputs.
    inputs = [torch.randn(SHAPE, requires_grad=True) for _ in range(branches)]
    leaf = torch.zeros(SHAPE, requires_grad=True)
    factor = torch.randn(SHAPE)
    total = leaf
    for x in inputs:
        total = total + layer()(x)
    (total * factor).sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, factor)
    for x in inputs:
        assert x.grad is not None
        assert torch.equal(x.grad, gradient_of(x, factor))


def test_branches_that_meet_again() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    first, second = torch.randn(SHAPE), torch.randn(SHAPE)
    y = layer()(x)
    ((y * first).sum() + (y * second).sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, gradient_of(x, first + second))


def test_an_expanded_gradient() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    layer()(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, gradient_of(x, torch.ones(SHAPE)))


class FromOutside(torch.autograd.Function):
    """A backward whose result is somebody else's memory."""

    result: Callable[[], Tensor]

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.sum()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return FromOutside.result()


@pytest.mark.parametrize("owner", ["NumPy", "Python", "slice"])
def test_memory_of_other_owners(owner: str) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    array = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    tensor = torch.from_numpy(array.copy())
    held = tensor[0].clone()
    FromOutside.result = {
        "NumPy": lambda: torch.from_numpy(array[0]),
        "Python": lambda: held,
        "slice": lambda: tensor[0],
    }[owner]
    before = array.copy()
    FromOutside.apply(layer()(x)).backward()
    assert np.array_equal(array, before)
    assert torch.equal(held, torch.from_numpy(before[0]))
    assert torch.equal(tensor, torch.from_numpy(before))
    assert x.grad is not None
    assert torch.equal(x.grad, gradient_of(x, held))


def test_the_input_as_its_own_gradient() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    y = layer()(x)
    before = x.detach().clone()
    y.backward(x.detach())
    assert torch.equal(x, before)


def test_a_graph_of_the_gradient_is_not_overwritten() -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    bn = torch_bn.BatchNorm1d(SHAPE[1], dtype=torch.float64)
    torchs = torch.nn.BatchNorm1d(SHAPE[1], dtype=torch.float64)
    factor = torch.randn(SHAPE, dtype=torch.float64)

    def second(module: torch.nn.Module) -> Tensor:
        (first,) = torch.autograd.grad((module(x) * factor).pow(2).sum(), x, create_graph=True)
        (result,) = torch.autograd.grad(first.pow(2).sum(), x)
        return result

    # Sums of 40 float64 terms in another order, through two derivatives.
    torch.testing.assert_close(second(bn), second(torchs), rtol=1e-9, atol=1e-9)

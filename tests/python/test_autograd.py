"""Derivatives of every order and in every mode, for us and for torch's own as a control."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

import torch_bn

BatchNorm = Callable[..., Tensor]
IMPLEMENTATIONS = {
    "torch": torch.nn.functional.batch_norm,
    "torch_bn": torch_bn.functional.batch_norm,
}
LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
SHAPES = [(5, 3), (3, 2, 2)]

both = pytest.mark.parametrize("batch_norm", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
both_layers = pytest.mark.parametrize("layer_type", LAYERS.values(), ids=LAYERS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def with_statistics(batch_norm: BatchNorm, training: bool, channels: int) -> BatchNorm:
    def call(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean = torch.linspace(-1, 1, channels, dtype=x.dtype)
        var = torch.linspace(0.5, 1, channels, dtype=x.dtype)
        return batch_norm(x, mean, var, weight, bias, training)

    return call


def arguments(shape: tuple[int, ...]) -> list[Tensor]:
    sizes = (shape, shape[1], shape[1])
    return [torch.randn(size, dtype=torch.double, requires_grad=True) for size in sizes]


@both
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradcheck(batch_norm: BatchNorm, training: bool, shape: tuple[int, ...]) -> None:
    call = with_statistics(batch_norm, training, shape[1])
    assert gradcheck(
        call,
        arguments(shape),
        check_undefined_grad=True,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
    )


@both
@in_both_modes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradgradcheck(batch_norm: BatchNorm, training: bool, shape: tuple[int, ...]) -> None:
    call = with_statistics(batch_norm, training, shape[1])
    # check_batched_grad also sends the batch through the backward of the backward.
    assert gradgradcheck(call, arguments(shape), check_fwd_over_rev=True, check_batched_grad=True)


@both
@in_both_modes
@pytest.mark.parametrize("without", [(1,), (2,), (1, 2)], ids=str)
def test_gradcheck_without_parameters(
    batch_norm: BatchNorm, training: bool, without: tuple[int, ...]
) -> None:
    full = with_statistics(batch_norm, training, 3)

    def call(*given: Tensor) -> Tensor:
        rest = iter(given)
        return full(*(None if i in without else next(rest) for i in range(3)))

    kept = [value for i, value in enumerate(arguments((5, 3))) if i not in without]
    assert gradcheck(call, kept, check_forward_ad=True)
    if batch_norm is torch.nn.functional.batch_norm and without == (1,):
        # torch 2.13 loses what comes back through the bias's gradient where there is no weight.
        with pytest.raises(GradcheckError, match="Jacobian mismatch for output 1"):
            gradgradcheck(call, kept)
    else:
        assert gradgradcheck(call, kept, check_fwd_over_rev=True)


@both
def test_forward_mode_leaves_statistics_and_counter_right(batch_norm: BatchNorm) -> None:
    x, tangent = torch.randn(2, 6, 3, dtype=torch.double)
    mean, var = torch.zeros(2, 3, dtype=torch.double)
    with forward_ad.dual_level():
        batch_norm(forward_ad.make_dual(x, tangent), mean, var, training=True, momentum=1.0)
    assert forward_ad.unpack_dual(mean).tangent is None
    # Two sums of six numbers of the order of 1, in float64.
    torch.testing.assert_close(mean, x.mean(0), rtol=0, atol=1e-14)
    torch.testing.assert_close(var, x.var(0), rtol=0, atol=1e-14)


def definition(x: Tensor, *_: object, **__: object) -> Tensor:
    """Batch norm in training, written so that autograd derives it to every order."""
    centred = x - x.mean(0)
    return centred * (centred.square().mean(0) + 1e-5).rsqrt()


def directional_derivatives(batch_norm: BatchNorm) -> list[float]:
    """d^k/dt^k <f(x + t v), w> at t = 0 for k = 1, 2, 3, by repeated differentiation."""
    x, v, w = (torch.randn(5, 3, dtype=torch.double) for _ in range(3))
    t = torch.zeros((), dtype=torch.double, requires_grad=True)
    value = (batch_norm(x + t * v, None, None, training=True) * w).sum()
    derivatives = []
    for _ in range(3):
        (value,) = torch.autograd.grad(value, t, create_graph=True)
        derivatives.append(value.item())
    return derivatives


def test_third_derivative_in_training() -> None:
    # The data of a known report: 8.636 is right where torch 2.13 gives -1.146 (issue 186256 of
    # pytorch/pytorch). Rounding of float64, amplified by derivatives of the order of 10.
    right = pytest.approx([1.821, -4.400, 8.636], abs=5e-4)
    torch.manual_seed(0)
    by_definition = directional_derivatives(definition)
    assert by_definition == right
    torch.manual_seed(0)
    ours = directional_derivatives(torch_bn.functional.batch_norm)
    assert ours == pytest.approx(by_definition, rel=1e-11)


def test_third_derivative_of_torch_is_still_wrong() -> None:
    # When this fails, torch has mended its third derivative, and the test above its comparison.
    torch.manual_seed(0)
    assert directional_derivatives(torch.nn.functional.batch_norm)[2] == pytest.approx(
        -1.146, abs=5e-4
    )


def test_fourth_derivative_with_parameters() -> None:
    x, weight, bias = arguments((5, 2))
    direction = torch.arange(10.0, dtype=torch.double).view(5, 2)

    def fourth(normalise: BatchNorm) -> tuple[Tensor, ...]:
        value = normalise(x, weight, bias).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * direction).sum()
        return torch.autograd.grad(value, (x, weight, bias))

    ours = fourth(lambda *a: torch_bn.functional.batch_norm(a[0], None, None, *a[1:], True))
    want = fourth(lambda x, weight, bias: definition(x) * weight + bias)
    for got, expected in zip(ours, want, strict=True):
        # The same function written another way: rounding, amplified by four differentiations.
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8 * want[0].abs().max().item())


@both_layers
@in_both_modes
@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("input",), ("weight", "bias"), ()])
def test_only_asked_for_gradients_are_computed(
    layer_type: type[torch.nn.BatchNorm1d], training: bool, frozen: tuple[str, ...]
) -> None:
    layer = layer_type(3).train(training)
    leaves = {"input": torch.randn(5, 3), "weight": layer.weight, "bias": layer.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in frozen)
    layer(leaves["input"]).pow(3).sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {*leaves} - {*frozen}


@in_both_modes
@pytest.mark.parametrize("asked", ["input", "weight", "bias"])
def test_the_backward_operator_is_told_what_is_asked_for(training: bool, asked: str) -> None:
    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        masks: list[list[bool]]

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func is torch.ops.torch_bn.batch_norm_backward.default:
                self.masks.append(args[6])
            return func(*args, **(kwargs or {}))

    layer = torch_bn.BatchNorm1d(3).train(training)
    leaves = {
        "input": torch.randn(5, 3, requires_grad=True),
        "weight": layer.weight,
        "bias": layer.bias,
    }
    loss = layer(leaves["input"]).pow(3).sum()
    with Recorder() as recorder:
        recorder.masks = []
        torch.autograd.grad(loss, leaves[asked])
    assert recorder.masks == [[name == asked for name in leaves]]


@both
def test_statistics_that_require_grad_are_refused(batch_norm: BatchNorm) -> None:
    x, mean = torch.randn(4, 2), torch.zeros(2, requires_grad=True)
    words = "not differentiable with respect to argument 'running_mean'"
    with pytest.raises(RuntimeError, match=words):
        batch_norm(x, mean, torch.ones(2), training=False)


LAYERS_IN_FORWARD_MODE = {
    "plain": lambda: torch_bn.BatchNorm1d(3),
    "before a ReLU": lambda: torch_bn.BatchNormReLU1d(3),
    "behind a ReLU": lambda: torch_bn.ReLUBatchNorm1d(3),
    "ghost": lambda: torch_bn.BatchNorm1d(3, virtual_batch_size=4),
    "ghost of bare input": lambda: torch_bn.BatchNorm1d(3, affine=False, virtual_batch_size=4),
}


@pytest.mark.parametrize("name", LAYERS_IN_FORWARD_MODE)
def test_a_backward_takes_the_tangent_of_a_gradient(name: str) -> None:
    layer = LAYERS_IN_FORWARD_MODE[name]().double()
    x = torch.randn(9, 3, dtype=torch.double, requires_grad=True)
    y, (g, t) = layer(x), torch.randn(2, 9, 3, dtype=torch.double)
    wanted = [x, *layer.parameters()]
    values, expected = (torch.autograd.grad(y, wanted, each, retain_graph=True) for each in (g, t))
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, wanted, forward_ad.make_dual(g, t))
        duals = [forward_ad.unpack_dual(each) for each in found]
    # A backward is linear. Sums of 9 terms of the order of 1 to 10 in float64, in another order.
    for dual, value, tangent in zip(duals, values, expected, strict=True):
        torch.testing.assert_close(dual.primal, value, rtol=0, atol=1e-12)
        torch.testing.assert_close(dual.tangent, tangent, rtol=0, atol=1e-12)

"""The fused layers are their two modules in one: values, gradients, state, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_bn
from torch_bn import BatchNormReLU1d, ReLUBatchNorm1d

FUSED = {"after": BatchNormReLU1d, "before": ReLUBatchNorm1d}
fused = pytest.mark.parametrize("order", FUSED)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(2, 1), (64, 100), (129, 33), (3, 4, 5), (6, 40, 129), (300, 300)]


def pair(order: str, channels: int, base: type = torch_bn.BatchNorm1d, **options: Any) -> Any:
    """The fused layer, and the two modules with a state equal to its own."""
    one = FUSED[order](channels, **options)
    norm = base(channels, **options)
    with torch.no_grad():
        for name, value in one.state_dict().items():
            if value.is_floating_point():
                value.copy_(
                    torch.rand_like(value) + (0.5 if name.endswith(("weight", "var")) else -0.5)
                )
    norm.load_state_dict(one.state_dict())
    two = nn.Sequential(norm, nn.ReLU()) if order == "after" else nn.Sequential(nn.ReLU(), norm)
    return one, two, norm


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Output, and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    y = layer(x)
    return (y, *torch.autograd.grad(y, [x, *layer.parameters()], g))


# ------------------------------------------------------------------------------------------------
# Values and gradients
# ------------------------------------------------------------------------------------------------


@fused
@in_both_modes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_has_the_bits_of_our_two_modules(
    order: str, training: bool, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    one, two, norm = pair(order, shape[1])
    one.to(dtype).train(training), two.to(dtype).train(training)
    x, g = torch.randn(2, *shape).to(dtype)
    # The mask is the forward's, for every element: one that differed would move the gradients.
    for ours, want in zip(gradients(one, x, g), gradients(two, x, g), strict=True):
        assert torch.equal(ours, want)
    for ours, want in zip(one.buffers(), norm.buffers(), strict=True):
        assert torch.equal(ours, want)


@fused
@in_both_modes
@pytest.mark.parametrize("shape", [(64, 10), (5, 3, 70)], ids=str)
def test_agrees_with_torchs_two_modules(order: str, training: bool, shape: tuple[int, ...]) -> None:
    one, two, norm = pair(order, shape[1], nn.BatchNorm1d)
    one.double().train(training), two.double().train(training)
    x, g = torch.randn(2, *shape, dtype=torch.double)
    for ours, want in zip(gradients(one, x, g), gradients(two, x, g), strict=True):
        # Sums of hundreds of float64 numbers of the order of 1, in another order.
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-11)
    for ours, want in zip(one.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(ours, want, rtol=1e-11, atol=1e-11)


@fused
@pytest.mark.parametrize(
    "options", [{"affine": False}, {"bias": False}, {"momentum": None}], ids=str
)
@pytest.mark.parametrize("tracked", [True, False])
def test_options(order: str, options: dict[str, Any], tracked: bool) -> None:
    one, two, norm = pair(order, 4, **options, track_running_stats=tracked)
    for training in (True, True, False):
        one.train(training), two.train(training)
        x, g = torch.randn(2, 6, 4)
        for ours, want in zip(gradients(one, x, g), gradients(two, x, g), strict=True):
            assert torch.equal(ours, want)
        assert [b.tolist() for b in one.buffers()] == [b.tolist() for b in norm.buffers()]


@fused
def test_strided_and_transposed_inputs(order: str) -> None:
    one, two, _ = pair(order, 6)
    wide = torch.randn(8, 12)
    for x in (wide[:, ::2], wide[:6].t(), torch.randn(1, 6).expand(8, 6)):
        g = torch.randn(6, x.shape[0]).t()
        for ours, want in zip(gradients(one, x, g), gradients(two, x, g), strict=True):
            assert torch.equal(ours, want)


@fused
def test_zero_and_nan_are_torchs(order: str) -> None:
    """A zero blocks the gradient, a NaN passes both ways and stays in its channel."""
    x = torch.tensor([[-1.0, 1.0], [0.0, 2.0], [1.0, 3.0]])
    for layer in pair(order, 2)[:2]:
        layer.eval()
        norm = layer if isinstance(layer, torch_bn.BatchNorm1d) else layer[order == "before"]
        nn.init.zeros_(norm.running_mean), nn.init.zeros_(norm.bias)
        y, dx, *_ = gradients(layer, x, torch.ones(3, 2))
        assert (dx[:, 0] != 0).tolist() == [False, False, True]
        assert y[1, 0] == 0
        y, dx, *_ = gradients(
            layer,
            x.index_put((torch.tensor(1), torch.tensor(0)), torch.tensor(torch.nan)),
            torch.ones(3, 2),
        )
        assert y.isnan().tolist() == [[False] * 2, [True, False], [False] * 2]
        assert dx[1, 0] != 0


@given(
    st.integers(2, 40),
    st.integers(1, 9),
    st.integers(0, 5),
    st.sampled_from(list(FUSED)),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_shape(n: int, c: int, length: int, order: str, training: bool, seed: int) -> None:
    torch.manual_seed(seed)
    shape = (n, c, length) if length else (n, c)
    one, two, _ = pair(order, c)
    one.train(training), two.train(training)
    x, g = torch.randn(2, *shape)
    for ours, want in zip(gradients(one, x, g), gradients(two, x, g), strict=True):
        assert torch.equal(ours, want)


# ------------------------------------------------------------------------------------------------
# Derivatives of every order and direction
# ------------------------------------------------------------------------------------------------

OPERATORS = {
    "after": torch.ops.torch_bn.batch_norm_relu,
    "before": torch.ops.torch_bn.relu_batch_norm,
}


def functional(order: str, training: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    statistics = torch.linspace(-0.5, 0.5, 3), torch.linspace(0.5, 2, 3)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, var = (each.to(x.dtype) for each in statistics)
        if training:
            mean, var = None, None
        return OPERATORS[order](x, weight, bias, mean, var, None, training, 0.1, 1e-5)

    return function


def points(*shape: int) -> tuple[Tensor, ...]:
    draws = (torch.randn(*shape), torch.rand(3) + 0.5, torch.randn(3))
    return tuple(each.double().requires_grad_() for each in draws)


@fused
@in_both_modes
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 4)], ids=str)
def test_numerical_derivatives(order: str, training: bool, shape: tuple[int, ...]) -> None:
    function, inputs = functional(order, training), points(*shape)
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True)


@fused
@in_both_modes
def test_second_and_third_derivatives_are_the_compositions(order: str, training: bool) -> None:
    function, inputs = functional(order, training), points(7, 3)
    statistics = torch.linspace(-0.5, 0.5, 3).double(), torch.linspace(0.5, 2, 3).double()

    def composition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x.relu() if order == "before" else x
        mean, var = (x.mean(0), x.var(0, correction=0)) if training else statistics
        y = (x - mean) / (var + 1e-5).sqrt() * weight + bias
        return y.relu() if order == "after" else y

    def derivatives(f: Callable[..., Tensor]) -> list[Tensor]:
        current, results = f(*inputs).pow(3).sum(), []
        for _ in range(3):
            each = torch.autograd.grad(current, inputs, create_graph=True, materialize_grads=True)
            results += each
            current = sum(g.pow(2).sum() for g in each)
        return results

    for ours, want in zip(derivatives(function), derivatives(composition), strict=True):
        # Each order multiplies the size of the terms; float64 sums in another order.
        torch.testing.assert_close(ours, want, rtol=1e-8, atol=1e-8)


@fused
@pytest.mark.parametrize("shape", [(40, 3), (5, 3, 40)], ids=str)
def test_the_second_derivative_takes_the_mask_of_the_kernels(
    order: str, shape: tuple[int, ...]
) -> None:
    """In float32, where float64's mask of a value near zero might be another."""
    x, weight, bias = (each.detach().float().requires_grad_() for each in points(*shape))
    y = functional(order, True)(x, weight, bias)
    g = torch.randn_like(y).requires_grad_()
    (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
    (to_g,) = torch.autograd.grad(dx.sum() + (dx * torch.randn_like(dx)).sum(), g)
    if (
        order == "after"
    ):  # the derivative in g is zero where the forward's result is, and nowhere else
        assert torch.equal(to_g == 0, y == 0)
    else:
        assert torch.equal(dx == 0, x <= 0)


@fused
@in_both_modes
def test_transforms(order: str, training: bool) -> None:
    function, (x, weight, bias) = functional(order, training), points(5, 3)
    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    # Sums of a few dozen float64 numbers of the order of 1 to 100, in another order.
    close: dict[str, float] = {"rtol": 1e-10, "atol": 1e-10}
    want = function(x, weight, bias)
    tangent = torch.randn_like(x)
    value, out_tangent = torch.func.jvp(lambda a: function(a, weight, bias), (x,), (tangent,))
    torch.testing.assert_close(value, want, **close)
    jacobian = torch.func.jacrev(function)(x, weight, bias)
    torch.testing.assert_close(torch.func.jacfwd(function)(x, weight, bias), jacobian, **close)
    torch.testing.assert_close(torch.tensordot(jacobian, tangent, 2), out_tangent, **close)
    gradient = torch.func.grad(lambda a: function(a, weight, bias).pow(2).sum())(x)
    torch.testing.assert_close(torch.tensordot(2 * want, jacobian, 2), gradient, **close)
    stacked = torch.stack([x, 2 * x, -x])
    batched = torch.func.vmap(function, in_dims=(0, None, None))(stacked, weight, bias)
    assert torch.equal(batched, torch.stack([function(a, weight, bias) for a in stacked]))
    per_sample = torch.func.vmap(torch.func.grad(lambda a: function(a, weight, bias).sum()))(
        stacked
    )
    singly = [
        torch.autograd.functional.vjp(lambda a: function(a, weight, bias).sum(), a)[1]
        for a in stacked
    ]
    torch.testing.assert_close(per_sample, torch.stack(singly), **close)
    parts = torch.func.functionalize(function)(x, weight, bias)
    torch.testing.assert_close(parts, want, **close)


# ------------------------------------------------------------------------------------------------
# Memory
# ------------------------------------------------------------------------------------------------


@fused
@in_both_modes
def test_only_the_input_and_small_statistics_are_saved(order: str, training: bool) -> None:
    layer = FUSED[order](30).train(training)
    x = torch.randn(50, 30, requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    large = [tensor for tensor in saved if tensor.numel() > 2 * 30]
    assert [tensor.data_ptr() for tensor in large] == [x.data_ptr()]


@fused
def test_a_gradient_that_the_user_passed_is_left_alone(order: str) -> None:
    layer, x, g = FUSED[order](30), torch.randn(50, 30, requires_grad=True), torch.randn(50, 30)
    before = g.clone()
    y = layer(x)
    y.backward(g, retain_graph=True)
    first = x.grad.clone()
    x.grad = None
    y.backward(g)
    assert torch.equal(g, before)
    assert torch.equal(x.grad, first)


@fused
@pytest.mark.usefixtures("restored_threads")
def test_bits_do_not_depend_on_threads(order: str) -> None:
    one, _, _ = pair(order, 64)
    x, g = torch.randn(2, 4096, 64)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(gradients(copy.deepcopy(one), x, g))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ------------------------------------------------------------------------------------------------
# As a module
# ------------------------------------------------------------------------------------------------


@fused
def test_state_is_a_batch_norms(order: str) -> None:
    layer = FUSED[order](5)
    layer(torch.randn(8, 5))
    for norm in (nn.BatchNorm1d(5), torch_bn.BatchNorm1d(5)):
        assert norm.load_state_dict(layer.state_dict()) == ([], [])
        assert layer.load_state_dict(norm.state_dict()) == ([], [])
        assert layer.state_dict()._metadata == norm.state_dict()._metadata
    assert repr(layer) == (
        f"{FUSED[order].__name__}(5, eps=1e-05, momentum=0.1, affine=True, bias=True, "
        "track_running_stats=True)"
    )
    assert isinstance(layer, nn.BatchNorm1d)


@fused
def test_copies(order: str) -> None:
    layer, x = FUSED[order](5), torch.randn(8, 5)
    layer(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = (
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer),
        torch.load(file, weights_only=False),
    )
    want = layer(x)
    for each in copies:
        assert type(each) is FUSED[order]
        assert torch.equal(each(x), want)


@fused
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(1, 3), ValueError, "Expected more than 1 value per channel when training"),
        (torch.ones(3), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        (torch.ones(4, 2), RuntimeError, "running_mean should contain 2 elements not 3"),
        (torch.ones(4, 3, dtype=torch.long), NotImplementedError, "not implemented for 'Long'"),
        (torch.ones(4, 3, dtype=torch.double), RuntimeError, "mixed dtype"),
    ],
    ids=["one row", "rank", "channels", "integers", "dtype"],
)
def test_refusals_leave_the_state(order: str, x: Tensor, error: type, words: str) -> None:
    layer = FUSED[order](3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error, match=words):
        layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@fused
@in_both_modes
def test_compiled_scripted_exported_and_traced(order: str, training: bool) -> None:
    one, _, _ = pair(order, 3)
    one.train(training)
    x = torch.randn(8, 3)
    want = copy.deepcopy(one)
    expected = want(x)
    ways = {
        "aot_eager": lambda m: torch.compile(m, backend="aot_eager", fullgraph=True),
        "script": torch.jit.script,
        "fx": torch.fx.symbolic_trace,
        "export": lambda m: torch.export.export(m, (x,)).module(check_guards=False),
    }
    for name, way in ways.items():
        layer = copy.deepcopy(one)
        y = way(layer)(x)
        assert torch.equal(y, expected), name
        if name != "export":  # which has buffers of its own
            assert torch.equal(layer.running_mean, want.running_mean), name
            assert layer.num_batches_tracked == want.num_batches_tracked, name


@fused
def test_gradients_of_a_compiled_layer(order: str) -> None:
    one, _, _ = pair(order, 30)
    x, g = torch.randn(2, 40, 30)
    want = gradients(copy.deepcopy(one), x, g)
    got = gradients(torch.compile(one, fullgraph=True), x, g)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Both exporters warn of torch's own changes.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@fused
@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx(order: str, dynamo: bool, tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    layer = FUSED[order](3).eval()
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (torch.randn(4, 3),), str(path), dynamo=dynamo, verbose=False)
    nodes = onnx.load(str(path)).graph.node
    kinds = [node.op_type for node in nodes if node.op_type != "Identity"]
    want = ["BatchNormalization", "Relu"]
    assert kinds == (want if order == "after" else want[::-1])


@fused
@in_both_modes
def test_another_device_is_served_by_torch(order: str, training: bool) -> None:
    layer = FUSED[order](3, device="meta").train(training)
    assert layer(torch.randn(4, 3, device="meta")).shape == (4, 3)


@fused
@in_both_modes
def test_a_subclass_is_served_by_torch(order: str, training: bool) -> None:
    one, two, _ = pair(order, 3, nn.BatchNorm1d)
    one.train(training), two.train(training)

    class Seen(Tensor):
        calls: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(
            cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            cls.calls.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(4, 3)
    y = one(x.as_subclass(Seen))
    assert {"batch_norm", "relu"} <= set(Seen.calls)
    assert torch.equal(y.as_subclass(Tensor), two(x))


@fused
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_input_with_float32_parameters(order: str, dtype: torch.dtype) -> None:
    one, two, _ = pair(order, 5)
    x, g = torch.randn(2, 8, 5).to(dtype)
    results = gradients(one, x, g), gradients(two, x, g)
    assert [each.dtype for each in results[0]] == [dtype, dtype, torch.float32, torch.float32]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

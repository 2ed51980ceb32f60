"""torch.compile: no graph break, recompilation only where torch recompiles, the same results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import torch_bn

Layer = type[torch.nn.BatchNorm1d]
LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
FUNCTIONS = {
    "torch": torch.nn.functional.batch_norm,
    "torch_bn": torch_bn.functional.batch_norm,
}
BACKENDS = ["eager", "aot_eager", "inductor"]
both = pytest.mark.parametrize("layer_type", LAYERS.values(), ids=LAYERS)
backends = pytest.mark.parametrize("backend", BACKENDS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

pytestmark = [
    # torch's own, while it compiles.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
# Sums of a few dozen float32 numbers of the order of 1 to 10: the compiled builtin sums in another
# order than the eager one. Our operator is the same in both, and only what is around it may differ.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(torch.nn.Module):
    def __init__(self, layer_type: Layer, **options: Any) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
        self.bn = layer_type(3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x)).relu()


def step(net: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad


def assert_same_state(got: torch.nn.Module, want: torch.nn.Module) -> None:
    for (name, one), other in zip(got.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, **CLOSE, msg=name)
    torch.testing.assert_close(dict(got.named_buffers()), dict(want.named_buffers()), **CLOSE)


@both
@backends
@in_both_modes
@pytest.mark.parametrize(
    "options", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}], ids=str
)
def test_steps_of_a_compiled_model(
    layer_type: Layer, backend: str, training: bool, options: dict[str, Any]
) -> None:
    net = Net(layer_type, **options).train(training)
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    if layer_type is torch.nn.BatchNorm1d and "momentum" in options and training:
        # torch's layer reads its counter as a number.
        with pytest.raises(Exception, match="Could not guard on data-dependent expression"):
            compiled(torch.randn(5, 4))
        return
    for _ in range(3):
        x = torch.randn(5, 4)
        torch.testing.assert_close(step(compiled, x), step(eager, x), **CLOSE)
    assert_same_state(net, eager)


def test_compiled_eager_and_uncompiled_have_the_same_bits() -> None:
    layer, x = torch_bn.BatchNorm1d(37), torch.randn(50, 37)
    eager, aot = copy.deepcopy(layer), copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor")
    by_aot = torch.compile(aot, fullgraph=True, backend="aot_eager")
    want = step(eager, x)
    assert all(map(torch.equal, step(compiled, x), want))
    assert all(map(torch.equal, step(by_aot, x), want))
    assert torch.equal(layer.running_var, eager.running_var)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # no backend after these adds guards
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dynamic", [None, True, False], ids=str)
@pytest.mark.parametrize("length", [(), (7,)], ids=["2D", "3D"])
def test_recompiles_no_more_than_torch(
    backend: str, training: bool, dynamic: bool | None, length: tuple[int, ...]
) -> None:
    compilations = {}
    for name, layer_type in LAYERS.items():
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        layer = layer_type(3).train(training)
        compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=dynamic)
        for rows in (4, 5, 6, 9):
            step(compiled, torch.randn(rows, 3, *length))
        layer.train(not training)
        for rows in (4, 5):
            step(compiled, torch.randn(rows, 3, *length))
        compilations[name] = counter.frame_count
    assert compilations["torch_bn"] <= compilations["torch"]


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@backends
@in_both_modes
def test_functional(function: Callable[..., Tensor], backend: str, training: bool) -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))

    def call(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return function(x, mean, var, weight, bias, training, 0.3, 1e-3)

    compiled = torch.compile(call, fullgraph=True, backend=backend)
    x = torch.randn(6, 3, requires_grad=True)
    eager_mean, eager_var = mean.clone(), var.clone()
    got, want = compiled(x, mean, var), call(x, eager_mean, eager_var)
    torch.testing.assert_close((got, mean, var), (want, eager_mean, eager_var), **CLOSE)
    leaves = (x, weight, bias)
    torch.testing.assert_close(
        torch.autograd.grad(got.pow(3).sum(), leaves),
        torch.autograd.grad(want.pow(3).sum(), leaves),
        **CLOSE,
    )


@both
@pytest.mark.parametrize("rows", [1], ids=["one row"])
def test_refusals_survive_compilation(layer_type: Layer, rows: int) -> None:
    compiled = torch.compile(layer_type(3), backend="aot_eager")
    with pytest.raises(Exception, match="Expected more than 1 value per channel when training"):
        compiled(torch.randn(rows, 3))


@both
def test_inference_mode(layer_type: Layer) -> None:
    net, x = Net(layer_type).eval(), torch.randn(5, 4)
    with torch.inference_mode():
        got = torch.compile(net, fullgraph=True)(x)
        torch.testing.assert_close(got, net(x), **CLOSE)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_evaluation_compiles_to_an_operator_that_writes_nothing(training: bool) -> None:
    targets = []

    def record(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    from torch._dynamo.backends.common import aot_autograd

    layer = torch_bn.BatchNorm1d(3).train(training)
    torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=record))(
        torch.randn(5, 3)
    )
    assert ("torch_bn._batch_norm_inference.default" in targets) is not training
    assert ("auto_functionalized_v2" in " ".join(targets)) is training


@both
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("forward", ["eager forward", "compiled forward"])
def test_compiled_autograd(layer_type: Layer, backend: str, forward: str) -> None:
    net, x = Net(layer_type), torch.randn(5, 4)
    eager = copy.deepcopy(net)
    want = step(eager, x)
    call = torch.compile(net, backend=backend) if forward == "compiled forward" else net
    x = x.clone().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        y = call(x)
        y.pow(3).sum().backward()
    torch.testing.assert_close((y.detach(), x.grad), want, **CLOSE)
    assert_same_state(net, eager)


@both
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=str)
def test_compiled_autograd_without_parameters(layer_type: Layer, options: dict[str, Any]) -> None:
    layer = layer_type(3, **options)
    eager = copy.deepcopy(layer)
    x = torch.randn(5, 3)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        got = step(layer, x)
    torch.testing.assert_close(got, step(eager, x), **CLOSE)
    for own, other in zip(layer.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, **CLOSE)


@both
def test_compiled_autograd_with_dynamic_batch(layer_type: Layer) -> None:
    layer = layer_type(3)
    eager = copy.deepcopy(layer)
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        for rows in (4, 5, 6):
            x = torch.randn(rows, 3)
            torch.testing.assert_close(step(layer, x), step(eager, x), **CLOSE)
    assert_same_state(layer, eager)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_compiled_autocast(layer_type: Layer, dtype: torch.dtype) -> None:
    net, x = Net(layer_type), torch.randn(6, 4)
    eager = copy.deepcopy(net)
    with torch.autocast("cpu", dtype=dtype):
        got, want = torch.compile(net, fullgraph=True, backend="aot_eager")(x), eager(x)
    assert got.dtype == want.dtype == dtype
    # One unit in the last place of results up to 3: the builtin decomposes, and rounds elsewhere.
    torch.testing.assert_close(got, want, rtol=0, atol=torch.finfo(dtype).eps * 2)


@both
def test_double_backward_through_a_compiled_model_is_refused(layer_type: Layer) -> None:
    layer, x = layer_type(3), torch.randn(5, 3, requires_grad=True)
    loss = torch.compile(layer, backend="aot_eager")(x).pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()

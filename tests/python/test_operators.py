"""The operators through torch's own checker: schema, autograd, fake tensors, AOT.

All that are registered but sync_batch_norm, whose collectives need a group of processes: its parts
between them are checked here, the whole is tested in test_sync.py.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.schema_check_mode import SchemaCheckMode
from torch.library import opcheck

import torch_bn

OPS = torch.ops.torch_bn
SHAPES = [(6, 3), (3, 4, 5)]
MASKS = [list(mask) for mask in itertools.product([True, False], repeat=3)]
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(shape: tuple[int, ...], parameters: bool = True) -> tuple[Tensor | None, ...]:
    """Input, weight, bias, running mean and variance."""
    channels = shape[1]
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    x = torch.randn(shape, requires_grad=True)
    statistics = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    return (x, *((weight, bias) if parameters else (None, None)), *statistics)


@shapes
@in_both_modes
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_norm_relu", "relu_batch_norm", "_batch_norm_forward"]
)
def test_forward(
    name: str, shape: tuple[int, ...], training: bool, parameters: bool, momentum: float | None
) -> None:
    counter = torch.tensor(0)
    arguments = (*tensors(shape, parameters), counter, training, momentum, 1e-5)
    opcheck(getattr(OPS, name).default, arguments)


@shapes
@in_both_modes
@pytest.mark.parametrize("relu", [1, 2])
def test_forward_with_relu(shape: tuple[int, ...], training: bool, relu: int) -> None:
    arguments = (*tensors(shape), torch.tensor(0), training, 0.1, 1e-5, relu)
    opcheck(OPS._batch_norm_forward.default, arguments)


@shapes
@pytest.mark.parametrize("relu", [0, 1, 2])
def test_inference(shape: tuple[int, ...], relu: int) -> None:
    opcheck(OPS._batch_norm_inference.default, (*tensors(shape), 1e-5, relu))


@shapes
@in_both_modes
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_backward(shape: tuple[int, ...], training: bool, mask: list[bool]) -> None:
    x, weight, *_ = tensors(shape)
    _, stats = OPS._batch_norm_forward(x, weight, None, None, None, None, True, 0.1, 1e-5)
    gradient = torch.randn(shape, requires_grad=True)
    opcheck(OPS.batch_norm_backward.default, (gradient, x, weight, stats, training, 1e-5, mask))


@shapes
@in_both_modes
@pytest.mark.parametrize("relu", [1, 2])
def test_backward_with_relu(shape: tuple[int, ...], training: bool, relu: int) -> None:
    x, weight, bias, *_ = tensors(shape)
    _, stats = OPS._batch_norm_forward(x, weight, bias, None, None, None, True, 0.1, 1e-5, relu)
    gradient = torch.randn(shape, requires_grad=True)
    arguments = (gradient, x, weight, stats, training, 1e-5, MASKS[0], bias.detach(), relu)
    opcheck(OPS.batch_norm_backward.default, arguments)


@pytest.mark.parametrize("name", ["batch_norm_backward", "_ghost_batch_norm_backward"])
def test_types_of_gradients_without_data(name: str) -> None:
    """Of a 16-bit input beside float32 parameters each has its own."""
    ghost = "ghost" in name
    x, stats = torch.randn(6, 3).bfloat16(), torch.ones((2, 2, 3) if ghost else (2, 3)).double()
    rest = (1e-5, 3, MASKS[0]) if ghost else (True, 1e-5, MASKS[0])
    given = (x, x, torch.ones(3), stats)
    real = getattr(OPS, name)(*given, *rest)
    without_data = getattr(OPS, name)(*(each.to("meta") for each in given), *rest)
    assert [each.dtype for each in real] == [torch.bfloat16, torch.float32, torch.float32]
    for got, want in zip(without_data, real, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)


def test_update_of_running_statistics() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    batch = torch.randn(3).double(), torch.rand(3).double()
    opcheck(OPS._update_running_stats.default, (*batch, 6, mean, var, torch.tensor(0), 0.1))


# Chunks of any size, a short last one, and a last row that joins the chunk before.
@pytest.mark.parametrize("shape", [(6, 3), (7, 3), (8, 3), (5, 4, 5)], ids=str)
@pytest.mark.parametrize("parameters", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghost_forward(shape: tuple[int, ...], parameters: bool, momentum: float | None) -> None:
    arguments = (*tensors(shape, parameters), torch.tensor(0))
    opcheck(OPS._ghost_batch_norm_forward.default, (*arguments, momentum, 1e-5, 3))
    for training in (True, False):
        opcheck(OPS.ghost_batch_norm.default, (*arguments, training, momentum, 1e-5, 3))


@pytest.mark.parametrize("shape", [(7, 3), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_ghost_backward(shape: tuple[int, ...], mask: list[bool]) -> None:
    x, weight, *_ = tensors(shape)
    _, stats = OPS._ghost_batch_norm_forward(x, weight, None, None, None, None, 0.1, 1e-5, 2)
    gradient = torch.randn(shape, requires_grad=True)
    opcheck(OPS._ghost_batch_norm_backward.default, (gradient, x, weight, stats, 1e-5, 2, mask))


@pytest.mark.parametrize("relu", [0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 3), (2, 3, 40), (0, 3)], ids=str)
def test_synchronised(shape: tuple[int, ...], relu: int) -> None:
    """The parts between the collectives."""
    # Autograd is above these operators: the arguments need no gradient.
    x, weight, bias, mean, var = (each.detach() for each in tensors(shape))
    opcheck(OPS._sync_moments.default, (x, 5, relu))
    other = torch.randn(4, *shape[1:])
    parts = torch.stack([OPS._sync_moments(part, 5, relu) for part in (x, other)])
    rest = (weight, bias, mean, var, torch.tensor(0), 0.1, 1e-5, "bn", relu)
    opcheck(OPS._sync_normalise.default, (x, parts, *rest))
    _, stats = OPS._sync_normalise(x, parts, *rest)
    g = torch.randn(shape)
    given = (g, x, weight, bias, stats)
    opcheck(OPS._sync_gradient_sums.default, (*given, 5, relu))
    sums = torch.stack([OPS._sync_gradient_sums(*given, 5, relu)] * 2)
    opcheck(OPS._sync_gradient.default, (*given, sums, "bn", relu))


def test_synchronised_parts_of_another_shape_or_layer_are_refused() -> None:
    x = torch.randn(6, 3)
    rest = (None, None, None, None, None, 0.1, 1e-5, "bn")
    with pytest.raises(RuntimeError, match=r"parts should be of .* shape \[processes, 8\]"):
        OPS._sync_normalise(x, torch.zeros(2, 6, dtype=torch.double), *rest)
    with pytest.raises(RuntimeError, match=r"relu should be 0 \(none\), 1 \(after\) or 2"):
        OPS._sync_moments(x, 5, 3)
    parts = torch.stack([OPS._sync_moments(x, mark) for mark in (5, 6)])
    with pytest.raises(RuntimeError, match="'bn': the processes of ranks 0 and 1 of its group are"):
        OPS._sync_normalise(x, parts, *rest)


def test_no_operator_is_without_its_check() -> None:
    # A new one fails this until a check of it is above.
    registered = {
        name.split("::")[1]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("torch_bn::")
    }
    assert registered == {
        "batch_norm",
        "batch_norm_relu",
        "relu_batch_norm",
        "_batch_norm_forward",
        "_batch_norm_inference",
        "batch_norm_backward",
        "_update_running_stats",
        "ghost_batch_norm",
        "_ghost_batch_norm_forward",
        "_ghost_batch_norm_backward",
        "_sync_moments",
        "_sync_normalise",
        "_sync_gradient_sums",
        "_sync_gradient",
        "sync_batch_norm",  # in test_sync.py
    }


LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
both = pytest.mark.parametrize("layer_type", LAYERS.values(), ids=LAYERS)


@both
@in_both_modes
def test_fake_tensors(layer_type: type[torch.nn.BatchNorm1d], training: bool) -> None:
    with FakeTensorMode():
        layer, x = layer_type(3).train(training), torch.randn(5, 3, 7, requires_grad=True)
        y = layer(x)
        y.sum().backward()
    assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, (21, 7, 1))
    assert (x.grad.shape, layer.weight.grad.shape) == (x.shape, (3,))


@both
@in_both_modes
def test_schema_check_mode(layer_type: type[torch.nn.BatchNorm1d], training: bool) -> None:
    layer, x = layer_type(3).train(training), torch.randn(5, 3, requires_grad=True)
    with SchemaCheckMode():
        layer(x).sum().backward()
    assert layer.num_batches_tracked == int(training)


@both
@in_both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(
    layer_type: type[torch.nn.BatchNorm1d], training: bool, dtype: torch.dtype
) -> None:
    linear, layer = torch.nn.Linear(4, 3), layer_type(3).train(training)
    reference = torch.nn.BatchNorm1d(3).train(training)
    x = torch.randn(6, 4)
    with torch.autocast("cpu", dtype=dtype):
        hidden = linear(x)
        y = layer(hidden)
        alone = layer(x[:, :3])
    assert (hidden.dtype, y.dtype, alone.dtype) == (dtype, dtype, torch.float32)
    want = reference(hidden.float())
    # One rounding of the result to 16 bits: half an ulp of its largest value.
    bound = torch.finfo(dtype).eps / 2 * want.abs().max().item()
    torch.testing.assert_close(y.float(), want, rtol=0, atol=bound * 1.01)
    y.float().pow(2).sum().backward()
    assert layer.weight.grad.dtype == linear.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["none", "bias", "both"])
def test_types_of_gradients_under_vmap(name: str) -> None:
    """The decomposition gives gradients of the kernels' types, also where there is no weight."""
    x, gradient = torch.randn(2, 2, 6, 3).bfloat16()
    stats = torch.ones(2, 3, dtype=torch.double)
    weight = torch.ones(3) if name == "both" else None
    bias = None if name == "none" else torch.zeros(3)

    def gradients(g: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = OPS.batch_norm_backward(
            g, x, weight, stats, True, 1e-5, [True] * 3, bias, 0
        )
        return result

    want = [each.dtype for each in gradients(gradient[0], x[0])]
    assert want == [torch.bfloat16, torch.float32, torch.float32]
    assert [each.dtype for each in torch.func.vmap(gradients)(gradient, x)] == want


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (torch_bn.BatchNorm1d(3), "torch_bn::batch_norm"),
        (torch_bn.BatchNormReLU1d(3), "torch_bn::batch_norm_relu"),
        (torch_bn.ReLUBatchNorm1d(3), "torch_bn::relu_batch_norm"),
    ],
    ids=str,
)
def test_a_profiler_sees_the_layers_operator(layer: torch.nn.Module, name: str) -> None:
    # Without one, a plain call goes past the dispatcher, which tells profilers of operators.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        layer(torch.randn(5, 3))
    assert name in {event.name for event in profiler.events()}

"""Where our kernels cannot serve, torch's own run in silence.

Torch's own layer runs through the same tests as control.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dropin import LAYERS, C, layers, trained
from torch import Tensor, nn

import torch_bn

# ------------------------------------------------------------------------------------------------
# Where our kernels cannot serve, torch's own run in silence
# ------------------------------------------------------------------------------------------------


class Overriding(Tensor):
    """Answers for F.batch_norm itself, as users' subclasses do."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is F.batch_norm:
            return "answered"
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("batch_norm", [F.batch_norm, torch_bn.functional.batch_norm])
@pytest.mark.parametrize("position", range(5))
def test_functional_honours_torch_function(
    batch_norm: Callable[..., Tensor], position: int
) -> None:
    arguments = [torch.ones(5, C), *(torch.ones(C) for _ in range(4))]
    arguments[position] = arguments[position].as_subclass(Overriding)
    assert batch_norm(*arguments, training=True) == "answered"


@layers
def test_layer_honours_torch_function(layer_class: type) -> None:
    x = torch.ones(5, C)
    assert layer_class(C)(x.as_subclass(Overriding)) == "answered"
    layer = layer_class(C)
    layer.running_mean = layer.running_mean.as_subclass(Overriding)
    assert layer(x) == "answered"


@layers
def test_a_property_in_place_of_an_attribute(layer_class: type) -> None:
    class Halved(layer_class):
        momentum = property(lambda self: 0.5, lambda self, value: None)

    layer, x = Halved(C), torch.tensor([[1.0] * C, [3.0] * C])
    layer(x)
    assert layer.running_mean.tolist() == [1.0] * C
    assert layer.running_var.tolist() == [1.5] * C


@layers
def test_a_plain_subclass_stays_one(layer_class: type) -> None:
    class Tagged(Tensor):
        pass

    y = layer_class(C)(torch.randn(5, C).as_subclass(Tagged))
    assert type(y) is Tagged


class Mode(torch.overrides.TorchFunctionMode):
    def __init__(self) -> None:
        self.seen: list[object] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_our_operator() -> None:
    # Such a mode is on for everyone who uses `with torch.device(...)`: it must not cost the digits.
    x = torch.randn(64, C) + 1e4
    want = torch_bn.BatchNorm1d(C)(x)
    with Mode() as mode:
        assert torch.equal(torch_bn.BatchNorm1d(C)(x), want)
    assert torch.ops.torch_bn.batch_norm.default in mode.seen
    with torch.device("cpu"):
        assert torch.equal(torch_bn.BatchNorm1d(C)(x), want)


class AtenOnly(Tensor):
    """A wrapper that knows the operators of ATen and no others, as DTensor does."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> AtenOnly:
        result = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        result.inner = inner
        return result

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace != "aten":
            raise NotImplementedError(f"no rule for {func}")
        unwrapped, _ = torch.utils._pytree.tree_flatten(args)
        plain = [a.inner if isinstance(a, cls) else a for a in unwrapped]
        outputs = func(*plain, **(kwargs or {}))
        if isinstance(outputs, tuple):
            return tuple(cls(o) for o in outputs)
        return cls(outputs)


@layers
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_dispatch_subclass_that_knows_aten_alone(
    layer_class: type, momentum: float | None
) -> None:
    layer, x = layer_class(C, momentum=momentum), torch.randn(5, C)
    y = layer(AtenOnly(x))
    assert type(y) is AtenOnly
    assert torch.equal(y.inner, nn.BatchNorm1d(C)(x))
    assert layer.num_batches_tracked.item() == 1


@pytest.fixture(scope="module")
def lazy_device() -> None:
    """The lazy-tensor device, which every build of torch has beside CPU and meta."""
    import torch._lazy
    import torch._lazy.ts_backend

    torch._lazy.ts_backend.init()  # once in a process


@layers
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.usefixtures("lazy_device")
def test_another_device(layer_class: type, training: bool, momentum: float | None) -> None:
    layer = trained(layer_class, momentum=momentum).train(training)
    reference = trained(nn.BatchNorm1d, momentum=momentum).train(training)
    layer.to("lazy")
    x = torch.randn(5, C)
    remote = x.to("lazy").requires_grad_()
    y = layer(remote)
    assert y.device.type == "lazy"
    assert type(y.grad_fn).__name__ == "NativeBatchNormBackward0"
    y.sum().backward()
    assert remote.grad.device.type == "lazy"
    assert torch.allclose(y.cpu(), reference(x), atol=1e-6)  # float32
    assert layer.num_batches_tracked.cpu().item() == 1 + training
    z = torch_bn.functional.batch_norm(remote, None, None, training=True)
    assert type(z.grad_fn).__name__ == "NativeBatchNormBackward0"


@pytest.mark.usefixtures("lazy_device")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.25, None])
def test_the_operator_on_another_device(training: bool, momentum: float | None) -> None:
    """As an FX graph or an exported program calls it, without the layer around it."""
    x = torch.randn(5, C)
    results = []
    for device in ("lazy", "cpu"):
        mean, var = (torch.full((C,), value, device=device) for value in (0.5, 2.0))
        counter = torch.tensor(3, device=device)
        y = torch.ops.torch_bn.batch_norm(
            x.to(device), None, None, mean, var, counter, training, momentum, 1e-5
        )
        assert y.device.type == device
        # Torch's own leaves the running statistics of this device alone.
        results.append((y.cpu(), counter.item()))
    (theirs, counted), (ours, _) = results
    assert torch.allclose(theirs, ours, atol=1e-6)  # float32
    assert counted == 3 + training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtypes_that_mix_on_meta_alone(dtype: torch.dtype) -> None:
    # Torch's own takes on meta what it refuses on CPU.
    x = torch.empty(5, C, device="meta")
    for layer_class in LAYERS:
        layer = layer_class(C, device="meta", dtype=dtype)
        assert layer(x).shape == (5, C)


def test_mkldnn_input_of_the_functional() -> None:
    x, mean, var = torch.randn(2, C, 5, 5), torch.rand(C), torch.rand(C) + 1
    weight, bias = torch.rand(C), torch.rand(C)
    got, want = (
        batch_norm(x.to_mkldnn(), mean, var, weight, bias).to_dense()
        for batch_norm in (torch_bn.functional.batch_norm, F.batch_norm)
    )
    assert torch.equal(got, want)


@pytest.fixture
def quiet_export() -> Iterator[None]:
    with warnings.catch_warnings():  # the exporters' own deprecations
        warnings.simplefilter("ignore")
        yield


@layers
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.usefixtures("quiet_export")
def test_onnx_export(layer_class: type, dynamo: bool, training: bool, tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx", reason="the ONNX exporters need onnx")
    pytest.importorskip("onnxscript", reason="the ONNX exporters need onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="to run what was exported")
    model, x = nn.Sequential(trained(layer_class)), torch.randn(5, C)
    path = str(tmp_path / "model.onnx")
    mode = {"training": torch.onnx.TrainingMode.TRAINING} if training and not dynamo else {}
    model.train(training)
    want = copy.deepcopy(model)(x)
    torch.onnx.export(model, (x,), path, dynamo=dynamo, verbose=False, **mode)
    nodes = onnx.load(path).graph.node
    assert "BatchNormalization" in {node.op_type for node in nodes}
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    if training:
        # The newer exporter writes inference for the builtin too; the other's result onnxruntime
        # cannot run on CPU, where it has no BatchNormalization in training mode.
        return
    session = runtime.InferenceSession(path)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert torch.allclose(torch.from_numpy(got), want, atol=1e-5)  # float32 in another order

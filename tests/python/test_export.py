"""Models that leave Python: torch.export, AOTInductor, TorchScript and ONNX."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

import torch_bn

Layer = type[torch.nn.BatchNorm1d]
LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
FUNCTIONS = {
    "torch": torch.nn.functional.batch_norm,
    "torch_bn": torch_bn.functional.batch_norm,
}
both = pytest.mark.parametrize("layer_type", LAYERS.values(), ids=LAYERS)
both_functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
shapes = pytest.mark.parametrize("length", [(), (7,)], ids=["2D", "3D"])

pytestmark = [
    # torch's own, while it exports.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # of the builtin's size check
    pytest.mark.filterwarnings("ignore:ONNX Preprocess - Removing mutation"),  # of the counter
    pytest.mark.filterwarnings("ignore:It is recommended that constant folding be turned off"),
]
# A few roundings of float32 results of the order of 1 to 4: another program may fold batch norm
# into the layer before it, or sum in another order.
CLOSE = {"rtol": 0, "atol": 4e-6}
ROWS = ({0: torch.export.Dim("rows", min=2)},)


class Net(torch.nn.Module):
    def __init__(self, layer_type: Layer, **options: Any) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 4)
        self.bn = layer_type(4, **options)
        self.second = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) if x.dim() == 2 else x
        hidden = self.bn(hidden).relu()
        return self.second(hidden) if x.dim() == 2 else hidden


def make(layer_type: Layer, training: bool, **options: Any) -> Net:
    """A net whose running statistics are not those it began with."""
    net = Net(layer_type, **options)
    for _ in range(3):
        net(torch.randn(8, 4) * 2 + 1)
    return net.train(training).requires_grad_(training)


def to_bytes_and_back(save: Callable[..., None], load: Callable[..., Any], what: Any) -> Any:
    buffer = io.BytesIO()
    save(what, buffer)
    buffer.seek(0)
    return load(buffer)


@both
@in_both_modes
@shapes
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("after", ["as is", "saved and loaded", "decomposed"])
def test_exported_program(
    layer_type: Layer, training: bool, length: tuple[int, ...], strict: bool, after: str
) -> None:
    net = make(layer_type, training)
    program = torch.export.export(
        copy.deepcopy(net), (torch.randn(6, 4, *length),), dynamic_shapes=ROWS, strict=strict
    )
    if after == "saved and loaded":
        program = to_bytes_and_back(torch.export.save, torch.export.load, program)
    elif after == "decomposed":
        program = program.run_decompositions()
    module = program.module()
    for rows in (5, 9):
        x = torch.randn(rows, 4, *length)
        torch.testing.assert_close(module(x), net(x), **CLOSE)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, net.get_buffer(name), **CLOSE)
    assert net.bn.num_batches_tracked == (5 if training else 3)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exported_cumulative_average(strict: bool) -> None:
    # torch's own layer cannot be exported so: it reads its counter as a number.
    net = make(torch_bn.BatchNorm1d, training=True, momentum=None)
    module = torch.export.export(
        copy.deepcopy(net), (torch.randn(6, 4),), dynamic_shapes=ROWS, strict=strict
    ).module()
    for rows in (5, 9):
        x = torch.randn(rows, 4)
        assert torch.equal(module(x), net(x))
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, net.get_buffer(name))
    assert net.bn.num_batches_tracked == 5


def test_evaluation_is_exported_without_mutation() -> None:
    net = make(torch_bn.BatchNorm1d, training=False)
    program = torch.export.export(net, (torch.randn(6, 4),)).run_decompositions()
    assert program.graph_signature.buffers_to_mutate == {}
    training = torch.export.export(net.train(), (torch.randn(6, 4),)).run_decompositions()
    assert set(training.graph_signature.buffers_to_mutate.values()) == {
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    }


@both
def test_training_of_an_exported_program(layer_type: Layer) -> None:
    net = make(layer_type, training=True)
    program = torch.export.export(copy.deepcopy(net), (torch.randn(6, 4),), dynamic_shapes=ROWS)
    module, x = program.module(), torch.randn(5, 4)
    module(x).pow(2).sum().backward()
    net(x).pow(2).sum().backward()
    for name, parameter in module.named_parameters():  # of the same operators in the same order
        assert torch.equal(parameter.grad, net.get_parameter(name).grad)


@both
def test_aot_inductor(layer_type: Layer, tmp_path: Path) -> None:
    net = make(layer_type, training=False)
    program = torch.export.export(net, (torch.randn(6, 4),), dynamic_shapes=ROWS)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "net.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for rows in (5, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(package(x), net(x), **CLOSE)


@both
@in_both_modes
@shapes
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None}, {"bias": False}],
    ids=str,
)
def test_script(
    layer_type: Layer, training: bool, length: tuple[int, ...], options: dict[str, Any]
) -> None:
    net = make(layer_type, training, **options)
    scripted = torch.jit.script(copy.deepcopy(net))
    loaded = to_bytes_and_back(torch.jit.save, torch.jit.load, scripted)
    for rows in (5, 6, 9):  # more than one, so that the profiling executor has optimised
        x = torch.randn(rows, 4, *length)
        want = net(x)
        torch.testing.assert_close(scripted(x), want, **CLOSE)
        torch.testing.assert_close(loaded(x), want, **CLOSE)
    for each in (scripted, loaded):
        torch.testing.assert_close(dict(each.named_buffers()), dict(net.named_buffers()), **CLOSE)


@both
def test_script_follows_train_and_eval_and_differentiates(layer_type: Layer) -> None:
    net = make(layer_type, training=True)
    scripted, x = torch.jit.script(copy.deepcopy(net)), torch.randn(5, 4)
    for module in (scripted, net):
        for _ in range(3):
            module.zero_grad()
            module(x).pow(2).sum().backward()
    for name, parameter in scripted.named_parameters():
        # TorchScript may sum in an order of its own: ten float32 terms below 10, each off by 6e-8
        # of it.
        torch.testing.assert_close(parameter.grad, net.get_parameter(name).grad, rtol=0, atol=6e-6)
    torch.testing.assert_close(scripted.eval()(x), net.eval()(x), **CLOSE)
    assert scripted.bn.num_batches_tracked == net.bn.num_batches_tracked == 6


@both
def test_script_shares_the_parameters(layer_type: Layer) -> None:
    net = make(layer_type, training=True)
    before = net.bn
    scripted = torch.jit.script(net)
    assert net.bn is before
    assert type(before) is layer_type
    assert scripted.bn.weight.data_ptr() == before.weight.data_ptr()
    assert scripted.bn.running_mean.data_ptr() == before.running_mean.data_ptr()


@both
@in_both_modes
@shapes
def test_trace(layer_type: Layer, training: bool, length: tuple[int, ...]) -> None:
    net = make(layer_type, training)
    traced = torch.jit.trace(copy.deepcopy(net), (torch.randn(5, 4, *length),))
    net.load_state_dict(traced.state_dict())  # tracing has run it in training
    loaded = to_bytes_and_back(torch.jit.save, torch.jit.load, traced)
    for rows in (5, 9):
        x = torch.randn(rows, 4, *length)
        want = net(x)
        torch.testing.assert_close(traced(x), want, **CLOSE)
        torch.testing.assert_close(loaded(x), want, **CLOSE)
    for each in (traced, loaded):
        torch.testing.assert_close(dict(each.named_buffers()), dict(net.named_buffers()), **CLOSE)


@both
@pytest.mark.parametrize("how", ["scripted", "traced"])
@pytest.mark.parametrize(
    "freeze", [torch.jit.freeze, torch.jit.optimize_for_inference], ids=lambda f: f.__name__
)
def test_freeze(layer_type: Layer, how: str, freeze: Callable[[Any], Any]) -> None:
    net = make(layer_type, training=False)
    script = torch.jit.script(net) if how == "scripted" else torch.jit.trace(net, torch.randn(5, 4))
    frozen = freeze(script)
    for rows in (5, 9):
        x = torch.randn(rows, 4)
        torch.testing.assert_close(frozen(x), net(x), **CLOSE)


@both_functions
@in_both_modes
@shapes
def test_functional_in_script_and_trace(
    function: Callable[..., Tensor], training: bool, length: tuple[int, ...]
) -> None:
    scripted = torch.jit.script(function)
    x, weight, bias = torch.randn(6, 4, *length), torch.randn(4), torch.randn(4)
    states = [(torch.zeros(4), torch.ones(4)) for _ in range(3)]

    def call(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return function(x, mean, var, weight, bias, training, 0.3, 1e-3)

    traced = torch.jit.trace(call, (x, torch.zeros(4), torch.ones(4)), check_trace=False)
    want = call(x, *states[0])
    got = scripted(x, *states[1], weight, bias, training, 0.3, 1e-3)
    torch.testing.assert_close(got, want, **CLOSE)
    torch.testing.assert_close(traced(x, *states[2]), want, **CLOSE)
    torch.testing.assert_close(states[1], states[0], **CLOSE)
    torch.testing.assert_close(states[2], states[0], **CLOSE)


@both_functions
def test_scripted_functional_of_other_ranks_is_torchs(function: Callable[..., Tensor]) -> None:
    x = torch.randn(4, 3, 5, 5)
    want = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert torch.equal(torch.jit.script(function)(x, None, None, training=True), want)


def run_onnx(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(result)


def export_onnx(net: torch.nn.Module, x: Tensor, path: Path, how: str) -> None:
    if how == "older exporter":
        torch.onnx.export(
            net,
            (x,),
            path,
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "rows"}},
            training=torch.onnx.TrainingMode.PRESERVE,
        )
    elif how == "exported before":
        program = torch.export.export(net, (x,), dynamic_shapes=ROWS)
        torch.onnx.export(program, (), path, dynamo=True, verbose=False)
    else:
        torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=ROWS, verbose=False)


def expect_the_same_by_onnx(
    net: torch.nn.Module, path: Path, how: str, length: tuple[int, ...] = ()
) -> None:
    export_onnx(net, torch.randn(5, 4, *length), path, how)
    x = torch.randn(7, 4, *length)
    torch.testing.assert_close(run_onnx(path, x), net(x), **CLOSE)


@both
@shapes
@pytest.mark.parametrize("how", ["dynamo", "exported before", "older exporter"])
def test_onnx(layer_type: Layer, length: tuple[int, ...], how: str, tmp_path: Path) -> None:
    expect_the_same_by_onnx(make(layer_type, training=False), tmp_path / "net.onnx", how, length)


@pytest.mark.parametrize("layer_type", [torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d])
def test_onnx_of_fused_layers_exported_before(layer_type: Layer, tmp_path: Path) -> None:
    net = make(layer_type, training=False)
    expect_the_same_by_onnx(net, tmp_path / "net.onnx", "exported before")


# The newer exporter writes evaluation whatever the mode, for torch's layer too.
@both
def test_onnx_of_training_exported_before(layer_type: Layer, tmp_path: Path) -> None:
    net, path = make(layer_type, training=True), tmp_path / "net.onnx"
    counted = net.bn.num_batches_tracked.clone()
    export_onnx(net, torch.randn(5, 4), path, "exported before")
    assert net.bn.num_batches_tracked == counted
    x = torch.randn(7, 4)
    torch.testing.assert_close(run_onnx(path, x), net.eval()(x), **CLOSE)


@both
def test_onnx_in_training(layer_type: Layer, tmp_path: Path) -> None:
    # The older exporter alone can: the newer exports evaluation whatever the mode, torch's too.
    net = make(layer_type, training=True)
    expect_the_same_by_onnx(net, tmp_path / "net.onnx", "older exporter")


@both
def test_onnx_leaves_no_trace(layer_type: Layer, tmp_path: Path) -> None:
    net = make(layer_type, training=False)
    want = copy.deepcopy(net.state_dict())
    for how in ("dynamo", "older exporter"):
        export_onnx(net, torch.randn(5, 4), tmp_path / "net.onnx", how)
    for name, value in net.state_dict().items():
        assert torch.equal(value, want[name])
    targets = {
        str(node.target) for node in torch.export.export(net, (torch.randn(5, 4),)).graph.nodes
    }
    ours = "torch_bn.batch_norm.default" in targets
    assert ours is (layer_type is torch_bn.BatchNorm1d)

"""What surrounds a backward: several forwards, changed inputs, hooks, checkpoints, anomaly mode."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torch_bn

Layer = type[torch.nn.BatchNorm1d]
LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
both = pytest.mark.parametrize("layer_type", LAYERS.values(), ids=LAYERS)
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def make(layer_type: Layer, training: bool = True) -> torch.nn.BatchNorm1d:
    layer = layer_type(3, dtype=torch.double).train(training)
    with torch.no_grad():
        for i, each in enumerate((layer.weight, layer.bias, layer.running_mean, layer.running_var)):
            each.copy_(torch.linspace(0.5 + i, 2 + i, 3))
    return layer


def gradients(layer: torch.nn.BatchNorm1d, x: Tensor) -> list[Tensor]:
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


def plain_gradients(layer: torch.nn.BatchNorm1d, x: Tensor) -> list[Tensor]:
    """Of a copy, for the same loss as in the tests."""
    layer, x = copy.deepcopy(layer), x.detach().clone().requires_grad_()
    layer(x).pow(3).sum().backward()
    return gradients(layer, x)


@both
def test_two_forwards_before_one_backward(layer_type: Layer) -> None:
    layer, first, second = make(layer_type), *torch.randn(2, 6, 3).double()
    apart = [plain_gradients(layer, each)[1:] for each in (first, second)]
    (layer(first).pow(3).sum() + layer(second).pow(3).sum()).backward()
    for parameter, one, other in zip(layer.parameters(), *apart, strict=True):
        assert torch.equal(parameter.grad, one + other)
    assert layer.num_batches_tracked == 2


@both
@in_both_modes
@pytest.mark.parametrize("changed", ["input", "weight"])
def test_in_place_change_before_backward_is_refused(
    layer_type: Layer, training: bool, changed: str
) -> None:
    layer, x = make(layer_type, training), torch.randn(6, 3).double().requires_grad_() * 1.0
    loss = layer(x).sum()
    with torch.no_grad():
        (x if changed == "input" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@both
def test_the_backward_does_not_need_bias_or_output(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    y = layer(x)
    gradient = 3 * y.detach() ** 2
    with torch.no_grad():
        y.zero_()
        layer.bias.zero_()
    y.backward(gradient)
    for got, expected in zip(gradients(layer, x), want, strict=True):
        # y^3 squares what pow's own backward computes as 3 y^2: one more rounding.
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@both
@in_both_modes
def test_versions_of_the_running_statistics(layer_type: Layer, training: bool) -> None:
    layer = make(layer_type, training)
    before = {name: buffer._version for name, buffer in layer.named_buffers()}
    layer(torch.randn(6, 3).double())
    changed = {name for name, buffer in layer.named_buffers() if buffer._version > before[name]}
    # torch's operator changes the statistics unseen by autograd, ours in sight of it.
    seen_in_training = {*before} if layer_type is torch_bn.BatchNorm1d else {"num_batches_tracked"}
    assert changed == (seen_in_training if training else set())


@both
@in_both_modes
def test_saved_tensor_hooks(layer_type: Layer, training: bool) -> None:
    layer, x = make(layer_type, training), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    packed = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.clone())
        return len(packed) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, packed.__getitem__):
        loss = layer(x).pow(3).sum()
    assert packed
    loss.backward()
    for got, expected in zip(gradients(layer, x), want, strict=True):
        assert torch.equal(got, expected)


@both
def test_saved_tensors_on_cpu(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    with torch.autograd.graph.save_on_cpu():
        layer(x).pow(3).sum().backward()
    for got, expected in zip(gradients(layer, x), want, strict=True):
        assert torch.equal(got, expected)


@both
@in_both_modes
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(layer_type: Layer, training: bool, reentrant: bool) -> None:
    layer, x = make(layer_type, training), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
    for got, expected in zip(gradients(layer, x), want, strict=True):
        assert torch.equal(got, expected)
    # The recomputation is a second training forward, in torch as in ours.
    assert layer.num_batches_tracked == (2 if training else 0)


@both
@in_both_modes
def test_retained_graph(layer_type: Layer, training: bool) -> None:
    layer, x = make(layer_type, training), torch.randn(6, 3).double().requires_grad_()
    loss = layer(x).pow(3).sum()
    loss.backward(retain_graph=True)
    once = [each.clone() for each in gradients(layer, x)]
    loss.backward()
    for got, expected in zip(gradients(layer, x), once, strict=True):
        assert torch.equal(got, 2 * expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@both
def test_anomaly_mode_finds_nothing_in_good_data(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            layer(x).pow(3).sum().backward()
    for got, expected in zip(gradients(layer, x), want, strict=True):
        assert torch.equal(got, expected)


@both
def test_anomaly_mode_names_the_node_of_a_nan(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode warns at its start and shows the forward's trace
        with torch.autograd.detect_anomaly():
            y = layer(x)
            with pytest.raises(RuntimeError, match=r"Function '.*BatchNorm.*' returned nan"):
                y.backward(torch.full_like(y, torch.nan))


@both
def test_inference_mode_and_no_grad(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double()
    want = copy.deepcopy(layer)(x)
    for guard in (torch.inference_mode, torch.no_grad):
        again = copy.deepcopy(layer)
        with guard():
            got = again(x)
        assert not got.requires_grad
        assert torch.equal(got, want)
        assert again.num_batches_tracked == 1


@both
def test_gradient_hooks_of_tensors_and_parameters(layer_type: Layer) -> None:
    layer, x = make(layer_type), torch.randn(6, 3).double().requires_grad_()
    want = plain_gradients(layer, x)
    seen = []
    layer.weight.register_hook(lambda gradient: seen.append("weight") or gradient * 2)
    layer.bias.register_post_accumulate_grad_hook(lambda _: seen.append("bias"))
    layer.register_full_backward_hook(lambda *_: seen.append("layer"))
    layer(x).pow(3).sum().backward()
    assert sorted(seen) == ["bias", "layer", "weight"]
    assert torch.equal(layer.weight.grad, 2 * want[1])
    assert torch.equal(x.grad, want[0])


class Blocks(torch.autograd.Function):
    """Hands no gradient on."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, _gradient: Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.BatchNorm1d(3),
        torch_bn.BatchNorm1d(3),
        torch_bn.BatchNormReLU1d(3),
        torch_bn.ReLUBatchNorm1d(3),
        torch_bn.BatchNorm1d(3, virtual_batch_size=2),
    ],
    ids=["torch", "torch_bn", "BatchNormReLU1d", "ReLUBatchNorm1d", "ghost"],
)
def test_no_gradient_goes_in_and_none_comes_out(layer: torch.nn.Module) -> None:
    """None, and not zeros: an optimiser with momentum or weight decay would move by those."""
    x = torch.randn(4, 3, requires_grad=True)
    Blocks.apply(layer(x)).sum().backward()
    assert gradients(layer, x) == [None, None, None]


class LooksOn(TorchDispatchMode):
    """Sees every operator and changes nothing."""

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [nullcontext, LooksOn])
@pytest.mark.parametrize("virtual_batch_size", [None, 2])
def test_statistics_made_in_inference_mode_are_updated(
    mode: Any, virtual_batch_size: int | None
) -> None:
    """They have no version that could be counted, which must not be found out after the update."""
    layer = torch_bn.BatchNorm1d(3, virtual_batch_size=virtual_batch_size)
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        layer.running_mean, layer.running_var = torch.zeros(3), torch.ones(3)
    x = torch.randn(4, 3)
    with mode():
        layer(x)
    twin(x)
    for name, value in twin.named_buffers():
        assert torch.equal(getattr(layer, name), value), name

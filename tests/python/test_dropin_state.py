"""State dicts, copies, files, devices and dtypes of torch_bn.BatchNorm1d.

Torch's own layer runs through the same tests as control.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from dropin import LAYERS, C, assert_same_state, layers, trained
from torch import nn

import torch_bn

# ------------------------------------------------------------------------------------------------
# State: state dicts of both versions, copies, saving and loading
# ------------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("version", [1, None])
def test_state_dict_of_version_1(layer_class: type, version: int | None) -> None:
    state = trained(layer_class).state_dict()
    del state["num_batches_tracked"]
    if version is None:
        del state._metadata
    else:
        state._metadata[""]["version"] = version
    layer = trained(layer_class)
    assert layer.load_state_dict(state) == ([], [])
    assert layer.num_batches_tracked.item() == 1  # what it was
    on_meta = layer_class(C, device="meta")
    on_meta.load_state_dict(state, assign=True)
    assert on_meta.num_batches_tracked.item() == 0


@layers
def test_state_dict_of_version_2_needs_the_counter(layer_class: type) -> None:
    state = trained(layer_class).state_dict()
    del state["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"num_batches_tracked"'):
        layer_class(C).load_state_dict(state)
    assert layer_class(C).load_state_dict(state, strict=False).missing_keys == [
        "num_batches_tracked"
    ]


@pytest.mark.parametrize("source", LAYERS, ids=["from builtin", "from ours"])
@pytest.mark.parametrize("target", LAYERS, ids=["to builtin", "to ours"])
@pytest.mark.parametrize("assign", [True, False])
def test_weights_only_file(source: type, target: type, assign: bool) -> None:
    layer, file = trained(source), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = target(C)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_same_state(other, layer)


@layers
@pytest.mark.parametrize(
    "how",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(whole_file(m), weights_only=False),
        lambda m: load_with_safe_globals(whole_file(m), type(m)),
    ],
    ids=["deepcopy", "copy", "pickle", "torch.save", "weights only"],
)
def test_whole_module_copies(layer_class: type, how: Callable[[nn.Module], nn.Module]) -> None:
    layer = trained(layer_class, momentum=None).eval()
    layer.note = "the user's"
    other = how(layer)
    assert type(other) is layer_class
    assert other.note == "the user's"
    assert not other.training
    assert_same_state(other, layer)
    x = torch.randn(5, C)
    assert torch.equal(other(x), layer(x))


def whole_file(layer: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return file


def load_with_safe_globals(file: io.BytesIO, layer_class: type) -> nn.Module:
    from collections import OrderedDict

    needed = [layer_class, nn.Parameter, OrderedDict, set, torch._utils._rebuild_parameter]
    with torch.serialization.safe_globals(needed):
        return torch.load(file, weights_only=True)


@layers
def test_a_pickle_names_its_own_class(layer_class: type) -> None:
    text = pickle.dumps(layer_class(C))
    assert (b"torch_bn.modules" in text) == (layer_class is torch_bn.BatchNorm1d)


# ------------------------------------------------------------------------------------------------
# Meta, dtypes, swapping
# ------------------------------------------------------------------------------------------------


@layers
def test_meta_to_empty(layer_class: type) -> None:
    with torch.device("meta"):
        layer = layer_class(C)
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, layer_class(C))
    x = torch.randn(5, C)
    assert torch.equal(layer(x), layer_class(C)(x))


@layers
def test_skip_init(layer_class: type) -> None:
    layer = nn.utils.skip_init(layer_class, C, dtype=torch.float64)
    layer.load_state_dict(layer_class(C, dtype=torch.float64).state_dict())
    assert layer(torch.randn(5, C, dtype=torch.float64)).dtype == torch.float64


@layers
@pytest.mark.parametrize("swap", [True, False], ids=["swapped", "in place"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_to_dtype(layer_class: type, swap: bool, dtype: torch.dtype) -> None:
    layer = layer_class(C)
    weight = layer.weight
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        assert layer.to(dtype) is layer
        layer.load_state_dict(layer_class(C, dtype=dtype).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    assert layer.weight is weight
    assert layer.running_mean.dtype == dtype
    assert layer.num_batches_tracked.dtype == torch.long
    layer(torch.randn(5, C, dtype=dtype)).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, torch.ones(C, dtype=dtype))


@layers
def test_to_device(layer_class: type) -> None:
    layer = trained(layer_class).to("meta")
    assert layer(torch.empty(5, C, device="meta")).shape == (5, C)
    assert layer.num_batches_tracked.is_meta
    assert layer.to_empty(device="cpu")(torch.randn(5, C)).device.type == "cpu"


@layers
def test_a_float_layer_takes_16_bit_inputs(layer_class: type) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        assert layer_class(C)(torch.randn(5, C, dtype=dtype)).dtype == dtype

"""The network of the training job: its layers, its initial weights, and the ReLU that is pinned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torch_bn
from mlp.model import PLACEMENTS, PinnedReLU, Trace, build_mlp, generator

BN_LAYERS = (nn.BatchNorm1d, torch_bn.BatchNorm1d)


@pytest.mark.parametrize("layer", BN_LAYERS)
@pytest.mark.parametrize("features", [784, 64])
@pytest.mark.parametrize(
    ("placement", "names"),
    [
        ("none", "flatten dense1 relu1 dense2 relu2 dense3"),
        ("after", "flatten dense1 relu1 bn1 dense2 relu2 bn2 dense3"),
        ("before", "flatten dense1 bn1 relu1 dense2 bn2 relu2 dense3"),
    ],
)
def test_structure(placement: str, names: str, features: int, layer: type[nn.Module]) -> None:
    model = build_mlp(features, placement, layer, seed=0)
    assert [name for name, _ in model.named_children()] == names.split()
    dense = [model.get_submodule(f"dense{i}") for i in (1, 2, 3)]
    assert [(d.in_features, d.out_features) for d in dense] == [
        (features, 300),
        (300, 100),
        (100, 10),
    ]
    hidden_bias = placement != "before"
    assert [d.bias is not None for d in dense] == [hidden_bias, hidden_bias, True]
    if placement != "none":
        assert type(model.bn1) is type(model.bn2) is layer
        assert (model.bn1.num_features, model.bn2.num_features) == (300, 100)
    assert model(torch.zeros(4, features)).shape == (4, 10)


def test_images_are_flattened() -> None:
    model = build_mlp(784, "before", seed=0)
    x = torch.rand(3, 28, 28, generator=generator("x"))
    assert torch.equal(model.eval()(x), model(x.flatten(1)))


def test_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement is 'inside'"):
        build_mlp(4, "inside", seed=0)


def test_same_seed_gives_same_weights_in_every_placement_layer_and_dtype() -> None:
    first = build_mlp(64, "before", nn.BatchNorm1d, seed=7)
    # What else draws from the global generator must not matter.
    torch.rand(5)
    for placement in PLACEMENTS:
        for layer in BN_LAYERS:
            for dtype in (torch.float32, torch.float64):
                other = build_mlp(64, placement, layer, seed=7, dtype=dtype)
                for i in (1, 2, 3):
                    weight = other.get_submodule(f"dense{i}").weight
                    assert weight.dtype == dtype
                    assert torch.equal(first.get_submodule(f"dense{i}").weight.to(dtype), weight)


def test_other_seed_gives_other_weights() -> None:
    # Torch's generator sees 32 bits of a seed: 2**32 must not be 0 again.
    weights = [build_mlp(64, "none", seed=seed).dense1.weight for seed in (0, 1, 2**32)]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_initial_weights_have_the_usual_range() -> None:
    weight = build_mlp(400, "none", seed=0).dense1.weight
    # nn.Linear draws uniformly within 1/sqrt(400); of 120,000 values some come within 1 % of it.
    assert 0.99 / 20 < weight.max() <= 1 / 20
    assert -1 / 20 <= weight.min() < -0.99 / 20


def test_pinned_relu_takes_its_mask_in_training_alone() -> None:
    relu = PinnedReLU()
    x = torch.tensor([-2.0, -1e-9, 0.0, 3.0], requires_grad=True)
    assert torch.equal(relu(x), torch.relu(x))
    relu.mask = torch.tensor([False, True, False, False])
    y = relu(x)
    y.sum().backward()
    assert torch.equal(y, torch.tensor([0.0, -1e-9, 0.0, 0.0]))
    assert torch.equal(x.grad, torch.tensor([0.0, 1.0, 0.0, 0.0]))
    assert torch.equal(relu.eval()(x), torch.relu(x))


@pytest.mark.parametrize("placement", ["before", "after"])
def test_trace_keeps_tensors_and_gradients_and_changes_nothing(placement: str) -> None:
    model = build_mlp(8, placement, torch_bn.BatchNorm1d, seed=0)
    twin = build_mlp(8, placement, torch_bn.BatchNorm1d, seed=0)
    x = torch.rand(6, 8, generator=generator("x"))
    with Trace(model) as trace:
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert trace.names("bn") == ["bn1", "bn2"]
    for name in trace.names("bn"):
        assert trace.input[name].grad.shape == trace.output[name].grad.shape
    assert torch.equal(trace.masks()["relu1"], trace.output["relu1"] > 0)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    before = trace.input["bn1"]
    model(x)
    assert trace.input["bn1"] is before, "the hooks outlived the block"

"""Under torch_bn.lean() outputs are computed again: the same bits, and less memory."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import torch_bn

LAYERS = [torch_bn.BatchNorm1d, torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d]
each = pytest.mark.parametrize("layer_type", LAYERS)


def network(layer_type: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 20), layer_type(20), nn.Linear(20, 20), layer_type(20), nn.Linear(20, 3)
    )


def storages(model: nn.Module, x: Tensor) -> tuple[Tensor, list[StorageWeakRef]]:
    """The loss, and the storages of the outputs of the batch norm layers."""
    seen: list[StorageWeakRef] = []
    hooks = [
        layer.register_forward_hook(
            lambda _module, _args, y: seen.append(StorageWeakRef(y.untyped_storage()))
        )
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm1d)
    ]
    loss = model(x).pow(2).sum()
    for hook in hooks:
        hook.remove()
    return loss, seen


@each
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_and_statistics_have_the_same_bits(
    layer_type: type, tracked: bool, affine: bool
) -> None:
    kept = network(lambda c: layer_type(c, track_running_stats=tracked, affine=affine))
    freed = copy.deepcopy(kept)
    for _ in range(3):
        x = torch.randn(30, 6)
        storages(kept, x)[0].backward()
        with torch_bn.lean():
            loss, _ = storages(freed, x)
        loss.backward()
        for model in (kept, freed):
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
    for a, b in zip(kept.state_dict().values(), freed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(kept.parameters(), freed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@each
def test_outputs_are_freed_before_the_backward(layer_type: type) -> None:
    model, x = network(layer_type), torch.randn(30, 6)
    with torch_bn.lean():
        loss, outputs = storages(model, x)
    assert len(outputs) == 2
    assert all(each.expired() for each in outputs)
    loss.backward()
    _, outputs = storages(model, x)  # and not without
    loss, outputs = storages(model, x)
    assert not any(each.expired() for each in outputs)


@each
def test_evaluation_keeps_outputs(layer_type: type) -> None:
    model, x = network(layer_type).eval(), torch.randn(30, 6)
    with torch_bn.lean():
        loss, outputs = storages(model, x)
    assert not any(each.expired() for each in outputs)
    loss.backward()


def test_one_output_for_two_consumers() -> None:
    layer, heads = torch_bn.BatchNormReLU1d(6), [nn.Linear(6, 2), nn.Linear(6, 3)]
    x = torch.randn(9, 6, requires_grad=True)
    gradients = []
    for lean in (False, True):
        layer.reset_running_stats()
        with torch_bn.lean() if lean else torch.enable_grad():
            y = layer(x)
            loss = sum(head(y).pow(2).sum() for head in heads) + (y * y).sum()
            del y
        gradients.append(
            torch.autograd.grad(loss, [x, *layer.parameters(), *heads[0].parameters()])
        )
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_second_derivatives() -> None:
    model, x = network(torch_bn.BatchNormReLU1d).double(), torch.randn(12, 6, dtype=torch.double)
    x.requires_grad_()
    results = []
    for lean in (False, True):
        with torch_bn.lean() if lean else torch.enable_grad():
            loss = model(x).pow(2).sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), [x, model[0].weight]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_output_changed_in_place_is_kept() -> None:
    layer, linear, x = torch_bn.BatchNorm1d(6), nn.Linear(6, 2), torch.randn(9, 6)
    gradients = []
    for lean in (False, True):
        with torch_bn.lean() if lean else torch.enable_grad():
            loss = linear(layer(x).mul_(2)).pow(2).sum()
        gradients.append(torch.autograd.grad(loss, linear.weight)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("what", ["input", "weight"])
def test_a_change_in_place_before_the_backward_is_refused(what: str) -> None:
    layer, linear = torch_bn.BatchNorm1d(6), nn.Linear(6, 2)
    x = torch.randn(9, 6)
    with torch_bn.lean():
        loss = linear(layer(x)).sum()
    with torch.no_grad():
        (x if what == "input" else layer.weight).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tensor_at_the_address_of_a_freed_output_is_not_taken_for_it() -> None:
    layer, linear = torch_bn.BatchNorm1d(6), nn.Linear(6, 2)
    x = torch.randn(9, 6)
    with torch_bn.lean():
        y = layer(x)
        other = torch.empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())
        del y
        other.copy_(torch.randint(-9, 10, (9, 6)))  # whole numbers: their sums are exact
        loss = linear(other).sum()
    (gradient,) = torch.autograd.grad(loss, linear.weight)
    assert torch.equal(gradient[0], other.sum(0))


def test_other_threads_are_left_alone() -> None:
    model, x = network(torch_bn.BatchNormReLU1d), torch.randn(30, 6)
    expired: list[bool] = []

    def run() -> None:
        _, outputs = loss_and_outputs = storages(model, x)
        expired.extend(each.expired() for each in outputs)
        del loss_and_outputs

    with torch_bn.lean():
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert expired == [False, False]


def test_hooks_are_gone_afterwards() -> None:
    with pytest.raises(ValueError, match="mine"), torch_bn.lean():
        raise ValueError("mine")
    # What torch.compile looks at, to warn of hooks on all modules.
    assert not nn.modules.module._has_any_global_hook()


def test_nested() -> None:
    model, x = network(torch_bn.BatchNormReLU1d), torch.randn(30, 6)
    with torch_bn.lean(), torch_bn.lean():
        loss, outputs = storages(model, x)
    assert all(each.expired() for each in outputs)
    loss.backward()


def test_several_steps_in_one_block_keep_no_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch_bn.BatchNormReLU1d(3), nn.Linear(3, 1))
    inputs: list[StorageWeakRef] = []
    model[1].register_forward_pre_hook(
        lambda _, args: inputs.append(StorageWeakRef(args[0].untyped_storage()))
    )
    with torch_bn.lean():
        for rows in range(8, 16):
            model(torch.randn(rows, 4)).square().mean().backward()
        assert [each.expired() for each in inputs] == [True] * 8

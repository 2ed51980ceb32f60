"""Ghost batch norm under autograd's orders, transforms, compilers and exporters."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_ghost import assert_same_bits, chunks, pair, step
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

import torch_bn

K = 4
# A short last chunk, and a last row that joins the chunk before.
SHAPES = [(10, 3), (9, 3), (6, 2, 3)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
# Sums of a few dozen float64 numbers of the order of 1 to 100, in another order.
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def ghost_norm(x: Tensor, *parameters: Tensor) -> Tensor:
    weight, bias = parameters or (None, None)
    return torch.ops.torch_bn.ghost_batch_norm(
        x, weight, bias, None, None, None, True, 0.1, 1e-5, K
    )


def definition(x: Tensor, *parameters: Tensor) -> Tensor:
    """Batch norm of each chunk, written in operators that every transform knows."""
    outputs = []
    for part in chunks(x, K):
        dims = (0, *range(2, x.dim()))
        centred = part - part.mean(dims, keepdim=True)
        y = centred * (centred.square().mean(dims, keepdim=True) + 1e-5).rsqrt()
        if parameters:
            weight, bias = (p.view(1, -1, *[1] * (x.dim() - 2)) for p in parameters)
            y = y * weight + bias
        outputs.append(y)
    return torch.cat(outputs)


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = (torch.randn(s, dtype=torch.double) for s in (shape, shape[1], shape[1]))
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@shapes
def test_gradients_of_both_orders(shape: tuple[int, ...]) -> None:
    assert gradcheck(
        ghost_norm,
        inputs(shape),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )
    assert gradgradcheck(ghost_norm, inputs(shape), check_batched_grad=True)


@shapes
def test_second_derivatives_of_parts(shape: tuple[int, ...]) -> None:
    # Each of the three gradients alone, and by each of the inputs alone.
    for wanted in range(3):
        for by in range(3):
            tensors = [t.detach() for t in inputs(shape)]
            tensors[wanted].requires_grad_()
            tensors[by].requires_grad_()
            results = []
            for function in (ghost_norm, definition):
                value = function(*tensors).pow(3).sum()
                (first,) = torch.autograd.grad(value, tensors[wanted], create_graph=True)
                results.append(torch.autograd.grad(first.square().sum(), tensors[by]))
            # A few dozen float64 terms of up to 1e5, which may cancel to nothing.
            torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: jacrev(f)(x),
    "jacfwd": lambda f, x: jacfwd(f)(x),
    "hessian": lambda f, x: hessian(lambda x: f(x).sum())(x),
    "jacfwd of jacfwd": lambda f, x: jacfwd(jacfwd(lambda x: f(x).sum()))(x),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x.cos()])),
    "vmap of vmap": lambda f, x: vmap(vmap(f))(torch.stack([x, x.cos(), x.sin()])[:, None]),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(torch.stack([x, x.cos()])),
    "grad of vmap": lambda f, x: grad(lambda x: vmap(f)(x).sum())(torch.stack([x, x.cos()])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@shapes
def test_transform(name: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.double)
    got, want = (TRANSFORMS[name](lambda x, f=f: f(x).pow(3), x) for f in (ghost_norm, definition))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10 * want.abs().max().item())


def test_forward_mode_updates_as_the_ordinary_call() -> None:
    x = torch.randn(10, 3, dtype=torch.double)
    ghost, ordinary = pair(K, 3, dtype=torch.double)
    with forward_ad.dual_level():
        y = ghost(forward_ad.make_dual(x, x.cos()))
        primal, tangent = forward_ad.unpack_dual(y)
    with torch.no_grad():
        want = torch.cat([ordinary(part) for part in chunks(x, K)])
    torch.testing.assert_close(primal, want, **CLOSE)
    for name, buffer in ordinary.named_buffers():
        torch.testing.assert_close(ghost.get_buffer(name), buffer, **CLOSE)
    weight, bias = ghost.weight.detach(), ghost.bias.detach()
    want = jvp(lambda x: definition(x, weight, bias), (x,), (x.cos(),))[1]
    torch.testing.assert_close(tangent, want, **CLOSE)


def test_vmap_over_models() -> None:
    layers = [pair(K, 3)[0] for _ in range(2)]
    with torch.no_grad():
        layers[1].weight.mul_(2)
    parameters, buffers = stack_module_state(layers)
    x = torch.randn(2, 10, 3)
    got = vmap(lambda p, b, x: functional_call(layers[0], (p, b), (x,)))(parameters, buffers, x)
    want = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
    # The channels of the models are those of one call: their sums keep their order.
    assert torch.equal(got, want)
    for name, stacked in buffers.items():
        assert torch.equal(stacked, torch.stack([layer.get_buffer(name) for layer in layers]))


def test_vmap_with_shared_statistics_is_refused_before_anything_changes() -> None:
    ghost, _ = pair(K, 3)
    before = copy.deepcopy(ghost.state_dict())
    with pytest.raises(RuntimeError, match="were not batched"):
        vmap(ghost)(torch.randn(2, 10, 3))
    assert_same_bits(ghost.state_dict(), before)


def test_two_forwards_before_one_backward() -> None:
    ghost, _ = pair(K, 3)
    x = torch.randn(10, 3, requires_grad=True)
    (ghost(x) + ghost(2 * x)).sum().backward()
    version = ghost.running_mean._version
    ghost(x)
    assert ghost.running_mean._version > version
    assert ghost.num_batches_tracked == 9


def test_names_in_the_graph() -> None:
    ghost, _ = pair(K, 3)
    y = ghost(torch.randn(10, 3))
    assert "GhostBatchNorm" in y.grad_fn.name()


# ------------------------------------------------------------------------------------------------
# Compilers
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled(backend: str, momentum: float | None) -> None:
    torch._dynamo.reset()
    ghost, _ = pair(K, 3, momentum=momentum)
    plain = copy.deepcopy(ghost)
    compiled = torch.compile(ghost, fullgraph=True, backend=backend)
    for rows in (10, 12, 9, 8):  # dynamic from the second size on; one of them joins a row
        x, g = torch.randn(rows, 3), torch.randn(rows, 3)
        got, want = step(compiled, x, g), step(plain, x, g)
        assert torch.equal(got["output"], want["output"])
        assert torch.equal(got["grad_input"], want["grad_input"])
        assert_same_bits(dict(ghost.named_buffers()), dict(plain.named_buffers()))
    ghost.eval()
    plain.eval()
    assert torch.equal(compiled(x), plain(x))


def test_compiled_with_a_dynamic_batch_from_the_start() -> None:
    torch._dynamo.reset()
    ghost, _ = pair(K, 3)
    plain = copy.deepcopy(ghost)
    compiled = torch.compile(ghost, fullgraph=True, dynamic=True)
    for rows in (10, 4, 9, 3, 200):
        x = torch.randn(rows, 3)
        assert torch.equal(compiled(x), plain(x))
    assert ghost.num_batches_tracked == plain.num_batches_tracked


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    ghost, _ = pair(K, 3)
    plain = copy.deepcopy(ghost)
    rows = torch.export.Dim("rows", min=2, max=1000)
    program = torch.export.export(
        ghost, (torch.randn(10, 3),), dynamic_shapes=({0: rows},), strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    module = torch.export.load(file).module()
    for count in (10, 9, 23):
        x = torch.randn(count, 3)
        assert torch.equal(module(x), plain(x))
    assert_same_bits(dict(module.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("how", ["script", "trace"])
def test_torchscript(how: str) -> None:
    ghost, _ = pair(K, 3)
    plain = copy.deepcopy(ghost)
    if how == "script":
        scripted = torch.jit.script(ghost)
    else:
        scripted = torch.jit.trace(ghost, (torch.randn(10, 3),))
        plain.load_state_dict(scripted.state_dict())  # tracing has run it
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    reference = copy.deepcopy(plain)
    for rows in (10, 9, 12):
        x, g = torch.randn(rows, 3), torch.randn(rows, 3)
        assert_same_bits(step(scripted, x, g), step(plain, x, g))
        assert torch.equal(loaded(x), reference(x))


def test_fx_records_the_operator() -> None:
    ghost, _ = pair(K, 3)
    plain, x = copy.deepcopy(ghost), torch.randn(10, 3)
    traced = torch.fx.symbolic_trace(torch.nn.Sequential(ghost))
    assert torch.equal(traced(x), plain(x))
    assert ghost.num_batches_tracked == plain.num_batches_tracked == 3


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("rows", [10, 9])  # of 9, the last joins the chunk before
def test_tensor_subclasses_go_through_torch(rows: int) -> None:
    ghost, _ = pair(K, 3)
    reference = torch.nn.BatchNorm1d(3)
    reference.load_state_dict(ghost.state_dict())
    x = torch.randn(rows, 3)
    y = ghost(x.as_subclass(Subclass))
    want = torch.cat([reference(part) for part in chunks(x, K)])
    assert isinstance(y, Subclass)
    assert torch.equal(y.as_subclass(Tensor), want)
    assert_same_bits(dict(ghost.named_buffers()), dict(reference.named_buffers()))


def test_another_device() -> None:
    ghost = torch_bn.BatchNorm1d(3, virtual_batch_size=K, device="meta")
    y = ghost(torch.empty(10, 3, device="meta", requires_grad=True))
    y.sum().backward()
    assert (y.shape, y.stride(), ghost.weight.grad.shape) == ((10, 3), (3, 1), (3,))

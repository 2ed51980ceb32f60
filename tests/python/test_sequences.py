"""Padded sequences by lengths or mask, and channels as the last dimension."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_ghost import assert_same_bits, filled
from torch import Tensor
from torch.autograd.gradcheck import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import torch_bn

N, C, L = 5, 3, 7
LENGTHS = torch.tensor([7, 3, 0, 1, 6])
# As test_layer.py: four roundings of a result to float32.
FLOAT32 = 2.5e-7
either_layout = pytest.mark.parametrize("last", [False, True], ids=["(N, C, L)", "(N, L, C)"])


def make(last: bool = False, **options: Any) -> Any:
    return filled(torch_bn.BatchNorm1d(C, channels_last=last, **options))


def sequences(last: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    n, c, length = shape or (N, C, L)
    return torch.randn((n, length, c) if last else (n, c, length), dtype=dtype) * 2 + 3


def mask_of(lengths: Tensor, length: int = L) -> Tensor:
    return torch.arange(length) < lengths[:, None]


def by_steps(x: Tensor, last: bool) -> Tensor:
    """A view (N, L, C)."""
    return x if last else x.transpose(1, 2)


# ------------------------------------------------------------------------------------------------
# Lengths and masks
# ------------------------------------------------------------------------------------------------


@either_layout
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["lengths", "mask", "holes"])
def test_has_the_bits_of_the_packed_steps(
    last: bool, training: bool, dtype: torch.dtype, how: str
) -> None:
    mask = torch.rand(N, L) < 0.5 if how == "holes" else mask_of(LENGTHS)
    option = {"lengths": LENGTHS} if how == "lengths" else {"mask": mask}
    layer, packed_layer = (make(last, dtype=dtype).train(training) for _ in range(2))
    x, g = sequences(last, dtype=dtype), sequences(last, dtype=dtype)
    # What stands at padded steps has no effect on anything.
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).repeat(N, L).to(dtype)
    for each in (x, g):
        by_steps(each, last)[~mask] = garbage.reshape(-1)[: (~mask).sum(), None]
    x.requires_grad_()
    rows = by_steps(x, last)[mask].detach().requires_grad_()
    y, want = layer(x, **option), packed_layer(rows)
    y.backward(g)
    want.backward(by_steps(g, last)[mask])
    assert (y.shape, y.dtype, y.is_contiguous()) == (x.shape, x.dtype, True)
    for got, packed in ((y, want), (x.grad, rows.grad)):
        assert torch.equal(by_steps(got, last)[mask], packed)
        assert torch.count_nonzero(by_steps(got, last)[~mask]) == 0
    for name in ("weight", "bias"):
        assert torch.equal(layer.get_parameter(name).grad, packed_layer.get_parameter(name).grad)
    assert_same_bits(layer.state_dict(), packed_layer.state_dict())


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint64], ids=str)
def test_lengths_of_every_integer_type(dtype: torch.dtype) -> None:
    x = sequences(False)
    assert torch.equal(make()(x, lengths=LENGTHS.to(dtype)), make()(x, lengths=LENGTHS))
    with pytest.raises(ValueError, match=r"should be in \[0, L\] = \[0, 7\], but got 8"):
        make()(x, lengths=(LENGTHS + 1).to(dtype))


@either_layout
@pytest.mark.parametrize("training", [True, False])
def test_full_lengths_are_the_ordinary_layer(last: bool, training: bool) -> None:
    layer, ordinary = (make(last).train(training) for _ in range(2))
    x = sequences(last)
    got, want = layer(x, lengths=torch.full((N,), L)), ordinary(x)
    scale = want.abs().max()
    assert (got - want).abs().max() <= 2 * FLOAT32 * scale  # each is that near to float64
    # One rounding each.
    torch.testing.assert_close(layer.state_dict(), ordinary.state_dict(), rtol=1.2e-7, atol=1e-7)


def definition(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, last: bool) -> Tensor:
    """With sums over masked products, in operators that every transform knows."""
    x = by_steps(x, last)
    kept = mask.unsqueeze(-1).to(x.dtype)
    count = kept.sum()
    mean = (x * kept).sum((0, 1)) / count
    centred = (x - mean) * kept
    var = centred.square().sum((0, 1)) / count
    y = (centred * (var + 1e-5).rsqrt() * weight + bias) * kept
    return y if last else y.transpose(1, 2)


@either_layout
def test_agrees_with_float64(last: bool) -> None:
    layer = make(last)
    x, g, mask = sequences(last, 40, C, 50), sequences(last, 40, C, 50), torch.rand(40, 50) < 0.7
    x.requires_grad_()
    y = layer(x, mask=mask)
    y.backward(g)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    x64 = x.detach().double().requires_grad_()
    y64 = definition(x64, mask, weight, bias, last)
    y64.backward(g.double())
    invstd = 1 / by_steps(x64, last)[mask].detach().std(0)
    scale = (by_steps(g, last) * invstd * weight).abs().max()
    assert (y.double() - y64).abs().max() <= FLOAT32 * y64.abs().max()
    assert (x.grad.double() - x64.grad).abs().max() <= FLOAT32 * scale


@either_layout
def test_derivatives_of_both_orders(last: bool) -> None:
    layer = make(last, dtype=torch.double, track_running_stats=False)
    x = sequences(last, dtype=torch.double).requires_grad_()
    weight, bias = (p.detach().clone().requires_grad_() for p in layer.parameters())

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,), {"lengths": LENGTHS})

    want = definition(x, mask_of(LENGTHS), weight, bias, last)
    # Sums of 17 float64 numbers below 10, and a few roundings of theirs: 17 * 10 * 1.1e-16, times
    # an invstd and a weight of the order of 1.
    torch.testing.assert_close(function(x, weight, bias), want, rtol=0, atol=1e-12)
    arguments = (x, weight, bias)
    assert gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, arguments)


def test_transforms() -> None:
    layer = make(dtype=torch.double, track_running_stats=False)
    x = sequences(False, dtype=torch.double)
    functions = (
        lambda x: layer(x, lengths=LENGTHS).pow(3),
        lambda x: definition(x, mask_of(LENGTHS), layer.weight, layer.bias, False).pow(3),
    )
    for transform in (
        lambda f: grad(lambda x: f(x).sum())(x),
        lambda f: jvp(f, (x,), (x.cos(),))[1],
        lambda f: vmap(f)(torch.stack([x, x.cos()])),
        lambda f: vmap(grad(lambda x: f(x).sum()))(torch.stack([x, x.cos()])),
    ):
        # The same sums, of terms below 1,000.
        torch.testing.assert_close(*(transform(f) for f in functions), rtol=0, atol=1e-11)


def test_vmap_over_masks_is_refused() -> None:
    layer = make(track_running_stats=False)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(lambda x, mask: layer(x, mask=mask))(
            torch.randn(2, N, C, L), torch.ones(2, N, L, dtype=torch.bool)
        )


@either_layout
@pytest.mark.parametrize("momentum", [0.1, None])
def test_together_with_chunks(last: bool, momentum: float | None) -> None:
    ghost = make(last, momentum=momentum, virtual_batch_size=2)
    ordinary = make(last, momentum=momentum)
    lengths = torch.tensor([7, 3, 4, 0, 1])  # the last sequence's one step joins the chunk before
    x, g = sequences(last).requires_grad_(), sequences(last)
    y = ghost(x, lengths=lengths)
    y.backward(g)
    twin = x.detach().clone().requires_grad_()
    parts = [ordinary(twin[a:b], lengths=lengths[a:b]) for a, b in ((0, 2), (2, 5))]
    torch.cat(parts).backward(g)
    assert torch.equal(y, torch.cat(parts))
    assert torch.equal(x.grad, twin.grad)
    assert_same_bits(dict(ghost.named_buffers()), dict(ordinary.named_buffers()))


@given(
    n=st.integers(1, 6),
    length=st.integers(1, 6),
    k=st.sampled_from([None, 1, 2, 3]),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_mask_is_a_loop_over_packed_chunks(
    n: int, length: int, k: int | None, last: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((n, length, C), generator=generator)
    mask = torch.rand((n, length), generator=generator) < 0.7
    size = n if k is None else k
    rows = [x[i : i + size][mask[i : i + size]] for i in range(0, n, size)]
    if len(rows) > 1 and len(rows[-1]) < 2:
        rows[-2:] = [torch.cat(rows[-2:])]
    layer, ordinary = make(last, virtual_batch_size=k), make()
    given_x = x if last else x.transpose(1, 2)
    if min(len(part) for part in rows) < 2:
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(given_x, mask=mask)
        assert_same_bits(layer.state_dict(), before)
    else:
        got = by_steps(layer(given_x, mask=mask), last)[mask]
        assert torch.equal(got, torch.cat([ordinary(part) for part in rows]))
        assert_same_bits(dict(layer.named_buffers()), dict(ordinary.named_buffers()))


SINGLE = "Expected more than 1 value per channel when training, got input size "
BOOLEAN = torch.ones(N, L, dtype=torch.bool)


@either_layout
@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (
            {"lengths": LENGTHS, "mask": BOOLEAN},
            ValueError,
            "expected lengths or mask, but got both",
        ),
        ({"mask": BOOLEAN[:, 1:]}, ValueError, r"mask should have .* \(5, 7\), but got \(5, 6\)"),
        ({"mask": BOOLEAN[0]}, ValueError, r"mask should have .* \(5, 7\), but got \(7,\)"),
        ({"mask": BOOLEAN.int()}, TypeError, "mask should be a bool tensor, but got torch.int32"),
        ({"mask": [[True]]}, TypeError, "mask should be a bool tensor, but got list"),
        ({"lengths": LENGTHS[1:]}, ValueError, r"lengths should have .* \(5,\), but got \(4,\)"),
        (
            {"lengths": LENGTHS.float()},
            TypeError,
            "should be an integer tensor, but got torch.float",
        ),
        ({"lengths": LENGTHS > 1}, TypeError, "should be an integer tensor, but got torch.bool"),
        ({"lengths": [1, 2, 3, 4, 5]}, TypeError, "should be an integer tensor, but got list"),
        ({"lengths": LENGTHS + 1}, ValueError, r"should be in \[0, L\] = \[0, 7\], but got 8"),
        ({"lengths": LENGTHS - 1}, ValueError, r"should be in \[0, L\] = \[0, 7\], but got -1"),
        ({"lengths": LENGTHS * 0}, ValueError, SINGLE + r"torch.Size\(\[0, 3\]\)"),
        ({"mask": ~BOOLEAN}, ValueError, SINGLE + r"torch.Size\(\[0, 3\]\)"),
        ({"lengths": (LENGTHS == 1).long()}, ValueError, SINGLE + r"torch.Size\(\[1, 3\]\)"),
    ],
)
def test_refusals_leave_the_buffers(
    last: bool, options: dict[str, Any], kind: type, words: str
) -> None:
    layer = make(last)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind, match=words):
        layer(sequences(last), **options)
    assert_same_bits(layer.state_dict(), before)


@either_layout
@pytest.mark.parametrize(
    "options", [{"lengths": LENGTHS}, {"mask": BOOLEAN}], ids=["lengths", "mask"]
)
def test_refused_beside_inputs_of_other_ranks(last: bool, options: dict[str, Any]) -> None:
    for x, words in ((torch.randn(N, C), "expected 3D input with"), (torch.randn(N), "2D or 3D")):
        with pytest.raises(ValueError, match=words):
            make(last)(x, **options)


def test_a_chunk_of_one_step_is_refused_before_another_is_counted() -> None:
    layer = make(virtual_batch_size=2)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=SINGLE + r"torch.Size\(\[1, 3\]\)"):
        layer(sequences(False), lengths=torch.tensor([7, 7, 1, 0, 7]))
    assert_same_bits(layer.state_dict(), before)


@either_layout
def test_nothing_to_normalise_in_evaluation(last: bool) -> None:
    y = make(last).eval()(sequences(last), lengths=LENGTHS * 0)
    assert torch.equal(y, torch.zeros_like(y))


@either_layout
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_with_lengths_in_one_graph(last: bool, backend: str) -> None:
    torch._dynamo.reset()
    layer = make(last)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for rows in (5, 6, 9):
        x, lengths = sequences(last, rows, C, L), torch.randint(2, L + 1, (rows,))
        got, want = (f(x, lengths=lengths) for f in (compiled, plain))
        assert torch.equal(got, want)
        got.sum().backward()
        want.sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    assert_same_bits(layer.state_dict(), plain.state_dict())


def test_refusals_survive_compilation() -> None:
    torch._dynamo.reset()
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    compiled = torch.compile(layer, backend="aot_eager")
    # An assertion of the compiled graph has torch's type, or the refusal is that of the layer.
    for lengths in (LENGTHS + 1, LENGTHS - 1, LENGTHS * 0):
        with pytest.raises(
            (RuntimeError, ValueError), match=r"lengths should be|Expected more than 1"
        ):
            compiled(sequences(False), lengths=lengths)
        assert_same_bits(layer.state_dict(), before)


def test_torchscript_refuses_lengths_and_masks_in_words() -> None:
    scripted = torch.jit.script(make())
    for options in ({"lengths": LENGTHS}, {"mask": BOOLEAN}):
        with pytest.raises(torch.jit.Error, match="lengths and mask are not served in TorchScript"):
            scripted(sequences(False), **options)


def test_fx_traces_a_layer_by_itself_without_lengths() -> None:
    layer = make()
    plain, x = copy.deepcopy(layer), sequences(False)
    assert torch.equal(torch.fx.symbolic_trace(layer)(x), plain(x))


# ------------------------------------------------------------------------------------------------
# Channels last
# ------------------------------------------------------------------------------------------------

VIEWS = {
    "contiguous": lambda n, length, c: torch.randn(n, length, c),
    "channels of more": lambda n, length, c: torch.randn(n, length, 2 * c)[..., 1 : c + 1],
    "transposed": lambda n, length, c: torch.randn(n, c, length).transpose(1, 2),
    "some steps": lambda n, length, c: torch.randn(n, length + 2, c)[:, 1:-1],
    "steps outside": lambda n, length, c: torch.randn(length, n, c).transpose(0, 1),
    "expanded": lambda n, length, c: torch.randn(1, length, c).expand(n, length, c),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [None, 2, 3])
@pytest.mark.parametrize("sizes", [(N, L), (N, 40), (4, 1), (1, L)], ids=str)
def test_channels_last_is_the_transposed_layer(
    view: str, training: bool, k: int | None, sizes: tuple[int, int]
) -> None:
    x, g = VIEWS[view](*sizes, C), torch.randn(*sizes, C)
    layer = make(True, virtual_batch_size=k).train(training)
    ordinary = make(False, virtual_batch_size=k).double().train(training)
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(g)
    x64 = x.detach().double().transpose(1, 2).requires_grad_()
    want = ordinary(x64)
    want.backward(g.double().transpose(1, 2))
    assert (y.shape, y.is_contiguous()) == (x.shape, True)
    scale = want.abs().max()
    assert (y.double() - want.transpose(1, 2)).abs().max() <= FLOAT32 * scale
    # Relative to the largest term, with the largest factor that a chunk has.
    scale = g.abs().max() * max(1, x64.grad.abs().max() / g.abs().max())
    assert (x.grad.double() - x64.grad.transpose(1, 2)).abs().max() <= 4 * FLOAT32 * scale
    for name, buffer in ordinary.named_buffers():
        got = layer.get_buffer(name)
        assert (got.double() - buffer).abs().max() <= 5 * FLOAT32 * buffer.abs().max()


def test_contiguous_channels_last_has_the_bits_of_a_matrix_and_copies_nothing() -> None:
    x, g = sequences(True).requires_grad_(), sequences(True)
    layer, ordinary = make(True), make()
    y = layer(x)
    flat = x.detach().flatten(0, 1).requires_grad_()
    want = ordinary(flat)
    y.backward(g)
    want.backward(g.flatten(0, 1))
    assert torch.equal(y.flatten(0, 1), want)
    assert torch.equal(x.grad.flatten(0, 1), flat.grad)
    assert_same_bits(layer.state_dict(), ordinary.state_dict())
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert any(t.data_ptr() == x.data_ptr() for t in saved)


def test_channels_last_leaves_matrices_alone() -> None:
    x = torch.randn(N, C)
    assert torch.equal(make(True)(x), make(False)(x))


@pytest.mark.parametrize(
    ("x", "kind", "words"),
    [
        (torch.randn(1, 1, C), ValueError, SINGLE + r"torch.Size\(\[1, 1, 3\]\)"),
        (torch.randn(N, L, C + 1), RuntimeError, "running_mean should contain 4 elements not 3"),
        (torch.randn(N, C, L), RuntimeError, "running_mean should contain 7 elements not 3"),
        (torch.randn(N), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        (torch.zeros(N, L, C).int(), NotImplementedError, "not implemented for 'Int'"),
    ],
)
def test_channels_last_refuses_as_the_ordinary_layer(x: Tensor, kind: type, words: str) -> None:
    layer = make(True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(kind, match=words):
        layer(x)
    assert_same_bits(layer.state_dict(), before)


@pytest.mark.parametrize("shape", [(0, L, C), (N, 0, C)], ids=str)
def test_empty_sequences(shape: tuple[int, ...]) -> None:
    for k in (None, 2):
        x = torch.zeros(shape)
        layer, ordinary = make(True, virtual_batch_size=k), make(False, virtual_batch_size=k)
        assert layer(x).shape == shape
        ordinary(x.transpose(1, 2))
        assert_same_bits(layer.state_dict(), ordinary.state_dict())


@pytest.mark.parametrize("k", [None, 2])
def test_channels_last_compiled_exported_and_scripted(k: int | None) -> None:
    torch._dynamo.reset()
    layer = make(True, virtual_batch_size=k)
    plain, other = copy.deepcopy(layer), copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True)
    for rows in (5, 6, 8):
        x = sequences(True, rows, C, L)
        assert torch.equal(compiled(x), plain(x))
    assert_same_bits(layer.state_dict(), plain.state_dict())
    program = torch.export.export(other, (x,))
    assert torch.equal(program.module()(x), copy.deepcopy(other)(x))
    scripted = torch.jit.script(other)
    torch.testing.assert_close(scripted(x), layer(x), rtol=0, atol=1e-6)  # another layout
    assert scripted(x).is_contiguous()


def test_state_of_channels_last() -> None:
    layer = make(True)
    assert repr(layer) == repr(make())[:-1] + ", channels_last=True)"
    assert layer.state_dict().keys() == make().state_dict().keys()
    assert "channels_last" not in make().__dict__
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = sequences(True)
        assert torch.equal(copied(x), copy.deepcopy(layer)(x))
    report: list[str] = []
    assert torch_bn.revert(layer, report=report) is layer
    assert type(layer) is torch_bn.BatchNorm1d
    assert report == [
        "the model itself: torch_bn.BatchNorm1d left alone, it has channels_last=True"
    ]


def test_lazy_layers_learn_the_last_dimension() -> None:
    x, lengths = sequences(True), LENGTHS
    lazy = torch_bn.LazyBatchNorm1d(channels_last=True)
    assert "channels_last=True" in repr(lazy)
    by_position = torch_bn.LazyBatchNorm1d(channels_last=True)
    y = lazy(x, lengths=lengths)
    assert torch.equal(by_position(x, lengths), y)
    assert (type(lazy), lazy.num_features) == (torch_bn.BatchNorm1d, C)
    assert torch.equal(y, torch_bn.BatchNorm1d(C, channels_last=True)(x, lengths=lengths))
    matrix = torch_bn.LazyBatchNorm1d(channels_last=True)
    matrix(torch.randn(N, 9))
    assert matrix.num_features == 9

"""Ghost batch norm: the layer with ``virtual_batch_size`` is a loop over chunks."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_bn

SHAPES = [(12, 5), (14, 3), (13, 3), (257, 70), (12, 5, 6), (13, 3, 40), (1000, 33), (5, 3, 1)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]
# As test_layer.py: four roundings of a result to float32; sums in double, rounded once, and once
# more the running statistics' old value.
FLOAT32 = 2.5e-7
FLOAT32_SUMS = 1.2e-7


def chunks(x: Tensor, k: int) -> list[Tensor]:
    """Those of torch.split, but a last single value per channel joins the chunk before."""
    parts = list(torch.split(x, k))
    if len(parts) > 1 and parts[-1][:, 0].numel() == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def filled(layer: torch.nn.BatchNorm1d) -> torch.nn.BatchNorm1d:
    with torch.no_grad():
        for name, first, last in (
            ("weight", 0.5, 2),
            ("bias", -1, 2),
            ("running_mean", -1, 1),
            ("running_var", 0.5, 2),
        ):
            tensor = getattr(layer, name)
            if tensor is not None:
                tensor.copy_(torch.linspace(first, last, layer.num_features))
    return layer


def step(layer: torch.nn.Module, x: Tensor, g: Tensor, k: int | None = None) -> dict[str, Tensor]:
    """Results of one step of the layer, or of its calls on chunks of k rows."""
    x = x.detach().clone().requires_grad_()
    y = layer(x) if k is None else torch.cat([layer(part) for part in chunks(x, k)])
    y.backward(g)
    return {"output": y.detach(), "grad_input": x.grad, **dict(layer.named_buffers())}


def pair(k: int, channels: int, **options: Any) -> tuple[Any, Any]:
    ghost = filled(torch_bn.BatchNorm1d(channels, virtual_batch_size=k, **options))
    return ghost, filled(torch_bn.BatchNorm1d(channels, **options))


def assert_same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in got:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "parameters"), DTYPES, ids=str)
@pytest.mark.parametrize("k", [2, 4, 13, 1000])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False}],
    ids=str,
)
def test_has_the_bits_of_a_loop_over_chunks(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameters: torch.dtype,
    k: int,
    options: dict[str, Any],
) -> None:
    ghost, ordinary = pair(k, shape[1], dtype=parameters, **options)
    x, g = (torch.randn(shape) * 2 + 3).to(dtype), torch.randn(shape).to(dtype)
    for _ in range(2):
        assert_same_bits(step(ghost, x, g), step(ordinary, x, g, k))


def by_definition(x: Tensor, g: Tensor, layer: Any, k: int) -> dict[str, Tensor]:
    """In float64, of autograd, chunk by chunk, with the builtin."""
    reference = torch.nn.BatchNorm1d(layer.num_features, momentum=layer.momentum).double()
    reference.load_state_dict(layer.state_dict())
    result = step(reference, x.double(), g.double(), k)
    return {
        **result,
        "grad_weight": reference.weight.grad,
        "grad_bias": reference.bias.grad,
    }


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [2, 4, 13])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_agrees_with_float64(shape: tuple[int, ...], k: int, momentum: float | None) -> None:
    ghost, _ = pair(k, shape[1], momentum=momentum)
    x, g = torch.randn(shape) * 2 + 3, torch.randn(shape)
    want = by_definition(x, g, ghost, k)
    got = {**step(ghost, x, g), "grad_weight": ghost.weight.grad, "grad_bias": ghost.bias.grad}
    assert got["num_batches_tracked"] == want["num_batches_tracked"] == len(chunks(x, k))
    dims = (0, *range(2, x.dim()))
    channels = (1, -1, *[1] * (x.dim() - 2))
    weight, bias = (p.detach().double().view(channels) for p in (ghost.weight, ghost.bias))
    invstd = torch.cat(
        [
            (p.var(dims, keepdim=True, correction=0) + ghost.eps).rsqrt().expand_as(p)
            for p in chunks(x.double(), k)
        ]
    )
    normalised = (want["output"] - bias) / weight
    scales = {
        "output": want["output"].abs().max(),
        "grad_input": (weight * invstd * g).abs().max(),
        "grad_weight": (g * normalised).square().sum(dims).sqrt().max(),
        "grad_bias": g.double().square().sum(dims).sqrt().max(),
        "running_mean": want["running_mean"].abs().max(),
        "running_var": want["running_var"].abs().max(),
    }
    for name, scale in scales.items():
        bound = FLOAT32 if name in ("output", "grad_input") else FLOAT32_SUMS
        if name.startswith("running"):
            bound *= len(chunks(x, k))  # each chunk rounds them once
        error = (got[name].double() - want[name].double()).abs().max() / scale
        assert error <= bound, (name, error.item())


def test_gradients_of_parameters_are_rounded_once() -> None:
    # In bfloat16 a sum of rounded sums of 250 chunks would be off by many units in the last place.
    ghost, _ = pair(4, 3, dtype=torch.bfloat16)
    x, g = torch.randn(1000, 3).bfloat16(), torch.randn(1000, 3).bfloat16()
    step(ghost, x, g)
    want = by_definition(x, g, ghost, 4)
    for name, got in (("grad_weight", ghost.weight.grad), ("grad_bias", ghost.bias.grad)):
        assert torch.equal(got, want[name].bfloat16()), name


@pytest.mark.parametrize("training", [True, False])
def test_only_training_is_cut(training: bool) -> None:
    ghost, ordinary = pair(4, 3)
    x = torch.randn(12, 3)
    same = torch.equal(ghost.train(training)(x), ordinary.train(training)(x))
    assert same == (not training)
    assert ghost.num_batches_tracked == (3 if training else 0)


def test_without_running_statistics_evaluation_takes_the_whole_batch() -> None:
    ghost, ordinary = pair(4, 3, track_running_stats=False)
    x = torch.randn(12, 3)
    assert torch.equal(ghost.eval()(x), ordinary.eval()(x))


# The last shape is for so many chunks that threads which share what they should not do meet: the
# others may be over before a second thread has woken up.
@pytest.mark.parametrize(
    "shape", [(40, 7), (4099, 64), (60, 64, 40), (8, 5000), (100_003, 8)], ids=str
)
@pytest.mark.parametrize("k", [3, 16])
@pytest.mark.usefixtures("restored_threads")
def test_same_bits_on_any_number_of_threads(shape: tuple[int, ...], k: int) -> None:
    x, g = torch.randn(shape), torch.randn(shape)
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        ghost, _ = pair(k, shape[1])
        results.append(step(ghost, x, g))
        results[-1]["grad_weight"] = ghost.weight.grad
        results[-1]["grad_bias"] = ghost.bias.grad
    for each in results[1:]:
        assert_same_bits(each, results[0])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.flip(0)[::2],
        lambda x: x[:, ::2],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["channels outside", "every other row", "every other channel", "one row"],
)
@pytest.mark.parametrize("shape", [(24, 6), (24, 6, 5)], ids=str)
def test_any_strides(view: Any, shape: tuple[int, ...]) -> None:
    x, g = view(torch.randn(shape)), view(torch.randn(shape))
    ghost, ordinary = pair(5, x.size(1))
    got, want = step(ghost, x, g), step(ordinary, x, g, 5)
    assert got["output"].is_contiguous()
    assert_same_bits(got, want)


@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 5),
    length=st.sampled_from([None, 1, 2, 7]),
    k=st.integers(1, 45),
    momentum=st.sampled_from([None, 0.0, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_problem_is_that_of_the_loop(
    rows: int, channels: int, length: int | None, k: int, momentum: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, channels) if length is None else (rows, channels, length)
    x, g = (torch.randn(shape, generator=generator) for _ in range(2))
    ghost, ordinary = pair(k, channels, momentum=momentum)
    parts = chunks(x, k)
    if parts[0][:, 0].numel() == 1:
        before = copy.deepcopy(ghost.state_dict())
        words = f"more than 1 value per channel when training, got input size {parts[0].shape}"
        with pytest.raises(ValueError, match=re.escape(words)):
            ghost(x)
        assert_same_bits(ghost.state_dict(), before)
    else:
        assert_same_bits(step(ghost, x, g), step(ordinary, x, g, k))


def test_an_empty_batch_counts_as_one_chunk() -> None:
    ghost, ordinary = pair(4, 3)
    x = torch.zeros(0, 3)
    assert_same_bits(step(ghost, x, x), step(ordinary, x, x))
    x = torch.zeros(8, 3, 0)
    assert_same_bits(step(ghost, x, x), step(ordinary, x, x, 4))


# ------------------------------------------------------------------------------------------------
# Refusals
# ------------------------------------------------------------------------------------------------

SINGLE = r"Expected more than 1 value per channel when training, got input size torch\.Size\(\[1, 3"


@pytest.mark.parametrize(
    ("k", "x", "kind", "words"),
    [
        (1, torch.randn(4, 3), ValueError, SINGLE + r"\]\)"),
        (1, torch.randn(4, 3, 1), ValueError, SINGLE + r", 1\]\)"),
        (4, torch.randn(1, 3), ValueError, SINGLE + r"\]\)"),
        (4, torch.randn(8), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
        (4, torch.randn(8, 5), RuntimeError, "running_mean should contain 5 elements not 3"),
        (4, torch.zeros(8, 3, dtype=torch.int), NotImplementedError, "not implemented for 'Int'"),
    ],
)
def test_refusals_leave_the_buffers(k: int, x: Tensor, kind: type, words: str) -> None:
    ghost, _ = pair(k, 3)
    before = copy.deepcopy(ghost.state_dict())
    with pytest.raises(kind, match=words):
        ghost(x)
    assert_same_bits(ghost.state_dict(), before)


@pytest.mark.parametrize(
    "layer", [lambda **k: torch_bn.BatchNorm1d(3, **k), torch_bn.LazyBatchNorm1d]
)
def test_refusals_of_sizes(layer: Any) -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"should be positive, but got {size}"):
            layer(virtual_batch_size=size)
    for size in (2.0, "2", True):
        with pytest.raises(TypeError, match="should be an integer or None, but got"):
            layer(virtual_batch_size=size)


def test_a_size_set_later_is_checked_by_the_call() -> None:
    ghost, _ = pair(4, 3)
    ghost.virtual_batch_size = 0
    with pytest.raises(ValueError, match="should be positive, but got 0"):
        ghost(torch.randn(8, 3))
    with pytest.raises(ValueError, match="should be positive, but got 0"):
        torch.ops.torch_bn.ghost_batch_norm(
            torch.randn(8, 3), None, None, None, None, None, True, 0.1, 1e-5, 0
        )
    ghost.virtual_batch_size = None
    ghost(torch.randn(8, 3))
    assert ghost.num_batches_tracked == 1


def test_chunks_are_for_training_of_rows_only() -> None:
    ghost, _ = pair(1, 3)
    assert ghost(torch.randn(4, 3, 5)).shape == (4, 3, 5)  # a chunk of one row of several values
    assert ghost.num_batches_tracked == 4


# ------------------------------------------------------------------------------------------------
# State
# ------------------------------------------------------------------------------------------------


def test_state_is_that_of_the_ordinary_layer() -> None:
    ghost, ordinary = pair(4, 3)
    assert ghost.state_dict().keys() == torch.nn.BatchNorm1d(3).state_dict().keys()
    torch.nn.BatchNorm1d(3).load_state_dict(ghost.state_dict())
    assert repr(ghost) == repr(ordinary)[:-1] + ", virtual_batch_size=4)"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_the_option(copied: Any) -> None:
    ghost, _ = pair(4, 3)
    x, g = torch.randn(10, 3), torch.randn(10, 3)
    assert_same_bits(step(copied(ghost), x, g), step(ghost, x, g))


def test_layers_pickled_without_the_option_are_ordinary() -> None:
    # As those of the time before it: an ordinary layer has no attribute of its own.
    loaded = pickle.loads(pickle.dumps(filled(torch_bn.BatchNorm1d(3))))
    assert "virtual_batch_size" not in loaded.__dict__
    assert loaded.virtual_batch_size is None
    converted = torch_bn.convert(filled(torch.nn.BatchNorm1d(3)))
    assert repr(loaded) == repr(converted)
    x, g = torch.randn(10, 3), torch.randn(10, 3)
    assert_same_bits(step(loaded, x, g), step(converted, x, g))


def test_conversions() -> None:
    ghost, _ = pair(4, 3)
    report: list[str] = []
    model = torch.nn.Sequential(ghost, torch_bn.BatchNorm1d(3))
    torch_bn.convert(model)
    torch_bn.revert(model, report=report)
    assert type(ghost) is torch_bn.BatchNorm1d
    assert ghost.virtual_batch_size == 4
    assert type(model[1]) is torch.nn.BatchNorm1d
    assert report[0] == "0: torch_bn.BatchNorm1d left alone, it has virtual_batch_size=4"


def test_lazy() -> None:
    lazy = torch_bn.LazyBatchNorm1d(virtual_batch_size=4)
    assert "virtual_batch_size=4" in repr(lazy)
    x, g = torch.randn(10, 3), torch.randn(10, 3)
    ordinary = torch_bn.BatchNorm1d(3)
    assert_same_bits(step(lazy, x, g), step(ordinary, x, g, 4))
    assert type(lazy) is torch_bn.BatchNorm1d
    assert lazy.virtual_batch_size == 4


class GhostOfEight(torch_bn.BatchNorm1d):
    virtual_batch_size = 8


class EpsByProperty(torch_bn.BatchNorm1d):
    eps = property(lambda self: 0.5, lambda self, value: None)


def test_options_of_subclasses() -> None:
    x, g = torch.randn(20, 3), torch.randn(20, 3)
    by_option = torch_bn.BatchNorm1d(3, virtual_batch_size=8)
    assert_same_bits(step(GhostOfEight(3), x, g), step(by_option, x, g))
    assert torch.equal(EpsByProperty(3)(x), torch_bn.BatchNorm1d(3, eps=0.5)(x))


@pytest.mark.parametrize("fused", [torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d])
@pytest.mark.parametrize("options", [{"virtual_batch_size": 4}, {"channels_last": True}], ids=str)
def test_with_a_relu_it_is_the_two_modules(
    fused: type[torch.nn.Module], options: dict[str, Any]
) -> None:
    one, norm = (filled(cls(5, **options)) for cls in (fused, torch_bn.BatchNorm1d))
    pair = [norm, torch.nn.ReLU()]
    two = torch.nn.Sequential(*(pair if fused is torch_bn.BatchNormReLU1d else pair[::-1]))
    x, g = torch.randn(2, 13, 5, 5)
    results = step(one, x, g), step(two, x, g)
    for got, want in zip(*(result.values() for result in results), strict=True):
        assert torch.equal(got, want)

"""The inputs that torch tests its own BatchNorm1d and F.batch_norm with, run against ours.

They come from torch.testing._internal: module_db's entry for nn.BatchNorm1d and op_db's for
nn.functional.batch_norm, error inputs included. Torch's own runs through the same tests as control.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torch_bn

with warnings.catch_warnings():  # torch's own, raised while its test utilities are imported
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

MODULE = next(info for info in module_db if info.module_cls is torch.nn.BatchNorm1d)
# Two entries, which differ only with cuDNN.
OPERATORS = [info for info in op_db if info.name == "nn.functional.batch_norm"]
OPERATOR = OPERATORS[0]
LAYERS = [torch.nn.BatchNorm1d, torch_bn.BatchNorm1d]
FUNCTIONALS = [F.batch_norm, torch_bn.functional.batch_norm]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ALL_DTYPES = [
    *DTYPES,
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
    *(torch.complex32, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]

layers = pytest.mark.parametrize("layer_class", LAYERS, ids=["builtin", "ours"])
functionals = pytest.mark.parametrize("batch_norm", FUNCTIONALS, ids=["builtin", "ours"])
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


# ------------------------------------------------------------------------------------------------
# The samples: fixed by their place in torch's list, made anew for each test.
# ------------------------------------------------------------------------------------------------


def module_samples(training: bool, dtype: torch.dtype, requires_grad: bool) -> list[Any]:
    torch.manual_seed(0)
    make = MODULE.module_inputs_func
    return make(MODULE, "cpu", dtype, requires_grad=requires_grad, training=training)


def operator_samples(dtype: torch.dtype, requires_grad: bool) -> list[Any]:
    torch.manual_seed(0)
    return list(OPERATOR.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def describe(sample: Any) -> str:
    given = "".join("-" if a is None else "x" for a in sample.args)
    return f"{tuple(sample.input.shape)} {given} {sample.kwargs}"


_MODULE_IDS = [sample.desc for sample in module_samples(True, torch.float32, False)]
_OPERATOR_IDS = [describe(sample) for sample in operator_samples(torch.float32, False)]
module_inputs = pytest.mark.parametrize("index", range(len(_MODULE_IDS)), ids=_MODULE_IDS)
operator_inputs = pytest.mark.parametrize("index", range(len(_OPERATOR_IDS)), ids=_OPERATOR_IDS)


def build(layer_class: type, sample: Any, training: bool, **options: Any) -> torch.nn.Module:
    given = sample.constructor_input
    return layer_class(*given.args, **given.kwargs, **options).train(training)


def only_input(sample: Any) -> Tensor:
    (x,) = sample.forward_input.args
    assert not sample.forward_input.kwargs
    return x


def copied(value: Any, convert: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    if not isinstance(value, Tensor):
        return value
    return convert(value.detach()).requires_grad_(value.requires_grad)


def copied_call(sample: Any, convert: Callable[[Tensor], Tensor] = Tensor.clone) -> list[Any]:
    return [copied(value, convert) for value in (sample.input, *sample.args)]


def assert_close(got: Tensor, want: Tensor, scale: float = 0.0) -> None:
    """Close to a float64 result, for tensors of a few dozen elements.

    Four eps, eight roundings in the dtype of the result, relative to the largest element or to
    `scale`: the builtin's x * a + b makes about as many (mean, invstd, a, two of b, product, sum),
    ours five (distance, scale, shift, product, sum). In 16 bits they are float32's, and one more.
    """
    assert got.shape == want.shape
    if got.numel() == 0:
        return
    largest = max(want.abs().max().item(), scale)
    bound = 4 * torch.finfo(got.dtype).eps * largest
    assert (got.double() - want).abs().max().item() <= bound


def test_the_samples_are_what_this_file_was_written_for() -> None:
    # Another number after an upgrade of torch calls for a look at what is new.
    assert len(_MODULE_IDS) == 8
    assert len(_OPERATOR_IDS) == 12
    assert {info.sample_inputs_func.__name__ for info in OPERATORS} == {"sample_inputs_batch_norm"}
    assert set(OPERATOR.dtypes) == set(DTYPES)
    assert set(MODULE.dtypes) == {torch.float32, torch.float64}
    # torch has none for this operator; the refusals are in test_dropin_errors.py.
    assert all(info.error_inputs_func is None for info in OPERATORS)


# ------------------------------------------------------------------------------------------------
# Forward, first gradients, dtypes
# ------------------------------------------------------------------------------------------------


def gradients(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    seed = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    grads = torch.autograd.grad(output, leaves, seed.to(output.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]


@layers
@modes
@module_inputs
@dtypes
def test_module(layer_class: type, training: bool, index: int, dtype: torch.dtype) -> None:
    sample = module_samples(training, dtype, True)[index]
    layer = build(layer_class, sample, training, dtype=dtype)
    reference = build(torch.nn.BatchNorm1d, sample, training, dtype=torch.float64)
    x, x64 = only_input(sample), copied(only_input(sample), Tensor.double)
    got, want = layer(x), reference(x64)
    assert got.dtype == dtype
    assert_close(got.detach(), want.detach())
    leaves = [x, *layer.parameters()]
    for leaf, g, g64 in zip(
        leaves,
        gradients(got, leaves),
        gradients(want, [x64, *reference.parameters()]),
        strict=True,
    ):
        assert g.dtype == leaf.dtype
        # Sums of up to 81 terms of size one may cancel; evaluation divides by sqrt(1).
        assert_close(g, g64, scale=float(got.shape[0]))
    for name, buffer in layer.named_buffers():
        want_buffer = reference.get_buffer(name)
        if name == "num_batches_tracked":
            assert torch.equal(buffer, want_buffer)
        else:
            assert_close(buffer, want_buffer)


@functionals
@operator_inputs
@dtypes
def test_operator(batch_norm: Callable[..., Tensor], index: int, dtype: torch.dtype) -> None:
    sample = operator_samples(dtype, True)[index]
    values, values64 = copied_call(sample), copied_call(sample, Tensor.double)
    got = batch_norm(*values, **sample.kwargs)
    want = F.batch_norm(*values64, **sample.kwargs)
    assert got.dtype == dtype
    assert_close(got.detach(), want.detach())
    leaves = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    leaves64 = [v for v in values64 if isinstance(v, Tensor) and v.requires_grad]
    for g, g64 in zip(gradients(got, leaves), gradients(want, leaves64), strict=True):
        assert_close(g, g64, scale=largest_term(sample))
    for statistics, statistics64 in zip(values[1:3], values64[1:3], strict=True):
        if statistics is not None:
            # Samples are below 9, and with a negative momentum two variances are subtracted.
            assert_close(statistics, statistics64, scale=81.0)


def largest_term(sample: Any) -> float:
    """A bound on weight * invstd * grad_output, whose sums may cancel; weights are below 9."""
    if sample.input.numel() == 0:
        return 0.0
    x = sample.input.detach().double()
    var = x.var([d for d in range(x.dim()) if d != 1], correction=0)
    if not sample.kwargs.get("training", False):
        var = sample.args[1].double()
    return 9 * float((var.min() + sample.kwargs.get("eps", 1e-5)).rsqrt())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@operator_inputs
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_operator_takes_the_dtypes_that_torch_takes(index: int, dtype: torch.dtype) -> None:
    sample = operator_samples(torch.float32, False)[index]

    def outcome(batch_norm: Callable[..., Tensor]) -> tuple[object, ...]:
        try:
            result = batch_norm(*copied_call(sample, lambda t: t.to(dtype)), **sample.kwargs)
        except (RuntimeError, ValueError) as error:
            return type(error), str(error).splitlines()[0]
        return result.dtype, result.shape

    theirs, ours = (outcome(each) for each in FUNCTIONALS)
    assert ours == theirs
    if dtype in OPERATOR.dtypes:
        assert ours[0] == dtype


# ------------------------------------------------------------------------------------------------
# Derivatives against finite differences, in fast_mode as in torch's own harness
# ------------------------------------------------------------------------------------------------


@layers
@modes
@module_inputs
def test_module_gradcheck(layer_class: type, training: bool, index: int) -> None:
    sample = module_samples(training, torch.float64, True)[index]
    layer = build(layer_class, sample, training, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]
    buffers = {name: b.clone() for name, b in layer.named_buffers()}

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        # Each evaluation starts from the same statistics.
        state = {**dict(zip(names, parameters, strict=True)), **copy.deepcopy(buffers)}
        return torch.func.functional_call(layer, state, (x,))

    inputs = (only_input(sample), *layer.parameters())
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@functionals
@operator_inputs
def test_operator_gradcheck(batch_norm: Callable[..., Tensor], index: int) -> None:
    sample = operator_samples(torch.float64, True)[index]
    mean, var, weight, bias = sample.args
    inputs = [each for each in (sample.input, weight, bias) if each is not None]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return batch_norm(x, copied(mean), copied(var), *parameters, **sample.kwargs)

    assert OPERATOR.supports_forward_ad
    assert OPERATOR.supports_fwgrad_bwgrad
    assert gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, inputs, check_fwd_over_rev=True, fast_mode=True)


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


@layers
@pytest.mark.parametrize("index", range(2), ids=["eps negative", "eps zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_module_error_inputs(layer_class: type, index: int, dtype: torch.dtype) -> None:
    make = MODULE.module_error_inputs_func
    errors = make(MODULE, "cpu", dtype, requires_grad=False, training=True)
    assert len(errors) == 2
    error = errors[index]
    assert error.error_on is ModuleErrorEnum.FORWARD_ERROR
    sample = error.module_error_input
    layer = build(layer_class, sample, training=True, dtype=dtype)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(error.error_type, match=error.error_regex):
        layer(only_input(sample))
    if layer_class is torch_bn.BatchNorm1d:  # torch's own counts the refused call
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


# ------------------------------------------------------------------------------------------------
# Non-contiguous, copy-on-write
# ------------------------------------------------------------------------------------------------


def spread(tensor: Tensor) -> Tensor:
    """The same values with a hole of NaN after each, and with the dimensions stored backwards."""
    order = list(reversed(range(tensor.dim())))
    holes = tensor.permute(order).unsqueeze(-1).repeat_interleave(2, -1).clone()
    holes[..., 1] = float("nan")
    result = holes[..., 0].permute(order)
    assert tensor.numel() < 2 or not result.is_contiguous()
    return result


@layers
@modes
@module_inputs
def test_module_noncontiguous(layer_class: type, training: bool, index: int) -> None:
    sample = module_samples(training, torch.float32, True)[index]
    layer = build(layer_class, sample, training)
    other = copy.deepcopy(layer)
    for tensor in [*other.parameters(), *other.buffers()]:
        if tensor.dim() == 1:
            tensor.data = spread(tensor.data)
            assert not tensor.is_contiguous()
    x = only_input(sample)
    strided = copied(x, spread)
    want, got = layer(x), other(strided)
    # Builtin sums in another order for other strides; see assert_close for the bound.
    assert_close(got.detach(), want.detach().double())
    for g, g0 in zip(
        gradients(got, [strided, *other.parameters()]),
        gradients(want, [x, *layer.parameters()]),
        strict=True,
    ):
        assert_close(g, g0.double(), scale=float(x.shape[0]))
    for name, buffer in other.named_buffers():
        assert torch.allclose(buffer, layer.get_buffer(name), rtol=1e-6)  # a few float32 roundings


@functionals
@operator_inputs
@dtypes
def test_operator_noncontiguous(
    batch_norm: Callable[..., Tensor], index: int, dtype: torch.dtype
) -> None:
    sample = operator_samples(dtype, True)[index]
    values, strided = copied_call(sample), copied_call(sample.noncontiguous())
    want, got = batch_norm(*values, **sample.kwargs), batch_norm(*strided, **sample.kwargs)
    assert_close(got.detach(), want.detach().double())
    for statistics, strided_statistics in zip(values[1:3], strided[1:3], strict=True):
        if statistics is not None:
            assert_close(strided_statistics, statistics.double())


@operator_inputs
def test_operator_does_not_materialise_copies_on_write(index: int) -> None:
    # Reading must not copy; OpInfo allows it for the statistics only, and only those are written.
    sample = operator_samples(torch.float32, False)[index]
    lazy = [v if v is None else torch._lazy_clone(v) for v in (sample.input, *sample.args)]
    torch_bn.functional.batch_norm(*lazy, **sample.kwargs)
    allowed = OPERATOR.allow_cow_input_materialize_forward
    for i, tensor in enumerate(lazy):
        if tensor is not None and tensor.numel() and i not in allowed:
            assert torch._C._is_cow_tensor(tensor), i


# ------------------------------------------------------------------------------------------------
# State and device
# ------------------------------------------------------------------------------------------------


def saved_and_loaded(layer: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    result = copy.deepcopy(layer)
    for tensor in result.state_dict().values():
        tensor.zero_()
    result.load_state_dict(torch.load(file, weights_only=True))
    return result


COPIES: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "state_dict": saved_and_loaded,
}


@layers
@modes
@module_inputs
@pytest.mark.parametrize("how", COPIES)
def test_module_state(layer_class: type, training: bool, index: int, how: str) -> None:
    sample = module_samples(training, torch.float32, False)[index]
    layer = build(layer_class, sample, training)
    layer(only_input(sample))
    other = COPIES[how](layer)
    assert type(other) is layer_class
    assert list(other.state_dict()) == list(layer.state_dict())
    assert torch.equal(other(only_input(sample)), layer(only_input(sample)))
    for name, value in other.state_dict().items():
        assert torch.equal(value, layer.state_dict()[name])


@layers
@modes
@module_inputs
def test_module_on_meta(layer_class: type, training: bool, index: int) -> None:
    if layer_class is torch.nn.BatchNorm1d and training and _MODULE_IDS[index].endswith("average"):
        pytest.skip("momentum None reads the counter's value, which torch's own cannot on meta")
    sample = module_samples(training, torch.float32, True)[index]
    layer = build(layer_class, sample, training, device="meta")
    x = copied(only_input(sample), lambda t: t.to("meta"))
    y = layer(x)
    like = build(layer_class, sample, training)(only_input(sample))
    assert (y.device.type, y.dtype, y.shape) == ("meta", like.dtype, like.shape)
    assert y.stride() == like.stride()
    y.backward(torch.empty_like(y))
    assert x.grad.device.type == "meta"
    assert x.grad.shape == x.shape
    for parameter in layer.parameters():
        assert parameter.grad.shape == parameter.shape


@functionals
@operator_inputs
@dtypes
def test_operator_on_meta(
    batch_norm: Callable[..., Tensor], index: int, dtype: torch.dtype
) -> None:
    sample = operator_samples(dtype, False)[index]
    got = batch_norm(*copied_call(sample, lambda t: t.to("meta")), **sample.kwargs)
    want = batch_norm(*copied_call(sample), **sample.kwargs)
    assert (got.device.type, got.dtype, got.shape) == ("meta", want.dtype, want.shape)
    assert got.stride() == want.stride()

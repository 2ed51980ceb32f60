"""What torch refuses is refused with its exception type and its words, and changes nothing.

Every case is put to torch's own first; a case that it accepts fails the test.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dropin import LAYERS, C
from torch import Tensor

import torch_bn

MODES = [True, False]
PER_CHANNEL = ["running_mean", "running_var", "weight", "bias"]

modes = pytest.mark.parametrize("training", MODES, ids=["training", "evaluation"])


def outcome(call: Callable[[], Tensor]) -> tuple[type, str] | Tensor:
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def in_torchs_name(message: str) -> str:
    """The message without what cannot be the same: the lines after the first, as of a list of
    backends, and the class whose constructor takes the arguments."""
    return message.splitlines()[0].replace("_BatchNorm.__init__", "BatchNorm1d.__init__")


def assert_refused_alike(theirs: object, ours: object) -> None:
    assert isinstance(theirs, tuple), f"torch accepts this and returns {theirs}"
    assert isinstance(ours, tuple), f"torch refuses this: {theirs}"
    assert ours[0] is theirs[0], (ours, theirs)
    assert in_torchs_name(ours[1]) == in_torchs_name(theirs[1])


# ------------------------------------------------------------------------------------------------
# The functional
# ------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "input": torch.linspace(-2, 2, 5 * C).reshape(5, C),
        "running_mean": torch.zeros(C),
        "running_var": torch.ones(C),
        "weight": torch.ones(C),
        "bias": torch.zeros(C),
        **changed,
    }


def refused_by_functional(**changed: Any) -> None:
    theirs = outcome(lambda: F.batch_norm(**arguments(**changed)))
    given = arguments(**changed)
    plain = {k: v for k, v in given.items() if type(v) is Tensor and is_plain(v)}
    before = copy.deepcopy(plain)
    assert_refused_alike(theirs, outcome(lambda: torch_bn.functional.batch_norm(**given)))
    for name, value in plain.items():
        assert torch.equal(value, before[name]), name


def is_plain(tensor: Tensor) -> bool:
    dense = tensor.is_cpu and tensor.layout == torch.strided
    return dense and not tensor.is_quantized and not tensor.requires_grad


@modes
@pytest.mark.parametrize("shape", [(), (C,), (1,), (5, 3), (2, 3, 7), (2, 3, 5, 5)], ids=str)
def test_input_size(training: bool, shape: tuple[int, ...]) -> None:
    refused_by_functional(input=torch.ones(shape), training=training)


@pytest.mark.parametrize("shape", [(1, C), (1, C, 1), (1, C, 1, 1)], ids=str)
def test_one_value_per_channel(shape: tuple[int, ...]) -> None:
    refused_by_functional(input=torch.ones(shape), training=True)


@modes
@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("shape", [(3,), (5,), (2, 3), (), (0,)], ids=str)
def test_size_of_each_argument(training: bool, name: str, shape: tuple[int, ...]) -> None:
    refused_by_functional(training=training, **{name: torch.ones(shape)})


@modes
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("shape", [(2, 2), (1, 4)], ids=str)
def test_rank_of_statistics(training: bool, name: str, shape: tuple[int, ...]) -> None:
    refused_by_functional(training=training, **{name: torch.ones(shape)})


@modes
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_require_grad(training: bool, name: str) -> None:
    refused_by_functional(training=training, **{name: torch.ones(C, requires_grad=True)})


@modes
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_of_two_statistics_missing(training: bool, name: str) -> None:
    refused_by_functional(training=training, **{name: None})


def test_both_statistics_missing_in_evaluation() -> None:
    refused_by_functional(running_mean=None, running_var=None)


@modes
@pytest.mark.parametrize("eps", [-1e-5, -1.0, -1, -0.1234567890123456789, -123456789.0, -1e22])
def test_eps_negative(training: bool, eps: float) -> None:
    refused_by_functional(training=training, eps=eps)


@pytest.mark.parametrize("eps", [0.0, 0, -0.0, False])
def test_eps_zero_in_training(eps: float) -> None:
    refused_by_functional(training=True, eps=eps)


def test_eps_in_the_operators_own_words() -> None:
    # The functional leaves the words to torch; the operator and C++ have their own.
    operator = torch.ops.torch_bn.batch_norm.default
    x = torch.ones(5, C)
    for eps in [0.0, -1e-5, -1e-4, -0.1, -1 / 3, -1.0, -1e15, -1e16, -123456789.0, -5e-324, -1e308]:
        theirs = outcome(lambda e=eps: F.batch_norm(x, None, None, training=True, eps=e))
        ours = outcome(lambda e=eps: operator(x, *[None] * 5, True, 0.1, e))
        assert_refused_alike(theirs, ours)
    assert math.isnan(F.batch_norm(x, None, None, training=True, eps=math.nan)[0, 0])
    assert math.isnan(
        torch_bn.functional.batch_norm(x, None, None, training=True, eps=math.nan)[0, 0]
    )


@modes
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.cfloat], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "with parameters"])
def test_integer_and_complex_input(training: bool, dtype: torch.dtype, alone: bool) -> None:
    if alone and not training:
        statistics = {name: torch.ones(C, dtype=dtype) for name in PER_CHANNEL}
    else:
        statistics = dict.fromkeys(PER_CHANNEL) if alone else {}
    refused_by_functional(input=torch.ones(5, C).to(dtype), training=training, **statistics)


@modes
@pytest.mark.parametrize(
    ("input", "parameters"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float64),
        (torch.float8_e4m3fn, torch.float16),
        (torch.float8_e5m2, torch.float32),
    ],
    ids=str,
)
def test_dtypes_that_do_not_mix(
    training: bool, input: torch.dtype, parameters: torch.dtype
) -> None:
    each = {name: torch.ones(C, dtype=parameters) for name in PER_CHANNEL}
    refused_by_functional(input=torch.ones(5, C).to(input), training=training, **each)


@modes
@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64], ids=str)
def test_dtype_of_each_argument(training: bool, name: str, dtype: torch.dtype) -> None:
    refused_by_functional(training=training, **{name: torch.ones(C, dtype=dtype)})


@modes
@pytest.mark.parametrize("name", PER_CHANNEL)
@pytest.mark.parametrize("value", ["text", [1.0] * C, 1.0, np.ones(C, np.float32)], ids=str)
def test_arguments_that_are_no_tensors(training: bool, name: str, value: object) -> None:
    refused_by_functional(training=training, **{name: value})


@modes
@pytest.mark.parametrize("value", [None, "text", [[1.0] * C] * 5, 1.0], ids=str)
def test_an_input_that_is_no_tensor(training: bool, value: object) -> None:
    refused_by_functional(input=value, training=training)


@modes
@pytest.mark.parametrize(
    "changed",
    [{"momentum": None}, {"momentum": "x"}, {"eps": None}, {"eps": "x"}],
    ids=str,
)
def test_numbers_of_another_type(training: bool, changed: dict[str, object]) -> None:
    refused_by_functional(training=training, **changed)


@pytest.mark.parametrize("training", [0, 1, None, "x"], ids=str)
def test_training_that_is_no_bool(training: object) -> None:
    refused_by_functional(training=training)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # torch's deprecation
@modes
@pytest.mark.parametrize("name", ["input", *PER_CHANNEL])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.to("meta"),
        Tensor.to_sparse,
        pytest.param(Tensor.to_mkldnn, id="mkldnn"),
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    ],
    ids=["meta", "sparse", "mkldnn", "quantized"],
)
def test_another_device_or_layout(
    training: bool, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    refused_by_functional(training=training, **{name: change(arguments()[name])})


# ------------------------------------------------------------------------------------------------
# The layer
# ------------------------------------------------------------------------------------------------

X = torch.linspace(-2, 2, 5 * C).reshape(5, C)


def with_attribute(name: str, value: Any) -> Callable[[type], Tensor]:
    def call(layer_class: type) -> Tensor:
        layer = layer_class(C)
        setattr(layer, name, value)
        return layer(X)

    return call


LAYER_CASES: dict[str, Callable[[type], Any]] = {
    "rank 0": lambda cls: cls(C)(torch.ones(())),
    "rank 1": lambda cls: cls(C)(torch.ones(C)),
    "rank 4": lambda cls: cls(C)(torch.ones(2, C, 3, 3)),
    "rank 4 in evaluation": lambda cls: cls(C).eval()(torch.ones(2, C, 3, 3)),
    "rank of a wrong dtype": lambda cls: cls(C)(torch.ones(C, dtype=torch.long)),
    "channels": lambda cls: cls(C)(torch.ones(5, 3)),
    "channels of (N, C, L)": lambda cls: cls(C)(torch.ones(5, 3, C)),
    "channels in evaluation": lambda cls: cls(C).eval()(torch.ones(5, 3)),
    "channels without statistics": lambda cls: cls(C, track_running_stats=False)(torch.ones(5, 3)),
    "channels, statistics alone": lambda cls: cls(C, affine=False)(torch.ones(5, 3)),
    "one row": lambda cls: cls(C)(torch.ones(1, C)),
    "one row of length one": lambda cls: cls(C)(torch.ones(1, C, 1)),
    "one row, no statistics": lambda cls: cls(C, track_running_stats=False).eval()(
        torch.ones(1, C)
    ),
    "eps zero": lambda cls: cls(C, eps=0.0)(X),
    "eps negative": lambda cls: cls(C, eps=-1e-5)(X),
    "eps negative in evaluation": lambda cls: cls(C, eps=-1.0).eval()(X),
    "eps None": lambda cls: cls(C, eps=None)(X),
    "eps text": lambda cls: cls(C, eps="1e-5")(X),
    "momentum text": lambda cls: cls(C, momentum="x")(X),
    "long": lambda cls: cls(C)(torch.ones(5, C, dtype=torch.long)),
    "long in evaluation": lambda cls: cls(C).eval()(torch.ones(5, C, dtype=torch.long)),
    "complex": lambda cls: cls(C)(torch.ones(5, C, dtype=torch.cfloat)),
    "bool": lambda cls: cls(C)(torch.ones(5, C, dtype=torch.bool)),
    "bool in evaluation": lambda cls: cls(C).eval()(torch.ones(5, C, dtype=torch.bool)),
    "double into float": lambda cls: cls(C)(X.double()),
    "float into double": lambda cls: cls(C).double()(X),
    "float into bfloat16": lambda cls: cls(C).bfloat16()(X),
    "CPU into meta": lambda cls: cls(C, device="meta")(X),
    "CPU into meta in evaluation": lambda cls: cls(C, device="meta").eval()(X),
    "meta into CPU": lambda cls: cls(C)(X.to("meta")),
    "sparse": lambda cls: cls(C)(X.to_sparse()),
    "mkldnn": lambda cls: cls(C)(X.to_mkldnn()),
    "None": lambda cls: cls(C)(None),
    "a list": lambda cls: cls(C)([[1.0] * C] * 5),
    "statistics that require grad": with_attribute("running_mean", torch.zeros(C).requires_grad_()),
    "no running_mean": with_attribute("running_mean", None),
    "no running_var": with_attribute("running_var", None),
    "running_var of two dimensions": with_attribute("running_var", torch.ones(2, 2)),
    "weight of another size": with_attribute("weight", torch.nn.Parameter(torch.ones(3))),
    "bias of another dtype": with_attribute("bias", torch.nn.Parameter(torch.ones(C).double())),
    "counter that is no tensor": lambda cls: with_no_buffer(cls, 5)(X),
    "unknown argument": lambda cls: cls(C, epsilon=1e-5),
    "bias by position": lambda cls: cls(C, 1e-5, 0.1, True, True, None, None, False),
    "negative num_features": lambda cls: cls(-1),
    "num_features of a float": lambda cls: cls(1.5),
    "integer parameters": lambda cls: cls(C, dtype=torch.long),
    "state_dict of another size": lambda cls: cls(C).load_state_dict(cls(3).state_dict()),
    "state_dict without statistics": lambda cls: cls(C).load_state_dict(
        cls(C, track_running_stats=False).state_dict()
    ),
    "state_dict with too much": lambda cls: cls(C, affine=False).load_state_dict(
        cls(C).state_dict()
    ),
    "unset statistics of a reset": lambda cls: with_tracking(cls).reset_running_stats(),
}


def with_no_buffer(layer_class: type, value: object) -> torch.nn.Module:
    layer = layer_class(C)
    del layer.num_batches_tracked
    layer.num_batches_tracked = value
    return layer


def with_tracking(layer_class: type) -> torch.nn.Module:
    layer = layer_class(C, track_running_stats=False)
    layer.track_running_stats = True
    return layer


@pytest.mark.parametrize("name", LAYER_CASES)
def test_layer(name: str) -> None:
    call = LAYER_CASES[name]
    theirs, ours = (outcome(lambda c=cls: call(c)) for cls in LAYERS)
    assert_refused_alike(theirs, ours)


UNCHANGED: dict[str, Tensor] = {
    "rank": torch.ones(C),
    "channels": torch.ones(5, 3),
    "one row": torch.ones(1, C),
    "dtype": torch.ones(5, C, dtype=torch.long),
    "mixed dtype": torch.ones(5, C).double(),
    "meta": torch.ones(5, C, device="meta"),
    "sparse": torch.ones(5, C).to_sparse(),
    "mkldnn": torch.ones(5, C).to_mkldnn(),
}


@modes
@pytest.mark.parametrize("name", UNCHANGED)
@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
def test_a_refused_call_changes_no_buffer(
    training: bool, name: str, momentum: float | None
) -> None:
    if name == "one row" and not training:
        pytest.skip("evaluation takes one row")
    layer = torch_bn.BatchNorm1d(C, momentum=momentum)
    layer(X)
    layer.train(training)
    before = copy.deepcopy(layer.state_dict())
    versions = [buffer._version for buffer in layer.buffers()]
    with pytest.raises((RuntimeError, ValueError)):
        layer(UNCHANGED[name])
    assert [buffer._version for buffer in layer.buffers()] == versions
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_error_of_the_users_hook_is_not_tried_again() -> None:
    # Were torch asked after an error that is no refusal, the statistics would count a batch twice.
    layer = torch_bn.BatchNorm1d(C)
    calls = []

    def pack(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise RuntimeError("from the hook")

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
        pytest.raises(RuntimeError, match="from the hook"),
    ):
        layer(X)
    assert len(calls) == 1
    assert layer.num_batches_tracked.item() == 1


# ------------------------------------------------------------------------------------------------
# What torch accepts though it looks odd
# ------------------------------------------------------------------------------------------------

ACCEPTED: dict[str, dict[str, Any]] = {
    "weight of two dimensions": {"weight": torch.full((2, 2), 2.0)},
    "bias of two dimensions": {"bias": torch.full((1, 4), 2.0)},
    "weight of stride two": {"weight": torch.linspace(0, 1, 2 * C)[::2]},
    "expanded bias": {"bias": torch.full((1,), 0.5).expand(C)},
    "weight alone": {"bias": None},
    "bias alone": {"weight": None},
    "eps of an int": {"eps": 1},
    "eps of a bool": {"eps": True},
    "eps of NumPy": {"eps": np.float32(1e-3)},
    "eps of a tensor": {"eps": torch.tensor(1e-3)},
    "eps infinite": {"eps": math.inf},
    "momentum of an int": {"momentum": 1},
    "momentum of NumPy": {"momentum": np.float64(0.25)},
    "momentum of a tensor": {"momentum": torch.tensor(0.25)},
    "momentum zero": {"momentum": 0.0},
    "momentum negative": {"momentum": -0.5},
    "momentum above one": {"momentum": 2.0},
    "an input that is a parameter": {"input": torch.nn.Parameter(X.clone())},
    "rank 4": {"input": torch.linspace(-1, 1, 2 * C * 9).reshape(2, C, 3, 3)},
    "rank 5": {"input": torch.linspace(-1, 1, 2 * C * 8).reshape(2, C, 2, 2, 2)},
    "no rows": {"input": torch.ones(0, C)},
    "rows of length zero": {"input": torch.ones(3, C, 0)},
    # Of an empty input torch checks no sizes.
    "no channels": {"input": torch.ones(3, 0)},
    "no rows, other channels": {"input": torch.ones(0, 3)},
}


@modes
@pytest.mark.parametrize("name", ACCEPTED)
def test_odd_but_accepted(training: bool, name: str) -> None:
    theirs, ours = (copy.deepcopy(arguments(**ACCEPTED[name])) for _ in range(2))
    want = F.batch_norm(**theirs, training=training)
    got = torch_bn.functional.batch_norm(**ours, training=training)
    # The builtin's x * a + b makes seven float32 roundings, 6e-8 each of values near one.
    assert torch.allclose(got, want, rtol=1e-6, atol=5e-7, equal_nan=True)
    assert got.shape == want.shape
    for statistics in ("running_mean", "running_var"):
        assert torch.allclose(ours[statistics], theirs[statistics], rtol=1e-6, atol=5e-7)


def test_no_statistics_in_evaluation_of_an_empty_input() -> None:
    x = torch.ones(0, C)
    assert F.batch_norm(x, None, None).shape == torch_bn.functional.batch_norm(x, None, None).shape


def test_a_layer_without_channels() -> None:
    # Torch's own fails by accident, on its way to multiply an empty input by weight[0].
    with pytest.raises(IndexError):
        torch.nn.BatchNorm1d(0)(torch.ones(3, 0))
    assert torch_bn.BatchNorm1d(0)(torch.ones(3, 0)).shape == (3, 0)

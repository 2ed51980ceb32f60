"""torch_bn.BatchNorm1d in the place of torch.nn.BatchNorm1d: construction, life as a module.

Torch's own layer runs through the same tests as control.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dropin import FLOAT64, LAYERS, C, assert_same_state, layers, trained
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torch_bn

LAZY_LAYERS = [nn.LazyBatchNorm1d, torch_bn.LazyBatchNorm1d]

lazy_layers = pytest.mark.parametrize("layer_class", LAZY_LAYERS, ids=["builtin", "ours"])


def assert_twins(change: Callable[[nn.Module], Any], rounds: int = 2, **options: Any) -> None:
    """Torch's layer and ours, changed alike, give alike outputs, gradients and statistics."""
    pair = [cls(C, dtype=torch.float64, **options) for cls in LAYERS]
    for layer in pair:
        change(layer)
    for _ in range(rounds):
        x = torch.randn(6, C, dtype=torch.float64)
        inputs = [x.clone().requires_grad_() for _ in pair]
        outputs = [layer(each) for layer, each in zip(pair, inputs, strict=True)]
        assert torch.allclose(*outputs, **FLOAT64)
        for y in outputs:
            y.pow(3).sum().backward()
        assert torch.allclose(*(each.grad for each in inputs), **FLOAT64)
    assert_same_state(*pair)


# ------------------------------------------------------------------------------------------------
# Construction
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [LAYERS[::-1], LAZY_LAYERS[::-1]])
def test_signature(ours: type, theirs: type) -> None:
    own = ["virtual_batch_size", "channels_last"]
    parameters = list(inspect.signature(ours).parameters.items())
    # Types are stated where torch's layer states none.
    assert [(name, each.kind, each.default) for name, each in parameters[: -len(own)]] == [
        (name, each.kind, each.default)
        for name, each in inspect.signature(theirs).parameters.items()
    ]
    assert [name for name, _ in parameters[-len(own) :]] == own
    assert all(each.kind is each.KEYWORD_ONLY for _, each in parameters[-len(own) :])
    assert ours._version == theirs._version == 2
    assert ours.__constants__ == [*theirs.__constants__, *own]
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__


OPTIONS = [
    dict(zip(("affine", "bias", "track_running_stats", "momentum"), values, strict=True))
    for values in itertools.product([True, False], [True, False], [True, False], [0.25, None])
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_every_combination_of_arguments(options: dict[str, Any], dtype: torch.dtype | None) -> None:
    theirs, ours = (cls(C, 1e-3, dtype=dtype, **options) for cls in LAYERS)
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert_same_state(ours, theirs)
    assert {k for k in vars(ours) if k[0] != "_"} == {k for k in vars(theirs) if k[0] != "_"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_every_combination_computes_the_same(options: dict[str, Any], training: bool) -> None:
    def change(layer: nn.Module) -> None:
        layer(torch.linspace(-1, 1, 5 * C, dtype=torch.float64).reshape(5, C))
        layer.train(training)

    assert_twins(change, **options)


@pytest.mark.parametrize("momentum", [0.0, -0.5, 1.0, 1.5, 1])
def test_unusual_momentum(momentum: float) -> None:
    assert_twins(lambda layer: None, momentum=momentum)


@layers
def test_resets(layer_class: type) -> None:
    layer = layer_class(C)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(3)
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean, torch.zeros(C))
    assert torch.equal(layer.running_var, torch.ones(C))
    assert layer.num_batches_tracked.item() == 0
    assert torch.equal(layer.weight, torch.full((C,), 3.0))
    layer.reset_parameters()
    assert torch.equal(layer.weight, torch.ones(C))
    assert torch.equal(layer.bias, torch.zeros(C))


# ------------------------------------------------------------------------------------------------
# Attributes changed after construction
# ------------------------------------------------------------------------------------------------


def no_running_statistics(layer: nn.Module) -> None:
    layer.running_mean = layer.running_var = None


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "momentum": lambda m: setattr(m, "momentum", 0.5),
    "momentum None": lambda m: setattr(m, "momentum", None),
    "eps": lambda m: setattr(m, "eps", 0.5),
    "eps of an int": lambda m: setattr(m, "eps", 1),
    "no more tracking": lambda m: setattr(m, "track_running_stats", False),
    "no more tracking, evaluation": lambda m: setattr(m.eval(), "track_running_stats", False),
    "no statistics": no_running_statistics,
    "no statistics, evaluation": lambda m: no_running_statistics(m.eval()),
    "no counter": lambda m: setattr(m, "num_batches_tracked", None),
    "no counter, momentum None": lambda m: (
        setattr(m, "num_batches_tracked", None),
        setattr(m, "momentum", None),
    ),
    "no weight": lambda m: setattr(m, "weight", None),
    "no bias": lambda m: setattr(m, "bias", None),
    "frozen weight": lambda m: m.weight.requires_grad_(False),
    "training of an int": lambda m: setattr(m, "training", 1),
    "num_features": lambda m: setattr(m, "num_features", 17),
    "affine": lambda m: setattr(m, "affine", False),
    "new statistics": lambda m: setattr(m, "running_var", torch.full((C,), 2.0).double()),
    "statistics of stride two": lambda m: setattr(
        m, "running_mean", torch.ones(2 * C, dtype=torch.float64)[::2]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_attributes_changed_after_construction(name: str) -> None:
    assert_twins(CHANGES[name])


def test_training_of_an_int_through_torchs_own() -> None:
    def change(layer: nn.Module) -> None:
        layer.training = 1
        layer.num_batches_tracked = torch.tensor(0, dtype=torch.int32)  # not for our operator

    assert_twins(change)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=str)
def test_parameters_of_another_shape(options: dict[str, int]) -> None:
    # Torch's own refuses them, but in its backward only; ours gives gradients of that shape.
    layer, plain = torch_bn.BatchNorm1d(C, **options), torch_bn.BatchNorm1d(C, **options)
    layer.weight = nn.Parameter(torch.ones(2, 2))
    layer.bias = nn.Parameter(torch.zeros(C, 1))
    x = torch.randn(5, C)
    for each in (layer, plain):
        each(x).pow(3).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad.reshape(2, 2))
    assert torch.equal(layer.bias.grad, plain.bias.grad.reshape(C, 1))


@pytest.mark.parametrize("momentum", [0.25, None])
@pytest.mark.parametrize(
    "counter",
    [
        torch.tensor(3, dtype=torch.int32),
        torch.tensor([3]),
        torch.tensor([[3]]),
        torch.tensor(3.0),
        torch.tensor(3, dtype=torch.uint8),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_counters_of_another_type(counter: Tensor, momentum: float | None) -> None:
    # Served by torch's own: our operator takes a counter of torch's usual type alone.
    def change(layer: nn.Module) -> None:
        layer.num_batches_tracked = counter.clone()

    assert_twins(change, momentum=momentum)


# ------------------------------------------------------------------------------------------------
# Hooks and parametrisation
# ------------------------------------------------------------------------------------------------


@layers
def test_hooks(layer_class: type) -> None:
    layer, seen = layer_class(C), []
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, output: output + 1)
    layer.register_full_backward_pre_hook(lambda m, grads: seen.append(("pre", grads[0].shape)))
    layer.register_full_backward_hook(
        lambda m, grad_in, grad_out: seen.append(("post", grad_in[0].shape))
    )
    x = torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    y = layer.double()(x)
    plain = nn.BatchNorm1d(C).double()
    assert torch.allclose(y, plain(2 * x) + 1, **FLOAT64)
    y.sum().backward()
    assert seen == [("pre", (5, C)), ("post", (5, C))]


class Counted(nn.Module):
    """Doubles, and counts how often it is asked, as a spectral norm's power iteration would."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


@layers
def test_parametrised_weight(layer_class: type) -> None:
    layer = layer_class(C).double()
    parametrize.register_parametrization(layer, "weight", Counted())
    counted = layer.parametrizations.weight[0]
    calls = counted.calls.item()
    x = torch.randn(5, C, dtype=torch.float64)
    y = layer(x)
    assert counted.calls.item() == calls + 1
    assert torch.allclose(y, 2 * nn.BatchNorm1d(C).double()(x), **FLOAT64)
    y.pow(3).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer(x[0])
    assert counted.calls.item() == calls + 1  # a refused call changes no buffer
    with parametrize.cached():
        layer(x)
        layer(x)
    assert counted.calls.item() == calls + 2
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is layer_class


# ------------------------------------------------------------------------------------------------
# Lazy
# ------------------------------------------------------------------------------------------------


@lazy_layers
@pytest.mark.parametrize("shape", [(8, 3), (2, 3, 5)], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"affine": False}, {"bias": False}, {"track_running_stats": False}, {"momentum": None}],
    ids=str,
)
def test_lazy(layer_class: type, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    becomes = LAYERS[LAZY_LAYERS.index(layer_class)]
    layer = layer_class(dtype=torch.float64, **options)
    assert layer.has_uninitialized_params() == (options.get("affine", True) or len(options) == 1)
    x = torch.randn(shape, dtype=torch.float64)
    y = layer(x)
    assert type(layer) is becomes
    plain = becomes(3, dtype=torch.float64, **options)
    assert repr(layer) == repr(plain)
    assert torch.equal(y, plain(x))  # the first call too is the class's own arithmetic
    assert_same_state(layer, plain)


def test_the_first_call_of_a_lazy_layer_is_ours() -> None:
    x = torch.randn(64, 3) + 1e4  # where the builtin loses its digits
    first = torch_bn.LazyBatchNorm1d()(x)
    assert torch.equal(first, torch_bn.BatchNorm1d(3)(x))
    assert not torch.equal(first, nn.LazyBatchNorm1d()(x))


@lazy_layers
def test_lazy_state(layer_class: type) -> None:
    layer = layer_class(momentum=0.5)
    # torch refuses to deepcopy uninitialised parameters
    copies = [pickle.loads(pickle.dumps(layer)), layer_class(momentum=0.5)]
    state = trained(LAYERS[LAZY_LAYERS.index(layer_class)]).state_dict()
    for each in copies:
        each.load_state_dict(state)
        assert not each.has_uninitialized_params()
        each.eval()(torch.randn(5, C))
        assert type(each) is LAYERS[LAZY_LAYERS.index(layer_class)]
        assert torch.equal(each.running_var, state["running_var"])
    assert layer.has_uninitialized_params()


@lazy_layers
def test_lazy_refusals(layer_class: type) -> None:
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        layer_class()(torch.randn(2, 3, 4, 5))
    with pytest.raises(ValueError, match="uninitialized parameter"):
        layer_class().forward(torch.randn(2, 3))


# ------------------------------------------------------------------------------------------------
# Tools of torch that look for its class
# ------------------------------------------------------------------------------------------------


@layers
def test_update_bn(layer_class: type) -> None:
    model = nn.Sequential(layer_class(C, dtype=torch.float64)).eval()
    batches = list(torch.randn(3, 6, C, dtype=torch.float64))
    torch.optim.swa_utils.update_bn(batches, model)
    assert torch.allclose(model[0].running_mean, torch.cat(batches).mean(0), **FLOAT64)
    assert model[0].momentum == 0.1
    assert not model.training
    assert model[0].num_batches_tracked.item() == 3


@layers
def test_replace_all_batch_norm_modules(layer_class: type) -> None:
    model = torch.func.replace_all_batch_norm_modules_(nn.Sequential(layer_class(C)))
    assert model[0].running_mean is None
    assert model[0].num_batches_tracked is None
    x = torch.randn(5, C)
    want = torch_bn.functional.batch_norm(x, None, None, training=True)
    assert torch.allclose(model.eval()(x), want, atol=1e-6)  # float32


@layers
def test_fuse_linear_bn_eval(layer_class: type) -> None:
    linear, norm = nn.Linear(3, C).double().eval(), trained(layer_class).double().eval()
    fused = nn.utils.fuse_linear_bn_eval(linear, norm)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.allclose(fused(x), norm(linear(x)), **FLOAT64)


@layers
def test_fsdp_and_sync_batch_norm_see_it(layer_class: type) -> None:
    from torch.distributed.fsdp import MixedPrecision

    # FSDP keeps these in full precision.
    assert isinstance(layer_class(C), tuple(MixedPrecision()._module_classes_to_ignore))
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer_class(C)))
    assert type(model[0]) is nn.SyncBatchNorm


@layers
def test_functional_call(layer_class: type) -> None:
    layer = layer_class(C, dtype=torch.float64)
    before = copy.deepcopy(layer.state_dict())
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    state["weight"] = torch.full((C,), 3.0, dtype=torch.float64)
    x = torch.randn(5, C, dtype=torch.float64)
    y = torch.func.functional_call(layer, state, (x,))
    assert torch.allclose(y, 3 * nn.BatchNorm1d(C).double()(x), **FLOAT64)
    assert state["num_batches_tracked"].item() == 1
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


# ------------------------------------------------------------------------------------------------
# FX
# ------------------------------------------------------------------------------------------------


class LeafTracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm1d) or super().is_leaf_module(m, qualified_name)


@layers
def test_fx_as_a_leaf(layer_class: type) -> None:
    model = nn.Sequential(nn.Linear(3, C), layer_class(C))
    traced = torch.fx.GraphModule(model, LeafTracer().trace(model))
    assert [n.op for n in traced.graph.nodes].count("call_module") == 2
    assert type(traced.get_submodule("1")) is layer_class


@pytest.mark.parametrize("training", [True, False])
def test_fx_traced_to_our_operator(training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, C), torch_bn.BatchNorm1d(C)).train(training)
    twin = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    targets = [node.target for node in traced.graph.nodes]
    assert torch.ops.torch_bn.batch_norm.default in targets
    for x in torch.randn(2, 5, 3):
        assert torch.equal(traced(x), twin(x))
    assert_same_state(model, twin)


def test_fx_traces_the_functional() -> None:
    def call(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return torch_bn.functional.batch_norm(x, mean, var, training=True)

    traced = torch.fx.symbolic_trace(call)
    x, state = torch.randn(5, C), [torch.zeros(C), torch.ones(C)]
    other = copy.deepcopy(state)
    assert torch.equal(traced(x, *state), call(x, *other))
    assert torch.equal(state[0], other[0])
    assert torch.ops.torch_bn.batch_norm.default in [n.target for n in traced.graph.nodes]


# ------------------------------------------------------------------------------------------------
# The cumulative average, compiled and exported; torch's own reads its counter and fails there
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_momentum_none_compiles_into_one_graph(backend: str) -> None:
    layer, eager = (torch_bn.BatchNorm1d(C, momentum=None) for _ in range(2))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for x in torch.randn(3, 6, C):
        assert torch.equal(compiled(x), eager(x))
    assert layer.num_batches_tracked.item() == 3
    assert torch.equal(layer.running_var, eager.running_var)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_momentum_none_is_exported(strict: bool) -> None:
    layer = torch_bn.BatchNorm1d(C, momentum=None)
    x = torch.randn(6, C)
    exported = torch.export.export(copy.deepcopy(layer), (x,), strict=strict).module()
    for each in torch.randn(3, 6, C):
        assert torch.equal(exported(each), layer(each))
    assert exported.num_batches_tracked.item() == 3
    assert torch.equal(exported.running_mean, layer.running_mean)

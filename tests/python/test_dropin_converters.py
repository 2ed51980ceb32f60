"""convert and revert: layers change their class and nothing else."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torch_bn

C = 4


class ClampedNorm(nn.BatchNorm1d):
    """A user's subclass, with its own forward on top of torch's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.5, 0.5)


class AnyRankNorm(nn.BatchNorm1d):
    """The usual way to let batch norm take inputs of more dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class LazyClampedNorm(nn.LazyBatchNorm1d):
    cls_to_become = ClampedNorm


class OursWithLabel(torch_bn.BatchNorm1d):
    label = "mine"


class OursClamped(torch_bn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.5, 0.5)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def nested() -> nn.Sequential:
    shared = nn.BatchNorm1d(C, momentum=None)
    return nn.Sequential(
        Block(nn.BatchNorm1d(C, eps=1e-3)),
        nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.LazyBatchNorm1d()])}),
        nn.BatchNorm1d(C, affine=False),
        nn.BatchNorm1d(C, track_running_stats=False, dtype=torch.float64),
    )


def norms(model: nn.Module) -> list[type]:
    base = (nn.modules.batchnorm._NormBase,)
    return [type(module) for module in model.modules() if isinstance(module, base)]


OURS = [torch_bn.BatchNorm1d] * 2 + [torch_bn.LazyBatchNorm1d] + [torch_bn.BatchNorm1d] * 2
TORCHS = [nn.BatchNorm1d] * 2 + [nn.LazyBatchNorm1d] + [nn.BatchNorm1d] * 2


# ------------------------------------------------------------------------------------------------
# What is converted
# ------------------------------------------------------------------------------------------------


def test_a_nested_model_and_back() -> None:
    model = nested()
    before = list(model.modules())
    assert torch_bn.convert(model) is model
    assert norms(model) == OURS
    assert torch_bn.revert(model) is model
    assert norms(model) == TORCHS
    # The very same objects: a shared layer is shared as before, and lists outside still hold.
    assert all(a is b for a, b in zip(model.modules(), before, strict=True))
    assert model[1]["a"] is model[1]["b"][0]


def test_twice_is_once() -> None:
    report: list[str] = []
    model = torch_bn.convert(torch_bn.convert(nested()), report=report)
    assert norms(model) == OURS
    assert report == []
    torch_bn.revert(torch_bn.revert(model), report=report)
    assert norms(model) == TORCHS
    assert report == []


@pytest.mark.parametrize("change", [torch_bn.convert, torch_bn.revert])
def test_a_model_without_such_layers(change: Callable[..., nn.Module]) -> None:
    model, report = nn.Sequential(nn.Linear(2, 2)), []
    assert change(model, report=report) is model
    assert report == []


def test_the_model_itself() -> None:
    layer, report = nn.BatchNorm1d(C), []
    assert torch_bn.convert(layer, report=report) is layer
    assert type(layer) is torch_bn.BatchNorm1d
    assert torch_bn.revert(layer, report=report) is layer
    assert type(layer) is nn.BatchNorm1d
    assert report == [
        "the model itself: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
        "the model itself: torch_bn.BatchNorm1d -> torch.nn.BatchNorm1d",
    ]


def test_the_report_names_every_place() -> None:
    report: list[str] = []
    model = torch_bn.convert(nested(), report=report)
    assert report == [
        "0.norm: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
        "1.a, 1.b.0: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
        "1.b.1: torch.nn.LazyBatchNorm1d -> torch_bn.LazyBatchNorm1d",
        "2: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
        "3: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
    ]
    backwards: list[str] = []
    torch_bn.revert(model, report=backwards)
    assert len(backwards) == 5
    assert backwards[1] == "1.a, 1.b.0: torch_bn.BatchNorm1d -> torch.nn.BatchNorm1d"


@pytest.mark.parametrize("change", [torch_bn.convert, torch_bn.revert])
@pytest.mark.parametrize("subclasses", [True, False])
@pytest.mark.parametrize(
    "layer_class",
    [
        *(nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d),
        *(nn.LazyBatchNorm2d, nn.LazyBatchNorm3d),
    ],
)
def test_other_layers_are_left_alone(
    change: Callable[..., nn.Module], subclasses: bool, layer_class: type
) -> None:
    layer = layer_class() if "Lazy" in layer_class.__name__ else layer_class(C)
    report: list[str] = []
    change(nn.Sequential(layer), subclasses=subclasses, report=report)
    assert type(layer) is layer_class
    assert report == []


def test_a_cycle_in_the_model_ends() -> None:
    model = Block(nn.BatchNorm1d(C))
    model.norm.owner = model
    report: list[str] = []
    torch_bn.convert(model, report=report)
    assert type(model.norm) is torch_bn.BatchNorm1d
    assert report == ["norm: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d"]


# ------------------------------------------------------------------------------------------------
# What is kept
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"device": "meta"},
        {"momentum": None, "eps": 0.25},
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_state_and_attributes(options: dict[str, Any], training: bool) -> None:
    layer = nn.BatchNorm1d(C, **options).train(training)
    layer.note = ["the user's"]
    layer.requires_grad_(False)
    text, tensors = repr(layer), layer.state_dict(keep_vars=True)
    kept = copy.copy(layer.__dict__)
    for change in (torch_bn.convert, torch_bn.revert):
        change(layer)
        assert layer.__dict__.keys() == kept.keys()
        assert all(layer.__dict__[name] is value for name, value in kept.items())
        after = layer.state_dict(keep_vars=True)
        assert list(after) == list(tensors)
        assert after._metadata == tensors._metadata
        assert all(after[name] is tensor for name, tensor in tensors.items())
        assert repr(layer) == text


def test_round_trip_of_state_dicts() -> None:
    model = nested()
    model[1]["b"][1](torch.randn(5, C))
    before = copy.deepcopy(model.state_dict())
    torch_bn.convert(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.load_state_dict(before)
    for _ in range(2):
        model[0](torch.randn(6, C))
    trained = copy.deepcopy(model.state_dict())
    plain = torch_bn.revert(model)
    assert list(plain.state_dict()) == list(before)
    assert all(torch.equal(v, trained[k]) for k, v in plain.state_dict().items())
    fresh = nested()
    fresh[1]["b"][1](torch.randn(5, C))
    fresh.load_state_dict(trained)


def test_an_optimizer_goes_on_working() -> None:
    model = Block(nn.BatchNorm1d(C))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(8, C)).pow(3).sum().backward()
        optimizer.step()

    step()
    torch_bn.convert(model)
    weight = model.norm.weight.detach().clone()
    step()
    assert not torch.equal(model.norm.weight, weight)
    assert model.norm.weight in optimizer.state


def test_hooks_of_every_kind() -> None:
    layer, calls = nn.BatchNorm1d(C), []

    def note(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: calls.append(name)

    layer.register_forward_pre_hook(note("forward_pre"))
    layer.register_forward_pre_hook(note("forward_pre_kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("forward"))
    layer.register_forward_hook(note("forward_kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("forward_always"), always_call=True)
    layer.register_full_backward_pre_hook(note("backward_pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.register_state_dict_pre_hook(note("state_dict_pre"))
    layer.register_state_dict_post_hook(note("state_dict_post"))
    layer.register_load_state_dict_pre_hook(note("load_pre"))
    layer.register_load_state_dict_post_hook(note("load_post"))
    layer.weight.register_hook(note("gradient"))

    def run() -> list[str]:
        calls.clear()
        layer(torch.randn(5, C, requires_grad=True)).sum().backward()
        layer.load_state_dict(layer.state_dict())
        return list(calls)

    want = run()
    assert len(want) == 12
    for change in (torch_bn.convert, torch_bn.revert):
        change(layer)
        assert sorted(run()) == sorted(want)


def test_a_converted_model_computes_the_same() -> None:
    model = Block(nn.BatchNorm1d(C)).double()
    converted = torch_bn.convert(copy.deepcopy(model))
    for x in torch.randn(3, 6, C, dtype=torch.float64):
        # Float64 sums of six values in another order.
        assert torch.allclose(converted(x), model(x), rtol=0, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.allclose(converted.state_dict()[name], value, rtol=0, atol=1e-12)
    assert type(converted.norm(x).grad_fn).__name__ != type(model.norm(x).grad_fn).__name__


# ------------------------------------------------------------------------------------------------
# Lazy and parametrised layers
# ------------------------------------------------------------------------------------------------


def test_a_lazy_layer() -> None:
    model = torch_bn.convert(nn.Sequential(nn.LazyBatchNorm1d()))
    assert model[0].has_uninitialized_params()
    model(torch.randn(5, 3))
    assert type(model[0]) is torch_bn.BatchNorm1d
    again = torch_bn.revert(torch_bn.convert(nn.Sequential(nn.LazyBatchNorm1d())))
    again(torch.randn(5, 3))
    assert type(again[0]) is nn.BatchNorm1d


def test_a_parametrised_layer() -> None:
    model = Block(nn.BatchNorm1d(C)).double()
    parametrize.register_parametrization(model.norm, "weight", Doubled())
    twin = copy.deepcopy(model)
    x = torch.randn(6, C, dtype=torch.float64)
    want = copy.deepcopy(model)(x)
    original = model.norm.parametrizations.weight.original
    report: list[str] = []
    torch_bn.convert(model, report=report)
    assert report == ["norm: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d"]
    assert isinstance(model.norm, torch_bn.BatchNorm1d)
    assert not isinstance(twin.norm, torch_bn.BatchNorm1d)  # shared its class until now
    assert parametrize.is_parametrized(model.norm, "weight")
    assert parametrize.type_before_parametrizations(model.norm) is torch_bn.BatchNorm1d
    assert model.norm.parametrizations.weight.original is original
    assert torch.equal(model.norm.weight, 2 * original)
    assert torch.allclose(copy.deepcopy(model)(x), want, rtol=0, atol=1e-12)
    with parametrize.cached():
        assert model.norm.weight is model.norm.weight
    parametrize.register_parametrization(model.norm, "bias", Doubled())
    torch_bn.revert(model)
    assert parametrize.type_before_parametrizations(model.norm) is nn.BatchNorm1d
    assert torch.equal(model.norm.weight, 2 * original)
    parametrize.remove_parametrizations(model.norm, "weight")
    parametrize.remove_parametrizations(model.norm, "bias")
    assert type(model.norm) is nn.BatchNorm1d


def test_parametrisations_are_removed_from_a_converted_layer() -> None:
    layer = nn.BatchNorm1d(C)
    parametrize.register_parametrization(layer, "weight", Doubled())
    torch_bn.convert(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is torch_bn.BatchNorm1d
    assert torch.equal(layer.weight, torch.full((C,), 2.0))


# ------------------------------------------------------------------------------------------------
# Subclasses
# ------------------------------------------------------------------------------------------------


def test_subclasses_are_left_alone() -> None:
    model, report = nn.Sequential(ClampedNorm(C), LazyClampedNorm()), []
    torch_bn.convert(model, report=report)
    assert norms(model) == [ClampedNorm, LazyClampedNorm]
    assert report == [
        "0: ClampedNorm left alone, a subclass",
        "1: LazyClampedNorm left alone, a subclass",
    ]


def test_a_subclass_on_request() -> None:
    model, report = nn.Sequential(ClampedNorm(C)), []
    x = torch.randn(64, C) * 0.01 + 1e4  # where the builtin loses its digits
    torch_bn.convert(model, subclasses=True, report=report)
    assert report == ["0: ClampedNorm -> ClampedNorm on torch_bn"]
    assert isinstance(model[0], ClampedNorm)
    assert isinstance(model[0], torch_bn.BatchNorm1d)
    want = torch_bn.functional.batch_norm(x, None, None, training=True).clamp(-0.5, 0.5)
    assert torch.equal(model(x), want)
    assert not torch.equal(ClampedNorm(C)(x), want)
    assert repr(model[0]) == repr(ClampedNorm(C))
    torch_bn.revert(model)
    assert type(model[0]) is ClampedNorm


def test_a_subclass_that_takes_other_ranks() -> None:
    layer = torch_bn.convert(AnyRankNorm(C), subclasses=True)
    x = torch.randn(2, C, 3, 3)
    assert torch.equal(layer(x), AnyRankNorm(C)(x))  # both by torch's own
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        torch_bn.BatchNorm1d(C)(x)


def test_a_lazy_subclass_on_request() -> None:
    layer = torch_bn.convert(LazyClampedNorm(), subclasses=True)
    layer(torch.randn(5, C))
    assert isinstance(layer, ClampedNorm)
    assert isinstance(layer, torch_bn.BatchNorm1d)
    assert type(torch_bn.revert(layer)) is ClampedNorm


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda m, p=protocol: pickle.loads(pickle.dumps(m, protocol=p))
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_converted_subclass(how: str) -> None:
    layer = torch_bn.convert(ClampedNorm(C), subclasses=True)
    layer(torch.randn(5, C))
    other = COPIES[how](layer)
    assert type(other) is type(layer)
    assert all(torch.equal(v, layer.state_dict()[k]) for k, v in other.state_dict().items())
    assert type(torch_bn.revert(other)) is ClampedNorm


class KnowsHowToBePickled(torch.nn.BatchNorm1d):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return KnowsHowToBePickled, (self.num_features,)


def test_a_converted_subclass_that_pickles_itself_does_so() -> None:
    layer = torch_bn.convert(KnowsHowToBePickled(C), subclasses=True)
    assert type(layer) is not KnowsHowToBePickled
    assert type(pickle.loads(pickle.dumps(layer))) is KnowsHowToBePickled


def test_a_converted_subclass_through_torch_save() -> None:
    layer = torch_bn.convert(ClampedNorm(C), subclasses=True)
    parametrised = copy.deepcopy(layer)
    parametrize.register_parametrization(parametrised, "weight", Doubled())
    assert type(torch_bn.revert(parametrised)).__bases__ == (ClampedNorm,)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is type(layer)


def test_revert_of_subclasses_of_ours() -> None:
    model, report = nn.Sequential(OursWithLabel(C), OursClamped(C)), []
    torch_bn.revert(model, report=report)
    assert norms(model) == [OursWithLabel, OursClamped]
    assert report == [
        "0: OursWithLabel left alone, a subclass",
        "1: OursClamped left alone, a subclass",
    ]
    torch_bn.revert(model, subclasses=True)
    # A forward of its own has no counterpart in torch.
    assert norms(model) == [nn.BatchNorm1d, OursClamped]


def test_convert_leaves_subclasses_of_ours_alone() -> None:
    model, report = nn.Sequential(OursWithLabel(C)), []
    torch_bn.convert(model, subclasses=True, report=report)
    assert norms(model) == [OursWithLabel]
    assert report == []


# ------------------------------------------------------------------------------------------------
# Tools that match classes exactly
# ------------------------------------------------------------------------------------------------


def test_fusions_of_torch_ao_after_revert() -> None:
    with warnings.catch_warnings():  # torch.ao.quantization is deprecated as a whole
        warnings.simplefilter("ignore")
        from torch.ao.quantization import fuse_modules

        model = torch_bn.convert(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))).eval()
        with pytest.raises(AssertionError, match="did not find fuser method"):
            fuse_modules(model, [["0", "1"]])
        model[1].running_mean.copy_(torch.linspace(-1, 1, C))
        fused = fuse_modules(torch_bn.revert(model), [["0", "1"]])
    assert type(fused[1]) is nn.Identity
    x = torch.randn(5, 3)
    assert torch.allclose(fused(x), model(x), atol=1e-6)  # float32, folded in another order


def test_copies_of_a_parametrised_layer_go_on_sharing_their_class() -> None:
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    model = nn.Sequential(layer, copy.deepcopy(layer))
    assert type(model[0]) is type(model[1])
    torch_bn.convert(model)
    assert type(model[0]) is type(model[1])
    assert isinstance(model[1], torch_bn.BatchNorm1d)

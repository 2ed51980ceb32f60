"""convert(fuse=True) and revert on Sequentials: what is fused, what is left alone, what is kept."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from stacks import apart, scatter, seeded, stacks
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torch_bn

C = 4

# Float64 on both sides. A norm multiplies what earlier layers rounded by up to 1 / sqrt(eps), 316;
# seven layers of 1e-16 and a few of these factors stay far below, and any mistake far above.
ROUNDING = 1e-7


class ClampedNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.5, 0.5)


class ShiftedReLU(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - 1


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def fuse(model: nn.Module) -> tuple[nn.Module, list[str]]:
    report: list[str] = []
    return torch_bn.convert(model, fuse=True, report=report), report


def types(model: nn.Module) -> list[type]:
    return [type(each) for each in model]


# ------------------------------------------------------------------------------------------------
# What is fused
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, torch_bn.BatchNorm1d])
def test_pairs_of_both_orders(norm: type, inplace: bool) -> None:
    model = nn.Sequential(
        *(nn.Linear(3, C), norm(C), nn.ReLU(inplace)),
        *(nn.Linear(C, C), nn.ReLU(inplace), norm(C)),
        *(nn.Linear(C, 2), nn.BatchNorm1d(2)),
    )
    parts, state = list(model), model.state_dict(keep_vars=True)
    fused, report = fuse(model)
    assert fused is model
    assert all(a is b for a, b in zip(model, parts, strict=True))
    assert type(model[1]) is torch_bn.BatchNormReLU1d
    assert type(model[5]) is torch_bn.ReLUBatchNorm1d
    assert isinstance(model[2], nn.Identity)
    assert isinstance(model[4], nn.Identity)
    assert repr(model[2]) == "Identity(ReLU, fused)"
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[name] is tensor for name, tensor in state.items())
    old = "torch.nn" if norm is nn.BatchNorm1d else "torch_bn"
    assert report == [
        f"1 + 2: {old}.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d",
        f"4 + 5: torch.nn.ReLU + {old}.BatchNorm1d -> torch_bn.ReLUBatchNorm1d",
        "7: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
    ]


def test_only_on_request() -> None:
    model = torch_bn.convert(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    assert types(model) == [torch_bn.BatchNorm1d, nn.ReLU]


def test_twice_is_once() -> None:
    model, _ = fuse(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    before = types(model)
    assert fuse(model)[1] == []
    assert types(model) == before


def test_a_relu_between_two_norms_goes_to_the_first() -> None:
    model, report = fuse(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU(), nn.BatchNorm1d(C)))
    assert type(model[0]) is torch_bn.BatchNormReLU1d
    assert type(model[2]) is torch_bn.BatchNorm1d
    assert len(report) == 2


def test_nested_sequentials_are_one_chain() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C)), nn.ReLU())
    _, report = fuse(model)
    assert report == ["0.1 + 1: torch.nn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d"]


def test_other_activations_and_distant_relus() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(C), nn.LeakyReLU(), nn.BatchNorm1d(C), nn.Dropout(), nn.ReLU()
    )
    _, report = fuse(model)
    assert [line.partition(":")[0] for line in report] == ["0", "2"]


@settings(max_examples=60)
@given(stacks())
def test_any_stack_computes_the_same(drawn: tuple[nn.Sequential, tuple[int, ...]]) -> None:
    model, shape = drawn
    fused, report = fuse(copy.deepcopy(model))
    for index in range(len(model) - 1):
        if type(model[index]) in (nn.BatchNorm1d, torch_bn.BatchNorm1d):
            assert type(model[index + 1]) is not nn.ReLU or type(fused[index]) in (
                torch_bn.BatchNormReLU1d,
                torch_bn.ReLUBatchNorm1d,
            ), report
    for training in (True, False):
        x = torch.randn(shape, dtype=torch.float64)
        fused.train(training), model.train(training)
        results = [seeded(each, x) for each in (fused, model)]
        assert apart(*results) < ROUNDING
        if results[0].requires_grad:
            gradients = [
                torch.autograd.grad(y.square().sum(), each.parameters(), materialize_grads=True)
                for y, each in zip(results, (fused, model), strict=True)
            ]
            assert all(apart(a, b) < ROUNDING for a, b in zip(*gradients, strict=True))
        for name, value in model.state_dict().items():
            assert apart(fused.state_dict()[name], value) < ROUNDING, name
    undone = torch_bn.revert(copy.deepcopy(fused))
    assert apart(seeded(undone, x), seeded(model, x)) < ROUNDING
    written = [type(each).__name__ for each in model]
    # What was written as a fused layer stays one, all else is as it was.
    assert [type(each).__name__ for each in undone] == written


# ------------------------------------------------------------------------------------------------
# What is left alone
# ------------------------------------------------------------------------------------------------


def hooked(index: int, register: str) -> Callable[[], nn.Sequential]:
    def make() -> nn.Sequential:
        model = nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())
        getattr(model[index], register)(lambda *args: None)
        return model

    return make


def parametrised() -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())
    parametrize.register_parametrization(model[0], "weight", Doubled())
    return model


def shared(which: int) -> nn.Sequential:
    parts = [nn.BatchNorm1d(C), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(C, C), parts[which])


def with_own_forward(which: int) -> nn.Sequential:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.ReLU())
    model[which].forward = torch.neg
    return model


HOOKS = [
    *("register_forward_hook", "register_forward_pre_hook"),
    *("register_full_backward_hook", "register_full_backward_pre_hook"),
]
IN_PLACE = "the in-place ReLU changes a value that may be used elsewhere"
LEFT_ALONE: dict[str, tuple[Callable[[], nn.Sequential], str]] = {
    **{
        f"{register} {index}": (hooked(index, register), f"0 + 1: left alone, {index} has hooks")
        for register in HOOKS
        for index in (0, 1)
    },
    "parametrised": (parametrised, "0 + 1: left alone, 0 is parametrised"),
    "shared norm": (lambda: shared(0), "0, 3 + 1: left alone, 0, 3 is shared"),
    "shared ReLU": (lambda: shared(1), "0 + 1, 3: left alone, 1, 3 is shared"),
    "derived norm": (
        lambda: nn.Sequential(ClampedNorm(C), nn.ReLU()),
        "0 + 1: left alone, 0 is of a derived class",
    ),
    "derived ReLU": (
        lambda: nn.Sequential(nn.BatchNorm1d(C), ShiftedReLU()),
        "0 + 1: left alone, 1 is of a derived class",
    ),
    "forward of a norm": (
        lambda: with_own_forward(0),
        "0 + 1: left alone, 0 has a forward of its own",
    ),
    "forward of a ReLU": (
        lambda: with_own_forward(1),
        "0 + 1: left alone, 1 has a forward of its own",
    ),
    "lazy": (
        lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU()),
        "0 + 1: left alone, 0 is lazy, and has not seen its first batch",
    ),
    "in place on the model's input": (
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(C)),
        f"0 + 1: left alone, {IN_PLACE}",
    ),
    "in place on a view": (
        lambda: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.BatchNorm1d(C)),
        f"1 + 2: left alone, {IN_PLACE}",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_the_reason(case: str) -> None:
    make, line = LEFT_ALONE[case]
    model = make()
    _, report = fuse(model)
    assert line in report
    assert not any(isinstance(each, nn.Identity) for each in model.modules())
    fused = (torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d)
    assert not any(isinstance(each, fused) for each in model.modules())


def test_an_in_place_relu_on_a_hooked_layers_output() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.ReLU(inplace=True), nn.BatchNorm1d(C))
    kept: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    x = torch.randn(5, 3)
    model(x)
    assert f"1 + 2: left alone, {IN_PLACE}" in fuse(model)[1]
    model(x)
    assert torch.equal(kept[0], kept[1])


def test_hooks_of_a_nested_sequential_keep_its_end_apart() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()), nn.ReLU())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    x = torch.randn(5, 3)
    model(x)
    _, report = fuse(model)
    assert report == ["0.1 + 0.2: torch.nn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d"]
    model(x)
    assert torch.allclose(seen[0], seen[1], rtol=0, atol=1e-6)  # float32, of the order of 1
    other = nn.Sequential(nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C)), nn.ReLU())
    other[0].register_forward_hook(lambda module, args, output: None)
    assert fuse(other)[1] == ["0.1: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d"]


# ------------------------------------------------------------------------------------------------
# What goes on
# ------------------------------------------------------------------------------------------------


def pair() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, 2))
    scatter(model)
    return model


def test_an_optimizer_goes_on_working() -> None:
    model = pair().double()
    other = copy.deepcopy(model)

    def steps(each: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        for rows in x:
            optimizer.zero_grad()
            each(rows).pow(3).sum().backward()
            optimizer.step()

    x = 0.1 * torch.randn(6, 8, 3, dtype=torch.float64)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, other)]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        steps(each, optimizer, x[:3])
    fuse(model)
    before = model[1].weight.detach().clone()
    for each, optimizer in zip((model, other), optimizers, strict=True):
        steps(each, optimizer, x[3:])
    assert not torch.equal(model[1].weight, before)
    for name, value in other.state_dict().items():
        assert apart(model.state_dict()[name], value) < ROUNDING, name


def test_round_trip_of_state_dicts() -> None:
    model, plain = pair(), pair()
    fuse(model)
    model(torch.randn(5, 3))
    plain.load_state_dict(model.state_dict())
    again, _ = fuse(pair())
    again.load_state_dict(plain.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


# ------------------------------------------------------------------------------------------------
# revert
# ------------------------------------------------------------------------------------------------

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_revert(how: str, inplace: bool) -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU(inplace), nn.Linear(C, C))
    model.extend([nn.ReLU(), torch_bn.BatchNorm1d(C)])
    attributes = [list(vars(each)) for each in model]
    text = repr(model)
    fuse(model)
    report: list[str] = []
    model = torch_bn.revert(COPIES[how](model), report=report)
    assert types(model)[1:] == [nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.ReLU, nn.BatchNorm1d]
    assert [list(vars(each)) for each in model] == attributes
    assert repr(model) == text
    assert report == [
        "1 + 2: torch_bn.BatchNormReLU1d -> torch.nn.BatchNorm1d + torch.nn.ReLU",
        "4 + 5: torch_bn.ReLUBatchNorm1d -> torch.nn.ReLU + torch.nn.BatchNorm1d",
    ]


def test_revert_of_two_copies_in_one_model() -> None:
    model, _ = fuse(pair())
    both = torch_bn.revert(nn.ModuleList([model, copy.deepcopy(model)]))
    for each in both:
        assert types(each) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_revert_leaves_half_a_pair_alone() -> None:
    model, _ = fuse(pair())
    x = torch.randn(5, 3)
    half, report = model[:2].eval(), []
    want = half(x)
    torch_bn.revert(half, report=report)
    assert report == ["1: torch_bn.BatchNormReLU1d left alone, torch.nn has no such layer"]
    assert torch.equal(half(x), want)
    assert types(torch_bn.revert(model)) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("subclasses", [False, True])
def test_revert_leaves_layers_alone_that_were_written_fused(subclasses: bool) -> None:
    model, report = nn.Sequential(torch_bn.BatchNormReLU1d(C), torch_bn.ReLUBatchNorm1d(C)), []
    torch_bn.revert(model, subclasses=subclasses, report=report)
    assert types(model) == [torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d]
    assert report == [
        "0: torch_bn.BatchNormReLU1d left alone, torch.nn has no such layer",
        "1: torch_bn.ReLUBatchNorm1d left alone, torch.nn has no such layer",
    ]


def test_revert_of_a_layer_parametrised_since() -> None:
    model, _ = fuse(pair().double())
    parametrize.register_parametrization(model[1], "weight", Doubled())
    x = torch.randn(5, 3, dtype=torch.float64)
    want = model(x)
    torch_bn.revert(model)
    assert parametrize.type_before_parametrizations(model[1]) is nn.BatchNorm1d
    assert type(model[2]) is nn.ReLU
    assert apart(model(x), want) < ROUNDING


@pytest.mark.parametrize("option", [{"virtual_batch_size": 2}, {"channels_last": True}], ids=str)
def test_layers_with_options_of_ours_are_left_alone(option: dict[str, object]) -> None:
    norm = torch_bn.BatchNorm1d(3, **option)
    model, done = nn.Sequential(nn.Linear(4, 3), norm, nn.ReLU()), []
    torch_bn.convert(model, fuse=True, drop_bias=True, report=done)
    assert type(model[1]) is torch_bn.BatchNorm1d
    assert model[0].bias is not None
    (name, value), *_ = option.items()
    assert any(f"1 has {name}={value}" in line for line in done)


def test_fused_layers_that_got_an_option_of_ours_are_not_reverted() -> None:
    model, report = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()), []
    torch_bn.convert(model, fuse=True)
    model[1].virtual_batch_size = 2
    torch_bn.revert(model, report=report)
    assert type(model[1]) is torch_bn.BatchNormReLU1d
    assert type(model[2]) is not nn.ReLU
    assert report == ["1: torch_bn.BatchNormReLU1d left alone, torch.nn has no such layer"]

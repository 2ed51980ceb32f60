"""convert(fuse=True) and revert on models with a forward of their own, seen through torch.fx."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict, deque
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stacks import apart, scatter
from torch import Tensor, nn
from torch.fx import GraphModule

import torch_bn

C = 4
ROUNDING = 1e-12  # float64 of the order of 1 through three layers, in another order of operations


class Net(nn.Module):
    """Any forward over the same parts."""

    def __init__(self, forward: Callable[..., Tensor]) -> None:
        super().__init__()
        self.dense = nn.Linear(3, C)
        self.norm = nn.BatchNorm1d(C)
        self.act = nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.own = forward
        scatter(self)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self, x)


class Optional(Net):
    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        return self.own(self, x, skip)


class Nested(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.first = parts[0]
        self.rest = nn.ModuleList(parts[1:])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for part in self.rest:
            x = part(x)
        return x


def fuse(model: nn.Module) -> tuple[nn.Module, list[str]]:
    report: list[str] = []
    return torch_bn.convert(model, fuse=True, report=report), report


def is_fused(model: nn.Module) -> bool:
    return isinstance(model.norm, (torch_bn.BatchNormReLU1d, torch_bn.ReLUBatchNorm1d))


def inputs() -> Tensor:
    return torch.randn(7, 3, dtype=torch.float64)


def agree(a: nn.Module, b: nn.Module) -> None:
    for training in (True, False):
        a.train(training)
        b.train(training)
        x = inputs()
        assert apart(a(x), b(x)) < ROUNDING
        for name, value in b.state_dict().items():
            assert apart(a.state_dict()[name], value) < ROUNDING


# ------------------------------------------------------------------------------------------------
# Pairs of modules
# ------------------------------------------------------------------------------------------------

MODULES = {
    "norm + act": lambda m, x: m.act(m.norm(m.dense(x))).sin(),
    "act + norm": lambda m, x: m.norm(m.act(m.dense(x))).sin(),
}


@pytest.mark.parametrize("label", MODULES)
def test_modules_change_in_place(label: str) -> None:
    model = Net(MODULES[label])
    model.act.inplace = True
    plain, state, text = copy.deepcopy(model), model.state_dict(keep_vars=True), repr(model)
    fused, report = fuse(model)
    assert fused is model
    assert isinstance(model.act, nn.Identity)
    name = "BatchNormReLU1d" if label == "norm + act" else "ReLUBatchNorm1d"
    assert type(model.norm).__name__ == name
    parts = [f"torch.nn.{'BatchNorm1d' if p == 'norm' else 'ReLU'}" for p in label.split(" + ")]
    assert report == [f"{label}: {' + '.join(parts)} -> torch_bn.{name}"]
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(state)
    assert all(after[key] is tensor for key, tensor in state.items())
    agree(model, plain)
    torch_bn.revert(model)
    assert repr(model) == text
    agree(model, plain)


def test_parts_of_several_blocks() -> None:
    class Block(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.norm, self.dense = nn.BatchNorm1d(C), nn.Linear(inputs, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.dense(x))

    model = Nested(nn.Sequential(Block(3), nn.ReLU()), Block(C), nn.Sequential(nn.ReLU()))
    fused, report = fuse(model)
    assert fused is model
    assert report == [
        "first.0.norm + first.1: torch.nn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d",
        "rest.0.norm + rest.1.0: torch.nn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d",
    ]


def in_place_shared(m: nn.Module, x: Tensor) -> Tensor:
    h = m.dense(x)
    return m.norm(F.relu(h, True)) + h


LEFT_ALONE: dict[str, tuple[Callable[..., Tensor], str]] = {
    "between, norm first": (
        lambda m, x: m.act(h := m.norm(m.dense(x))) + h,
        "norm + act: left alone, the value between is used elsewhere",
    ),
    "between, ReLU first": (
        lambda m, x: m.norm(h := m.act(m.dense(x))) + h,
        "act + norm: left alone, the value between is used elsewhere",
    ),
    "between, returned": (
        lambda m, x: (h := m.norm(m.dense(x)), m.act(h)),
        "norm + act: left alone, the value between is used elsewhere",
    ),
    "between, a function": (
        lambda m, x: F.relu(h := m.norm(m.dense(x))) + h,
        "norm + F.relu: left alone, the value between is used elsewhere",
    ),
    "norm called twice": (
        lambda m, x: m.act(m.norm(m.norm(m.dense(x)))),
        "norm + act: left alone, norm is shared",
    ),
    "ReLU called twice": (
        lambda m, x: m.act(m.act(m.norm(m.dense(x))) - 1),
        "norm + act: left alone, act is shared",
    ),
    "in place, its input used elsewhere": (
        in_place_shared,
        "F.relu + norm: left alone, the in-place ReLU changes a value that may be used elsewhere",
    ),
    "another way in evaluation": (
        lambda m, x: m.act(m.norm(m.dense(x))) if m.training else m.norm(m.dense(x)),
        "norm + act: left alone, they do not always follow each other",
    ),
    "another use of the ReLU in evaluation": (
        lambda m, x: m.act(m.norm(m.dense(x))) if m.training else m.act(m.dense(x)),
        "norm + act: left alone, they do not always follow each other",
    ),
    "a function in training alone": (
        lambda m, x: F.relu(m.norm(m.dense(x))) if m.training else m.norm(m.dense(x)),
        "norm + F.relu: left alone, they do not always follow each other",
    ),
    "a function in training, a module in evaluation": (
        lambda m, x: (F.relu if m.training else m.act)(m.norm(m.dense(x))),
        "norm + F.relu: left alone, they do not always follow each other",
    ),
    "a forward that knows the mode": (
        lambda m, x: F.dropout(F.relu(m.norm(m.dense(x))), 0.5, m.training),
        "norm + F.relu: left alone, the model's forward is another in training than in evaluation",
    ),
    "a tensor made in the forward": (
        lambda m, x: F.relu(m.norm(m.dense(x))) + torch.rand(C),
        "norm + F.relu: left alone, the model's forward makes tensors that tracing would freeze",
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_the_reason(case: str) -> None:
    forward, line = LEFT_ALONE[case]
    model = Net(forward)
    result, report = fuse(model)
    assert result is model
    assert report == [line, "norm: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d"]
    assert type(model.norm) is torch_bn.BatchNorm1d
    assert type(model.act) is nn.ReLU


def test_optional_arguments() -> None:
    # With the argument the pair is one, without it it is not.
    sometimes = Optional(
        lambda m, x, skip: m.act(m.norm(m.dense(x))) if skip is not None else m.norm(m.dense(x))
    )
    report = fuse(sometimes)[1]
    assert "norm + act: left alone, they do not always follow each other" in report
    always = Optional(lambda m, x, skip: m.act(m.norm(x if skip is None else skip)))
    assert fuse(always)[0] is always
    assert is_fused(always)
    function = Optional(lambda m, x, skip: F.relu(m.norm(m.dense(x))))
    assert (
        "norm + F.relu: left alone, the model's forward has optional arguments" in fuse(function)[1]
    )


def test_a_hooked_part_is_one_call() -> None:
    block = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    seen: list[Tensor] = []
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    _, report = fuse(Nested(block, nn.ReLU()))
    assert report == ["first.1: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d"]
    assert seen == []  # nor was it called by the tracing


def test_a_layer_called_from_inside_an_opaque_part_too() -> None:
    block = nn.Sequential(nn.BatchNorm1d(C), nn.Tanh())
    block.register_forward_hook(lambda *args: None)  # so it is not looked into

    class Twice(Nested):
        def forward(self, x: Tensor) -> Tensor:
            return self.rest[0](self.first[0](x)) + self.first(x)

    report = fuse(Twice(block, nn.ReLU()))[1]
    assert "first.0 + rest.0: left alone, first.0 is shared" in report


# ------------------------------------------------------------------------------------------------
# Functions
# ------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "F.relu in place": lambda x: F.relu(x, inplace=True),
}


def with_function(name: str, after: bool) -> Net:
    relu = FUNCTIONS[name]
    if after:
        return Net(lambda m, x: relu(m.norm(m.dense(x))).sin())
    return Net(lambda m, x: m.norm(relu(m.dense(x))).sin())


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_dropped_from_a_graph(name: str, after: bool) -> None:
    model = with_function(name, after)
    plain, state = copy.deepcopy(model), model.state_dict(keep_vars=True)
    fused, report = fuse(model)
    label = name.removesuffix(" in place")
    parts, classes = ["norm", label], ["torch.nn.BatchNorm1d", label]
    if not after:
        parts, classes = parts[::-1], classes[::-1]
    new = "BatchNormReLU1d" if after else "ReLUBatchNorm1d"
    assert report == [
        f"{' + '.join(parts)}: {' + '.join(classes)} -> torch_bn.{new}",
        "the model itself: a torch.fx.GraphModule takes its place",
    ]
    assert isinstance(fused, GraphModule)
    assert "relu" not in fused.code
    # The children are the model's own, in number and order: names, parameters, what is unused.
    after_state = fused.state_dict(keep_vars=True)
    assert list(after_state) == list(state)
    assert all(after_state[key] is tensor for key, tensor in state.items())
    assert list(fused.named_children()) == list(model.named_children())
    agree(fused, plain)
    # The model goes on being right: a ReLU twice is a ReLU.
    plain.load_state_dict(model.state_dict())
    agree(model, plain)


@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
@pytest.mark.parametrize("after", [True, False])
def test_functions_come_back(after: bool, how: str) -> None:
    model = with_function("F.relu", after)
    plain = copy.deepcopy(model)
    fused, _ = fuse(model)
    if how != "itself":
        fused = copy.deepcopy(fused) if how == "deepcopy" else pickle.loads(pickle.dumps(fused))
    report: list[str] = []
    undone = torch_bn.revert(fused, report=report)
    assert undone is fused
    parts = ["torch.nn.BatchNorm1d", "F.relu"] if after else ["F.relu", "torch.nn.BatchNorm1d"]
    name = "BatchNormReLU1d" if after else "ReLUBatchNorm1d"
    assert report == [f"norm: torch_bn.{name} -> {' + '.join(parts)}"]
    assert undone.code.count("relu(") == 1
    assert type(undone.norm) is nn.BatchNorm1d
    agree(undone, copy.deepcopy(plain))
    if how == "itself":
        plain.load_state_dict(model.state_dict())
        agree(model, plain)


def test_revert_of_the_model_that_a_graph_has_replaced() -> None:
    model = with_function("F.relu", True)
    fused, _ = fuse(model)
    report: list[str] = []
    torch_bn.revert(model, report=report)
    # Its layer is the graph's too, which has no ReLU of its own.
    assert report == ["norm: torch_bn.BatchNormReLU1d left alone, torch.nn has no such layer"]
    assert is_fused(fused)


def test_a_function_between_two_norms_is_dropped_once() -> None:
    model = Net(lambda m, x: m.last(torch.relu(m.norm(m.dense(x)))))
    model.last = nn.BatchNorm1d(C).double()
    plain = copy.deepcopy(model)
    fused, _ = fuse(model)
    assert type(fused.norm) is torch_bn.BatchNormReLU1d
    assert type(fused.last) is torch_bn.BatchNorm1d
    agree(fused, plain)


def test_functions_and_modules_in_one_model() -> None:
    model = Net(lambda m, x: m.last(F.relu(m.act(m.norm(m.dense(x))) - m.offset)))
    model.last, model.offset = nn.BatchNorm1d(C).double(), torch.ones(C, dtype=torch.float64)
    plain = copy.deepcopy(model)
    fused, _ = fuse(model)
    assert type(fused.norm) is torch_bn.BatchNormReLU1d
    assert type(fused.last) is torch_bn.ReLUBatchNorm1d
    assert "offset" not in fused.state_dict()
    agree(fused, plain)


def test_a_model_with_hooks_keeps_its_functions() -> None:
    model = with_function("F.relu", True)
    model.register_forward_hook(lambda *args: None)
    result, report = fuse(model)
    assert result is model
    assert report[0] == "norm + F.relu: left alone, the model has hooks"


# ------------------------------------------------------------------------------------------------
# Tracing
# ------------------------------------------------------------------------------------------------


def test_where_tracing_fails_sequentials_are_fused() -> None:
    model = Net(lambda m, x: m.act(m.norm(m.pair(x))) if x.sum() > 0 else x)
    model.pair = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU()).double()
    result, report = fuse(model)
    assert result is model
    assert report[0].startswith("the model itself: not traced, only Sequentials seen: TraceError")
    assert report[1:] == [
        "pair.1 + pair.2: torch.nn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d",
        "norm: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d",
    ]


def test_a_sequential_that_is_not_called_whole() -> None:
    class Parts(Nested):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first[0](x)
            return self.first[1](h) + h

    model = Parts(nn.Sequential(nn.BatchNorm1d(C), nn.ReLU()))
    report = fuse(model)[1]
    assert report[0] == "first.0 + first.1: left alone, the value between is used elsewhere"


def test_a_sequential_in_itself_and_one_with_a_gap() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.ReLU())
    model.add_module("3", None)
    fuse(model)
    assert type(model[1]) is torch_bn.BatchNormReLU1d
    # It cannot be called, but the conversion comes to an end.
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    model.append(model)
    fuse(nn.Sequential(model))
    assert type(model[1]) is torch_bn.BatchNorm1d


def test_tracing_leaves_nothing_behind() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.last_input = x
        m.calls += 1
        m.noise = torch.rand(C, dtype=torch.float64)
        return m.act(m.norm(m.dense(x))) + m.noise

    model = Net(forward)
    model.calls = 0
    model.norm.eval()
    attributes = {name: list(vars(each)) for name, each in model.named_modules()}
    generator = torch.get_rng_state()
    fuse(model)
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.calls == 0
    assert model.training
    assert not model.norm.training
    for name, each in model.named_modules():
        new = set(vars(each)) - set(attributes[name])
        assert new == ({"_fused_relu"} if name in ("norm", "act") else set())


@pytest.mark.parametrize("kind", [list, deque, set, dict, OrderedDict])
def test_tracing_puts_nothing_into_containers(kind: type) -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        match m.kept:
            case dict():
                m.kept[x] = x
            case set():
                m.kept.add(x)
            case _:
                m.kept.append(x)
        return m.act(m.norm(m.dense(x)))

    model = Net(forward)
    model.kept = kept = kind([("a", 1)])
    fuse(model)
    assert is_fused(model)
    assert model.kept is kept
    assert kept == kind([("a", 1)])


def test_a_buffer_that_the_forward_changes_is_not_changed() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.act(m.norm(m.dense(x)))

    model = Net(forward)
    model.register_buffer("count", torch.zeros(()))
    assert fuse(model)[0] is model
    assert is_fused(model)
    assert model.count == 0


def test_a_user_s_train_is_heeded_and_undone() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen(MODULES["norm + act"]).train()
    fuse(model)
    assert is_fused(model)
    assert [model.training, model.norm.training, model.act.training] == [True, False, True]


def test_a_scripted_part_is_one_call() -> None:
    model = Net(lambda m, x: m.act(m.norm(m.scripted(x))))
    model.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, C)).double())
    assert fuse(model)[0] is model
    assert is_fused(model)
    assert model.scripted.training


def test_a_relu_in_training_alone_stays() -> None:
    model = Net(lambda m, x: F.relu(m.norm(x)) if m.training else m.norm(x).tanh())
    converted, report = fuse(model)
    assert converted is model
    assert type(model.norm) is torch_bn.BatchNorm1d
    assert report[0].endswith("left alone, they do not always follow each other")

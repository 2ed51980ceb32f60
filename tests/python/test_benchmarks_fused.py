"""The benchmark tool's parts about the fused layers. Nothing here depends on a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import torch_bn
from benchmarks import __main__ as command
from benchmarks import fused, models, tables
from benchmarks.figures import draw
from benchmarks.memory import allocated_after
from benchmarks.peers import Problem
from benchmarks.result import Ratio, Record, Result, Sample
from benchmarks.timing import Budget

NAMES = ("fused", "unfused", "builtin")
TINY = ["--quick", "--only", "fused", "--shape", "5x3", "--threads", "2", "1", "--seconds", "0.01"]


@pytest.mark.parametrize("order", fused.ORDERS)
@pytest.mark.parametrize("shape", [(64, 3), (32, 3, 5)], ids=str)
def test_all_do_the_same_work(order: str, shape: tuple[int, ...]) -> None:
    problem = Problem.of(shape, torch.float32, 1)
    wide = Problem(problem.x.double(), problem.g.double(), 1)
    reference = fused.modules("builtin", order, wide)
    leaf = wide.x.requires_grad_()
    want = [reference[0](leaf)]
    want[0].backward(wide.g)
    want += [leaf.grad, reference[1].eval()(leaf)]
    # The orders differ in sign: after a ReLU nothing is negative, after batch norm something is.
    assert (want[0].min() >= 0) == (order == "BN then ReLU")
    for name in NAMES:
        training, evaluation = fused.modules(name, order, problem)
        x = problem.x.clone().requires_grad_()
        got = [training(x)]
        got[0].backward(problem.g)
        got += [x.grad, evaluation.eval()(x)]
        for a, b in zip(got, want, strict=True):
            # Of the order of 1, through some ten roundings of 6e-8.
            assert torch.allclose(a.double(), b, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "layer"),
    [("BN then ReLU", torch_bn.BatchNormReLU1d), ("ReLU then BN", torch_bn.ReLUBatchNorm1d)],
)
def test_what_is_measured_is_what_the_name_says(order: str, layer: type) -> None:
    problem = Problem.of((5, 3), torch.bfloat16, 1)
    kinds = fused.between(order)
    for module in (*fused.modules("fused", order, problem), *kinds["fused"](3)):
        assert type(module) is layer
    for name, norm in (("unfused", torch_bn.BatchNorm1d), ("builtin", torch.nn.BatchNorm1d)):
        types = [norm, torch.nn.ReLU] if order == "BN then ReLU" else [torch.nn.ReLU, norm]
        assert [type(m) for m in kinds[name](3)] == types
        for module in fused.modules(name, order, problem):
            assert [type(m) for m in module.children()] == types
            assert {p.dtype for p in module.parameters()} == {torch.float32}
    found = models.networks((6, 5, 4, 3), kinds)
    assert [type(m) for m in found["without"]] == [torch.nn.Linear] * 3
    assert [type(m) for m in found["fused"]] == [torch.nn.Linear, layer] * 2 + [torch.nn.Linear]
    assert found["fused"][0] is found["builtin"][0]


def test_share_of_the_fused_layers() -> None:
    times = {"fused": [3.0, 4.0, 5.0], "builtin": [6.0, 6.0, 6.0], "without": [2.0, 2.0, 2.0]}
    assert models.share_of(times, "fused") == Ratio(0.5, 0.375, 0.625, "lower")


def test_what_a_call_leaves_is_counted() -> None:
    held = []

    def call() -> None:
        held.clear()
        held.append(torch.ones(1 << 24)[: 1 << 20].clone())

    assert allocated_after(call, held.clear) == 4 << 20
    assert allocated_after(lambda: torch.ones(1 << 20), held.clear) == 0


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "DEEP", (64, 64, 64, 10))


def floats(*shapes: tuple[int, ...]) -> int:
    return sum(4 * torch.Size(shape).numel() for shape in shapes)


@pytest.mark.usefixtures("deep")
def test_memory_of_a_deep_network() -> None:
    # So few rows that all the gradients, where they are kept, take more than anything before.
    batch, said = 8, []
    result = Result()
    plan = command.layers.Plan(budget=Budget(0, 1, 1), batches=(4, batch), say=said.append)
    fused.memory(plan, result)
    records = {(r.what, r.case): r for r in result.of("fused-memory")}
    for order in fused.ORDERS:
        held, peak, bare, time = (
            records[what, f"{order}, batch {batch}"]
            for what in ("held for the backward", "peak", "peak without gradients", "time")
        )
        # What follows both dense layers keeps its input, and the dense layer after it its own; the
        # last keeps log_softmax's output. Beyond it is at most what is kept for a channel: two
        # float64 and in case of a copy a float32 or two.
        least = 4 * floats((batch, 64)) + floats((batch, 10))
        weights = [floats((o, i), (o,)) for i, o in pairwise(fused.DEEP)]
        norms = 2 * floats((64,), (64,))
        for name in NAMES:
            assert least <= held.samples[name].median <= least + 2 * 64 * 32 + 64
            assert held.samples[name].median < bare.samples[name].median
            # All gradients are there at the end of the step, but not where each is dropped.
            assert peak.samples[name].median >= sum(weights) + norms
            assert bare.samples[name].median < sum(weights)
        assert {held.unit, peak.unit, bare.unit, time.unit} == {"B", "s"}
        assert held.ratios["fused/builtin"].better == "lower"
        assert time.ratios["fused/builtin"].better is None


@pytest.mark.usefixtures("deep")
def test_gradients_are_dropped_only_inside() -> None:
    step = fused.deep_steps("BN then ReLU", 8)["fused"]
    parameters = list(step.model.parameters())
    with fused.gradients_dropped([step.model, step.model]):
        step.step()
        assert all(p.grad is None for p in parameters)
    step.step()
    assert all(p.grad is not None for p in parameters)
    step.clear()
    assert step.loss is None
    assert all(p.grad is None for p in parameters)


@pytest.mark.usefixtures("deep")
def test_lean_spans_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen = [False], []

    @contextmanager
    def lean() -> Iterator[None]:
        inside[0] = True
        yield
        inside[0] = False

    monkeypatch.setattr(torch_bn, "lean", lean, raising=False)
    steps = fused.deep_steps("BN then ReLU", 8)
    assert list(steps) == [*("builtin", "unfused", "fused"), "lean"]
    assert steps["lean"].model is steps["fused"].model
    model = steps["lean"].model
    model.register_forward_hook(lambda *_: seen.append(("forward", inside[0])))
    model[0].weight.register_hook(lambda _: seen.append(("backward", inside[0])))
    for name in ("lean", "fused"):
        steps[name].step()
    assert seen == [("forward", True), ("backward", False), ("forward", False), ("backward", False)]


def run(path: Path, *arguments: str) -> Result:
    assert command.main([*TINY, *arguments, "--json", str(path)]) == 0
    return Result.read(path)


def test_compile_is_measured_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiled = []

    def compile_of(module: torch.nn.Module, *, dynamic: bool) -> torch.nn.Module:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_of)
    path = tmp_path / "result.json"
    directions = ("step", "forward", "evaluation")
    eager = {f"{d}, {o}" for d in directions for o in fused.ORDERS}
    found = run(path)
    assert {r.what for r in found.records} == eager
    assert {r.threads for r in found.records} == {1, 2}
    assert compiled == []
    capsys.readouterr()
    found = run(path, "--peers", "compile")
    beside = {r.what: r for r in found.records if r.what not in eager}
    assert set(beside) == {f"step, {o}, torch.compile" for o in fused.ORDERS}
    assert {r.threads for r in beside.values()} == {2}
    assert all(set(r.samples) == {"fused", "compile"} for r in beside.values())
    assert [type(m) for m in compiled] == [torch.nn.Sequential] * 4
    said = capsys.readouterr().out
    for table in tables.all_tables(found):
        assert table.title in said
    assert not {r.what for r in run(path, "--direction", "forward").records} - eager


def test_a_failing_compiler_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fails(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", compile_fails)
    found = run(tmp_path / "result.json", "--peers", "compile")
    assert [(a.part, a.peer) for a in found.absent] == [("fused", "compile")]
    assert "no C++ compiler here" in found.absent[0].reason


def record(what: str, case: str, threads: int, **ratios: float) -> Record:
    sample = Sample(1e-3, 0.9e-3, 1.1e-3, 9)
    found = {f"{name}/fused": Ratio(v, v, v) for name, v in ratios.items()}
    samples = dict.fromkeys(("fused", *ratios), sample)
    return Record("fused", what, case, "float32", threads, samples, found)


def test_tables_and_the_plot(tmp_path: Path) -> None:
    order = fused.ORDERS[0]
    result = Result(
        {"cpu": "one", "processors": 2, "torch": "2.13.0", "isa": "avx2", "date": "2026-01-01"},
        {},
        [
            record(f"step, {order}", "64x100", 2, builtin=2.0, unfused=1.5),
            record(f"forward, {order}", "64x100", 2, builtin=5.0, unfused=1.0),
            record(f"step, {order}", "5x3", 2, builtin=8.0, unfused=1.0),
            record(f"step, {order}", "5x3", 1, builtin=3.0, unfused=1.0),
            record(f"step, {order}, torch.compile", "5x3", 2, compile=7.0),
        ],
    )
    found = tables.all_tables(result)
    assert [t.title for t in found] == [
        "Fused: Layer step, BN then ReLU, float32, 2 threads",
        "Fused: Layer step, BN then ReLU, float32, 1 thread",
        "Fused: Layer step, BN then ReLU, torch.compile, float32, 2 threads",
        "Fused: Forward of the step, BN then ReLU, float32, 2 threads",
        "Fused layers in short",
    ]
    assert found[0].heading[-2:] == ("builtin/fused", "unfused/fused")
    assert found[0].rows[-2] == ("geometric mean", "", "", "", "4.00", "1.22")
    assert found[0].rows[-1] == ("least", "", "", "", "2.00", "1.00")
    assert found[-1].rows == [
        ("step, BN then ReLU, 2 threads", "4.00", "2.00", "64x100"),
        ("step, BN then ReLU, 1 thread", "3.00", "3.00", "5x3"),
        ("step, BN then ReLU, torch.compile, 2 threads", "7.00", "7.00", "5x3"),
        ("forward, BN then ReLU, 2 threads", "5.00", "5.00", "64x100"),
    ]
    assert [p.name for p in draw(result, tmp_path)] == ["performance-fused.png"]

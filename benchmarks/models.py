"""Parts of a run beyond one layer's time: small layers, MLPs, threads, memory."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

import torch_bn

from .layers import Plan, Shape, dtype_name, named, record, threads_set
from .machine import processors
from .memory import allocated_peak, resident_peak
from .native import floor
from .peers import PEERS, Problem, layer_work
from .result import Ratio, Record, Result, Sample, quartiles
from .timing import Budget, Call, interleave

SMALL: tuple[Shape, ...] = ((64, 100), (64, 300))
CROWD: Shape = (1024, 1024)  # called by too many threads, or by several callers
MLPS = ((784, 300, 100, 10), (784, 1024, 1024, 1024, 10))

# The peers of calls without work, and with the least that a batch norm could do, by the name of
# their share.
PASSING = "passing Function"
ONE_PASS = "one-pass Function"
FLOORS = {"share of calls": PASSING, "share of one pass": ONE_PASS}

# The layers that follow a dense layer, from the number of its outputs, by the network's name.
Make = Callable[[int], Sequence[torch.nn.Module]]
Between = Mapping[str, Make]


class Floor(torch.nn.Module):
    """A module whose forward calls one C++ function that only allocates."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.function = function
        self.weight = torch.nn.Parameter(torch.ones(channels))
        self.bias = torch.nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight, self.bias)


def small(plan: Plan, result: Result) -> None:
    """Layers whose time is that of the calls, against calls without arithmetic."""
    native = floor()
    if isinstance(native, str):
        result.miss("small", "calls that only allocate", native)
        return
    for threads in plan.threads:
        with threads_set(threads):
            for shape in SMALL:
                plan.say(f"small layers {named(shape)}, {threads} threads")
                problem = Problem.of(shape, torch.float32, threads)
                result.records += [
                    _small_forward(plan, problem, native),
                    _small_step(plan, problem, native),
                ]


def _small_forward(plan: Plan, problem: Problem, native: object) -> Record:
    layers = {
        "ours": torch_bn.BatchNorm1d(problem.channels),
        "builtin": torch.nn.BatchNorm1d(problem.channels),
        "empty call": Floor(native.allocate_forward, problem.channels),  # type: ignore[attr-defined]
        "empty Function": Floor(native.empty_function, problem.channels),  # type: ignore[attr-defined]
    }

    def call(layer: torch.nn.Module) -> Call:
        return lambda: layer(problem.x)

    times = interleave({name: call(layer) for name, layer in layers.items()}, plan.budget)
    return _over_floor("forward", problem, times, ("empty call", "empty Function"))


def _small_step(plan: Plan, problem: Problem, native: object) -> Record:
    empty = Floor(native.empty_function, problem.channels)  # type: ignore[attr-defined]
    calls = {name: PEERS[name](problem)["step"] for name in ("ours", "builtin")}
    calls["empty Function"] = layer_work(empty, empty, problem.x, problem.g)["step"]
    return _over_floor("step", problem, interleave(calls, plan.budget), ("empty Function",))


def _over_floor(
    what: str, problem: Problem, times: dict[str, list[float]], floors: Sequence[str]
) -> Record:
    ratios = {f"ours/{name}": Ratio.of(times["ours"], times[name], "lower") for name in floors}
    ratios |= {f"builtin/{name}": Ratio.of(times["builtin"], times[name], None) for name in floors}
    case = named(tuple(problem.x.shape))
    return record("small", what, case, "float32", problem.threads, times, ratios)


def networks(sizes: Sequence[int], between: Between) -> dict[str, torch.nn.Sequential]:
    """Dense layers, and after each but the last what `between` makes of its number of outputs.

    The networks have their dense layers in common: where weights lie in memory alone can make a
    step tens of percent slower.
    """
    dense = [torch.nn.Linear(*pair) for pair in pairwise(sizes)]

    def layers(make: Make) -> Iterator[torch.nn.Module]:
        for linear in dense[:-1]:
            yield linear
            yield from make(linear.out_features)
        yield dense[-1]

    return {name: torch.nn.Sequential(*layers(make)) for name, make in between.items()}


def mlp(plan: Plan, result: Result) -> None:
    """What batch norm adds to the step of a network: ours over the builtin's."""
    relu = torch.nn.ReLU
    between: Between = {
        "ours": lambda c: (relu(), torch_bn.BatchNorm1d(c)),
        "builtin": lambda c: (relu(), torch.nn.BatchNorm1d(c)),
        "without": lambda c: (relu(),),
    }
    shares(plan, result, "mlp", "step", between)


def _floors(part: str, result: Result, without: Make) -> Between:
    """What `without` makes and a function that hands on its input, or copies it."""
    native = floor()
    if isinstance(native, str):
        for name in FLOORS.values():
            result.miss(part, name, native)
        return {}

    def followed_by(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Make:
        return lambda c: (*without(c), Floor(function, c))

    return {
        PASSING: followed_by(native.passing_function),
        ONE_PASS: followed_by(native.one_pass_function),
    }


def shares(
    plan: Plan, result: Result, part: str, what: str, between: Between, own: str = "ours"
) -> None:
    """What the layers of `own` add to the step of a network, over what the builtin's add."""
    between = {**between, **_floors(part, result, between["without"])}
    for threads in plan.threads:
        with threads_set(threads):
            for sizes in MLPS:
                for batch in plan.batches:
                    case = f"{'-'.join(map(str, sizes))}, batch {batch}"
                    plan.say(f"MLP {case}, {threads} threads")
                    x, target = torch.randn(batch, sizes[0]), torch.randint(sizes[-1], (batch,))
                    calls = {
                        name: training_step(model, x, target)
                        for name, model in networks(sizes, between).items()
                    }
                    times = interleave(calls, plan.budget)
                    ratios = {f"builtin/{own}": Ratio.of(times["builtin"], times[own], None)}
                    share = share_of(times, own)
                    for least, peer in reversed(FLOORS.items()):
                        if peer in times and (found := share_of(times, peer)):
                            ratios = {least: replace(found, better=None), **ratios}
                    if share:
                        ratios = {"share": share, **ratios}
                    else:
                        result.miss(
                            part,
                            f"share of {what} at {case}, {threads} threads",
                            "the step with the builtin took no longer than the one without",
                        )
                    result.records.append(
                        record(part, what, case, "float32", threads, times, ratios)
                    )


def training_step(model: torch.nn.Module, x: Tensor, target: Tensor) -> Call:
    """Gradients set to None, forward, cross entropy, backward; no optimiser."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(model(x), target).backward()

    return step


def share_of(times: dict[str, list[float]], own: str = "ours") -> Ratio | None:
    """(own - without) / (builtin - without), or None where the builtin adds nothing."""
    ours, builtin, without = (statistics.median(times[n]) for n in (own, "builtin", "without"))
    paired = [
        (o - w) / (b - w)
        for o, b, w in zip(times[own], times["builtin"], times["without"], strict=True)
        if b > w
    ]
    if builtin <= without or not paired:
        return None
    return Ratio((ours - without) / (builtin - without), *quartiles(paired), "lower")


def thread_counts(most: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    powers = [2**i for i in range(most.bit_length()) if 2**i < most]
    return [*powers, most]


def threads(plan: Plan, result: Result) -> None:
    """The gain of more threads, and what happens when there are too many."""
    most = max(plan.threads)
    for shape in plan.shapes:
        if most > 1:
            plan.say(f"threads {named(shape)}")
            result.records.append(_scaling(plan, shape, most))
    result.records += [_oversubscribed(plan, CROWD, 4 * processors())]
    with threads_set(most):
        result.records += [_two_callers(plan, CROWD, most)]
        native = floor()
        if isinstance(native, str):
            result.miss("threads", "calls inside a parallel region", native)
        else:
            result.records += [_inside(plan, CROWD, most, native)]


def _with_threads(count: int, call: Call) -> Call:
    def run() -> None:
        torch.set_num_threads(count)
        call()

    return run


def _scaling(plan: Plan, shape: Shape, most: int) -> Record:
    native = floor()
    problem = Problem.of(shape, plan.dtype, most)
    step = PEERS["ours"](problem)["step"]
    target = torch.empty_like(problem.x)
    calls: dict[str, Call] = {}
    for count in thread_counts(most):
        calls[f"ours {count}"] = _with_threads(count, step)
        if not isinstance(native, str):
            for kind in (False, True) if native.can_stream() else (False,):
                calls[f"{'streaming' if kind else 'memcpy'} {count}"] = (
                    lambda kind=kind, count=count: native.copy(target, problem.x, kind, count)
                )
    with threads_set(most):
        times = interleave(calls, plan.budget)
    # The best copy of each number of threads.
    for count in thread_counts(most):
        kinds = [f"{k} {count}" for k in ("memcpy", "streaming") if f"{k} {count}" in times]
        if kinds:
            times[f"copy {count}"] = min((times[k] for k in kinds), key=statistics.median)
    times = {n: t for n, t in times.items() if n.startswith(("ours", "copy"))}
    ratios = {
        f"{name} gain": Ratio.of(
            times[f"{name} 1"], times[f"{name} {most}"], "higher" if name == "ours" else None
        )
        for name in ("ours", "copy")
        if f"{name} 1" in times
    }
    return record(
        "threads",
        "gain, step",
        named(shape),
        dtype_name(plan.dtype),
        most,
        times,
        ratios,
        problem.x.nbytes,
    )


def _oversubscribed(plan: Plan, shape: Shape, crowd: int) -> Record:
    """More threads than processors. In blocks: a change of the count makes new threads."""
    problem = Problem.of(shape, torch.float32, crowd)
    calls = {name: PEERS[name](problem)["step"] for name in ("ours", "builtin")}
    repetitions = max(15, plan.budget.repetitions)
    times = {}
    for label, count in (("normal", processors()), (f"{crowd} threads", crowd)):
        with threads_set(count):
            found = interleave(calls, Budget(0, repetitions, repetitions))
        times |= {f"{name}, {label}": values for name, values in found.items()}
    ratios = {
        f"{name}/normal": Ratio.of(
            times[f"{name}, {crowd} threads"],
            times[f"{name}, normal"],
            "lower" if name == "ours" else None,
        )
        for name in calls
    }
    return record("threads", "oversubscribed", named(shape), "float32", crowd, times, ratios)


def _operators(shape: Shape) -> tuple[dict[str, Call], tuple[Tensor, Tensor, Tensor]]:
    problem = Problem.of(shape, torch.float32, 1)
    leaves = (problem.x, torch.ones(problem.channels), torch.zeros(problem.channels))
    op = torch.ops.torch_bn.batch_norm.default
    aten = torch.ops.aten.native_batch_norm.default
    calls: dict[str, Call] = {
        "ours": lambda: op(*leaves, None, None, None, True, 0.1, 1e-5),
        "builtin": lambda: aten(*leaves, None, None, True, 0.1, 1e-5),
    }
    return calls, leaves


def _two_callers(plan: Plan, shape: Shape, count: int) -> Record:
    """Two Python threads that call at once; seconds a call, of all calls together."""
    each = 20

    def both(call: Call) -> float:
        barrier = threading.Barrier(3)

        def caller() -> None:
            # A thread starts with torch's default number of threads.
            torch.set_num_threads(count)
            call()
            barrier.wait()
            for _ in range(each):
                call()

        callers = [threading.Thread(target=caller) for _ in range(2)]
        for thread in callers:
            thread.start()
        barrier.wait()
        start = time.perf_counter()
        for thread in callers:
            thread.join()
        return (time.perf_counter() - start) / (2 * each)

    def alone(call: Call) -> float:
        start = time.perf_counter()
        for _ in range(2 * each):
            call()
        return (time.perf_counter() - start) / (2 * each)

    calls, _ = _operators(shape)
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        both(call)
        pairs = [(alone(call), both(call)) for _ in range(max(7, plan.budget.repetitions))]
        times[f"{name} alone"] = [pair[0] for pair in pairs]
        times[f"{name}, two at once"] = [pair[1] for pair in pairs]
    ratios = {
        f"{name}, two at once/alone": Ratio.of(
            times[f"{name}, two at once"],
            times[f"{name} alone"],
            "lower" if name == "ours" else None,
        )
        for name in calls
    }
    return record("threads", "two callers", named(shape), "float32", count, times, ratios)


def _inside(plan: Plan, shape: Shape, count: int, native: object) -> Record:
    """Every thread of an OpenMP region calls; seconds a call, of all calls together."""
    calls, leaves = _operators(shape)
    inside = native.inside_a_region  # type: ignore[attr-defined]
    times = interleave(
        {"alone": calls["ours"], "in a region": lambda: inside(*leaves, count)},
        plan.budget,
        grad=False,
    )
    times["in a region"] = [t / count for t in times["in a region"]]
    ratios = {"in a region/alone": Ratio.of(times["in a region"], times["alone"], "lower")}
    return record("threads", "inside a region", named(shape), "float32", count, times, ratios)


def memory(plan: Plan, result: Result) -> None:
    """The most that a step holds beyond x and g."""
    count = max(plan.threads)
    with threads_set(count):
        for shape in plan.shapes:
            plan.say(f"memory {named(shape)}")
            problem = Problem.of(shape, plan.dtype, count)
            peaks: dict[str, int] = {}
            for name in ("ours", "builtin"):
                work = PEERS[name](problem)
                peaks[f"{name} allocated"] = allocated_peak(work["step"], work["clear"])
                resident = resident_peak(work["step"], work["clear"])
                work["clear"]()
                if isinstance(resident, str):
                    result.miss("memory", "resident memory", resident)
                else:
                    peaks[f"{name} resident"] = resident
            ratios = {}
            for kind in ("allocated", "resident"):
                # A tiny step fits into memory that the process has already: 0 bytes more.
                if peaks.get(f"ours {kind}") and peaks.get(f"builtin {kind}"):
                    above, below = ([float(peaks[f"{n} {kind}"])] for n in ("ours", "builtin"))
                    ratios[f"ours/builtin {kind}"] = Ratio.of(above, below, "lower")
            samples = {name: Sample.of([float(peak)]) for name, peak in peaks.items()}
            case, dtype = named(shape), dtype_name(plan.dtype)
            size = problem.x.nbytes
            result.records.append(
                Record("memory", "step", case, dtype, count, samples, ratios, "B", size)
            )

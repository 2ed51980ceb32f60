"""Parts of a run that measure one layer or its kernels: grid, kernels, bf16."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .native import floor
from .peers import DIRECTIONS, OWN_THREADS, PEERS, AbsentError, Problem, Work
from .result import Ratio, Record, Result, Sample
from .timing import Budget, Call, interleave

Shape = tuple[int, ...]

# Terms of measurement, in docs/performance.md.
GRID: tuple[Shape, ...] = (
    (64, 100),
    (64, 300),
    (256, 1024),
    (1024, 1024),
    (4096, 1024),
    (4096, 4096),
    (65536, 256),
    (1048576, 64),
    (512, 16384),
    (32, 64, 512),
    (128, 256, 64),
)
# The other peers compile for each shape: unless they are named, they are measured here only.
FEW: tuple[Shape, ...] = ((64, 100), (1024, 1024), (65536, 256), (32, 64, 512))
QUICK: tuple[Shape, ...] = ((64, 100), (256, 1024), (4096, 1024), (32, 64, 512))
LARGE: tuple[Shape, ...] = ((4096, 1024), (4096, 4096), (65536, 256), (128, 256, 64))


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: tuple[Shape, ...] = GRID
    dtype: torch.dtype = torch.float32
    threads: tuple[int, ...] = (1,)
    directions: tuple[str, ...] = DIRECTIONS
    peers: tuple[str, ...] = ()  # beside the builtin
    peers_everywhere: bool = False  # or at the shapes of FEW, with the first number of threads
    budget: Budget = field(default_factory=lambda: Budget(1.5))
    batches: tuple[int, ...] = (32, 64, 256, 1024)
    say: Callable[[str], None] = print


def named(shape: Shape) -> str:
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """torch's number of threads, and back again."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def record(
    part: str,
    what: str,
    case: str,
    dtype: str,
    threads: int,
    times: dict[str, list[float]],
    ratios: dict[str, Ratio],
    size: int = 0,
) -> Record:
    samples = {name: Sample.of(values) for name, values in times.items()}
    return Record(part, what, case, dtype, threads, samples, ratios, size=size)


def grid(plan: Plan, result: Result) -> None:
    """Step, forward and evaluation of ours and the builtin, over shapes and threads."""
    for threads in plan.threads:
        with threads_set(threads):
            for shape in plan.shapes:
                plan.say(f"layers {named(shape)}, {threads} threads")
                problem = Problem.of(shape, plan.dtype, threads)
                result.records += _layers("grid", plan, problem, ("builtin",), result)


def others(plan: Plan, result: Result) -> None:
    """The same calls of ours and the other peers, apart from the grid: they use other memory."""
    for threads in plan.threads if plan.peers_everywhere else plan.threads[:1]:
        with threads_set(threads):
            for shape in plan.shapes:
                if plan.peers_everywhere or shape in FEW:
                    plan.say(f"other peers {named(shape)}, {threads} threads")
                    problem = Problem.of(shape, plan.dtype, threads)
                    result.records += _layers("peers", plan, problem, plan.peers, result)


def _layers(
    part: str, plan: Plan, problem: Problem, peers: Sequence[str], result: Result
) -> Iterator[Record]:
    work: dict[str, Work] = {"ours": PEERS["ours"](problem)}
    for name in peers:
        try:
            work[name] = PEERS[name](problem)
        except AbsentError as absent:
            result.miss(part, name, str(absent))
    if len(work) == 1:
        return
    for direction in plan.directions:
        times = interleave(
            {name: calls[direction] for name, calls in work.items()},
            plan.budget,
            grad=direction != "evaluation",
            own_threads=OWN_THREADS,
        )
        ratios = {
            f"{name}/ours": Ratio.of(times[name], times["ours"]) for name in work if name != "ours"
        }
        case = named(tuple(problem.x.shape))
        yield record(
            part,
            direction,
            case,
            dtype_name(plan.dtype),
            problem.threads,
            times,
            ratios,
            problem.x.nbytes,
        )


def kernel_calls(problem: Problem) -> dict[str, Call]:
    """The private operators of ours, and torch's own beside them."""
    x, g, c = problem.x, problem.g, problem.channels
    weight, var = (torch.ones(c, dtype=problem.parameter_dtype) for _ in range(2))
    bias, mean = torch.zeros_like(weight), torch.zeros_like(weight)
    ops, aten = torch.ops.torch_bn, torch.ops.aten
    forward = ops._batch_norm_forward.default
    backward = ops.batch_norm_backward.default
    inference = ops._batch_norm_inference.default
    _, stats = forward(x, weight, bias, mean, var, None, True, 0.1, 1e-5)
    _, *saved = aten.native_batch_norm(x, weight, bias, mean, var, True, 0.1, 1e-5)
    masks = [True, True, True]
    return {
        "forward": lambda: forward(x, weight, bias, mean, var, None, True, 0.1, 1e-5),
        "backward": lambda: backward(g, x, weight, stats, True, 1e-5, masks),
        "evaluation": lambda: inference(x, weight, bias, mean, var, 1e-5),
        "builtin forward": lambda: aten.native_batch_norm.default(
            x, weight, bias, mean, var, True, 0.1, 1e-5
        ),
        "builtin backward": lambda: aten.native_batch_norm_backward.default(
            g, x, weight, mean, var, *saved, True, 1e-5, masks
        ),
        "builtin evaluation": lambda: aten.native_batch_norm.default(
            x, weight, bias, mean, var, False, 0.1, 1e-5
        ),
    }


def copy_calls(x: Tensor, threads: int, target: Callable[[], Tensor]) -> dict[str, Call]:
    """Copies of x with that many threads; empty when the C++ floor could not be built."""
    native = floor()
    if isinstance(native, str):
        return {}
    calls: dict[str, Call] = {"memcpy": lambda: native.copy(target(), x, False, threads)}
    if native.can_stream():
        calls["streaming"] = lambda: native.copy(target(), x, True, threads)
    return calls


@contextmanager
def reused_memory() -> Iterator[None]:
    """Results lie in memory that was used before, whoever allocates them."""
    native = floor()
    if isinstance(native, str):
        yield
        return
    native.reuse_memory(True)
    try:
        yield
    finally:
        native.reuse_memory(False)


def best(times: dict[str, list[float]], names: tuple[str, ...]) -> str:
    """The one of the least median."""
    return min((n for n in names if n in times), key=lambda n: Sample.of(times[n]).median)


COPIES = ("memcpy", "streaming")
# Behind the name of what was measured with results wherever torch's allocator puts them.
NEW = ", new"


def kernels(plan: Plan, result: Result) -> None:
    """The operators as multiples of the best copy of their input, alone and with the allocation."""
    native = floor()
    if isinstance(native, str):
        result.miss("kernels", "copy", native)
    elif not native.can_stream():
        result.miss("kernels", "streaming copy", "only memcpy: this processor has no AVX2")
    for threads in plan.threads:
        with threads_set(threads):
            for shape in plan.shapes:
                plan.say(f"kernels {named(shape)}, {threads} threads")
                problem = Problem.of(shape, plan.dtype, threads)
                times = kernel_times(problem, plan.budget)
                ratios = kernel_ratios(times)
                result.records.append(
                    record(
                        "kernels",
                        "kernels",
                        named(shape),
                        dtype_name(plan.dtype),
                        threads,
                        times,
                        ratios,
                        problem.x.nbytes,
                    )
                )


def kernel_times(problem: Problem, budget: Budget) -> dict[str, list[float]]:
    """Of operators and copies, onto memory that was used before and wherever it is allocated."""
    calls = kernel_calls(problem)
    x, threads = problem.x, problem.threads

    def onto_reused_memory() -> dict[str, list[float]]:
        target = torch.empty_like(x)
        return interleave(calls | copy_calls(x, threads, lambda: target), budget, grad=False)

    with reused_memory():
        times = onto_reused_memory()
    copies = copy_calls(x, threads, lambda: torch.empty_like(x))
    allocating = interleave(calls | copies, budget, grad=False)
    return times | {name + NEW: samples for name, samples in allocating.items()}


def kernel_ratios(times: dict[str, list[float]]) -> dict[str, Ratio]:
    """Multiples of the copy, both onto memory that was used before, or both with its allocation."""
    ratios = {}
    for operator in ("forward", "backward", "evaluation"):
        theirs = times[f"builtin {operator}"]
        ratios[f"builtin {operator}/{operator}"] = Ratio.of(theirs, times[operator])
        if "memcpy" in times:
            copy = times[best(times, COPIES)]
            new_copy = times[best(times, tuple(name + NEW for name in COPIES))]
            ratios[f"{operator}/copy"] = Ratio.of(times[operator], copy, "lower")
            ratios[f"{operator}/new copy"] = Ratio.of(times[operator + NEW], new_copy, "lower")
            ratios[f"builtin {operator}/copy"] = Ratio.of(theirs, copy, None)
    return ratios


def sixteen_bits(plan: Plan, result: Result) -> None:
    """A step in bfloat16 with float32 parameters against one in float32, element by element."""
    for threads in plan.threads:
        with threads_set(threads):
            for shape in plan.shapes:
                plan.say(f"bfloat16 {named(shape)}, {threads} threads")
                calls = {}
                for dtype in (torch.float32, torch.bfloat16):
                    problem = Problem.of(shape, dtype, threads)
                    for name in ("ours", "builtin"):
                        work = PEERS[name](problem)["step"]
                        calls[f"{name} {dtype_name(dtype)}"] = work
                times = interleave(calls, plan.budget)
                ratios = {
                    "ours bfloat16/float32": Ratio.of(
                        times["ours bfloat16"], times["ours float32"], "lower"
                    ),
                    "builtin bfloat16/float32": Ratio.of(
                        times["builtin bfloat16"], times["builtin float32"], None
                    ),
                    "builtin/ours": Ratio.of(times["builtin bfloat16"], times["ours bfloat16"]),
                }
                size = 2 * math.prod(shape)
                result.records.append(
                    record("bf16", "step", named(shape), "bfloat16", threads, times, ratios, size)
                )

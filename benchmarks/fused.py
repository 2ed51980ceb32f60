"""Parts of a run about batch norm with the ReLU beside it: as one layer, and as the two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_bn

from .layers import Plan, dtype_name, named, record, threads_set
from .memory import allocated_after, allocated_peak
from .models import Between, networks, shares
from .peers import AbsentError, Problem, Work, compiled_work, layer_work
from .result import Ratio, Record, Result, Sample
from .timing import interleave

ORDERS = ("BN then ReLU", "ReLU then BN")
# Ten times a dense layer and what follows it, and a last dense layer to ten classes.
DEEP = (512,) * 11 + (10,)
COMPILE = "torch.compile"  # in the name of the records that are measured beside it

Norm = Callable[..., torch.nn.Module]
Context = Callable[[], AbstractContextManager[object]]


def pair(order: str, norm: Norm, channels: int, **options: object) -> list[torch.nn.Module]:
    """A batch norm and a ReLU of their own, in that order."""
    both = [norm(channels, **options), torch.nn.ReLU()]
    return both if order == "BN then ReLU" else both[::-1]


def whole(order: str, channels: int, **options: object) -> torch.nn.Module:
    """Our layer that is both."""
    after = order == "BN then ReLU"
    fused: Norm = torch_bn.BatchNormReLU1d if after else torch_bn.ReLUBatchNorm1d
    return fused(channels, **options)


def modules(name: str, order: str, problem: Problem) -> list[torch.nn.Module]:
    """Two of a kind, one to train and one to evaluate: fused, unfused or builtin."""
    channels, dtype = problem.channels, problem.parameter_dtype
    if name == "fused":
        return [whole(order, channels, dtype=dtype) for _ in range(2)]
    norm = torch_bn.BatchNorm1d if name == "unfused" else torch.nn.BatchNorm1d
    return [torch.nn.Sequential(*pair(order, norm, channels, dtype=dtype)) for _ in range(2)]


def work_of(name: str, order: str, problem: Problem) -> Work:
    return layer_work(*modules(name, order, problem), problem.x, problem.g)


def layers(plan: Plan, result: Result) -> None:
    """Both orders over shapes and threads: fused, the builtin pair, and our layer beside a ReLU."""
    for threads in plan.threads:
        with threads_set(threads):
            for shape in plan.shapes:
                problem = Problem.of(shape, plan.dtype, threads)
                for order in ORDERS:
                    plan.say(f"{order} {named(shape)}, {threads} threads")
                    result.records += _against_eager(plan, order, problem)
    if "compile" in plan.peers and "step" in plan.directions:
        # Apart from the others, for its memory and its compiler's, which last.
        with threads_set(plan.threads[0]):
            for shape in plan.shapes:
                problem = Problem.of(shape, plan.dtype, plan.threads[0])
                for order in ORDERS:
                    plan.say(f"{order} {named(shape)}, {COMPILE}")
                    result.records += _against_compiled(plan, order, problem, result)


def _against_eager(plan: Plan, order: str, problem: Problem) -> list[Record]:
    work = {name: work_of(name, order, problem) for name in ("fused", "unfused", "builtin")}
    found = []
    for direction in plan.directions:
        calls = {name: calls[direction] for name, calls in work.items()}
        times = interleave(calls, plan.budget, grad=direction != "evaluation")
        ratios = {
            "builtin/fused": Ratio.of(times["builtin"], times["fused"]),
            "unfused/fused": Ratio.of(times["unfused"], times["fused"], None),
        }
        found.append(_record(plan, f"{direction}, {order}", problem, times, ratios))
    return found


def _against_compiled(plan: Plan, order: str, problem: Problem, result: Result) -> list[Record]:
    try:
        theirs = compiled_work(*modules("builtin", order, problem), problem, ("step",))
    except AbsentError as absent:
        result.miss("fused", "compile", str(absent))
        return []
    ours = work_of("fused", order, problem)
    times = interleave({"fused": ours["step"], "compile": theirs["step"]}, plan.budget)
    ratios = {"compile/fused": Ratio.of(times["compile"], times["fused"])}
    return [_record(plan, f"step, {order}, {COMPILE}", problem, times, ratios)]


def _record(
    plan: Plan,
    what: str,
    problem: Problem,
    times: dict[str, list[float]],
    ratios: dict[str, Ratio],
) -> Record:
    case, dtype = named(tuple(problem.x.shape)), dtype_name(plan.dtype)
    return record("fused", what, case, dtype, problem.threads, times, ratios, problem.x.nbytes)


def between(order: str) -> Between:
    """What follows a dense layer, by the name of the kind."""
    return {
        "fused": lambda c: (whole(order, c),),
        "unfused": lambda c: pair(order, torch_bn.BatchNorm1d, c),
        "builtin": lambda c: pair(order, torch.nn.BatchNorm1d, c),
        "without": lambda c: (),
    }


def mlp(plan: Plan, result: Result) -> None:
    """What batch norm and ReLU add to the step of a network: fused over the builtin pair."""
    for order in ORDERS:
        kinds = {name: make for name, make in between(order).items() if name != "unfused"}
        shares(plan, result, "fused-mlp", order, kinds, "fused")


@dataclass
class DeepStep:
    """A training step in two halves; the loss alone lives between them."""

    model: torch.nn.Module
    x: Tensor
    target: Tensor
    context: Context = nullcontext
    loss: Tensor | None = None

    def clear(self) -> None:
        self.loss = None
        self.model.zero_grad(set_to_none=True)

    def forward(self) -> None:
        with self.context():
            self.loss = torch.nn.functional.cross_entropy(self.model(self.x), self.target)

    def step(self) -> None:
        self.clear()
        self.forward()
        assert self.loss is not None
        self.loss.backward()


def deep_steps(order: str, batch: int) -> dict[str, DeepStep]:
    """One of each kind, and of the fused one under lean()."""
    kinds = {name: make for name, make in between(order).items() if name != "without"}
    found = networks(DEEP, {name: kinds[name] for name in ("builtin", "unfused", "fused")})
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, DEEP[0], generator=generator)
    target = torch.randint(DEEP[-1], (batch,), generator=generator)
    steps = {name: DeepStep(model, x, target) for name, model in found.items()}
    return steps | {"lean": DeepStep(found["fused"], x, target, torch_bn.lean)}


@contextmanager
def gradients_dropped(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Parameters' gradients are let go as soon as they are whole."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    # Those that several networks share are there once.
    parameters = dict.fromkeys(p for model in models for p in model.parameters())
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def memory(plan: Plan, result: Result) -> None:
    """What a step of a deep network holds, and how long it takes."""
    count, batch = max(plan.threads), max(plan.batches)
    with threads_set(count):
        for order in ORDERS:
            plan.say(f"memory of {order}, batch {batch}")
            steps = deep_steps(order, batch)
            held = {n: allocated_after(s.forward, s.clear) for n, s in steps.items()}
            peak = {n: allocated_peak(s.step, s.clear) for n, s in steps.items()}
            with gradients_dropped(s.model for s in steps.values()):
                without = {n: allocated_peak(s.step, s.clear) for n, s in steps.items()}
            times = interleave({n: s.step for n, s in steps.items()}, plan.budget)
            for what, bytes_of in (
                ("held for the backward", held),
                ("peak without gradients", without),
                ("peak", peak),
            ):
                values = {n: [float(b)] for n, b in bytes_of.items()}
                result.records.append(_deep_record(what, order, batch, count, values, "B"))
            result.records.append(_deep_record("time", order, batch, count, times, "s"))


def _deep_record(
    what: str, order: str, batch: int, threads: int, values: dict[str, list[float]], unit: str
) -> Record:
    """Over the builtin's: a guard for memory's, which does not vary; times are for information."""
    ratios = {
        f"{name}/builtin": Ratio.of(own, values["builtin"], "lower" if unit == "B" else None)
        for name, own in values.items()
        if name != "builtin"
    }
    samples = {name: Sample.of(own) for name, own in values.items()}
    case = f"{order}, batch {batch}"
    return Record("fused-memory", what, case, "float32", threads, samples, ratios, unit)

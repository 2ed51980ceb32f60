"""Who is measured: torch_bn, the builtin layer, and others that do the same work.

A peer makes its layer, data and gradient beforehand and offers three calls: the layer step, its
forward alone, and the forward in evaluation.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import torch_bn

from .machine import processors
from .native import BUILD, reason
from .timing import Call

DIRECTIONS = ("step", "forward", "evaluation")


class AbsentError(Exception):
    """A peer cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """Input and gradient of one shape, of unit variance around a small mean."""

    x: Tensor
    g: Tensor
    threads: int

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, threads: int) -> Problem:
        generator = torch.Generator().manual_seed(0)
        x, g = (torch.randn(shape, generator=generator).add_(0.5).to(dtype) for _ in range(2))
        return Problem(x, g, threads)

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def parameter_dtype(self) -> torch.dtype:
        """float32 beside 16-bit inputs, as in mixed precision."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32


Work = dict[str, Call]
Make = Callable[[Problem], Work]


def layer_work(
    training: torch.nn.Module, evaluation: torch.nn.Module, x: Tensor, g: Tensor
) -> Work:
    """The three calls of a module, and `clear`, which drops the gradients of the last step."""
    evaluation.eval()
    leaf = x.detach().requires_grad_()
    leaves = (leaf, *training.parameters())

    def clear() -> None:
        for tensor in leaves:
            tensor.grad = None

    def step() -> None:
        clear()
        training(leaf).backward(g)

    return {
        "clear": clear,
        "step": step,
        "forward": lambda: training(leaf),
        "evaluation": lambda: evaluation(x),
    }


def _two(layer: type[torch.nn.Module], problem: Problem) -> tuple[torch.nn.Module, torch.nn.Module]:
    options = {"dtype": problem.parameter_dtype}
    first, second = (layer(problem.channels, **options) for _ in range(2))
    return first, second


def ours(problem: Problem) -> Work:
    return layer_work(*_two(torch_bn.BatchNorm1d, problem), problem.x, problem.g)


def builtin(problem: Problem) -> Work:
    return layer_work(*_two(torch.nn.BatchNorm1d, problem), problem.x, problem.g)


def compiled(problem: Problem) -> Work:
    """torch.compile of the builtin layer."""
    return compiled_work(*_two(torch.nn.BatchNorm1d, problem), problem)


def compiled_work(
    training: torch.nn.Module,
    evaluation: torch.nn.Module,
    problem: Problem,
    directions: Sequence[str] = DIRECTIONS,
) -> Work:
    """torch.compile of both; what `directions` call is compiled here, where it isn't timed."""
    # Generated code is found again by the next run.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(BUILD / "inductor"))
    torch._dynamo.reset()
    try:
        first, second = (torch.compile(m, dynamic=False) for m in (training, evaluation))
        work = layer_work(first, second, problem.x, problem.g)
        work["step"]()
        if "evaluation" in directions:
            with torch.no_grad():
                work["evaluation"]()
    except Exception as error:
        # Of many types, from dynamo down to the C++ compiler that is missing.
        raise AbsentError(
            f"torch.compile failed (it needs a C++ compiler): {reason(error)}"
        ) from None
    return work


def onednn(problem: Problem) -> Work:
    """The builtin layer on mkldnn tensors, which take (N, C, H, W) only: L as H."""
    if not torch.backends.mkldnn.is_available():
        raise AbsentError("this torch was built without oneDNN")

    def converted(tensor: Tensor) -> Tensor:
        n, c = tensor.shape[:2]
        return tensor.reshape(n, c, -1, 1).to_mkldnn()

    try:
        x, g = converted(problem.x), converted(problem.g)
        work = layer_work(*_two(torch.nn.BatchNorm2d, problem), x, g)
        work["step"]()
        with torch.no_grad():
            work["evaluation"]()
    except (RuntimeError, NotImplementedError) as error:
        raise AbsentError(f"refused by torch's oneDNN operator: {reason(error)}") from None
    return work


def jax(problem: Problem) -> Work:
    """A batch norm in JAX, jitted, with its derivative by jax.vjp."""
    if importlib.util.find_spec("jax") is None:
        raise AbsentError("jax is not installed (pip install jax)")
    if problem.threads != processors():
        # XLA sizes its pool when it starts, by the processors the process may run on.
        raise AbsentError(
            f"XLA's threads are as many as the processors, {processors()}, and cannot be set to "
            f"{problem.threads} inside the process; 'taskset -c 0 python -m benchmarks --threads 1 "
            "--only peers --peers jax' measures it on one"
        )
    if problem.x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise AbsentError(f"not measured in {problem.x.dtype}: JAX has 64 bits switched off")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax as jx
    import jax.numpy as jnp

    dtype = {torch.float32: jnp.float32, torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}
    x, g = (jnp.asarray(t.float().numpy()).astype(dtype[t.dtype]) for t in (problem.x, problem.g))
    axes = (0,) if x.ndim == 2 else (0, 2)
    spread = (1, -1) if x.ndim == 2 else (1, -1, 1)
    rows = x.size // x.shape[1]
    weight, bias = jnp.ones(x.shape[1]), jnp.zeros(x.shape[1])
    running = (jnp.zeros(x.shape[1]), jnp.ones(x.shape[1]))

    def normalise(x, mean, var, weight, bias):  # type: ignore[no-untyped-def]
        scale = jx.lax.rsqrt(var + 1e-5) * weight
        y = (x - mean.reshape(spread)) * scale.reshape(spread) + bias.reshape(spread)
        return y.astype(x.dtype)

    def layer(x, weight, bias, running):  # type: ignore[no-untyped-def]
        wide = x.astype(jnp.float32)
        mean, var = wide.mean(axes), wide.var(axes)
        unbiased = var * (rows / (rows - 1))
        updated = tuple(0.9 * r + 0.1 * s for r, s in zip(running, (mean, unbiased), strict=True))
        return normalise(x, mean, var, weight, bias), updated

    @jx.jit
    def step(x, weight, bias, running, g):  # type: ignore[no-untyped-def]
        y, vjp, updated = jx.vjp(
            lambda *leaves: layer(*leaves, running), x, weight, bias, has_aux=True
        )
        # y is among the results, as it is in torch.
        return y, vjp(g), updated

    forward = jx.jit(layer)
    evaluation = jx.jit(lambda x, weight, bias, running: normalise(x, *running, weight, bias))

    def call(function: Callable[..., object], *arguments: object) -> Call:
        return lambda: jx.block_until_ready(function(*arguments))

    return {
        "step": call(step, x, weight, bias, running, g),
        "forward": call(forward, x, weight, bias, running),
        "evaluation": call(evaluation, x, weight, bias, running),
    }


PEERS: dict[str, Make] = {
    "ours": ours,
    "builtin": builtin,
    "compile": compiled,
    "onednn": onednn,
    "jax": jax,
}
# Theirs is a thread pool beside torch's.
OWN_THREADS = frozenset({"jax"})

"""Errors of a batch norm against a wider computation of the same data.

The error of an array is max |a - a64| / s, where a64 comes from wider arithmetic on the same input
and s is max |a64|. Sums may cancel, so s is for grad_input the largest of its first term,
|weight * invstd * grad_output|, and for grad_weight and grad_bias the largest channel's root of
the sum of squared terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPS = 1e-5
MOMENTUM = 0.1
QUANTITIES = ("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Problem:
    """Arguments of one forward and backward; `x` and `grad_output` are (N, C) or (N, C, L)."""

    x: Tensor
    grad_output: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool


def make_problem(
    shape: tuple[int, ...],
    mean: float,
    std: float,
    *,
    training: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Problem:
    """Normal data; in evaluation, running statistics that fit them."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    x = normal(*shape).mul_(std).add_(mean)
    statistics = torch.zeros(channels), torch.ones(channels)
    if not training:
        statistics = torch.full((channels,), mean), torch.full((channels,), std * std)
    return Problem(
        x=x,
        grad_output=normal(*shape),
        weight=normal(channels) * 0.25 + 1,
        bias=normal(channels),
        running_mean=statistics[0].to(dtype),
        running_var=statistics[1].to(dtype),
        training=training,
    )


def run(layer_class: type[torch.nn.BatchNorm1d], problem: Problem) -> dict[str, Tensor]:
    """The six results of one forward and backward of a layer, in the problem's dtype."""
    channels = problem.x.shape[1]
    layer = layer_class(channels, eps=EPS, momentum=MOMENTUM, dtype=problem.x.dtype)
    layer.train(problem.training)
    with torch.no_grad():
        layer.weight.copy_(problem.weight)
        layer.bias.copy_(problem.bias)
        layer.running_mean.copy_(problem.running_mean)
        layer.running_var.copy_(problem.running_var)
    x = problem.x.detach().requires_grad_()
    y = layer(x)
    y.backward(problem.grad_output)
    return {
        "y": y.detach(),
        "grad_input": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def errors(
    results: dict[str, Tensor], problem: Problem, wide: type[np.floating] = np.float64
) -> dict[str, float]:
    """Error of each result against arithmetic in `wide` (float64, or longdouble for float64 data).

    Channels are taken a few at a time, so that the wide copies stay small.
    """
    distance = dict.fromkeys(QUANTITIES, 0.0)
    scale = dict.fromkeys(QUANTITIES, 0.0)
    for chosen in _channel_groups(problem.x):
        want = _reference(problem, chosen, wide)
        for name, (value, own_scale) in want.items():
            got = _matrix(results[name], chosen).astype(wide)
            away = np.abs(got - value).max(initial=0)
            distance[name] = float(np.maximum(distance[name], away))  # a NaN stays
            scale[name] = max(scale[name], float(own_scale))
    return {name: distance[name] / scale[name] if scale[name] else distance[name] for name in want}


def mean_over_std(problem: Problem) -> float:
    """Largest |mean| / std of a channel, of the statistics that normalise it.

    Few rows may lie closer together than the distribution that they are drawn from.
    """
    if not problem.training:
        return (problem.running_mean.abs() / problem.running_var.sqrt()).max().item()
    dims = (0,) if problem.x.dim() == 2 else (0, 2)
    var, mean = torch.var_mean(problem.x.double(), dims, correction=0)
    return (mean.abs() / var.sqrt()).max().item()


def _channel_groups(x: Tensor) -> Iterator[slice]:
    rows = x.numel() // x.shape[1]
    width = max(1, (1 << 24) // rows)
    for first in range(0, x.shape[1], width):
        yield slice(first, first + width)


def _matrix(array: Tensor, channels: slice) -> NDArray[np.floating]:
    """The chosen channels as (rows, channels), or as a vector of per-channel values."""
    if array.dim() == 1:
        return array.detach()[channels].numpy()
    part = array.detach()[:, channels]
    if part.dim() == 3:
        part = part.transpose(1, 2).flatten(0, 1)
    return part.numpy()


def _reference(
    problem: Problem, channels: slice, wide: type[np.floating]
) -> dict[str, tuple[NDArray[np.floating], np.floating]]:
    """Each result and its scale, straight from the definition."""

    def part(array: Tensor) -> NDArray[np.floating]:
        return _matrix(array, channels).astype(wide)

    x, g, weight, bias = map(part, (problem.x, problem.grad_output, problem.weight, problem.bias))
    running_mean, running_var = part(problem.running_mean), part(problem.running_var)
    rows = wide(len(x))
    if problem.training:
        mean = x.sum(0) / rows
        centred = x - mean
        mean = mean + centred.sum(0) / rows  # the rounding of the first sum
        centred = x - mean
        var = (centred * centred).sum(0) / rows
        share = wide(MOMENTUM)
        running_mean = (1 - share) * running_mean + share * mean
        running_var = (1 - share) * running_var + share * var * rows / (rows - 1)
    else:
        centred = x - running_mean
        var = running_var
    invstd = 1 / np.sqrt(var + wide(EPS))
    xhat = centred * invstd
    terms = g * xhat
    grad_weight, grad_bias = terms.sum(0), g.sum(0)
    first = g * (weight * invstd)
    grad_input = first
    if problem.training:
        grad_input = (g - grad_bias / rows - xhat * (grad_weight / rows)) * (weight * invstd)
    y = xhat * weight + bias

    def largest(array: NDArray[np.floating]) -> np.floating:
        return np.abs(array).max()

    return {
        "y": (y, largest(y)),
        "grad_input": (grad_input, largest(first)),
        "grad_weight": (grad_weight, np.sqrt((terms * terms).sum(0)).max()),
        "grad_bias": (grad_bias, np.sqrt((g * g).sum(0)).max()),
        "running_mean": (running_mean, largest(running_mean)),
        "running_var": (running_var, largest(running_var)),
    }

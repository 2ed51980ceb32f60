"""Networks and training that the experiments share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torch_bn
from mlp.data import Dataset, Preprocessor
from mlp.model import generator
from mlp.training import Batches, evaluate
from study.experiment import mean

Samples = tuple[Tensor, Tensor]
"""Inputs (n, features) and labels (n,)."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


# Runs of an experiment mostly take the same samples.
@lru_cache(maxsize=4)
def samples(data: Dataset, preprocess: str, limit: int | None) -> tuple[Samples, Samples]:
    """The first `limit` training samples (all when None), and the validation samples.

    Both are scaled as fits those training samples.
    """
    train, validation = data.train, data.validation
    scaling = Preprocessor.fit(preprocess, train.images[:limit])
    return (
        (scaling(train.images[:limit]), train.labels[:limit]),
        (scaling(validation.images), validation.labels),
    )


def dense(inputs: int, units: int, *, std: float | None, bias: bool, key: tuple) -> nn.Linear:
    """A Linear with the usual weights, or Gaussian ones of that std and a bias of zero.

    They come from a generator of the key's own, the weight first: networks with and without batch
    norm or biases begin with the same.
    """
    layer = nn.utils.skip_init(nn.Linear, inputs, units, bias=bias)
    source = generator("weights", *key)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        if std is None:
            layer.weight.uniform_(-bound, bound, generator=source)
        else:
            layer.weight.normal_(0, std, generator=source)
        if bias and std is None:
            layer.bias.uniform_(-bound, bound, generator=source)
        elif bias:
            layer.bias.zero_()
    return layer


def stack(
    features: int,
    widths: tuple[int, ...],
    placement: str,
    *,
    seed: int,
    activation: str = "relu",
    classes: int = 10,
    std: Callable[[int], float] | None = None,
    bias: bool = True,
    norm: Callable[[int], nn.Module] = torch_bn.BatchNorm1d,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """Hidden Dense layers with the activation, and a Dense to the classes.

    Batch norm is nowhere ("none"), "before" each activation or "after" it. `std` gives the standard
    deviation of Gaussian initial weights from a layer's number of inputs.
    """
    layers: dict[str, nn.Module] = {}
    for number, units in enumerate(widths, start=1):
        key, width = (seed, number), std and std(features)
        layers[f"dense{number}"] = dense(features, units, std=width, bias=bias, key=key)
        if placement == "before":
            layers[f"bn{number}"] = norm(units)
        layers[f"act{number}"] = ACTIVATIONS[activation]()
        if placement == "after":
            layers[f"bn{number}"] = norm(units)
        if dropout:
            layers[f"drop{number}"] = nn.Dropout(dropout)
        features = units
    key, width = (seed, "last"), std and std(features)
    layers["last"] = dense(features, classes, std=width, bias=True, key=key)
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.to(dtype)


def steps(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    count: int,
    *,
    first: int = 0,
    clip: float | None = None,
) -> Iterator[float]:
    """Take `count` steps; the loss of each, after its backward and before its update.

    Ends early when the loss is no longer finite: nothing comes after that.
    """
    dtype = next(model.parameters()).dtype
    model.train()
    for step in range(first, first + count):
        x, y = batches.at(step, dtype)
        model.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        value = loss.item()
        yield value
        if not math.isfinite(value):
            return
        optimizer.step()


def epoch(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    number: int,
    clip: float | None = None,
) -> float:
    """Take the steps of an epoch, counted from 0; the mean loss, infinite if it has overflowed."""
    first, count = number * batches.per_epoch, batches.per_epoch
    losses = list(steps(model, optimizer, batches, count, first=first, clip=clip))
    return mean(losses) if math.isfinite(losses[-1]) else math.inf


def score(model: nn.Sequential, of: Samples) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode; a loss that overflowed is infinite, not NaN."""
    loss, accuracy = evaluate(model, *of)
    return loss if math.isfinite(loss) else math.inf, accuracy

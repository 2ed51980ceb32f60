"""The network of the job, and what the proofs need to look inside it."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

PLACEMENTS = ("none", "after", "before")
HIDDEN = (300, 100)

Layer = Callable[[int], nn.Module]
"""Makes a batch norm for so many channels: torch_bn.BatchNorm1d or torch.nn.BatchNorm1d."""


def generator(*key: int | str) -> torch.Generator:
    """A random generator of its own for each key, such as ("order", seed, epoch).

    The key is hashed because Torch's CPU generator looks at 32 bits of its seed only: nearby
    keys, and seeds beyond 32 bits, must not share a stream.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def _dense(inputs: int, outputs: int, *, bias: bool, key: tuple[int, int]) -> nn.Linear:
    """nn.Linear with its usual initial distribution, drawn from a generator of its own.

    Each layer draws its weight first, so that networks with and without biases begin with the
    same weights.
    """
    dense = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias)
    source = generator("weights", *key)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        dense.weight.uniform_(-bound, bound, generator=source)
        if bias:
            dense.bias.uniform_(-bound, bound, generator=source)
    return dense


def build_mlp(
    features: int,
    placement: str,
    layer: Layer = nn.BatchNorm1d,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    classes: int = 10,
    relu: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Flatten, Dense 300, ReLU, Dense 100, ReLU, Dense `classes`: (N, features) to (N, classes).

    `placement` puts a batch norm nowhere ("none"), "after" each hidden ReLU, or "before" it, where
    the Dense layers then have no bias: the batch norm would subtract it again. The same seed gives
    the same initial weights in every placement and dtype.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; it must be one of {', '.join(PLACEMENTS)}")
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = features
    for number, units in enumerate(HIDDEN, start=1):
        layers[f"dense{number}"] = _dense(
            width, units, bias=placement != "before", key=(seed, number)
        )
        if placement == "before":
            layers[f"bn{number}"] = layer(units)
        layers[f"relu{number}"] = relu()
        if placement == "after":
            layers[f"bn{number}"] = layer(units)
        width = units
    last = len(HIDDEN) + 1
    layers[f"dense{last}"] = _dense(width, classes, bias=True, key=(seed, last))
    return nn.Sequential(layers).to(dtype)


class PinnedReLU(nn.Module):
    """ReLU whose mask can be given instead of taken from the sign of its input.

    A pre-activation within rounding of zero may be positive in float32 and negative in float64.
    Its gradient then differs as a whole, not by a rounding, in whatever implementation. A float64
    model that takes the mask of the float32 model it judges is left with rounding alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or not self.training:
            return torch.relu(x)
        return x * self.mask


class Trace:
    """Keeps what every layer of a model takes and gives, by layer name, while the block runs.

    With backward inside the block the tensors carry their gradients, except the data itself.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.input: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}
        self._model = model
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Trace:
        for name, layer in self._model.named_children():
            self._handles.append(layer.register_forward_hook(partial(self._keep, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def names(self, prefix: str) -> list[str]:
        return [name for name in self.input if name.startswith(prefix)]

    def masks(self) -> dict[str, Tensor]:
        """For each ReLU, where it lets its input pass: (N, units), bool."""
        return {name: self.input[name] > 0 for name in self.names("relu")}

    def _keep(self, name: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        self.input[name], self.output[name] = args[0], output
        for tensor in (args[0], output):
            if tensor.requires_grad:
                tensor.retain_grad()

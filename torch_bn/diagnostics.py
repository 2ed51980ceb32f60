"""What goes through a model's layers while it trains: moments, percentiles, gradient norms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from torch_bn.modules import BatchNorm1d

__all__ = ["LayerRecord", "Recorder", "Statistics"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of one side of a layer, of T recorded forwards; on CPU and float64.

    Attributes:
        mean: of each channel, (T, C).
        std: of each channel, (T, C); the population's, as batch norm divides by it.
        percentiles: (T, P, U) for the P percentiles and U units that were asked for, interpolated
            linearly; (T, 0, 0) for none.
    """

    mean: Tensor
    std: Tensor
    percentiles: Tensor


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """What a :class:`Recorder` has seen of one layer.

    Attributes:
        steps: of the T recorded forwards, (T); the model's first forward under the recorder is 0.
        input: statistics of the layer's input.
        output: statistics of its output.
        gradient_steps: of the recorded backwards, (B).
        output_gradient: Euclidean norm of the loss's gradient for the layer's output, (B).
        parameter_steps: by name of the layer's own parameter, the steps of its gradients.
        parameter_gradients: by name, the Euclidean norms of what each backward adds to its
            gradient, in the order of ``parameter_steps``.
    """

    steps: Tensor
    input: Statistics
    output: Statistics
    gradient_steps: Tensor
    output_gradient: Tensor
    parameter_steps: dict[str, Tensor]
    parameter_gradients: dict[str, Tensor]


@dataclass
class _Side:
    """A row for each recorded forward, None where it had no statistics."""

    mean: list[Tensor | None] = field(default_factory=list)
    std: list[Tensor | None] = field(default_factory=list)
    percentiles: list[Tensor | None] = field(default_factory=list)

    def statistics(self) -> Statistics:
        return Statistics(
            _stack(self.mean, (0, 0)), _stack(self.std, (0, 0)), _stack(self.percentiles, (0, 0, 0))
        )


@dataclass
class _Seen:
    """The lists behind a LayerRecord."""

    steps: list[int] = field(default_factory=list)
    input: _Side = field(default_factory=_Side)
    output: _Side = field(default_factory=_Side)
    gradients: list[tuple[int, Tensor]] = field(default_factory=list)
    parameters: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    # By name, the step whose backward has come to the layer and not yet to the parameter.
    pending: dict[str, int] = field(default_factory=dict)


class Recorder(Mapping[str, LayerRecord]):
    """Records per-channel moments, percentiles and gradient norms of layers while the block runs.

    A mapping from the names of the layers to what was seen of them. Everything recorded is
    detached and computed in float64; the model's results keep their bits. The hooks are removed
    when the block ends, also by an exception; what was recorded stays.

    A step is a forward of ``model`` itself. Channels are dimension 1 of inputs (N, C) or (N, C,
    ...), and the last of layers with ``channels_last``. A forward in which the input or the output
    of a layer is no floating tensor of at least two dimensions has NaN for the statistics of that
    side; where all of them are so, there are none.

    A gradient belongs to the step whose forward it comes from. Where one backward goes through
    several forwards, what it adds to a parameter belongs to one of them.

    Args:
        model: whose layers are recorded.
        layers: their names in ``model.named_modules()``, or types, of which all layers are; every
            batch norm by default.
        every: record one step of so many, the first included. The others cost a call of a hook.
        percentiles: percents, 0 to 100, of the distribution of a unit over all but the channels.
        units: whose percentiles are recorded, as indices of channels; all by default. NaN where a
            layer has fewer channels.
        gradients: whether gradient norms are recorded in the backward.
        evaluation: whether forwards of the model in evaluation mode count and are recorded too.

    Raises:
        ValueError: for a name that is no layer's, for no layer at all, and for ``every``,
            percentiles or units out of range.

    Example:
        >>> import torch, torch_bn
        >>> from torch_bn.diagnostics import Recorder
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch_bn.BatchNorm1d(3))
        >>> with Recorder(model, every=2, percentiles=(15, 50, 85), gradients=True) as record:
        ...     for _ in range(5):
        ...         model(torch.randn(20, 4)).square().sum().backward()
        >>> list(record)
        ['1']
        >>> record["1"].steps
        tensor([0, 2, 4])
        >>> record["1"].output.std.round(decimals=2)
        tensor([[1., 1., 1.],
                [1., 1., 1.],
                [1., 1., 1.]], dtype=torch.float64)
        >>> record["1"].input.percentiles.shape
        torch.Size([3, 3, 3])
        >>> sorted(record["1"].parameter_gradients)
        ['bias', 'weight']
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layers: Iterable[str | type[torch.nn.Module]] | None = None,
        *,
        every: int = 1,
        percentiles: Sequence[float] = (),
        units: Sequence[int] | None = None,
        gradients: bool = False,
        evaluation: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"torch_bn: every is {every}, expected 1 or more")
        if not all(0 <= p <= 100 for p in percentiles):
            raise ValueError(f"torch_bn: percentiles are {tuple(percentiles)}, expected 0 to 100")
        self._model = model
        self._layers = _chosen(model, layers)
        _check_units(units or (), self._layers)
        self._every = every
        self._fractions = torch.tensor(list(percentiles), dtype=torch.float64) / 100
        self._units = None if units is None else list(units)
        self._gradients = gradients
        self._evaluation = evaluation
        self._step = -1
        self._active = False
        self._handles: list[RemovableHandle] = []
        self._seen = {name: _Seen() for name in self._layers}

    def __enter__(self) -> Recorder:
        self._handles.append(self._model.register_forward_pre_hook(self._begin, prepend=True))
        for name, layer in self._layers.items():
            seen = self._seen[name]
            self._handles.append(layer.register_forward_hook(partial(self._forward, seen)))
            if not self._gradients:
                continue
            for key, parameter in layer.named_parameters(recurse=False):
                if parameter.requires_grad:
                    seen.parameters.setdefault(key, [])
                    hook = partial(self._parameter_backward, seen, key)
                    handle = parameter.register_hook(hook)  # type: ignore[no-untyped-call]
                    self._handles.append(handle)
        # After the layers' own, of which the model may be one. What is called outside its forward,
        # as by a checkpoint that is computed again in the backward, is no step.
        end = self._model.register_forward_hook(self._end, always_call=True)
        self._handles.append(end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._active = False
        while self._handles:
            self._handles.pop().remove()

    def __getitem__(self, name: str) -> LayerRecord:
        seen = self._seen[name]
        return LayerRecord(
            steps=torch.tensor(seen.steps, dtype=torch.int64),
            input=seen.input.statistics(),
            output=seen.output.statistics(),
            gradient_steps=_steps(seen.gradients),
            output_gradient=_stack([norm for _, norm in seen.gradients], (0,)),
            parameter_steps={key: _steps(norms) for key, norms in seen.parameters.items()},
            parameter_gradients={
                key: _stack([norm for _, norm in norms], (0,))
                for key, norms in seen.parameters.items()
            },
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def to_tensorboard(self, directory: str | PathLike[str]) -> None:
        """Write everything recorded to ``directory``, for TensorBoard.

        Moments become histograms over the channels, percentiles and gradient norms scalars. A tag
        begins with the layer's name.

        Args:
            directory: where the event file goes; made where it is missing.

        Raises:
            ImportError: where the package ``tensorboard`` is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "torch_bn: to_tensorboard needs the package tensorboard: pip install tensorboard"
            ) from error
        writer: Any = SummaryWriter(str(directory))
        try:
            for name, record in self.items():
                self._write(writer, name, record)
        finally:
            writer.close()

    def _write(self, writer: Any, name: str, record: LayerRecord) -> None:
        percents = (self._fractions * 100).tolist()
        for side, found in (("input", record.input), ("output", record.output)):
            # Without statistics of a side there are no rows at all.
            for row, step in enumerate(record.steps.tolist()[: len(found.mean)]):
                if found.mean[row].isnan().all():  # which a histogram refuses
                    continue
                writer.add_histogram(f"{name}/{side}/mean", found.mean[row], step)
                writer.add_histogram(f"{name}/{side}/std", found.std[row], step)
                units = self._units or range(found.percentiles.shape[2])
                for values, percent in zip(found.percentiles[row], percents, strict=False):
                    for value, unit in zip(values, units, strict=True):
                        writer.add_scalar(f"{name}/{side}/unit {unit}/p{percent:g}", value, step)
        norms = {"output": (record.gradient_steps, record.output_gradient)}
        for key, values in record.parameter_gradients.items():
            norms[key] = (record.parameter_steps[key], values)
        for key, (steps, values) in norms.items():
            for step, value in zip(steps.tolist(), values, strict=True):
                writer.add_scalar(f"{name}/gradient norm/{key}", value, step)

    def _begin(self, model: torch.nn.Module, _: Any) -> None:
        counted = model.training or self._evaluation
        if counted:
            self._step += 1
            for seen in self._seen.values():
                seen.pending.clear()  # what its backward never reached
        self._active = counted and self._step % self._every == 0

    def _end(self, *_: Any) -> None:
        self._active = False

    def _forward(self, seen: _Seen, layer: torch.nn.Module, args: Any, output: Any) -> None:
        if not self._active:
            return
        seen.steps.append(self._step)
        self._note(seen.input, layer, args[0] if args else None)
        self._note(seen.output, layer, output)
        if not self._gradients:
            return
        if isinstance(output, Tensor) and output.requires_grad:
            # Not kept among the handles: it goes with the output.
            hook = partial(self._output_backward, seen, self._step)
            output.register_hook(hook)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled():  # an output of several tensors, as of a recurrent layer
            seen.pending = dict.fromkeys(seen.parameters, self._step)

    def _output_backward(self, seen: _Seen, step: int, gradient: Tensor) -> None:
        if self._handles:  # the backward may come after the block
            seen.gradients.append((step, _norm(gradient)))
            seen.pending = dict.fromkeys(seen.parameters, step)

    def _parameter_backward(self, seen: _Seen, key: str, gradient: Tensor) -> None:
        step = seen.pending.pop(key, None)
        if step is not None:
            seen.parameters[key].append((step, _norm(gradient)))

    @torch.no_grad()
    def _note(self, side: _Side, layer: torch.nn.Module, x: Any) -> None:
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2):
            for values in (side.mean, side.std, side.percentiles):
                values.append(None)
            return
        last = x.dim() == 3 and isinstance(layer, BatchNorm1d) and layer.channels_last
        # A row for each channel, in a copy of its own: the reductions run along memory.
        rows = x.detach().to(torch.float64).transpose(0, -1 if last else 1).flatten(1)
        var, mean = torch.var_mean(rows, 1, correction=0)
        side.mean.append(mean.cpu())
        side.std.append(var.sqrt_().cpu())
        if len(self._fractions) == 0:
            side.percentiles.append(torch.empty(0, 0, dtype=torch.float64))
            return
        units = range(len(rows)) if self._units is None else self._units
        found = torch.full((len(self._fractions), len(units)), math.nan, dtype=torch.float64)
        columns = [column for column, unit in enumerate(units) if unit < len(rows)]
        if columns:
            chosen = rows[[units[column] for column in columns]]
            found[:, columns] = torch.quantile(
                chosen, self._fractions.to(chosen.device), dim=1
            ).cpu()
        side.percentiles.append(found)


def _chosen(
    model: torch.nn.Module, layers: Iterable[str | type[torch.nn.Module]] | None
) -> dict[str, torch.nn.Module]:
    """The layers meant, by name, in the model's order."""
    wanted = [_BatchNorm] if layers is None else list(layers)
    named = dict(model.named_modules())
    missing = [name for name in wanted if isinstance(name, str) and name not in named]
    if missing:
        raise ValueError(f"torch_bn: the model has no layer {', '.join(map(repr, missing))}")
    types = tuple(kind for kind in wanted if isinstance(kind, type))
    found = {
        name: layer
        for name, layer in named.items()
        if name in wanted or (types and isinstance(layer, types))
    }
    if not found:
        raise ValueError("torch_bn: the model has none of the layers to record")
    return found


def _check_units(units: Sequence[int], layers: Mapping[str, torch.nn.Module]) -> None:
    """Refuse units that no channel of a layer can be."""
    if any(unit < 0 for unit in units):
        raise ValueError(f"torch_bn: units are {tuple(units)}, expected 0 or more")
    for name, layer in layers.items():
        # Of a lazy layer the number is not known yet.
        if isinstance(layer, _BatchNorm) and 0 < layer.num_features <= max(units, default=-1):
            raise ValueError(
                f"torch_bn: units are {tuple(units)}, but layer {name!r} has "
                f"{layer.num_features} channels"
            )


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64)
    return norm.cpu()


def _stack(values: Sequence[Tensor | None], empty: tuple[int, ...]) -> Tensor:
    """The values as one tensor, with NaN for None; an empty one where there are no others."""
    shape = next((value for value in values if value is not None), None)
    if shape is None:
        return torch.empty(empty, dtype=torch.float64)
    missing = torch.full_like(shape, math.nan)
    return torch.stack([missing if value is None else value for value in values])


def _steps(norms: list[tuple[int, Tensor]]) -> Tensor:
    return torch.tensor([step for step, _ in norms], dtype=torch.int64)

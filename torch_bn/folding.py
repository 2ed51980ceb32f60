"""Batch norms folded into their neighbours, for inference.

In evaluation a batch norm is ``x * scale + shift``, which the Linear or Conv1d before it or after
it can do by other weights. Objects stay in the folded copy and become something else, so that
whoever holds them in a list calls what they have become.
"""

from __future__ import annotations

import copy
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import Conv1d, Linear, Module
from torch.nn.utils import parametrize

from torch_bn._affine import Affine1d, AffineReLU1d, ReLUAffine1d
from torch_bn._fuse import FusedReLU, class_name
from torch_bn._pairs import HOOKS, Flows, source
from torch_bn.fused import BatchNormReLU1d, ReLUBatchNorm1d
from torch_bn.sync import _ALONE

__all__ = ["fold", "is_folded"]

_Dense: TypeAlias = Linear | Conv1d

_NORMS = (nn.BatchNorm1d, *_ALONE.values(), *_ALONE)
_ANY_NORM = (nn.BatchNorm1d, nn.LazyBatchNorm1d)
_IDENTITIES = (nn.Identity, FusedReLU, nn.Dropout, nn.Dropout1d, nn.AlphaDropout)
_AFFINES: dict[type[Any], type[Affine1d]] = {
    BatchNormReLU1d: AffineReLU1d,
    ReLUBatchNorm1d: ReLUAffine1d,
}
_MARK = "_folded_batch_norm"


def fold(model: Module, *, report: list[str] | None = None) -> Module:
    """A copy of a model, for inference, without batch norms.

    Each one goes into the weights of the Linear or Conv1d right before it; or else of the one right
    after it, unless that is a Conv1d that pads; or else it becomes a multiply-add. Dropout and
    Identity in between count as nothing, Flatten as what it is. The ReLU of a fused layer stays, as
    an ``nn.ReLU``. Everything is computed in float64 and rounded once. Neighbours are found as by
    :func:`convert`; a Linear is taken to be fed (N, C).

    Layers that were trained in several processes, :class:`torch_bn.SyncBatchNorm1d` and the fused
    ones, are folded as those of one.

    The copy is in evaluation. ``train()`` brings back its dropouts, but no batch statistics.

    Args:
        model: any module; it stays as it is.
        report: a list to which a line is appended for every batch norm.

    Returns:
        The copy. Modules keep their names; those of parameters are gone where batch norms were.

    Raises:
        ValueError: for a batch norm without running statistics or with ``channels_last``, and for
            a lazy module that has not seen its first batch.

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch_bn.BatchNorm1d(3))
        >>> done = []
        >>> torch_bn.fold(model, report=done)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): Identity()
        )
        >>> done
        ['1: torch_bn.BatchNorm1d folded into 0']
    """
    _refuse(model)
    result = copy.deepcopy(model).eval()
    lines: list[str] = [] if report is None else report
    flows = Flows(result, modes=(False,))
    if flows.failure is not None:
        lines.append(f"the model itself: not traced, only Sequentials seen: {flows.failure}")
    with torch.no_grad():
        _Folding(flows, lines).run()
    return result


def is_folded(module: Module) -> bool:
    """Whether a module was a batch norm, or fused with one, until it was folded."""
    return _MARK in vars(module)


def _refuse(model: Module) -> None:
    for name, module in model.named_modules():
        label = name or "the model itself"
        lazy = getattr(module, "has_uninitialized_params", None)
        if lazy is not None and lazy():
            raise ValueError(
                f"cannot fold a model before its first batch: {label} ({type(module).__name__}) "
                "does not know its number of channels yet"
            )
        plain = parametrize.type_before_parametrizations(module)
        if plain in _NORMS and (module.running_mean is None or module.running_var is None):
            raise ValueError(
                f"cannot fold {label} ({class_name(plain)}): it has no running statistics "
                "(track_running_stats=False), and normalises by the batch in evaluation too"
            )
        if plain in _NORMS and getattr(module, "channels_last", False):
            raise ValueError(
                f"cannot fold {label} ({class_name(plain)}): its channels are the last dimension "
                "(channels_last=True)"
            )


class _Folding:
    """The batch norms of a model that is in evaluation, and where they go."""

    def __init__(self, flows: Flows, report: list[str]) -> None:
        self.flows = flows
        self.report = report
        # In float64 until the end, so that a layer between two norms is rounded once.
        self.weights: dict[_Dense, tuple[Tensor, Tensor]] = {}

    def run(self) -> None:
        modules = self.flows.model.modules()
        norms: list[Module] = [each for each in modules if isinstance(each, _ANY_NORM)]
        left: dict[Module, str] = {}
        for norm in norms:
            reason = self._why_not_at_all(norm)
            if reason is not None:
                left[norm] = f"left alone, {reason}"
        todo = [norm for norm in norms if norm not in left]
        # A norm that is gone may bring another one next to a layer: again, until none goes.
        while True:
            gone = [norm for norm in todo if self._fold(norm)]
            if not gone:
                break
            todo = [norm for norm in todo if norm not in gone]
        for norm in todo:
            self._become_affine(norm)
        for norm, words in left.items():
            self.report.append(f"{self.flows.label(norm)}: {words}")
        for module in self.flows.model.modules():
            if type(module) is FusedReLU:  # its norm has given it up for good
                _become(module, nn.Identity())
        for dense, (weight, bias) in self.weights.items():
            dense.weight.copy_(weight)
            if dense.bias is None:
                new = torch.empty(bias.shape, dtype=dense.weight.dtype, device=bias.device)
                dense.bias = nn.Parameter(new, requires_grad=dense.weight.requires_grad)
            dense.bias.copy_(bias)

    def _why_not_at_all(self, norm: Module) -> str | None:
        if parametrize.type_before_parametrizations(norm) not in _NORMS:
            return "a subclass"
        if "forward" in vars(norm):
            return "it has a forward of its own"
        if self.flows.is_read(norm):
            return "the model's forward reads its parameters or buffers"
        return None

    def _fold(self, norm: Any) -> bool:
        """Fold a norm into a neighbour, if one can take it in."""
        if type(norm) not in _NORMS or self.flows.oddity(norm) is not None:
            return False
        old = class_name(type(norm))
        for dense, before, flattened in self._neighbours(norm):
            if self._why_not_into(dense, norm, before) is not None:
                continue
            folded = (_after if before else _before)(*self._state(dense), dense, norm, flattened)
            if folded is None:
                continue
            self.weights[dense] = folded
            keeps_relu = isinstance(norm, (BatchNormReLU1d, ReLUBatchNorm1d))
            _become(norm, nn.ReLU() if keeps_relu else nn.Identity())
            line = f"{self.flows.label(norm)}: {old} folded into {self.flows.label(dense)}"
            self.report.append(line + (", its ReLU stays" if keeps_relu else ""))
            return True
        return False

    def _neighbours(self, norm: Module) -> list[tuple[_Dense, bool, bool]]:
        """The layers beside a norm: which, whether before it, whether across a Flatten."""
        calls = [node for call in self.flows.calls(norm) for node in call]
        result = []
        for before in (True, False):
            if not calls or isinstance(norm, ReLUBatchNorm1d if before else BatchNormReLU1d):
                continue
            node: Node | None = calls[0]
            flattened = False
            while True:
                assert node is not None
                node = source(node) if before else next(iter(node.users), None)
                if node is None or not self._is_nothing(node):
                    break
                flattened = flattened or self._is_flatten(node)
            dense = self.flows.module(node) if node is not None else None
            if isinstance(dense, (Linear, Conv1d)):
                result.append((dense, before, flattened))
        return result

    def _why_not_into(self, dense: _Dense, norm: Module, before: bool) -> str | None:
        if type(dense) not in (Linear, Conv1d):
            return "is of a derived class"
        reason = self.flows.oddity(dense) or self.flows.tied(dense)
        if reason is not None:
            return reason
        first, second = (dense, norm) if before else (norm, dense)
        return self.flows.link(first, second, self._is_nothing)

    def _state(self, dense: _Dense) -> tuple[Tensor, Tensor]:
        if dense in self.weights:
            return self.weights[dense]
        weight = dense.weight.double()
        return weight, weight.new_zeros(len(weight)) if dense.bias is None else dense.bias.double()

    def _become_affine(self, norm: Any) -> None:
        plain = parametrize.type_before_parametrizations(norm)
        kind = _AFFINES.get(_ALONE.get(plain, plain), Affine1d)
        scale, shift = _scale_and_shift(norm)
        # 16-bit parameters would lose digits that a 16-bit result still shows.
        dtype = norm.running_mean.dtype
        dtype = torch.float32 if dtype.itemsize < 4 else dtype
        _become(norm, kind(scale.to(dtype), shift.to(dtype)))
        self.report.append(f"{self.flows.label(norm)}: {class_name(plain)} made a multiply-add")

    def _is_nothing(self, node: Node) -> bool:
        """Whether a node's result is its input in evaluation, or the same in another shape."""
        module = self.flows.module(node)
        if module is not None:
            is_identity = type(module) in _IDENTITIES and not module.training
            return (is_identity or self._is_flatten(node)) and not _is_odd(module)
        if node.op == "call_function" and node.target is F.dropout:
            training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            return training is False
        return self._is_flatten(node)

    def _is_flatten(self, node: Node) -> bool:
        """Whether a node makes (N, C, L) an (N, C * L), and leaves (N, C) alone."""
        module = self.flows.module(node)
        if module is not None:
            return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
        names = ("start_dim", "end_dim")
        given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
        is_called = (node.op, node.target) in (
            ("call_function", torch.flatten),
            ("call_method", "flatten"),
        )
        return bool(is_called and given.get("start_dim") == 1 and given.get("end_dim", -1) == -1)


def _is_odd(module: Module) -> bool:
    return "forward" in vars(module) or any(vars(module).get(name) for name in HOOKS)


def _scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _after(
    weight: Tensor, bias: Tensor, dense: _Dense, norm: Any, flattened: bool
) -> tuple[Tensor, Tensor] | None:
    """The weights of a layer and the norm after it, in one."""
    # Across a Flatten the numbers of channels agree only where there is nothing to flatten.
    if len(weight) != norm.num_features:
        return None
    scale, shift = _scale_and_shift(norm)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), bias * scale + shift


def _before(
    weight: Tensor, bias: Tensor, dense: _Dense, norm: Any, flattened: bool
) -> tuple[Tensor, Tensor] | None:
    """The weights of a norm and the layer after it, in one."""
    scale, shift = _scale_and_shift(norm)
    if isinstance(dense, Linear):
        repeats = dense.in_features // norm.num_features if flattened else 1
        if repeats * norm.num_features != dense.in_features:
            return None
        scale, shift = scale.repeat_interleave(repeats), shift.repeat_interleave(repeats)
        return weight * scale, bias + weight @ shift
    # The shift would not reach what a convolution pads with.
    if flattened or dense.in_channels != norm.num_features or not _pads_nothing(dense):
        return None

    def by_group(channels: Tensor) -> Tensor:
        """(in_channels) to (out_channels, in_channels / groups, 1), as the weight has them."""
        groups = channels.view(dense.groups, -1)
        return groups.repeat_interleave(len(weight) // dense.groups, 0).unsqueeze(-1)

    return weight * by_group(scale), bias + (weight * by_group(shift)).sum((1, 2))


def _pads_nothing(dense: Conv1d) -> bool:
    if dense.padding == "same":
        return dense.kernel_size == (1,)
    return dense.padding in ("valid", (0,))


def _become(module: Module, new: Module) -> None:
    """Make a module another one where it is, with its own hooks."""
    kinds = (*HOOKS, "_is_full_backward_hook")
    hooks = {name: table for name, table in vars(module).items() if name.startswith(kinds)}
    module.__class__ = type(new)
    vars(module).clear()
    vars(module).update(vars(new), training=False, **{_MARK: True})
    vars(module).update(hooks)

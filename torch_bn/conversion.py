"""Swapping a model's layers for ours and back, in place.

A layer is converted by a change of its class alone, the way torch's own parametrisations and lazy
modules do it. So everything else about it stays what it was: its identity, its parameters and
buffers (an optimizer goes on working), hooks of every kind, names, flags, attributes.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from torch_bn._fuse import (
    FUSED,
    class_name,
    drop_biases,
    fuse_pairs,
    own_option,
    rebased,
    unfuse_pairs,
)
from torch_bn._pairs import Flows, names
from torch_bn.folding import is_folded
from torch_bn.lazy import LazyBatchNorm1d
from torch_bn.modules import BatchNorm1d
from torch_bn.sync import _ALONE, SyncBatchNorm1d, _forget_others

__all__ = ["convert", "convert_sync", "revert"]

_Class: TypeAlias = type[Any]

_OURS: dict[_Class, _Class] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.LazyBatchNorm1d: LazyBatchNorm1d,
}
_TORCHS: dict[_Class, _Class] = {
    **{ours: theirs for theirs, ours in _OURS.items()},
    SyncBatchNorm1d: torch.nn.BatchNorm1d,
}
_SYNCHRONISED: dict[_Class, _Class] = {
    torch.nn.BatchNorm1d: SyncBatchNorm1d,
    **{alone: sync for sync, alone in _ALONE.items()},
}


def convert(
    model: Module,
    *,
    fuse: bool = False,
    drop_bias: bool = False,
    subclasses: bool = False,
    report: list[str] | None = None,
) -> Module:
    """Make every :class:`torch.nn.BatchNorm1d` of a model a :class:`torch_bn.BatchNorm1d`.

    Lazy layers become :class:`torch_bn.LazyBatchNorm1d`; parametrised layers stay parametrised.
    Other layers (``SyncBatchNorm``, ``BatchNorm2d``, ...) are left alone. The model is changed in
    place, and may itself be such a layer.

    With ``fuse``, a batch norm and a ReLU next to it become one layer, a
    :class:`torch_bn.BatchNormReLU1d` or :class:`torch_bn.ReLUBatchNorm1d`. The norm changes its
    class, and a ReLU module becomes an identity in its place, so that the names of parameters stay.
    Pairs are found in each whole ``nn.Sequential``, and in models with a forward of their own by
    ``torch.fx``. A pair whose parts are shared, hooked, parametrised or of derived classes, or
    whose value between is used elsewhere, is left alone.

    Args:
        model: any module.
        fuse: whether to fuse pairs of batch norm and ReLU. Where the ReLU is a function
            (``F.relu``, ``torch.relu``, ``Tensor.relu``) a :class:`torch.fx.GraphModule` is
            returned, which leaves out the calls.
        drop_bias: whether to drop the bias of a Linear or Conv1d right before a batch norm, which
            subtracts it again in training. ``running_mean`` takes it in, so evaluation is the
            same. (An optimizer that holds the bias goes on holding it, to no effect.) A Linear is
            taken to be fed (N, C).
        subclasses: whether to convert also layers of classes derived from
            :class:`torch.nn.BatchNorm1d`. They keep all that their class defines; where it calls
            ``super().forward``, that is ours.
        report: a list to which a line is appended for every layer that was changed, and for every
            one that was left alone because its class is derived; also for every pair and bias
            that was changed, or left alone for the reason given. (A list to fill, as the ``memo``
            of :meth:`torch.nn.Module.named_modules`, leaves the return value the model, and can
            collect over several calls.)

    Returns:
        ``model``, the same object; or with ``fuse`` the graph module, if there has to be one. Its
        children are the model's own.

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> done = []
        >>> torch_bn.convert(model, report=done) is model
        True
        >>> done
        ['1: torch.nn.BatchNorm1d -> torch_bn.BatchNorm1d']
        >>> type(model[1]) is torch_bn.BatchNorm1d
        True
        >>> done, model = [], model.append(torch.nn.ReLU())
        >>> _ = torch_bn.convert(model, fuse=True, drop_bias=True, report=done)
        >>> done[0]
        '1 + 2: torch_bn.BatchNorm1d + torch.nn.ReLU -> torch_bn.BatchNormReLU1d'
        >>> done[1]
        '0: bias dropped, 1 has it in its running_mean'
    """
    if fuse or drop_bias:
        flows, lines = Flows(model), [] if report is None else report
        if flows.failure is not None:
            lines.append(f"the model itself: not traced, only Sequentials seen: {flows.failure}")
        if fuse:
            model = fuse_pairs(model, flows, lines)
        if drop_bias:
            drop_biases(flows, lines)

    def ours(cls: _Class) -> _Class | None:
        if cls in _OURS:
            return _OURS[cls]
        if subclasses and issubclass(cls, tuple(_OURS)) and not issubclass(cls, tuple(_TORCHS)):
            return _adapted(cls)
        return None

    def derived(cls: _Class) -> bool:
        return issubclass(cls, tuple(_OURS)) and not issubclass(cls, tuple(_TORCHS))

    return _change_classes(model, ours, derived, report)


def revert(model: Module, *, subclasses: bool = False, report: list[str] | None = None) -> Module:
    """Undo :func:`convert`: make every layer of ours in a model the plain torch.nn layer again.

    What ``convert(fuse=True)`` has made one layer becomes two again, if both places are in the
    model. A fused layer that was written as such is left alone: torch.nn has no layer for it, and
    two would need another name in the model. Dropped biases do not come back. A
    :class:`torch_bn.SyncBatchNorm1d` becomes a :class:`torch.nn.BatchNorm1d` too, the layer of one
    process.

    Tools that match classes exactly, such as the fusions of ``torch.ao.quantization``, see a model
    of torch's own layers then. Changed in place, as by :func:`convert`. Layers with an option that
    torch's layer does not have, such as ``virtual_batch_size``, are left alone and reported.

    Args:
        model: any module.
        subclasses: whether also layers of classes that are written as subclasses of
            :class:`torch_bn.BatchNorm1d` become plain :class:`torch.nn.BatchNorm1d`, and lose what
            their class defines. Those with a ``forward`` of their own are left alone even so,
            since another would take its place. (What ``convert(subclasses=True)`` has made
            needs no asking: it gets its own class back.)
        report: a list to which a line is appended for every layer, as by :func:`convert`.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: if a layer was folded away by :func:`fold`, which cannot be undone; then nothing
            has changed.

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch_bn.BatchNorm1d(3))
        >>> type(torch_bn.revert(model)[1]) is torch.nn.BatchNorm1d
        True
    """
    if any(is_folded(each) for each in model.modules()):
        raise ValueError(
            "this model, or a part of it, comes from torch_bn.fold, and folding cannot be undone: "
            "batch norms are in the weights of other layers. Revert the model it was made from"
        )
    synchronised = [each for each in model.modules() if isinstance(each, SyncBatchNorm1d)]
    unfuse_pairs(model, names(model), [] if report is None else report)

    def torchs(cls: _Class) -> _Class | None:
        if cls in _TORCHS:
            return _TORCHS[cls]
        if _adapted_from(cls) is not None:
            return _adapted_from(cls)
        if subclasses and not issubclass(cls, FUSED):  # however a fused forward is written
            for base in _TORCHS:
                if issubclass(cls, base) and cls.forward is base.forward:
                    return _TORCHS[base]
        return None

    def derived(cls: _Class) -> bool:
        return issubclass(cls, tuple(_TORCHS))

    _change_classes(model, torchs, derived, report)
    for layer in synchronised:
        if not isinstance(layer, SyncBatchNorm1d):
            _forget_others(layer)
    return model


def convert_sync(model: Module, process_group: Any = None) -> Module:
    """Make every 1-D batch norm of a model a :class:`torch_bn.SyncBatchNorm1d`.

    That is every :class:`torch.nn.BatchNorm1d`, :class:`torch_bn.BatchNorm1d` and
    :class:`torch_bn.SyncBatchNorm1d`; a :class:`torch_bn.BatchNormReLU1d` becomes a
    :class:`torch_bn.SyncBatchNormReLU1d`, a :class:`torch_bn.ReLUBatchNorm1d` a
    :class:`torch_bn.SyncReLUBatchNorm1d`. Parametrised layers stay parametrised, and layers of
    other derived classes are left alone. The model is changed in place, layer by layer in their
    class alone, and may itself be such a layer. Call it before
    :class:`torch.nn.parallel.DistributedDataParallel`, in all processes.

    Args:
        model: any module.
        process_group: the processes whose batches belong together; all of them when None.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: for a lazy layer that does not know its number of channels yet, and for one with
            an option that SyncBatchNorm1d has not.

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
        >>> type(torch_bn.convert_sync(model)[1]) is torch_bn.SyncBatchNorm1d
        True
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LazyBatchNorm1d):
            raise ValueError(
                f"the layer '{name}' does not know its number of channels yet: convert the model "
                "after its first forward"
            )
        converted = parametrize.type_before_parametrizations(module) in _SYNCHRONISED
        if converted and own_option(module) is not None:
            raise ValueError(
                f"the layer '{name}' has {own_option(module)}, which SyncBatchNorm1d has not"
            )
    _change_classes(model, _SYNCHRONISED.get, lambda cls: False, None)
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm1d):
            module.process_group = process_group
            module._sync_name = name
    return model


def _change_classes(
    model: Module,
    counterpart: Callable[[_Class], _Class | None],
    derived: Callable[[_Class], bool],
    report: list[str] | None,
) -> Module:
    found = names(model) if report is not None else {}
    # Copies of a parametrised layer share its class; they go on sharing.
    classes: dict[_Class, _Class] = {}
    for module in model.modules():  # a shared module comes once
        old = type(module)
        plain = parametrize.type_before_parametrizations(module)
        new = counterpart(plain)
        option = own_option(module) if new is not None and new not in _TORCHS else None
        if option is not None:
            new = None
        if new is not None:
            module.__class__ = new if plain is old else rebased(old, new, classes)
        if report is None:
            continue
        label = ", ".join(found[id(module)])
        if new is not None:
            report.append(f"{label}: {_name(plain)} -> {_name(new)}")
        elif option is not None:
            report.append(f"{label}: {_name(plain)} left alone, it has {option}")
        elif issubclass(plain, FUSED):
            if derived(plain):
                report.append(f"{label}: {_name(plain)} left alone, torch.nn has no such layer")
        elif derived(plain):
            report.append(f"{label}: {_name(plain)} left alone, a subclass")
    return model


def _name(cls: _Class) -> str:
    if cls in _OURS or cls in _TORCHS or cls in FUSED or cls in _ALONE:
        return class_name(cls)
    if _adapted_from(cls) is not None:
        return f"{cls.__qualname__} on torch_bn"
    return str(cls.__qualname__)


# ------------------------------------------------------------------------------------------------
# A subclass of torch's layer, with ours slipped in between: in the method resolution order of a
# class derived from (cls, ours), ours comes after cls and before torch's.
# ------------------------------------------------------------------------------------------------


_ADAPTED: dict[_Class, _Class] = {}


def _adapted(cls: _Class) -> _Class:
    if cls in _ADAPTED:
        return _ADAPTED[cls]
    ours = next(ours for theirs, ours in _OURS.items() if issubclass(cls, theirs))
    own: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce_adapted,
        "_torch_bn_adapted_from": cls,
    }
    becomes = vars(cls).get("cls_to_become")
    if becomes is not None:  # a lazy layer with a class of its own to become
        own["cls_to_become"] = _OURS.get(becomes) or _adapted(becomes)
    _ADAPTED[cls] = type(cls.__name__, (cls, ours), own)
    return _ADAPTED[cls]


def _adapted_from(cls: _Class) -> _Class | None:
    result: _Class | None = vars(cls).get("_torch_bn_adapted_from")
    return result


def _new_adapted(cls: _Class) -> Any:
    return object.__new__(_adapted(cls))


def _reduce_adapted(self: Any, protocol: Any) -> Any:
    """Pickle by way of the class it was made from, the only one that can be found by its name."""
    cls: Any = next(c for c in type(self).__mro__ if _adapted_from(c) is not None)
    reduced = super(cls, self).__reduce_ex__(max(protocol, 2))
    if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
        return (_new_adapted, (_adapted_from(cls),), *reduced[2:])
    return reduced

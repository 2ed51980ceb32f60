"""Swapping a model's layers for ours and back, in place.

A layer is converted by a change of its class alone, the way torch's own parametrisations and lazy
modules do it. So everything else about it stays what it was: its identity, its parameters and
buffers (an optimizer goes on working), hooks of every kind, names, flags, attributes.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch.nn import Module
from torch.nn.utils import parametrize

from torch_bn.lazy import LazyBatchNorm1d
from torch_bn.modules import BatchNorm1d

__all__ = ["convert", "revert"]

_Class: TypeAlias = type[Any]

_OURS: dict[_Class, _Class] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.LazyBatchNorm1d: LazyBatchNorm1d,
}
_TORCHS: dict[_Class, _Class] = {ours: theirs for theirs, ours in _OURS.items()}


def convert(model: Module, *, subclasses: bool = False, report: list[str] | None = None) -> Module:
    """Make every :class:`torch.nn.BatchNorm1d` of a model a :class:`torch_bn.BatchNorm1d`.

    Lazy layers become :class:`torch_bn.LazyBatchNorm1d`; parametrised layers stay parametrised.
    Other layers (``SyncBatchNorm``, ``BatchNorm2d``, ...) are left alone. The model is changed in
    place, and may itself be such a layer.

    Args:
        model: any module.
        subclasses: whether to convert also layers of classes derived from
            :class:`torch.nn.BatchNorm1d`. They keep all that their class defines; where it calls
            ``super().forward``, that is ours.
        report: a list to which a line is appended for every layer that was changed, and for every
            one that was left alone because its class is derived. (A list to fill, as the ``memo``
            of :meth:`torch.nn.Module.named_modules`, leaves the return value the model, and can
            collect over several calls.)

    Returns:
        ``model``, the same object.

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
    """

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

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch_bn.BatchNorm1d(3))
        >>> type(torch_bn.revert(model)[1]) is torch.nn.BatchNorm1d
        True
    """

    def torchs(cls: _Class) -> _Class | None:
        if cls in _TORCHS:
            return _TORCHS[cls]
        if _adapted_from(cls) is not None:
            return _adapted_from(cls)
        if subclasses:
            for base in _TORCHS:
                if issubclass(cls, base) and cls.forward is base.forward:
                    return _TORCHS[base]
        return None

    def derived(cls: _Class) -> bool:
        return issubclass(cls, tuple(_TORCHS))

    return _change_classes(model, torchs, derived, report)


def _change_classes(
    model: Module,
    counterpart: Callable[[_Class], _Class | None],
    derived: Callable[[_Class], bool],
    report: list[str] | None,
) -> Module:
    names = _names(model) if report is not None else {}
    # Copies of a parametrised layer share its class; they go on sharing.
    rebased: dict[_Class, _Class] = {}
    for module in model.modules():  # a shared module comes once
        old = type(module)
        plain = parametrize.type_before_parametrizations(module)
        new = counterpart(plain)
        option = _own_option(module) if new is not None and new not in _TORCHS else None
        if option is not None:
            new = None
        if new is not None:
            module.__class__ = new if plain is old else _rebased(old, new, rebased)
        if report is None:
            continue
        label = ", ".join(names[id(module)])
        if new is not None:
            report.append(f"{label}: {_name(plain)} -> {_name(new)}")
        elif option is not None:
            report.append(f"{label}: {_name(plain)} left alone, it has {option}")
        elif derived(plain):
            report.append(f"{label}: {_name(plain)} left alone, a subclass")
    return model


def _own_option(module: Module) -> str | None:
    """An option of a layer that torch's layer cannot have, by name and value."""
    if getattr(module, "virtual_batch_size", None) is not None:
        return f"virtual_batch_size={module.virtual_batch_size}"
    if getattr(module, "channels_last", False):
        return "channels_last=True"
    return None


def _names(model: Module) -> dict[int, list[str]]:
    """All names under which each module is reached, by its id; of the model itself, its class."""

    def items() -> Iterator[tuple[int, str]]:
        yield id(model), "the model itself"
        for prefix, parent in model.named_modules():
            for name, child in parent._modules.items():
                if child is not None:
                    yield id(child), f"{prefix}.{name}" if prefix else name

    result: dict[int, list[str]] = {}
    for key, name in items():
        result.setdefault(key, []).append(name)
    return result


def _name(cls: _Class) -> str:
    if cls in _OURS:
        return f"torch.nn.{cls.__name__}"
    if cls in _TORCHS:
        return f"torch_bn.{cls.__name__}"
    if _adapted_from(cls) is not None:
        return f"{cls.__qualname__} on torch_bn"
    return str(cls.__qualname__)


def _rebased(cls: _Class, base: _Class, done: dict[_Class, _Class]) -> _Class:
    """The class that torch.nn.utils.parametrize made for one layer, on another base."""
    if cls not in done:
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        done[cls] = type(f"Parametrized{base.__name__}", (base,), own)
    return done[cls]


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

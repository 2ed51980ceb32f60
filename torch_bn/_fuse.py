"""Batch norm and ReLU made one layer and two again; biases that a batch norm cancels.

As in the conversion of single layers, objects stay and change their class. The norm becomes the
fused layer; a ReLU module becomes an identity that remembers what it was, so that the modules after
it keep their places. A ReLU that is a function in a forward is dropped from a trace of it.
"""

from __future__ import annotations

import secrets
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node
from torch.nn import Conv1d, Identity, Linear, Module, ReLU
from torch.nn.utils import parametrize

from torch_bn._pairs import Flows, call_name, is_hooked, is_relu, source
from torch_bn.fused import BatchNormReLU1d, ReLUBatchNorm1d
from torch_bn.modules import BatchNorm1d

__all__ = [
    "FUSED",
    "class_name",
    "drop_biases",
    "fuse_pairs",
    "own_option",
    "rebased",
    "unfuse_pairs",
]

FUSED = (BatchNormReLU1d, ReLUBatchNorm1d)
_NORMS = (torch.nn.BatchNorm1d, BatchNorm1d)
_ANY_NORM = (torch.nn.BatchNorm1d, torch.nn.LazyBatchNorm1d)
_MAKES_NEW_TENSORS = (Linear, Conv1d, *_NORMS, *FUSED)

# The attribute of a fused layer that tells where its ReLU is: the same token as that of a module,
# or that it was a function.
_MARK = "_fused_relu"
_FUNCTION = "a function"


class FusedReLU(Identity):
    """What a ReLU is while a neighbour does its work."""

    def _get_name(self) -> str:
        return "Identity"

    def extra_repr(self) -> str:
        """In a printed model."""
        return "ReLU, fused"


def own_option(module: Module) -> str | None:
    """An option of a layer that torch's layer cannot have, by name and value."""
    if getattr(module, "virtual_batch_size", None) is not None:
        return f"virtual_batch_size={module.virtual_batch_size}"
    if getattr(module, "channels_last", False):
        return "channels_last=True"
    return None


def class_name(cls: type[Any]) -> str:
    """A class's name with its package, as reports have it."""
    return f"{'torch_bn' if cls.__module__.startswith('torch_bn') else 'torch.nn'}.{cls.__name__}"


def rebased(cls: type[Any], base: type[Any], done: dict[type[Any], type[Any]]) -> type[Any]:
    """The class that torch.nn.utils.parametrize made for one layer, on another base."""
    if cls not in done:
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        done[cls] = type(f"Parametrized{base.__name__}", (base,), own)
    return done[cls]


# ------------------------------------------------------------------------------------------------
# Fusing
# ------------------------------------------------------------------------------------------------


def fuse_pairs(model: Module, flows: Flows, report: list[str]) -> Module:
    """Fuse all pairs of a norm and a ReLU; the result is another module if it has to be."""
    functions: list[tuple[Module, type[Any]]] = []
    taken: set[int] = set()
    for norm in list(model.modules()):
        if not isinstance(norm, _ANY_NORM) or isinstance(norm, FUSED):
            continue
        for after in (True, False):
            relu = _relu_beside(flows, norm, after, taken)
            if relu is None:
                continue
            module = flows.module(relu)
            label = flows.label(module) if module is not None else call_name(relu)
            parts = (flows.label(norm), label) if after else (label, flows.label(norm))
            line = " + ".join(parts)
            reason = _why_apart(flows, norm, after, relu)
            if reason is None and module is None:
                reason = flows.refusal()
            if reason is not None:
                report.append(f"{line}: left alone, {reason}")
                continue
            fused = BatchNormReLU1d if after else ReLUBatchNorm1d
            old = [class_name(type(norm)), label if module is None else class_name(type(module))]
            written = " + ".join(old if after else old[::-1])
            report.append(f"{line}: {written} -> {class_name(fused)}")
            if module is None:
                functions.append((norm, fused))
                taken.update(id(each) for each in _beside(flows, norm, after))
                setattr(norm, _MARK, _FUNCTION)
            else:
                token = secrets.token_hex(8)  # apart from the generators that seeds set
                setattr(norm, _MARK, token)
                setattr(module, _MARK, token)
                module.__class__ = FusedReLU
            norm.__class__ = fused
            break
    return _without(model, flows, functions, report) if functions else model


def _beside(flows: Flows, norm: Module, after: bool) -> list[Node]:
    """The nodes that take what a norm gives, or give what it takes."""
    result = []
    for node in (node for call in flows.calls(norm) for node in call):
        giver = source(node)
        if after:
            result += [user for user in node.users if source(user) is node]
        elif giver is not None:
            result.append(giver)
    return result


def _relu_beside(flows: Flows, norm: Module, after: bool, taken: set[int]) -> Node | None:
    for each in _beside(flows, norm, after):
        if id(each) not in taken and (is_relu(each) or isinstance(flows.module(each), ReLU)):
            return each
    return None


def _why_apart(flows: Flows, norm: Module, after: bool, relu: Node) -> str | None:
    """Why a norm and the ReLU beside it are not one layer."""
    module = flows.module(relu)
    reason = _why_not_plain(flows, norm, _NORMS)
    if reason is None and module is not None:
        reason = _why_not_plain(flows, module, (ReLU,))
    if reason is not None:
        return reason
    if module is not None:
        reason = flows.link(norm, module) if after else flows.link(module, norm)
        if reason is not None:
            return reason
    for node in (node for call in flows.calls(norm) for node in call):
        beside = next(iter(node.users)) if after else source(node)
        between = node if after else beside
        if between is not None and len(between.users) > 1:
            return "the value between is used elsewhere"
        if beside is None or flows.module(beside) is not module:
            return "they do not always follow each other"
        if module is None and not is_relu(beside):
            return "they do not always follow each other"
        if not after and _is_in_place(flows, beside) and not _is_private(flows, beside):
            return "the in-place ReLU changes a value that may be used elsewhere"
    return None


def _why_not_plain(flows: Flows, module: Module, classes: tuple[type[Any], ...]) -> str | None:
    reason: str | None = None
    if parametrize.is_parametrized(module):
        reason = "is parametrised"
    elif isinstance(module, torch.nn.LazyBatchNorm1d):
        reason = "is lazy, and has not seen its first batch"
    elif type(module) not in classes:
        reason = "is of a derived class"
    elif own_option(module) is not None:
        reason = f"has {own_option(module)}"
    else:
        reason = flows.oddity(module)
    return None if reason is None else f"{flows.label(module)} {reason}"


def _is_in_place(flows: Flows, relu: Node) -> bool:
    module = flows.module(relu)
    if isinstance(module, ReLU):
        return module.inplace
    return bool(relu.kwargs.get("inplace") or (len(relu.args) > 1 and relu.args[1]))


def _is_private(flows: Flows, relu: Node) -> bool:
    """Whether nobody but the ReLU can see the tensor that it takes."""
    giver = source(relu)
    if giver is None or len(giver.users) > 1:
        return False
    module = flows.module(giver)
    return module is not None and type(module) in _MAKES_NEW_TENSORS and not is_hooked(module)


def _without(
    model: Module,
    flows: Flows,
    functions: list[tuple[Module, type[Any]]],
    report: list[str],
) -> GraphModule:
    """The model as a graph that leaves out some calls of ReLU.

    It has the very children of the model, so that state dicts and parameters are the same in
    number and order. (The model goes on being right, if slower: a ReLU twice is a ReLU.)
    """
    graph = flows.traces[0]
    for norm, fused in functions:
        (call,) = (node for node in graph.nodes if flows.module(node) is norm)
        if fused is BatchNormReLU1d:
            (relu,) = call.users
            relu.replace_all_uses_with(call)
        else:
            relu = source(call)
            assert relu is not None
            call.replace_input_with(relu, source(relu))
        graph.erase_node(relu)
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was not evaluated; it could not be pickled
    result = GraphModule(model, graph, type(model).__name__)
    for table in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        now = vars(result)[table]
        now.clear()
        now.update(vars(model)[table])
    for node in graph.nodes:
        if node.op == "get_attr" and not hasattr(result, node.target.split(".")[0]):
            vars(result)[node.target] = getattr(model, node.target)  # a tensor, but no buffer
    result.training = model.training
    report.append("the model itself: a torch.fx.GraphModule takes its place")
    return result


# ------------------------------------------------------------------------------------------------
# Two layers again
# ------------------------------------------------------------------------------------------------


def unfuse_pairs(model: Module, labels: dict[int, list[str]], report: list[str]) -> None:
    """Make two layers again of what :func:`fuse_pairs` has made one."""
    norms: dict[str, list[Module]] = {}
    relus: dict[str, list[Module]] = {}
    for module in model.modules():
        mark = vars(module).get(_MARK)
        if mark is not None:
            table = relus if isinstance(module, FusedReLU) else norms
            table.setdefault(mark, []).append(module)
    for norm in norms.pop(_FUNCTION, []):
        if own_option(norm) is not None:  # set since, and nothing that torch's layer has
            continue
        if _call_again(model, norm):
            _split(norm, "F.relu", ", ".join(labels[id(norm)]), report)
    for mark, found in norms.items():
        # A copy in the same model has the same mark.
        if len(found) != len(relus.get(mark, [])):
            continue
        for norm, relu in zip(found, relus[mark], strict=True):
            if own_option(norm) is not None:
                continue
            relu.__class__ = ReLU
            delattr(relu, _MARK)
            parts = (norm, relu) if isinstance(norm, BatchNormReLU1d) else (relu, norm)
            label = " + ".join(", ".join(labels[id(each)]) for each in parts)
            _split(norm, "torch.nn.ReLU", label, report)


def _split(norm: Module, relu: str, label: str, report: list[str]) -> None:
    parts = ["torch.nn.BatchNorm1d", relu]
    if not isinstance(norm, BatchNormReLU1d):
        parts.reverse()
    report.append(f"{label}: {class_name(type(norm))} -> {' + '.join(parts)}")
    delattr(norm, _MARK)
    plain = torch.nn.BatchNorm1d
    parametrised = parametrize.is_parametrized(norm)
    norm.__class__ = rebased(type(norm), plain, {}) if parametrised else plain


def _call_again(model: Module, norm: Module) -> bool:
    """Put a call of ReLU back into the graphs that call a norm; whether there is one."""
    found = False
    for module in model.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in list(module.graph.nodes):
            if node.op != "call_module" or module.get_submodule(node.target) is not norm:
                continue
            found = True
            if isinstance(norm, BatchNormReLU1d):
                with module.graph.inserting_after(node):
                    relu = module.graph.call_function(F.relu, (node,))
                node.replace_all_uses_with(relu, lambda user, relu=relu: user is not relu)
            else:
                given = source(node)
                with module.graph.inserting_before(node):
                    relu = module.graph.call_function(F.relu, (given,))
                node.replace_input_with(given, relu)
        module.recompile()
    return found


# ------------------------------------------------------------------------------------------------
# Biases
# ------------------------------------------------------------------------------------------------


def drop_biases(flows: Flows, report: list[str]) -> None:
    """Drop the biases that a norm right behind them cancels in training."""
    for norm in flows.model.modules():
        if not isinstance(norm, torch.nn.BatchNorm1d) or isinstance(norm, ReLUBatchNorm1d):
            continue
        givers = [source(node) for call in flows.calls(norm) for node in call]
        dense = flows.module(givers[0]) if givers and givers[0] is not None else None
        if not isinstance(dense, (Linear, Conv1d)) or dense.bias is None:
            continue
        label = flows.label(dense)
        reason = _why_bias_stays(flows, dense, norm)
        if reason is not None:
            report.append(f"{label}: bias kept, {reason}")
            continue
        if norm.running_mean is not None:
            with torch.no_grad():  # one rounding, that of the copy
                norm.running_mean.copy_(norm.running_mean.double() - dense.bias.double())
        dense.register_parameter("bias", None)
        where = "cancels it" if norm.running_mean is None else "has it in its running_mean"
        report.append(f"{label}: bias dropped, {flows.label(norm)} {where}")


def _why_bias_stays(flows: Flows, dense: Linear | Conv1d, norm: Module) -> str | None:
    reason = _why_not_plain(flows, dense, (Linear, Conv1d))
    if reason is None:
        reason = _why_not_plain(flows, norm, (*_NORMS, BatchNormReLU1d))
    if reason is None and flows.tied(dense) is not None:
        reason = f"{flows.label(dense)} {flows.tied(dense)}"
    if reason is None and flows.is_read(norm):
        reason = f"{flows.label(norm)} {flows.tied(norm)}"
    if reason is None:
        reason = flows.link(dense, norm)
    if reason is None and dense.weight.shape[0] != norm.num_features:
        reason = f"{flows.label(norm)} has another number of channels"
    if reason is None and dense.training and not norm.training:
        reason = f"{flows.label(norm)} is in evaluation, and cancels nothing"
    return reason

"""Which layer's result goes to which: the calls of a model, known without running it.

The calls are held as graphs of torch.fx. There is one for every whole ``nn.Sequential``; and where
a model has a forward of its own, one for each way in which it was traced. Two layers are neighbours
only if every graph says so.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node, Tracer
from torch.nn import Module, Sequential

__all__ = ["HOOKS", "Flows", "call_name", "is_hooked", "is_relu", "names", "source"]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def names(model: Module) -> dict[int, list[str]]:
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


def source(node: Node) -> Node | None:
    """The value that a call takes first."""
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, Node) else None


def is_relu(node: Node) -> bool:
    """Whether a node that calls no module is a ReLU that leaves its input alone, or F.relu."""
    if node.op == "call_function":
        return node.target in (F.relu, torch.relu)
    return node.op == "call_method" and node.target == "relu"


def call_name(node: Node) -> str:
    """A function's name as it is usually written."""
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return f"{'F' if node.target is F.relu else 'torch'}.{getattr(node.target, '__name__', '')}"


class Flows:
    """The calls that a model's forward makes.

    Args:
        model: any module; while it is traced its forward runs without values, and what that
            leaves behind in its modules, their lists, dicts and sets is undone.
        modes: the settings of ``training`` in which it is traced.
    """

    def __init__(self, model: Module, modes: tuple[bool, ...] = (True, False)) -> None:
        self.model = model
        self.names = names(model)
        self.modules = {
            name: module for module in model.modules() for name in self.names[id(module)]
        }
        self.failure: str | None = None
        self.traces: list[Graph] = []
        self.chains = [self._chain(each) for each in self._whole_sequentials()]
        if not all(_is_opaque(each, model) or _is_chain(each) for each in model.modules()):
            try:
                self.traces = _traces(model, modes)
            except Exception as error:  # tracing runs the user's code, on values it wasn't made for
                words = str(error).strip() or "no words"
                self.failure = f"{type(error).__name__}: {words.splitlines()[0]}"
        self._calls: dict[int, list[list[Node]]] = {}
        for graphs in (self.chains, self.traces):  # what is called in the traces is judged by them
            called = [self._by_module(graph) for graph in graphs]
            for key in {key for each in called for key in each}:
                self._calls[key] = [each[key] for each in called if key in each]
        traced = {id(m): m for graph in self.traces for m in map(self.module, graph.nodes) if m}
        # What a forward calls itself, and also by way of a part that was not looked into.
        self._known_inside = {
            id(part) for each in traced.values() for part in each.modules() if part is not each
        } & traced.keys()
        self._slots: dict[int, int] = {}
        for module in model.modules():
            for tensor in module._parameters.values():
                self._slots[id(tensor)] = self._slots.get(id(tensor), 0) + 1
        reads = [node for graph in self.traces for node in graph.nodes if node.op == "get_attr"]
        owners = [str(node.target).rpartition(".")[0] for node in reads]
        self._read = {id(self.modules[name]) for name in owners if name in self.modules}

    def module(self, node: Node) -> Module | None:
        """The module that a node calls."""
        return self.modules.get(str(node.target)) if node.op == "call_module" else None

    def calls(self, module: Module) -> list[list[Node]]:
        """The calls of a module, one list for each graph in which it is called."""
        return self._calls.get(id(module), [])

    def label(self, module: Module) -> str:
        """A module's names, for reports."""
        return ", ".join(self.names[id(module)])

    def oddity(self, module: Module) -> str | None:
        """Why a layer is to be left alone whatever its neighbours are, in words after its name."""
        several = any(len(each) > 1 for each in self.calls(module))
        if several or len(self.names[id(module)]) > 1 or id(module) in self._known_inside:
            return "is shared"
        if is_hooked(module):
            return "has hooks"
        if "forward" in vars(module) or _is_compiled(module):
            return "has a forward of its own"
        return None

    def tied(self, module: Module) -> str | None:
        """Whether someone else knows a layer's parameters, in words after its name."""
        parameters = [each for each in module._parameters.values() if each is not None]
        if any(self._slots[id(each)] > 1 for each in parameters):
            return "has a parameter that another layer has too"
        if self.is_read(module):
            return "has its parameters read by the model's forward"
        return None

    def is_read(self, module: Module) -> bool:
        """Whether the forward takes a layer's parameters or buffers, beside calling it."""
        return id(module) in self._read

    def link(
        self, first: Module, second: Module, see_through: Callable[[Node], bool] | None = None
    ) -> str | None:
        """Why it is not so that `first` gives to `second` alone and `second` takes from it alone.

        `see_through` tells which nodes between them change nothing.
        """

        takes = [node for each in self.calls(second) for node in each]
        if len(takes) != sum(len(each) for each in self.calls(first)):
            return "they do not always follow each other"
        for node in takes:
            giver = source(node)
            between = []
            while giver is not None and see_through is not None and see_through(giver):
                between.append(giver)
                giver = source(giver)
            if giver is None or self.module(giver) is not first:
                return "they do not always follow each other"
            if any(len(each.users) > 1 for each in (giver, *between)):
                return "the value between is used elsewhere"
        return None

    def refusal(self) -> str | None:
        """Why the traces cannot take the place of the model's forward."""
        parameters = inspect.signature(self.model.forward).parameters.values()
        if any(each.default is not each.empty or each.kind in _VARIADIC for each in parameters):
            return "the model's forward has optional arguments"
        if is_hooked(self.model):
            return "the model has hooks"
        for node in self.traces[0].nodes:
            if node.op == "get_attr" and not _has(self.model, str(node.target)):
                return "the model's forward makes tensors that tracing would freeze"
        first, *others = [_text(graph) for graph in self.traces]
        if any(each != first for each in others):
            return "the model's forward is another in training than in evaluation"
        return None

    def _by_module(self, graph: Graph) -> dict[int, list[Node]]:
        result: dict[int, list[Node]] = {}
        for node in graph.nodes:
            module = self.module(node)
            if module is not None:
                result.setdefault(id(module), []).append(node)
        return result

    def _whole_sequentials(self) -> list[Module]:
        chains = [each for each in self.model.modules() if _is_chain(each)]
        inner = {id(c) for each in chains for c in each.children() if _is_inlined(c)}
        return [each for each in chains if id(each) not in inner]

    def _chain(self, sequential: Module) -> Graph:
        graph = Graph()
        value = graph.placeholder("input")

        def call(children: Module, within: tuple[Module, ...]) -> None:
            nonlocal value
            for child in children._modules.values():
                if child is None or child in within:
                    continue
                if _is_inlined(child):
                    call(child, (*within, child))
                else:
                    value = graph.call_module(self.names[id(child)][0], (value,))

        call(sequential, (sequential,))
        graph.output(value)
        return graph


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def is_hooked(module: Module) -> bool:
    """Whether a module's own hooks see what it takes or gives."""
    return any(vars(module).get(name) for name in HOOKS)


def _is_compiled(module: Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None


def _is_chain(module: Module) -> bool:
    return (
        isinstance(module, Sequential)
        and type(module).forward is Sequential.forward
        and "forward" not in vars(module)
    )


def _is_inlined(module: Module) -> bool:
    """Whether a call of it is a call of its parts one after another, and nothing else."""
    return _is_chain(module) and not is_hooked(module) and not _is_compiled(module)


def _is_opaque(module: Module, model: Module) -> bool:
    """Whether a module is taken as one call, whatever it does inside."""
    if module is model:
        return not module._modules
    return (
        isinstance(module, (torch.nn.BatchNorm1d, torch.jit.ScriptModule))
        or not module._modules
        or is_hooked(module)
        or _is_compiled(module)
        or bool(Tracer.is_leaf_module(_TRACER, module, ""))
    )


_TRACER = Tracer()


class _Tracer(Tracer):
    proxy_buffer_attributes = True  # so that a forward that reads or changes a buffer shows it

    def is_leaf_module(self, m: Module, module_qualified_name: str) -> bool:
        return _is_opaque(m, self.root)


def _traces(model: Module, modes: tuple[bool, ...]) -> list[Graph]:
    """Traces in every mode, with all arguments given and with none of the optional ones."""
    parameters = inspect.signature(model.forward).parameters
    optional = {k: p.default for k, p in parameters.items() if p.default is not p.empty}
    result = []
    with _unchanged(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for mode in modes:
            model.train(mode)
            for given in (None, optional) if optional else (None,):
                result.append(_Tracer().trace(model, given))
    return result


# Types of their own may not bear to be emptied and filled again.
_CONTAINERS = {list, deque, set, dict, OrderedDict, defaultdict}


@contextmanager
def _unchanged(model: Module) -> Iterator[None]:
    """Take back what is assigned to the model and its parts meanwhile, or put into a list, dict or
    set of theirs: a forward may keep what it computes, and now computes proxies."""
    kept: list[tuple[Any, Any]] = []
    scripted = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):  # holds its attributes in C++
            scripted.append((module, module.training))
            continue
        for each in (vars(module), *vars(module).values()):
            if type(each) in _CONTAINERS:
                kept.append((each, each.copy()))
    try:
        yield
    finally:
        for module, training in scripted:
            module.training = training
        for now, before in kept:
            now.clear()
            (now.extend if isinstance(now, (list, deque)) else now.update)(before)


def _text(graph: Graph) -> list[str]:
    return [
        f"{node.op} {node.name} {node.target} {node.args} {node.kwargs}" for node in graph.nodes
    ]


def _has(model: Module, target: str) -> bool:
    value: Any = model
    for name in target.split("."):
        value = getattr(value, name, None)
    return isinstance(value, (Tensor, Module))

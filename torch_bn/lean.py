"""Training with less memory: outputs that are cheap to compute again are not kept."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as module_hooks
from torch.nn.modules.module import register_module_forward_hook

from torch_bn import _serve
from torch_bn.fused import BatchNormReLU1d, ReLUBatchNorm1d
from torch_bn.modules import BatchNorm1d

__all__ = ["lean"]

# Subclasses may do something else.
_RELU = {
    BatchNorm1d: _serve.NO_RELU,
    BatchNormReLU1d: _serve.RELU_AFTER,
    ReLUBatchNorm1d: _serve.RELU_BEFORE,
}


@contextmanager
def lean() -> Iterator[None]:
    """Keep no outputs of this library's layers for the backward of what follows them.

    A linear layer keeps its input for the backward. Where that is the output of a
    :class:`torch_bn.BatchNorm1d`, :class:`torch_bn.BatchNormReLU1d` or
    :class:`torch_bn.ReLUBatchNorm1d` that normalises by its batch, it is not kept under this
    context but computed again in the backward, from the input of the batch norm, which is kept
    anyway. Of two tensors for each hidden layer one remains, and the gradients have the same bits.
    It costs one more forward of the batch norm in each backward.

    Inverting the output instead, as in-place activated batch norm does (Rota Bulò, Porzi and
    Kontschieder 2018), needs an activation that can be inverted, which a ReLU is not, and loses
    digits where the weight is small.

    Put the forward under it; the backward may come after. Outputs of subclasses, in evaluation,
    of layers with an option that ``torch.nn.BatchNorm1d`` lacks, and inside compiled models are
    kept as always. Hooks on a layer that return another output leave
    that one kept.

    Raises:
        RuntimeError: in the backward, if the input or a parameter of a layer was changed in place
            since the forward; torch refuses that too.

    Example:
        >>> import torch, torch_bn
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(4, 3), torch_bn.BatchNormReLU1d(3), torch.nn.Linear(3, 1)
        ... )
        >>> with torch_bn.lean():
        ...     loss = model(torch.randn(8, 4)).pow(2).mean()
        >>> loss.backward()
    """
    outputs: dict[int, _Output] = {}
    owner = threading.get_ident()

    def note(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if type(module) in _RELU and threading.get_ident() == owner and not kwargs:
            made = _Output.of(module, args, output)  # type: ignore[arg-type]
            if made is not None:
                # Nothing is saved of an output that is gone: its entry would keep the input.
                made.forgotten_with(output, outputs)

    def pack(tensor: Tensor) -> Tensor | _Output:
        made = outputs.get(tensor.data_ptr()) if tensor.is_cpu else None
        return made if made is not None and made.is_in(tensor) else tensor

    def unpack(packed: Tensor | _Output) -> Tensor:
        return packed.again() if isinstance(packed, _Output) else packed

    handle = register_module_forward_hook(note, with_kwargs=True)
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        handle.remove()
        # torch leaves its note of the hook behind, and warns of it when a module is compiled.
        module_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)


class _Output:
    """An output that can be computed again, by the operator that computed it."""

    def __init__(self, module: BatchNorm1d, x: Tensor, output: Tensor) -> None:
        self._relu = _RELU[type(module)]
        self._eps = module.eps
        # Without a graph, and with the version counters of the originals.
        self._x = x.detach()
        self._weight, self._bias = (
            t if t is None else t.detach() for t in (module.weight, module.bias)
        )
        self._tensors = [t for t in (self._x, self._weight, self._bias) if t is not None]
        self._versions = [t._version for t in self._tensors]
        self._output: weakref.ref[Tensor] = weakref.ref(output)
        self._version = output._version

    @staticmethod
    def of(module: BatchNorm1d, args: tuple[Any, ...], output: Any) -> _Output | None:
        by_batch = module.training or module.running_mean is None
        by_batch &= module.virtual_batch_size is None and not module.channels_last
        plain = len(args) == 1 and type(args[0]) is Tensor and type(output) is Tensor
        if not (by_batch and plain and output.is_cpu and output.requires_grad):
            return None
        return _Output(module, args[0], output)

    def forgotten_with(self, output: Tensor, outputs: dict[int, _Output]) -> None:
        """Stand among ``outputs`` for as long as the output exists."""
        key, own = output.data_ptr(), weakref.ref(self)

        def forget(_: object) -> None:
            made = own()
            if made is not None and outputs.get(key) is made:
                del outputs[key]

        outputs[key] = self
        self._output = weakref.ref(output, forget)

    def is_in(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has just these values: the output, or an alias of all of it."""
        output = self._output()
        return (
            output is not None  # else another tensor may lie where it lay
            and output._version == self._version
            and output.data_ptr() == tensor.data_ptr()
            and output.shape == tensor.shape
            and output.stride() == tensor.stride()
            and output.dtype == tensor.dtype
        )

    def again(self) -> Tensor:
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an "
                    f"inplace operation: the output of a batch norm of shape "
                    f"{list(self._x.shape)} cannot be computed again, for a tensor that "
                    f"it was computed from is at version {tensor._version}; expected version "
                    f"{version} instead"
                )
        with torch.no_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):
            return _serve.batch_norm(
                self._x,
                self._weight,
                self._bias,
                None,
                None,
                None,
                True,
                0.0,
                self._eps,
                self._relu,
            )

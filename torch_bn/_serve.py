"""Who serves a call: our operator, or where it cannot, torch's own implementation in silence.

The common case costs a few attribute checks. Everything unusual is decided after our operator has
refused, when time no longer counts; a refused call has changed nothing, so torch may be asked next.
"""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload
from torch.compiler import is_dynamo_compiling
from torch.fx import Proxy
from torch.nn import Parameter
from torch.overrides import _get_overloaded_args, has_torch_function_variadic

from torch_bn import _library as _library  # its loading registers the operators

_layer_forward: Callable[..., Any] = _library._C.layer_forward
# In the order of csrc/ops/ops.h: no ReLU, one after the norm, one before it.
NO_RELU, RELU_AFTER, RELU_BEFORE = range(3)
OPERATORS: tuple[OpOverload[..., Tensor], ...] = (
    torch.ops.torch_bn.batch_norm.default,
    torch.ops.torch_bn.batch_norm_relu.default,
    torch.ops.torch_bn.relu_batch_norm.default,
)
_tracing_state = torch._C._get_tracing_state


_check_input_dim = torch.nn.BatchNorm1d._check_input_dim


def layer(module: torch.nn.BatchNorm1d, input: Tensor, relu: int) -> Any:
    """The forward of a layer in one C++ call; NotImplemented where anything is unusual."""
    # What traces must see the operator, and whoever overrides a check its call.
    if is_dynamo_compiling() or type(module)._check_input_dim is not _check_input_dim:
        return NotImplemented
    if module.virtual_batch_size is not None or module.channels_last:
        return NotImplemented
    own = module.__dict__  # reading attributes of a module takes several times as long
    try:
        parameters, buffers = own["_parameters"], own["_buffers"]
        training, tracks = own["training"], own["track_running_stats"]
        momentum, eps = own["momentum"], own["eps"]
    except KeyError:  # a subclass may have made a property of one
        return NotImplemented
    try:
        return _layer_forward(input, parameters, buffers, training, tracks, momentum, eps, relu)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        statistics = (buffers["running_mean"], buffers["running_var"])
        tensors = (input, *statistics, parameters["weight"], parameters["bias"])
        if _is_final(error, tensors, buffers["num_batches_tracked"], momentum, eps):
            raise
        return NotImplemented  # nothing has changed; step by step it is refused again, or served


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: int = NO_RELU,
) -> Tensor:
    """The layer's arithmetic, ReLU and counter included, whoever computes it.

    Raises what torch raises, with its words; then no buffer has changed.
    """
    tensors = (input, running_mean, running_var, weight, bias)
    statistics = (running_mean, running_var, num_batches_tracked)
    arguments = (input, weight, bias, *statistics, training, momentum, eps)
    if has_torch_function_variadic(*tensors) or _tracing_state() is not None:
        if _belongs_to_torch(tensors):
            return by_torch(*arguments, relu)
        if any(isinstance(each, Proxy) for each in tensors):
            return OPERATORS[relu](*arguments)
    try:
        # Meta tensors too are served by us: their strides are to be those of our results.
        if input.is_cpu or input.is_meta:
            return OPERATORS[relu](*arguments)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if _is_final(error, tensors, num_batches_tracked, momentum, eps):
            raise
    return by_torch(*arguments, relu)


def by_torch(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    relu: int,
) -> Tensor:
    """What the forward of torch's layer does, but for one thing: the counter is last to change."""
    factor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None and momentum is None:
        factor = 1.0 / float(num_batches_tracked + 1)
    if relu == RELU_BEFORE:
        input = F.relu(input)
    result = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return F.relu(result) if relu == RELU_AFTER else result


def _belongs_to_torch(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an override of ``__torch_function__`` or an ONNX export asks for torch's function.

    A torch-function mode alone does not: it sees our operator instead. Nor does an FX proxy, which
    records our operator.
    """
    if torch.onnx.is_in_onnx_export():
        return True
    overrides = [each for each in _get_overloaded_args(tensors) if type(each) is not Tensor]
    return bool(overrides) and not any(isinstance(each, Proxy) for each in overrides)


def _is_final(
    error: Exception,
    tensors: tuple[Tensor | None, ...],
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> bool:
    """Whether our operator's refusal stands; if not, torch is asked to serve or to find the words.

    It stands for arguments of which we know that torch refuses them in the same words. Then also
    an error that is not a refusal (out of memory, a hook that raised) is not tried twice.
    """
    input = tensors[0]
    if isinstance(error, (ValueError, AttributeError)) or not isinstance(input, Tensor):
        return False
    counter_is_usual = num_batches_tracked is None or (
        _is_dense(num_batches_tracked)
        and num_batches_tracked.dtype == torch.long
        and num_batches_tracked.dim() == 0
    )
    return (
        counter_is_usual
        and input.numel() > 0  # torch checks no sizes then
        and all(each is None or _is_dense(each) for each in tensors)
        and any(each is not None and each.is_cpu for each in tensors)
        and isinstance(momentum, (float, int, NoneType))
        and isinstance(eps, (float, int))
    )


def _is_dense(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and (tensor.is_cpu or tensor.is_meta)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
    )

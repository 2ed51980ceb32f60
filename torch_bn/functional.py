"""The functional form, with the signature of :func:`torch.nn.functional.batch_norm`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch._jit_internal import is_scripting

from torch_bn import _script, _serve

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise each channel of a batch by its mean and variance.

    .. math:: y = \frac{x - \mathrm{mean}}{\sqrt{\mathrm{var} + \mathrm{eps}}} \cdot
        \mathrm{weight} + \mathrm{bias}

    (Ioffe and Szegedy 2015, algorithm 1.) In training, mean and biased variance are the batch's,
    and the running statistics move towards its mean and unbiased variance by ``momentum``; in
    evaluation they are the running statistics.

    Args:
        input: (N, C) or (N, C, L); float32, float64, bfloat16 or float16, of any strides. Other
            ranks and devices are served by torch's own implementation.
        running_mean: (C), updated in place in training; may be None there.
        running_var: (C), likewise.
        weight: (C) or None for ones.
        bias: (C) or None for zeros.
        training: whether the batch's own statistics normalise it.
        momentum: share of the batch in the updated running statistics.
        eps: added to the variance; positive in training.

    Returns:
        A contiguous tensor of the input's shape and dtype.

    Raises:
        ValueError: if there is one value per channel in training, ``eps`` is out of range, or only
            one of the two running statistics is given.
        RuntimeError: if a size or dtype does not fit the input, or a statistic is missing in
            evaluation.
        NotImplementedError: if the input is of an integer or complex dtype.

    Example:
        >>> import torch
        >>> from torch_bn.functional import batch_norm
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> mean, var = torch.zeros(1), torch.ones(1)
        >>> batch_norm(x, mean, var, training=True, momentum=0.5).flatten()
        tensor([-1.2247,  0.0000,  1.2247])
        >>> mean, var
        (tensor([1.]), tensor([1.]))
    """
    if is_scripting():
        return _script.batch_norm(
            input, weight, bias, running_mean, running_var, None, training, momentum, eps, 0
        )
    else:  # TorchScript compiles what follows an if, but not its other branch
        is_1d = not isinstance(input, Tensor) or input.dim() in (2, 3)  # an FX proxy may be
        if momentum is None or not isinstance(training, bool) or not is_1d:
            return F.batch_norm(
                input, running_mean, running_var, weight, bias, training, momentum, eps
            )
        return _serve.batch_norm(
            input, weight, bias, running_mean, running_var, None, training, momentum, eps
        )

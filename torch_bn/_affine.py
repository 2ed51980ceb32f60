"""What a batch norm is in a folded model where no other layer could take it in."""

# No "from __future__ import annotations": TorchScript reads those of the class as objects.
import torch
from torch import Tensor
from torch.nn import Module

__all__ = ["Affine1d", "AffineReLU1d", "ReLUAffine1d"]


def multiply_add(input: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """``input * scale + shift`` along dimension 1."""
    torch._assert(  # type: ignore[no-untyped-call]
        input.size(1) == scale.size(0), "the input has another number of channels"
    )
    # Channels last, and back: the same lines for both ranks, so that FX can trace them.
    rows = input.transpose(1, -1)
    return torch.addcmul(shift, rows, scale).transpose(1, -1).to(input.dtype)


class Affine1d(Module):
    """``input * scale + shift`` for each channel of an (N, C) or (N, C, L) input.

    The same in training and evaluation; nothing in it is learnt.

    Args:
        scale: (C), kept as a buffer.
        shift: (C), likewise.

    Shape:
        - Input: (N, C) or (N, C, L)
        - Output: the input's shape and dtype

    Example:
        >>> import torch
        >>> layer = Affine1d(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 10.0]))
        >>> layer(torch.tensor([[3.0, 4.0]]))
        tensor([[ 3., 18.]])
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply and add."""
        return multiply_add(input, self.scale, self.shift)

    def extra_repr(self) -> str:
        """In a printed model."""
        return str(self.scale.numel())


class AffineReLU1d(Affine1d):
    """``relu(input * scale + shift)``."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, add, and cut off at zero."""
        return multiply_add(input, self.scale, self.shift).relu()


class ReLUAffine1d(Affine1d):
    """``relu(input) * scale + shift``."""

    def forward(self, input: Tensor) -> Tensor:
        """Cut off at zero, multiply and add."""
        return multiply_add(input.relu(), self.scale, self.shift)

from typing import Any

from torch import Tensor

def build_info() -> dict[str, Any]: ...
def layer_forward(
    input: Tensor,
    parameters: dict[str, Any],
    buffers: dict[str, Any],
    training: bool,
    track_running_stats: bool,
    momentum: float | None,
    eps: float,
    relu: int,
    /,
) -> Any: ...

"""What happens to the other processes when one of them dies, hangs, or does something else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import torch_bn
from processes import Ended, join, run, run_well

C = 5


def outcome(call: Callable[[], Any]) -> tuple[str, float]:
    """What a call has raised, and after how long."""
    begin = time.monotonic()
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begin
    return "nothing", time.monotonic() - begin


def batch(channels: int = C, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(4, channels, dtype=dtype, requires_grad=True)


def model() -> torch.nn.Module:
    """Two layers of one shape that know their names."""
    return torch_bn.convert_sync(
        torch.nn.ModuleDict({"first": torch.nn.BatchNorm1d(C), "second": torch.nn.BatchNorm1d(C)})
    )


# ------------------------------------------------------------------------------------------------
# Processes that do not do the same. All raise, none is harmed: one group goes through all cases.
# ------------------------------------------------------------------------------------------------


def differ(rank: int, world: int, directory: str) -> None:
    join(rank, world, directory)
    odd = rank == 1
    sync = torch_bn.SyncBatchNorm1d
    found: dict[str, tuple[str, float]] = {}

    def layer(channels: int = C, **options: Any) -> torch.nn.Module:
        made = sync(channels, **options)
        made._sync_name = "bn"
        return made

    found["channels"] = outcome(lambda: layer(7 if odd else C)(batch(7 if odd else C)))
    dtype = torch.float64 if odd else torch.float32
    found["dtype"] = outcome(lambda: layer(dtype=dtype)(batch(dtype=dtype)))
    found["momentum"] = outcome(lambda: layer(momentum=None if odd else 0.1)(batch()))
    found["eps"] = outcome(lambda: layer(eps=1e-3 if odd else 1e-5)(batch()))
    found["wrong input"] = outcome(lambda: layer()(batch(7 if odd else C)))

    two: Any = model()
    names = ["second"] if odd else ["first", "second"]
    found["skips, first call"] = outcome(lambda: [two[name](batch()) for name in names])

    two = model()
    for each in two.values():
        each(batch())
    found["skips"] = outcome(lambda: [two[name](batch()) for name in names])
    if odd:
        two["first"].momentum = 0.5
    found["later"] = outcome(lambda: two["first"](batch()))
    os.environ["TORCH_BN_SYNC_DEBUG"] = "1"
    found["later, debug"] = outcome(lambda: two["first"](batch()))
    found["skips, debug"] = outcome(lambda: [two[name](batch()) for name in names])
    if odd:
        two["first"].momentum = 0.1
    found["same, debug"] = outcome(lambda: two["first"](batch()).sum().backward())

    # One that does not come, but goes on to another collective, such as DDP's.
    impatient = dist.new_group(timeout=timedelta(seconds=2))
    two["first"].process_group = impatient
    if odd:
        time.sleep(4)
        found["never"] = ("nothing", 0.0)
    else:
        found["never"] = outcome(lambda: two["first"](batch()))
    torch.save(found, f"{directory}/{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def different(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, float]]]:
    directory = tmp_path_factory.mktemp("differ")
    run_well(__file__, "differ", 2, directory)
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(
    ("name", "rank_0", "rank_1"),
    [
        ("channels", "layer 'bn', 5 channels", "layer 'bn', 7 channels"),
        ("dtype", "Float input, Float parameters", "Double input, Double parameters"),
        ("momentum", "momentum 0.1", "momentum None"),
        ("eps", "eps 1.0000000000000001e-05", "eps 0.001"),
        ("wrong input", "5 channels", "7 channels"),
        ("skips, first call", "layer 'first'", "layer 'second'"),
        ("later, debug", "momentum 0.1", "momentum 0.5"),
        ("skips, debug", "layer 'first'", "layer 'second'"),
    ],
)
def test_differences_are_named_in_all_processes(
    different: list[dict[str, tuple[str, float]]], name: str, rank_0: str, rank_1: str
) -> None:
    for found in different:
        words, seconds = found[name]
        assert words.startswith("RuntimeError: SyncBatchNorm1d '")
        assert "the processes of group '0' do not do the same. Rank 0: layer '" in words
        one, other = words.split("Rank 1: ")
        assert rank_0 in one
        assert rank_1 in other
        assert seconds < 30  # at once, of a timeout of 60, even on a busy machine


@pytest.mark.parametrize("name", ["skips", "later"])
def test_later_calls_are_marked(different: list[dict[str, tuple[str, float]]], name: str) -> None:
    """Without the debug mode, wrong numbers are still not made."""
    for found in different:
        words, seconds = found[name]
        assert words.startswith("RuntimeError: SyncBatchNorm1d '")
        assert "the processes of ranks 0 and 1 of its group are at different layers, or" in words
        assert seconds < 30


def test_the_same_goes_on_after_all_that(different: list[dict[str, tuple[str, float]]]) -> None:
    assert [found["same, debug"][0] for found in different] == ["nothing"] * 2


def test_one_that_does_not_come(different: list[dict[str, tuple[str, float]]]) -> None:
    words, seconds = different[0]["never"]
    assert words.startswith("RuntimeError: SyncBatchNorm1d 'first': rank 1 of group '")
    assert "did not come to its forward within 2 s, the group's timeout" in words
    assert 1.9 < seconds < 30  # not the 60 of the other groups


# ------------------------------------------------------------------------------------------------
# Processes that die or hang in the middle of a step.
# ------------------------------------------------------------------------------------------------

TIMEOUT = 4.0


def step(rank: int, world: int, directory: str, before: Callable[[str], None]) -> None:
    """Two steps; `before` is called ahead of each collective of the second one."""
    join(rank, world, directory, TIMEOUT)
    two: Any = model()
    for attempt in (0, 1):
        if attempt:
            before("forward")
        begin = time.monotonic()
        try:
            y = two["second"](two["first"](batch()).tanh())
            if attempt:
                before("backward")
            begin = time.monotonic()
            y.sum().backward()
        finally:
            Path(f"{directory}/{rank}.seconds").write_text(str(time.monotonic() - begin))


def dying(where: str, rank: int) -> Callable[[str], None]:
    def before(place: str) -> None:
        if rank == 1 and place == where:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def die_in_forward(rank: int, world: int, directory: str) -> None:
    step(rank, world, directory, dying("forward", rank))


def die_in_backward(rank: int, world: int, directory: str) -> None:
    step(rank, world, directory, dying("backward", rank))


def hang_in_backward(rank: int, world: int, directory: str) -> None:
    def before(place: str) -> None:
        if rank == 1 and place == "backward":
            time.sleep(3 * TIMEOUT)

    step(rank, world, directory, before)


def message(ended: Ended) -> str:
    return ended.errors[ended.errors.rindex("RuntimeError") :]


@pytest.mark.parametrize(
    ("function", "layer", "collective"),
    [
        ("die_in_forward", "first", "forward"),
        ("die_in_backward", "second", "backward"),
        ("hang_in_backward", "second", "backward"),
    ],
)
def test_the_others_fail_in_words(
    function: str, layer: str, collective: str, tmp_path: Path
) -> None:
    ended = run(__file__, function, 3, tmp_path)
    if function.startswith("die"):
        assert ended[1].status == -signal.SIGKILL
    for rank in (0, 2):
        assert ended[rank].status == 1
        words = message(ended[rank])
        # One of the two may see the other end before it sees the dead one.
        assert words.startswith(
            f"RuntimeError: SyncBatchNorm1d '{layer}': the all-gather of its {collective} in group "
            "'0' failed. Another process may have ended, hang, or be at another place"
        )
        # A dead one is seen at once, one that hangs by the timeout; the rest is for a busy machine.
        assert float((tmp_path / f"{rank}.seconds").read_text()) < TIMEOUT + 15

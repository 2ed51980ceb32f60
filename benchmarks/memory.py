"""Peak memory of a call, counted by torch's allocator and by the operating system."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
from pathlib import Path

import torch

from .timing import Call

# The profiler reports its start and end on stderr, unless it is told not to before its first use.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

_STATUS = Path("/proc/self/status")
_REFS = Path("/proc/self/clear_refs")


def allocated_peak(call: Call, before: Call) -> int:
    """The largest sum of bytes that torch's CPU allocator has handed out during `call`.

    Exact, from the profiler's record of every allocation and release, and blind to memory that does
    not come from torch's allocator. The call runs twice before, so that what the first call alone
    allocates does not count, and then `before`, which releases what calls leave behind.
    """
    return max(itertools.accumulate(_changes(call, before), initial=0))


def allocated_after(call: Call, before: Call) -> int:
    """How many bytes that torch's CPU allocator has handed out during `call` outlive it.

    Counted as in `allocated_peak`. The profiler knows no release of what was handed out earlier,
    and what `call` returns is dropped: what is to be counted, `call` has to keep.
    """
    return sum(_changes(call, before))


def _changes(call: Call, before: Call) -> list[int]:
    """Bytes of every allocation, and less than 0 of every release, in their order."""
    call()
    call()
    before()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if _memory(e))
    return [change for _, _, change in changes]


def _memory(event: object) -> bool:
    return event.name() == "[memory]"  # type: ignore[attr-defined, no-any-return]


def resident_peak(call: Call, before: Call) -> int | str:
    """How far the process's resident memory rises during `call`, in bytes, or why it isn't known.

    Counts everything that is touched, whoever allocated it, to some tens of KiB. Linux's mark of
    the highest resident memory (VmHWM) is set back to the present before the call, after glibc has
    returned what it keeps. `call` and `before` are as in `allocated_peak`.
    """
    call()
    call()
    before()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _REFS.write_text("5")
    except (OSError, AttributeError) as error:
        return f"the mark of the highest resident memory cannot be reset here ({error})"
    start = _kilobytes("VmHWM")
    call()
    return (_kilobytes("VmHWM") - start) * 1024


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if not found:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1])

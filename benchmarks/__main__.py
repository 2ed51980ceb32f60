"""`python -m benchmarks`: measures, prints tables, writes JSON and plots.

`python -m benchmarks compare OLD.json NEW.json` says which ratios fell between two runs.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from . import fused, guard, layers, models, page
from .figures import draw
from .files import folder_for
from .guard import ENVIRONMENT
from .machine import busy, environment, processors
from .peers import DIRECTIONS, PEERS
from .result import Result
from .tables import print_tables
from .timing import Budget

Part = Callable[[layers.Plan, Result], None]
PARTS: dict[str, Part] = {
    "grid": layers.grid,
    "peers": layers.others,
    "fused": fused.layers,
    "kernels": layers.kernels,
    "small": models.small,
    "mlp": models.mlp,
    "fused-mlp": fused.mlp,
    "bf16": layers.sixteen_bits,
    "threads": models.threads,
    "memory": models.memory,
    "fused-memory": fused.memory,
}
# Where it isn't the usual: a difference of two long times needs more repetitions than a time, and
# the cases of the fused layers are many.
BUDGETS = {"fused": Budget(0.4, 5), "mlp": Budget(3.0), "fused-mlp": Budget(2.0)}
OTHERS = tuple(name for name in PEERS if name not in ("ours", "builtin"))
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def shape(text: str) -> layers.Shape:
    """64x100 or 32x64x512."""
    try:
        sizes = tuple(int(size) for size in text.split("x"))
    except ValueError:
        sizes = ()
    rows = math.prod(sizes) // sizes[1] if len(sizes) in (2, 3) and min(sizes) > 0 else 0
    if rows < 2:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a shape of two rows or more, such as 64x100 or 32x64x512"
        )
    return sizes


def seconds(text: str) -> float:
    """A time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--shape", nargs="+", type=shape, metavar="NxC", help="64x100, or 32x64x512 (N, C, L)")
    add("--dtype", choices=DTYPES, default="float32", help="of layers and kernels")
    add("--threads", nargs="+", type=int, metavar="K", help="default: all processors, and 1")
    add("--direction", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="of layers")
    add(
        "--peers",
        nargs="*",
        choices=OTHERS,
        help="beside the builtin, at every shape and number of threads; default: all of them, at a "
        "few shapes",
    )
    add("--quick", action="store_true", help="fewer shapes and repetitions, in about a minute")
    add("--seconds", type=seconds, help="the time for one case")
    add("--json", type=Path, default=Path("runs/benchmarks/result.json"), help="written here")
    add("--docs", type=Path, metavar="DIR", help="write DIR/performance.md and its plots")
    add("--add", action="store_true", help="keep what the JSON file holds of other parts")
    chosen = parser.parse_args(arguments)
    if chosen.threads and min(chosen.threads) < 1:
        parser.error("--threads must be positive")
    return chosen


def plan_of(chosen: argparse.Namespace, say: Callable[[str], None]) -> layers.Plan:
    quick = chosen.quick
    without = quick and "peers" not in (chosen.only or ())
    peers = chosen.peers if chosen.peers is not None else () if without else OTHERS
    budget = Budget(chosen.seconds or (0.15 if quick else 1.0), 5 if quick else 7)
    return layers.Plan(
        shapes=tuple(chosen.shape or (layers.QUICK if quick else layers.GRID)),
        dtype=DTYPES[chosen.dtype],
        threads=tuple(chosen.threads or dict.fromkeys((processors(), 1))),
        directions=tuple(chosen.direction),
        peers=tuple(peers),
        peers_everywhere=bool(chosen.peers or chosen.shape),
        budget=budget,
        batches=(32, 256) if quick else (32, 64, 256, 1024),
        say=say,
    )


def measure(chosen: argparse.Namespace, console: Console, keep: Callable[[Result], None]) -> Result:
    """Every part that was asked for; what there is after each is given to `keep`."""
    result = Result(environment(), settings_of(chosen))
    with console.status("") as status:
        plan = plan_of(chosen, lambda text: status.update(text))
        for name, part in PARTS.items():
            if chosen.only and name not in chosen.only:
                continue
            own = plan
            if name in ("bf16", "threads", "memory") and not chosen.shape:
                large = layers.LARGE[:1] if chosen.quick else layers.LARGE
                own = replace(plan, shapes=large)
            elif name == "fused-mlp" and chosen.quick:
                own = replace(plan, threads=plan.threads[:1])
            elif name in BUDGETS and not (chosen.quick or chosen.seconds):
                own = replace(plan, budget=BUDGETS[name])
            gc.collect()
            start = time.perf_counter()
            part(own, result)
            keep(result)
            console.print(f"{name}: {time.perf_counter() - start:.0f} s", style="dim")
    return result


def settings_of(chosen: argparse.Namespace) -> dict[str, object]:
    """What was chosen, but for where it goes."""
    return {k: v for k, v in vars(chosen).items() if k not in ("json", "docs", "add")}


def earlier_result(path: Path) -> Result:
    """What an earlier run left in the file; raises ValueError when it ran elsewhere."""
    earlier, now = Result.read(path), environment()
    differing = [name for name in ENVIRONMENT if earlier.environment.get(name) != now[name]]
    if differing:
        raise ValueError(f"{path} was measured with another {', '.join(differing)}")
    return earlier


def keep_others(result: Result, earlier: Result) -> None:
    """Takes over the parts that this run did not measure."""
    measured = {r.part for r in result.records} | {a.part for a in result.absent}
    result.records[:0] = [r for r in earlier.records if r.part not in measured]
    result.absent[:0] = [a for a in earlier.absent if a.part not in measured]


def outputs(chosen: argparse.Namespace) -> Result:
    """Make sure that the results can be written, and read what they are added to.

    Raises OSError or ValueError, in words.
    """
    folder_for(chosen.json)
    if chosen.docs:
        folder_for(chosen.docs / "performance.md")
        page.read(chosen.docs / "performance.md")
    return earlier_result(chosen.json) if chosen.add and chosen.json.exists() else Result()


def main(arguments: Sequence[str]) -> int:
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    if arguments and arguments[0] == "compare":
        return guard.main(arguments[1:], console)
    chosen = options(arguments)
    try:
        earlier = outputs(chosen)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # The file itself may hold a whole run of another time.
    partial = chosen.json.with_name(f"{chosen.json.stem}.partial.json")
    try:
        result = measure(chosen, console, lambda result: result.write(partial))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if partial.exists():
            print(f"what was measured is in {partial}", file=sys.stderr)
        return 130
    keep_others(result, earlier)
    print_tables(result, console)
    if warning := busy(result.environment):
        console.print(warning, style="yellow")
    result.write(chosen.json)
    partial.unlink(missing_ok=True)
    pictures = draw(result, chosen.docs or chosen.json.parent)
    if chosen.docs:
        page.write(result, pictures, chosen.docs / "performance.md")
        pictures.append(chosen.docs / "performance.md")
    for path in (chosen.json, *pictures):
        console.print(f"written: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

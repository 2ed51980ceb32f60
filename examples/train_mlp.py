#!/usr/bin/env python
"""Train an MLP with torch_bn, with torch.nn and without batch norm, and prove torch_bn right."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from mlp import options
from mlp.checkpoint import Checkpoint, Interruption
from mlp.data import load_dataset
from mlp.job import Job
from mlp.model import Layer
from mlp.world import JoinError, World, world

PASSED, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None, layer: Layer | None = None) -> int:
    """Run the job that the command line `argv` describes; the exit status.

    `layer` makes the batch norm to be proved; torch_bn.BatchNorm1d when None.
    """
    chosen = options.parse(argv)
    console = Console()
    try:
        # The handlers come last: while the processes are joined, in C++, no Python runs, and a
        # signal has to end the process by itself.
        with world(chosen.settings.seed, chosen.backend) as here, Interruption() as stop:
            console.quiet = not here.main
            return _job(chosen, layer, console, here, stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ImportError as error:
        if error.name != "torch_bn":
            raise
        return _unusable("torch_bn is not installed: run `make train`, or `pip install .` first")
    except (OSError, JoinError) as error:
        return _unusable(str(error))


def _job(
    chosen: options.Options,
    layer: Layer | None,
    console: Console,
    here: World,
    stop: Interruption,
) -> int:
    if layer is None:
        # Imported here, so that --help works and its absence is explained.
        try:
            import torch_bn
        except RuntimeError as error:  # of TORCH_BN_ISA
            return _unusable(str(error))

        layer = torch_bn.BatchNorm1d
    try:
        job, checkpoint = _prepare(chosen, layer, console, here)
    except ValueError as error:
        return _unusable(str(error))
    stop.defer()
    return _run(job, checkpoint, chosen.out, console, stop)


def _prepare(
    chosen: options.Options, layer: Layer, console: Console, here: World
) -> tuple[Job, Checkpoint]:
    torch.set_num_threads(chosen.settings.threads)
    notify = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    data = here.main_first(
        lambda: load_dataset(chosen.data, url=chosen.data_url, cache=chosen.cache, notify=notify)
    )
    if here.main:
        chosen.out.mkdir(parents=True, exist_ok=True)
    job = Job(chosen.settings, data, layer, here)
    checkpoint = Checkpoint(chosen.out / "checkpoint.pt", job.identity(), here, notify)
    if not chosen.resume:
        if checkpoint.remove():
            notify(f"Starting anew: the interrupted run in {chosen.out} is given up.")
    elif checkpoint.load(job.stages):
        done = sum(stage.position for stage in job.stages)
        total = sum(stage.total for stage in job.stages)
        notify(f"Resumed from {chosen.out}: {done} of {total} steps are done.")
    else:
        notify(f"Nothing to resume in {chosen.out}: starting from the beginning.")
    return job, checkpoint


def _run(job: Job, checkpoint: Checkpoint, out: Path, console: Console, stop: Interruption) -> int:
    if not job.run(checkpoint, stop, console):
        console.print(f"Interrupted, state saved in {out}: continue with --resume.", soft_wrap=True)
        return INTERRUPTED
    passed = job.finish(out, console, checkpoint.seconds)
    checkpoint.remove()
    return PASSED if passed else FAILED


def _unusable(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())

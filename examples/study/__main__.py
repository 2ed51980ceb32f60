"""Measure what batch norm does, and write a report: `make study`, or python -m study."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from mlp.checkpoint import Interruption
from mlp.data import load_dataset
from mlp.job import fingerprint
from mlp.report import versions
from study import options
from study.catalogue import EXPERIMENTS

DONE, UNUSABLE, INTERRUPTED = 0, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Make the study that the command line `argv` describes; the exit status."""
    chosen = options.parse(argv, {each.number: each.name for each in EXPERIMENTS.values()})
    try:
        with Interruption() as stop:
            return _study(chosen, Console(), stop)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE


def _study(chosen: options.Options, console: Console, stop: Interruption) -> int:
    # Imported here: --help need not wait for them.
    from study import report
    from study.runner import run_all
    from study.store import Store

    notify = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    data = load_dataset(chosen.data, url=chosen.data_url, cache=chosen.cache, notify=notify)
    experiments = [each for each in EXPERIMENTS.values() if each.name in chosen.only]
    identity = {**versions(), "data": f"{data.name}, sha256 {fingerprint(data)[:12]}"}
    results = chosen.out / "results"
    if chosen.restart:
        for each in experiments:
            shutil.rmtree(results / each.name, ignore_errors=True)
    stop.defer()
    store = Store(results, identity)
    runs = run_all(experiments, chosen.quick, data, store, chosen.jobs, console, stop)
    if runs is None:
        notify(
            f"Interrupted: the runs that are done are in {chosen.out}, the same command goes on."
        )
        return INTERRUPTED
    sections = [report.section(each, runs[each.name]) for each in experiments]
    facts = {
        **identity,
        "training images": f"{len(data.train.labels)}",
        "validation images": f"{len(data.validation.labels)}",
        "test images": f"{len(data.test.labels)}",
    }
    report.write(chosen.out / "report.html", sections, facts, chosen.quick)
    for part in sections:
        for claim in part["claims"]:
            verdict = "held        " if claim.held else "did not hold"
            notify(f"{part['experiment'].number}  {verdict}  {claim.statement}: {claim.seen}")
    notify(f"Written to {chosen.out}: report.html")
    return DONE


if __name__ == "__main__":
    sys.exit(main())

"""Makes the runs that are missing, in processes of one thread each."""

from __future__ import annotations

import io
import multiprocessing
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from mlp.checkpoint import Interruption
from mlp.data import Dataset, Split
from mlp.progress import StageProgress
from study.experiment import Experiment, Run, Settings
from study.store import Store

SECONDS = "seconds"
"""The time a run took, added to its result."""


@dataclass
class _Tally:
    """An experiment's bar."""

    name: str
    title: str
    total: int
    position: int = 0

    def status(self) -> str:
        return "done" if self.position == self.total else ""


def run_all(
    experiments: Sequence[Experiment],
    quick: bool,
    data: Dataset,
    store: Store,
    jobs: int,
    console: Console,
    stop: Interruption,
) -> dict[str, list[Run]] | None:
    """The runs of every experiment, by its name; None when interrupted before all are there.

    What is in the store is not made again, and each result is put there as soon as it is made.
    """
    found: dict[str, list[Run | None]] = {}
    missing: list[tuple[Experiment, int, Settings]] = []
    tallies = {}
    for experiment in experiments:
        plan = experiment.plan(quick)
        loaded = [store.load(experiment.name, settings) for settings in plan]
        found[experiment.name] = [
            None if result is None else Run(settings, result)
            for settings, result in zip(plan, loaded, strict=True)
        ]
        missing += [
            (experiment, place, plan[place])
            for place, result in enumerate(loaded)
            if result is None
        ]
        done = sum(result is not None for result in loaded)
        title = f"{experiment.number} {experiment.name}"
        tallies[experiment.name] = _Tally(experiment.name, title, len(plan), done)
    with StageProgress(console, list(tallies.values())) as progress:
        for index, result in _make(missing, data, jobs, stop):
            experiment, place, settings = missing[index]
            store.save(experiment.name, settings, result)
            found[experiment.name][place] = Run(settings, result)
            tally = tallies[experiment.name]
            tally.position += 1
            line = f"{tally.title}: all {tally.total} runs are done"
            progress.stepped(tally, line if tally.position == tally.total else None)
    runs = {name: [run for run in all_ if run] for name, all_ in found.items()}
    complete = all(len(runs[name]) == len(all_) for name, all_ in found.items())
    return runs if complete else None


def _make(
    missing: Sequence[tuple[Experiment, int, Settings]],
    data: Dataset,
    jobs: int,
    stop: Interruption,
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Index and result of each run as it is made. Ends early when it is asked to stop."""
    jobs = min(jobs, len(missing))
    if jobs <= 1:
        _one_thread()
        for index, (experiment, _, settings) in enumerate(missing):
            if stop.requested:
                return
            yield index, _measured(experiment, settings, data)
        return
    # Forking a process that has OpenMP threads is not safe.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(jobs, context, _begin, (_pack(data),)) as pool:
        waiting: dict[Future[Mapping[str, Any]], int] = {
            pool.submit(_work, experiment.name, dict(settings)): index
            for index, (experiment, _, settings) in enumerate(missing)
        }
        try:
            while waiting and not stop.requested:
                done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    yield waiting.pop(future), future.result()
        finally:
            if waiting:
                # A run may take minutes: after an interruption or an error none is waited for.
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                pool.shutdown(cancel_futures=True)


def _measured(experiment: Experiment, settings: Settings, data: Dataset) -> dict[str, Any]:
    started = time.monotonic()
    result = dict(experiment.measure(settings, data))
    return {**result, SECONDS: time.monotonic() - started}


def _one_thread() -> None:
    # The runs are small: two at a time are faster than two threads for each.
    torch.set_num_threads(1)


def _pack(data: Dataset) -> bytes:
    """For another process, without the shared memory that containers are short of."""
    file = io.BytesIO()
    torch.save(asdict(data), file)
    return file.getvalue()


def _unpack(packed: bytes) -> Dataset:
    fields = torch.load(io.BytesIO(packed), weights_only=True)
    for name in ("train", "validation", "test"):
        fields[name] = Split(**fields[name])
    return Dataset(**fields)


_data: Dataset | None = None


def _begin(packed: bytes) -> None:
    """In each worker, before its first run."""
    global _data
    # The parent decides what an interruption from the keyboard means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _one_thread()
    _data = _unpack(packed)


def _work(name: str, settings: Settings) -> Mapping[str, Any]:
    # Imported here: the catalogue imports all experiments.
    from study.catalogue import EXPERIMENTS

    assert _data is not None
    return _measured(EXPERIMENTS[name], settings, _data)

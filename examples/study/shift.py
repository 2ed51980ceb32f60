"""Experiment 3: internal covariate shift, as Ioffe and Szegedy measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from mlp.data import Dataset
from mlp.training import Batches
from study import plots
from study.experiment import (
    Claim,
    Experiment,
    Findings,
    Group,
    Run,
    Settings,
    Table,
    grid,
    mean,
    spread,
)
from study.training import samples, score, stack, steps
from torch_bn.diagnostics import Recorder

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHOWN = 0.1
"""The rate at which both networks' percentiles are drawn, beside each one's best."""
PERCENTS = (15, 50, 85)
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1)), (0, (1, 3)))
LAST = "act3"
"""The last hidden layer's sigmoid, whose input is recorded."""


def plan(quick: bool) -> list[Settings]:
    return grid(
        placement=("none", "before"),
        rate=(0.1, 1.0) if quick else RATES,
        steps=(1500 if quick else 50_000,),
        every=(100 if quick else 1000,),
        std=(0.1,),
        seed=range(1 if quick else 3),
    )


@lru_cache(maxsize=1)
def binary(data: Dataset) -> Dataset:
    """The data set with every pixel black or white."""
    parts = {
        name: replace(split, images=(split.images >= 128).to(torch.uint8))
        for name in ("train", "validation", "test")
        for split in (getattr(data, name),)
    }
    return replace(data, **parts)


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    seed, every = settings["seed"], settings["every"]
    train, validation = samples(binary(data), "none", None)
    some = validation[0][:2000]
    model = stack(
        data.features, (100, 100, 100), settings["placement"], seed=seed, activation="sigmoid",
        std=lambda inputs: settings["std"], bias=settings["placement"] == "none",
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    batches = Batches(*train, 60, seed)
    at, accuracy, percentiles = [], [], []
    for first in range(0, settings["steps"], every):
        list(steps(model, optimizer, batches, every, first=first))
        at.append(first + every)
        accuracy.append(score(model, validation)[1])
        model.eval()
        recorder = Recorder(model, [LAST], percentiles=PERCENTS, evaluation=True)
        with recorder as record, torch.no_grad():
            model(some)
        percentiles.append(record[LAST].input.percentiles[0])
    found = torch.stack(percentiles)
    return {
        "steps": at,
        "accuracy": accuracy,
        "unit": found[:, :, 0].tolist(),
        "wander": [wander(found[:, :, unit].numpy()) for unit in range(found.shape[2])],
    }


def wander(percentiles: np.ndarray) -> float:
    """How much a unit's percentiles (checkpoints, 3) move, in units of their own distance.

    The mean over the three of the standard deviation over the checkpoints, divided by the mean
    distance of the highest from the lowest.
    """
    width = (percentiles[:, -1] - percentiles[:, 0]).mean()
    return float(percentiles.std(0).mean() / width) if width > 0 else float("inf")


def median_wander(runs: Sequence[Run]) -> list[float]:
    """How much the median unit wanders, in each run."""
    return [float(np.median(run.result["wander"])) for run in runs]


def at_best(runs: Sequence[Run], placement: str) -> tuple[float, list[Run]]:
    """The rate with the best mean accuracy at the end, and its runs."""
    groups = Group([run for run in runs if run.settings["placement"] == placement], "rate")
    rate = max(groups, key=lambda key: mean([run.result["accuracy"][-1] for run in groups[key]]))
    return rate[0], groups[rate]


def ahead(with_it: Sequence[Run], without: Sequence[Run]) -> tuple[int, int]:
    """At how many checkpoints, of how many, the mean accuracy of the first is at least as high."""
    ours, theirs = (
        np.mean([run.result["accuracy"] for run in runs], 0) for runs in (with_it, without)
    )
    return int((ours >= theirs).sum()), len(ours)


def judge(runs: Sequence[Run]) -> list[Claim]:
    (rate, with_it), (other, without) = (at_best(runs, place) for place in ("before", "none"))
    count, checkpoints = ahead(with_it, without)
    groups = Group(runs, "placement", "rate")
    rates = dict.fromkeys(run.settings["rate"] for run in runs)
    shared = {r: ahead(groups["before", r], groups["none", r]) for r in rates}
    shares = ", ".join(f"rate {r:g}: {n} of {of}" for r, (n, of) in shared.items())
    steadier = {
        r: (median_wander(groups["before", r]), median_wander(groups["none", r])) for r in rates
    }
    moved = [median_wander(each) for each in (with_it, without)]
    one = [[run.result["wander"][0] for run in each] for each in (with_it, without)]
    best = f"each at its best learning rate ({rate:g} with BN, {other:g} without)"
    return [
        Claim(
            "BN is ahead at every checkpoint",
            f"mean validation accuracy at least as high at all checkpoints, {best}",
            f"{count} of {checkpoints}",
            count == checkpoints,
        ),
        Claim(
            "BN is ahead at every checkpoint at the same learning rate too",
            "mean validation accuracy at least as high at all checkpoints, at every rate",
            shares,
            all(n == of for n, of in shared.values()),
        ),
        Claim(
            "the input of the first unit of the last hidden layer is steadier with BN",
            f"its percentiles wander less in every seed than without in any, {best}",
            f"{spread(one[0], '.2f')} against {spread(one[1], '.2f')}",
            max(one[0]) < min(one[1]),
        ),
        Claim(
            "so are the inputs of the last hidden layer's units as a whole",
            f"the median unit wanders less in every seed than without in any, {best}",
            f"{spread(moved[0], '.2f')} against {spread(moved[1], '.2f')}",
            max(moved[0]) < min(moved[1]),
        ),
        Claim(
            "they are steadier at the same learning rate",
            "the median unit wanders less in every seed than without in any, at every rate",
            ", ".join(
                f"rate {r:g}: {mean(ours):.2f} against {mean(theirs):.2f}"
                for r, (ours, theirs) in steadier.items()
            ),
            all(max(ours) < min(theirs) for ours, theirs in steadier.values()),
        ),
    ]


def draw_accuracy(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, 2, sharey=True)
    groups = Group(runs, "placement", "rate")
    rates = list(dict.fromkeys(run.settings["rate"] for run in runs))
    for ax, placement in zip(axes[0], ("none", "before"), strict=True):
        for index, rate in enumerate(rates):
            found = groups[placement, rate]
            plots.error_band(
                ax, found[0].result["steps"], [run.result["accuracy"] for run in found],
                color=plots.CYCLE[index], linestyle=DASHES[index],
                label=f"rate {rate:g}",
            )  # fmt: skip
        ax.set(xlabel="step", title="without BN" if placement == "none" else "with BN")
    plots.error_axis(axes[0, 0])
    plots.legend_below(figure, axes[0, 0], len(rates))
    return figure


def draw_percentiles(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(2, 2, sharex=True, sharey="row", height=3.2)
    groups = Group(runs, "placement", "rate")
    for column, placement in enumerate(("none", "before")):
        words = "without BN" if placement == "none" else "with BN"
        for row, (rate, found) in enumerate(
            (at_best(runs, placement), (SHOWN, groups[placement, SHOWN]))
        ):
            ax, result = axes[row, column], found[0].result
            for index, percent in enumerate(PERCENTS):
                ax.plot(
                    result["steps"], [percentiles[index] for percentiles in result["unit"]],
                    color=plots.CYCLE[index], linestyle=("--", "-", "-.")[index],
                    label=f"{percent}th percentile",
                )  # fmt: skip
            ax.set_title(f"{words}, rate {rate:g}{', its best' if row == 0 else ''}")
            axes[row, 0].set_ylabel("input of the sigmoid")
        axes[1, column].set_xlabel("step")
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    shown = (0, len(runs[0].result["steps"]) // 5 - 1, -1)
    rows = [
        [
            f"{'without' if placement == 'none' else 'with'} BN, rate {rate:g}",
            *(spread([run.result["accuracy"][i] for run in found]) for i in shown),
            spread([run.result["wander"][0] for run in found], ".2f"),
            spread([float(np.median(run.result["wander"])) for run in found], ".2f"),
        ]
        for (placement, rate), found in Group(runs, "placement", "rate").items()
    ]  # fmt: skip
    at = runs[0].result["steps"]
    columns = [
        "network", f"step {at[0]}", f"step {at[len(at) // 5 - 1]}", f"step {at[-1]}",
        "wander, first unit", "wander, median unit",
    ]  # fmt: skip
    return Findings(
        judge(runs),
        [Table("Validation accuracy, mean (lowest to highest seed), and wander", columns, rows)],
        [
            (draw_accuracy(runs), "Error against steps; bands are the extremes of the seeds."),
            (
                draw_percentiles(runs),
                "Percentiles of the input of the first unit of the last hidden layer over the "
                "first 2,000 validation images, in evaluation mode; seed 0.",
            ),
        ],
        [
            "Wander is the standard deviation of a percentile over the checkpoints, mean of the "
            "three percentiles, divided by the mean distance from the 15th to the 85th."
        ],
    )


EXPERIMENT = Experiment(
    number=3,
    name="shift",
    title="Internal covariate shift",
    about="After Ioffe and Szegedy 2015, section 4.1: pixels made black or white, three hidden "
    "layers of 100 sigmoids, batches of 60, plain SGD. The paper gives neither the learning rate "
    "nor the width of the Gaussian of the initial weights: a grid of rates, and 0.1. BN stands "
    "before the sigmoids, and the Dense layers before it have no bias.",
    plan=plan,
    measure=measure,
    findings=findings,
)

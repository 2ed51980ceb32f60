"""Experiment 5: higher learning rates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

import torch_bn
from mlp.data import Dataset
from mlp.model import build_mlp
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
from study.training import samples, score, steps

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
PLACEMENTS = {"none": "without BN", "before": "BN before ReLU", "after": "BN after ReLU"}
NEAR = 0.02


def plan(quick: bool) -> list[Settings]:
    return grid(
        placement=tuple(PLACEMENTS),
        rate=RATES,
        limit=(4000 if quick else None,),
        epochs=(2 if quick else 5,),
        seed=range(1 if quick else 3),
    )


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    seed = settings["seed"]
    train, validation = samples(data, "zscore", settings["limit"])
    model = build_mlp(data.features, settings["placement"], torch_bn.BatchNorm1d, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    batches = Batches(*train, 64, seed)
    losses = list(steps(model, optimizer, batches, settings["epochs"] * batches.per_epoch))
    return {"accuracy": score(model, validation)[1], "diverged": not math.isfinite(losses[-1])}


def usable(runs: Sequence[Run]) -> dict[str, list[float]]:
    """By placement: the rates whose mean accuracy is within NEAR of the placement's best."""
    groups = Group(runs, "placement", "rate")
    means = {key: mean(values) for key, values in groups.each("accuracy")}
    best = {p: max(v for (place, _), v in means.items() if place == p) for p in PLACEMENTS}
    return {p: [rate for rate in RATES if means[p, rate] >= best[p] - NEAR] for p in PLACEMENTS}


def judge(runs: Sequence[Run]) -> list[Claim]:
    found = usable(runs)
    groups = Group(runs, "placement", "rate")
    best = {p: max(mean(groups.results(p, r, of="accuracy")) for r in RATES) for p in PLACEMENTS}
    claims = []
    for place in ("before", "after"):
        claims.append(
            Claim(
                f"with BN {place} the ReLU, larger learning rates work",
                f"the largest rate within {NEAR:.0%} of the best accuracy is at least 3 times that "
                "without BN",
                f"{max(found[place]):g} against {max(found['none']):g}",
                max(found[place]) >= 2.99 * max(found["none"]),
            )
        )
        claims.append(
            Claim(
                f"with BN {place} the ReLU, the range of rates that work is wider",
                f"more decades between smallest and largest rate within {NEAR:.0%} of the best",
                f"{width(found[place]):.1f} against {width(found['none']):.1f}",
                width(found[place]) > width(found["none"]),
            )
        )
    claims.append(
        Claim(
            "the best accuracy with BN is higher",
            "BN before the ReLU at its best rate ahead of no BN at its best, in the mean",
            f"{best['before']:.2%} against {best['none']:.2%}",
            best["before"] > best["none"],
        )
    )
    return claims


def width(rates: Sequence[float]) -> float:
    return math.log10(max(rates) / min(rates))


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots()
    groups = Group(runs, "placement", "rate")
    for index, (placement, words) in enumerate(PLACEMENTS.items()):
        seeds = zip(*(groups.results(placement, r, of="accuracy") for r in RATES), strict=True)
        colour = {"none": plots.WITHOUT, "before": plots.WITH, "after": plots.ORANGE}[placement]
        plots.error_band(
            axes[0, 0], RATES, list(seeds), color=colour, marker=plots.MARKERS[index], label=words
        )
    axes[0, 0].set(xlabel="learning rate", xscale="log")
    plots.error_axis(axes[0, 0], "final validation error")
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(runs, "placement", "rate")
    rows = [
        [f"{rate:g}", *(spread(groups.results(p, rate, of="accuracy")) for p in PLACEMENTS)]
        for rate in RATES
    ]
    title = "Final validation accuracy, mean (lowest to highest seed)"
    caption = "Final error by learning rate; bands are the extremes of the seeds."
    return Findings(
        judge(runs), [Table(title, ["rate", *PLACEMENTS.values()], rows)], [(draw(runs), caption)]
    )


EXPERIMENT = Experiment(
    number=5,
    name="rates",
    title="Higher learning rates",
    about="The reference network (Dense 300, Dense 100, Dense 10 with ReLU), plain SGD, batches "
    "of 64, learning rates over four decades.",
    plan=plan,
    measure=measure,
    findings=findings,
)

"""Experiment 9: batch sizes, and running against batch statistics at evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import torch_bn
from mlp.data import Dataset
from mlp.model import build_mlp, generator
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
from study.training import Samples, samples, score, steps

TRAINED = (2, 8, 64)
EVALUATED = (2, 4, 8, 16, 64, 256, 1000)
MOMENTA = {"0.1": 0.1, "0.01": 0.01, "cumulative": None}
NEAR = 0.002
FAR = 0.05
ONE = 0.01


def plan(quick: bool) -> list[Settings]:
    return grid(
        batch=TRAINED,
        momentum=tuple(MOMENTA),
        limit=(3000 if quick else 20_000,),
        epochs=(2 if quick else 4,),
        seed=range(1 if quick else 3),
    )


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    seed = settings["seed"]
    train, validation = samples(data, "zscore", settings["limit"])
    layer = partial(torch_bn.BatchNorm1d, momentum=MOMENTA[settings["momentum"]])
    model = build_mlp(data.features, "before", layer, seed=seed)
    batches = Batches(*train, settings["batch"], seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    list(steps(model, optimizer, batches, settings["epochs"] * batches.per_epoch))
    running = score(model, validation)[1]
    # In a fixed random order, as neighbours in the files are not independent.
    order = torch.randperm(len(validation[1]), generator=generator("evaluation", seed))
    shuffled = (validation[0][order], validation[1][order])
    return {
        "running": running,
        "batch_statistics": [by_batch(model, shuffled, size) for size in EVALUATED],
        "normalised_pairs": pairs(model, shuffled[0][:1000]),
    }


@torch.no_grad()
def by_batch(model: nn.Sequential, of: Samples, size: int) -> float:
    """Accuracy with each batch normalised by its own statistics; the running ones are left alone.

    Rows that do not fill a batch are left out.
    """
    layers = [layer for layer in model if isinstance(layer, torch_bn.BatchNorm1d)]
    tracked = [layer.track_running_stats for layer in layers]
    model.train()
    for layer in layers:
        layer.track_running_stats = False
    correct = rows = 0
    size = min(size, len(of[1]))
    for x, y in zip(of[0].split(size), of[1].split(size), strict=True):
        if len(y) == size:
            correct += int((model(x).argmax(1) == y).sum())
            rows += size
    for layer, value in zip(layers, tracked, strict=True):
        layer.track_running_stats = value
    return correct / rows


@torch.no_grad()
def pairs(model: nn.Sequential, x: torch.Tensor) -> float:
    """Share of values within ONE of +1 or -1 when rows are normalised two by two.

    Of the first Dense layer's output, by a batch norm without weight and bias.
    """
    dense = model.get_submodule("dense1")
    norm = torch_bn.BatchNorm1d(dense(x[:2]).shape[1], affine=False, track_running_stats=False)
    values = torch.cat([norm(pair) for pair in dense(x).split(2) if len(pair) == 2])
    return float(((values.abs() - 1).abs() <= ONE).double().mean())


def judge(runs: Sequence[Run]) -> list[Claim]:
    groups = Group(runs, "batch", "momentum")
    running = {key: mean(values) for key, values in groups.each("running")}
    usual = groups[64, "0.1"]
    by_size = {
        size: mean([run.result["batch_statistics"][place] for run in usual])
        for place, size in enumerate(EVALUATED)
    }
    large = by_size[EVALUATED[-1]]
    ones = min(run.result["normalised_pairs"] for run in runs)
    return [
        Claim(
            "running statistics do as well as those of large batches",
            f"mean accuracy within {NEAR:.1%} of that with batches of {EVALUATED[-1]}, trained "
            "with batches of 64 and momentum 0.1",
            f"{running[64, '0.1']:.2%} and {large:.2%}",
            abs(running[64, "0.1"] - large) <= NEAR,
        ),
        Claim(
            "statistics of small batches at evaluation cost accuracy",
            f"batches of 4 at least {FAR:.0%} behind the running statistics, in the mean",
            f"{by_size[4]:.2%} against {running[64, '0.1']:.2%}",
            by_size[4] <= running[64, "0.1"] - FAR,
        ),
        Claim(
            "a batch of 2 leaves one bit of each value",
            f"at least 99% of the values normalised two by two within {ONE} of +1 or -1",
            f"{ones:.2%}",
            ones >= 0.99,
        ),
        Claim(
            "a network trained with batches of 2 is worse",
            f"mean accuracy at least {FAR:.0%} behind batches of 64, both with momentum 0.1 and "
            "running statistics",
            f"{running[2, '0.1']:.2%} against {running[64, '0.1']:.2%}",
            running[2, "0.1"] <= running[64, "0.1"] - FAR,
        ),
        Claim(
            "for small batches a longer average of the running statistics is better",
            "momentum 0.01 and the cumulative average both ahead of momentum 0.1 after training "
            "with batches of 2, in the mean",
            ", ".join(f"{name}: {running[2, name]:.2%}" for name in MOMENTA),
            min(running[2, "0.01"], running[2, "cumulative"]) > running[2, "0.1"],
        ),
    ]


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots()
    groups = Group(runs, "batch", "momentum")
    ax = axes[0, 0]
    for index, batch in enumerate(TRAINED):
        colour, found = plots.CYCLE[index], groups[batch, "0.1"]
        plots.band(
            ax,
            EVALUATED,
            [run.result["batch_statistics"] for run in found],
            color=colour,
            marker=plots.MARKERS[index],
            label=f"trained with {batch}: batch statistics",
        )
        ax.axhline(
            mean([run.result["running"] for run in found]),
            color=colour,
            linestyle="--",
            label=f"trained with {batch}: running statistics",
        )
    ax.set(xlabel="batch at evaluation (rows)", ylabel="validation accuracy", xscale="log")
    plots.percent(ax)
    plots.legend_below(figure, ax, 3)
    return figure


def draw_momenta(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots()
    groups = Group(runs, "batch", "momentum")
    for index, name in enumerate(MOMENTA):
        seeds = zip(*(groups.results(batch, name, of="running") for batch in TRAINED), strict=True)
        plots.band(
            axes[0, 0],
            TRAINED,
            list(seeds),
            color=plots.CYCLE[index],
            marker=plots.MARKERS[index],
            linestyle=("-", "--", ":")[index],
            label=f"momentum {name}" if name[0] == "0" else f"{name} average",
        )
    axes[0, 0].set(xlabel="batch in training (rows)", ylabel="validation accuracy", xscale="log")
    axes[0, 0].set_xticks(TRAINED, [str(batch) for batch in TRAINED])
    axes[0, 0].minorticks_off()
    plots.percent(axes[0, 0])
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    rows = []
    for (batch, momentum), found in Group(runs, "batch", "momentum").items():
        columns = zip(*(run.result["batch_statistics"] for run in found), strict=True)
        rows.append(
            [
                f"batch {batch}, {momentum}",
                spread([run.result["running"] for run in found]),
                *(f"{mean(column):.2%}" for column in columns),
            ]
        )
    titles = ["trained with", "running statistics", *(f"batches of {n}" for n in EVALUATED)]
    return Findings(
        judge(runs),
        [Table("Validation accuracy by the statistics of evaluation", titles, rows)],
        [
            (
                draw(runs),
                "Accuracy with the statistics of batches of different sizes, and with running "
                "statistics of momentum 0.1; bands are the extremes of the seeds.",
            ),
            (draw_momenta(runs), "Accuracy with running statistics, by how they are averaged."),
        ],
        [
            "Two values that differ are normalised to +1 and -1, whichever they are (as long as "
            "their difference is large beside the root of eps): only which of the two is the "
            "larger is left. A batch of a single row is refused in training. The cumulative "
            "average counts the first steps of training as much as the last, when the weights are "
            "others."
        ],
    )


EXPERIMENT = Experiment(
    number=9,
    name="evaluation",
    title="Batch size at evaluation",
    about="The reference network with BN before the ReLU, trained by plain SGD at 0.01 with "
    "batches of 2, 8 and 64, the running statistics averaged with momentum 0.1, 0.01, or "
    "cumulatively (momentum None); then evaluated with them, and with the statistics of batches of "
    "validation images in random order.",
    plan=plan,
    measure=measure,
    findings=findings,
)

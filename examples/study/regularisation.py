"""Experiment 6: batch norm as a regulariser, and the noise that makes it one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlp.data import Dataset
from mlp.model import generator
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
    of_kind,
    spread,
)
from study.training import samples, score, stack, steps

METHODS = {"none": "neither", "bn": "BN", "dropout": "dropout 0.5", "both": "both"}
SIZES = (100, 300, 1000, 3000)
BATCHES = (2, 4, 8, 16, 32, 64, 128, 256)
POOL = 4096
"""Rows that the batches for the noise are drawn from, with replacement: independent rows."""
SLOPE = 0.05


def plan(quick: bool) -> list[Settings]:
    training: list[Settings] = grid(
        kind=("training",),
        method=tuple(METHODS),
        size=(100, 1000) if quick else SIZES,
        steps=(300 if quick else 3000,),
        seed=range(2 if quick else 5),
    )
    draws = 200 if quick else 1000
    noise: list[Settings] = grid(
        kind=("noise",), batch=BATCHES, draws=(draws,), seed=range(1 if quick else 3)
    )
    return training + noise


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    if settings["kind"] == "noise":
        return noise(settings, data)
    method, seed = settings["method"], settings["seed"]
    train, validation = samples(data, "zscore", settings["size"])
    # Dropout draws from the default generator.
    torch.manual_seed(generator("dropout", seed).initial_seed())
    model = stack(
        data.features,
        (300, 100),
        "before" if method in ("bn", "both") else "none",
        seed=seed,
        dropout=0.5 if method in ("dropout", "both") else 0.0,
    )
    optimizer = torch.optim.Adam(model.parameters())
    list(steps(model, optimizer, Batches(*train, 64, seed), settings["steps"]))
    (loss, accuracy), (other_loss, other) = score(model, train), score(model, validation)
    return {
        "training": accuracy,
        "validation": other,
        "gap": accuracy - other,
        "loss_gap": other_loss - loss,
    }


def noise(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    """How the statistics of batches scatter about those of all rows, in the first Dense's output.

    Relative to the standard deviation of a channel; medians over the channels that vary.
    """
    seed = settings["seed"]
    (x, _), _ = samples(data, "zscore", POOL)
    model = stack(data.features, (100,), "none", seed=seed)
    with torch.no_grad():
        rows = model.get_submodule("dense1")(x).double()
    source = generator("noise", seed, settings["batch"])
    std = rows.std(0, correction=0)
    means, deviations = [], []
    for _ in range(settings["draws"]):
        chosen = torch.randint(len(rows), (settings["batch"],), generator=source)
        means.append(rows[chosen].mean(0))
        deviations.append(rows[chosen].std(0, correction=0))
    of_mean = torch.stack(means).std(0) / std
    of_std = torch.stack(deviations).std(0) / std
    return {"mean": float(of_mean.median()), "std": float(of_std.median())}


def slope(runs: Sequence[Run]) -> float:
    """The power of the batch size that the noise of the mean goes by."""
    points = [(math.log(run.settings["batch"]), math.log(run.result["mean"])) for run in runs]
    return float(np.polyfit(*np.array(points).T, 1)[0])


def judge(runs: Sequence[Run]) -> list[Claim]:
    groups = Group(of_kind(runs, "training"), "method", "size")
    sizes = sorted({size for _, size in groups})
    gaps, accuracies = (
        {key: mean(values) for key, values in groups.each(of)} for of in ("gap", "validation")
    )
    power = slope(of_kind(runs, "noise"))

    def seen(figures: Mapping[tuple[str, int], float], method: str) -> str:
        return "; ".join(
            f"{n} images: {figures[method, n]:.2%} against {figures['none', n]:.2%}" for n in sizes
        )

    return [
        Claim(
            "BN narrows the gap between training and validation",
            "smaller mean gap in accuracy than without, at every size of the training set",
            seen(gaps, "bn"),
            all(gaps["bn", n] < gaps["none", n] for n in sizes),
        ),
        Claim(
            "BN raises the accuracy on validation images",
            "higher mean accuracy than without, at every size",
            seen(accuracies, "bn"),
            all(accuracies["bn", n] > accuracies["none", n] for n in sizes),
        ),
        Claim(
            "dropout narrows the gap",
            "smaller mean gap in accuracy than without, at every size",
            seen(gaps, "dropout"),
            all(gaps["dropout", n] < gaps["none", n] for n in sizes),
        ),
        Claim(
            "BN does as much as dropout",
            "mean validation accuracy with BN at least that with dropout, at every size",
            "; ".join(
                f"{n}: {accuracies['bn', n]:.2%}, {accuracies['dropout', n]:.2%}" for n in sizes
            ),
            all(accuracies["bn", n] >= accuracies["dropout", n] for n in sizes),
        ),
        Claim(
            "the noise of the batch mean falls as one over the root of the batch size",
            f"fitted power of the batch size within {SLOPE} of -0.5",
            f"{power:.3f}",
            abs(power + 0.5) <= SLOPE,
        ),
    ]


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, 2)
    groups = Group(of_kind(runs, "training"), "method", "size")
    sizes = sorted({size for _, size in groups})
    for index, (method, words) in enumerate(METHODS.items()):
        for ax, of in zip(axes[0], ("gap", "validation"), strict=True):
            seeds = zip(*(groups.results(method, n, of=of) for n in sizes), strict=True)
            plots.band(
                ax,
                sizes,
                list(seeds),
                color=plots.CYCLE[index],
                marker=plots.MARKERS[index],
                label=words,
            )
    axes[0, 0].set_ylabel("training less validation accuracy")
    axes[0, 1].set_ylabel("validation accuracy")
    for ax in axes[0]:
        ax.set(xlabel="training images", xscale="log")
        plots.percent(ax)
    plots.legend_below(figure, axes[0, 0], 4)
    return figure


def draw_noise(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots()
    groups = Group(of_kind(runs, "noise"), "batch")
    for of, colour, marker in (("mean", plots.BLUE, "o"), ("std", plots.ORANGE, "s")):
        seeds = zip(*(groups.results(batch, of=of) for batch in BATCHES), strict=True)
        label = "mean" if of == "mean" else "standard deviation"
        plots.band(axes[0, 0], BATCHES, list(seeds), color=colour, marker=marker, label=label)
    law = [1 / math.sqrt(batch) for batch in BATCHES]
    axes[0, 0].plot(BATCHES, law, ":", color=plots.BLACK, label="1 / √batch")
    axes[0, 0].set(
        xlabel="batch (rows)",
        ylabel="scatter of the batch's statistic /\nstandard deviation of the channel",
        xscale="log",
        yscale="log",
    )
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(of_kind(runs, "training"), "size", "method")
    rows = [
        [f"{size} images, {METHODS[method]}"]
        + [spread(groups.results(size, method, of=of)) for of in ("training", "validation", "gap")]
        for size, method in sorted(groups, key=lambda key: key[0])
    ]
    columns = ["training set, method", "training", "validation", "gap"]
    return Findings(
        judge(runs),
        [Table("Accuracy after the last step, mean (lowest to highest seed)", columns, rows)],
        [
            (draw(runs), "Gap and validation accuracy; bands are the extremes of the seeds."),
            (
                draw_noise(runs),
                "Scatter of the statistics of random batches of a Dense layer's output, median "
                "over its channels.",
            ),
        ],
    )


EXPERIMENT = Experiment(
    number=6,
    name="regularisation",
    title="Regularisation",
    about="The reference network on the first few training images, Adam at 0.001, batches of 64 "
    "at most, the same number of steps for every size; BN before the ReLU, dropout after it. "
    "Accuracies are of evaluation mode. Then the noise: how the mean and deviation of a random "
    "batch scatter about those of all rows.",
    plan=plan,
    measure=measure,
    findings=findings,
)

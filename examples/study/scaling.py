"""Experiment 1: scaling of the data before the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import torch_bn
from mlp.data import Dataset
from mlp.model import build_mlp, generator
from mlp.training import Batches
from study import plots
from study.experiment import Claim, Experiment, Findings, Group, Run, Settings, Table, grid, mean
from study.training import Samples, epoch, samples, score, stack

MODES = ("zscore", "minmax", "unit", "none")
RATES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
BATCH = 64
AHEAD = 0.01
CLOSE = 0.01


def trips(count: int, seed: int) -> Samples:
    """Miles and hours of trips, (n, 2), and whether they were faster than 50 miles an hour."""
    source = generator("trips", seed)
    uniform = torch.rand(2, count, dtype=torch.float64, generator=source)
    hours, speed = 0.5 + 9.5 * uniform[0], 20 + 60 * uniform[1]
    return torch.stack((hours * speed, hours), 1), (speed > 50).long()


def scaled(mode: str, train: Tensor, x: Tensor) -> Tensor:
    """The features of x scaled each by itself, as fitted to `train`; "unit" is by the row's norm.

    They are in different units: one pair of numbers for both, as for pixels, would mean nothing.
    """
    if mode == "zscore":
        x = (x - train.mean(0)) / train.std(0, correction=0)
    elif mode == "minmax":
        low = train.amin(0)
        x = (x - low) / (train.amax(0) - low)
    elif mode == "unit":
        x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.float()


def plan(quick: bool) -> list[Settings]:
    seeds = range(1 if quick else 3)
    shared = {"rate": RATES, "placement": ("none", "before"), "seed": seeds}
    images = grid(
        data=("images",), limit=(4000 if quick else None,), epochs=(3 if quick else 5,),
        preprocess=MODES, **shared,
    )  # fmt: skip
    return images + grid(data=("trips",), epochs=(5 if quick else 20,), preprocess=MODES, **shared)


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    mode, placement, seed = settings["preprocess"], settings["placement"], settings["seed"]
    if settings["data"] == "images":
        train, validation = samples(data, mode, settings["limit"])
        model = build_mlp(data.features, placement, torch_bn.BatchNorm1d, seed=seed)
    else:
        # The data are the same for every seed, which is of weights and batches.
        (x, y), (other, labels) = trips(2000, 0), trips(2000, 1)
        train, validation = (scaled(mode, x, x), y), (scaled(mode, x, other), labels)
        model = stack(2, (16,), placement, seed=seed, classes=2)
    batches = Batches(*train, BATCH, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rate"])
    curves: dict[str, list[float]] = {"loss": [], "validation": [], "accuracy": []}
    for number in range(settings["epochs"]):
        loss = epoch(model, optimizer, batches, number)
        for name, value in zip(curves, (loss, *score(model, validation)), strict=True):
            curves[name].append(value)
        if not math.isfinite(loss):
            break
    left = settings["epochs"] - len(curves["loss"])
    # A network that has overflowed stays as good as guessing.
    curves = {name: curve + curve[-1:] * left for name, curve in curves.items()}
    return {**curves, "final": curves["accuracy"][-1]}


def best(runs: Sequence[Run]) -> dict[tuple[str, str, str], tuple[float, list[Run]]]:
    """By data, scaling and placement: the rate with the best mean final accuracy, and its runs."""
    found: dict[tuple[str, str, str], tuple[float, list[Run]]] = {}
    groups = Group(runs, "data", "preprocess", "placement", "rate")
    for (data, mode, placement, rate), finals in groups.each("final"):
        key = (data, mode, placement)
        if key not in found or mean(finals) > final(found[key][1]):
            found[key] = (rate, groups[data, mode, placement, rate])
    return found


def final(runs: Sequence[Run]) -> float:
    return mean([run.result["final"] for run in runs])


def judge(runs: Sequence[Run]) -> list[Claim]:
    chosen = {key: final(found) for key, (_, found) in best(runs).items()}
    claims = []
    for data in ("images", "trips"):
        without = chosen[data, "none", "none"]
        for mode in MODES[:3]:
            with_it = chosen[data, mode, "none"]
            claims.append(
                Claim(
                    f"{mode} scaling helps a network without BN on {data}",
                    "mean final accuracy ahead of no scaling by more than "
                    f"{AHEAD:.0%}, each at its best learning rate",
                    f"{with_it:.2%} against {without:.2%}",
                    with_it > without + AHEAD,
                )
            )
        reference, rescued = chosen[data, "zscore", "none"], chosen[data, "none", "before"]
        claims.append(
            Claim(
                f"BN makes up for missing scaling on {data}",
                f"no scaling with BN at most {CLOSE:.0%} behind z-scores without BN, "
                "each at its best learning rate",
                f"{rescued:.2%} against {reference:.2%}",
                rescued >= reference - CLOSE,
            )
        )
    groups = Group(runs, "data", "preprocess", "placement", "rate")
    usable = {
        mode: [
            rate
            for rate in RATES
            if mean(groups.results("images", mode, "none", rate, of="final"))
            > chosen["images", mode, "none"] - 0.1
        ]
        for mode in MODES
    }
    claims.append(
        Claim(
            "raw pixels need a smaller learning rate",
            "the largest rate within 10% of the best accuracy is smaller than with z-scores",
            f"{max(usable['none']):g} against {max(usable['zscore']):g}",
            max(usable["none"]) < max(usable["zscore"]),
        )
    )
    return claims


def draw(runs: Sequence[Run], data: str) -> Any:
    figure, axes = plots.subplots(1, 2)
    chosen = best(runs)
    for mode, colour, marker in zip(MODES, plots.CYCLE, plots.MARKERS, strict=False):
        for placement, dash in (("none", "-"), ("before", "--")):
            rate, found = chosen[data, mode, placement]
            words = "" if placement == "none" else ", BN"
            curves = ([run.result[of] for run in found] for of in ("loss", "accuracy"))
            plots.loss_and_error_bands(
                *axes[0], *curves, color=colour, linestyle=dash, marker=marker, markersize=4,
                label=f"{mode}{words} (rate {rate:g})",
            )  # fmt: skip
    plots.loss_and_error(*axes[0])
    plots.legend_below(figure, axes[0, 0], 4)
    what = "images" if data == "images" else "trips (miles and hours)"
    figure.suptitle(f"Scaling of {what}, each at its best learning rate")
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(runs, "data", "preprocess", "placement", "rate")
    found = Findings(claims=judge(runs))
    for data in ("images", "trips"):
        found.figures.append(
            (
                draw(runs, data),
                f"Training loss and validation error on {data}; lines are means over the seeds, "
                "bands their extremes, dashes networks with BN.",
            )
        )
        rows = [
            [
                f"{mode}, {'no BN' if placement == 'none' else 'BN before ReLU'}",
                *(f"{mean(groups.results(data, mode, placement, r, of='final')):.2%}"
                  for r in RATES),
            ]
            for mode in MODES
            for placement in ("none", "before")
        ]  # fmt: skip
        columns = ["scaling", *(f"rate {rate:g}" for rate in RATES)]
        found.tables.append(Table(f"Mean final validation accuracy, {data}", columns, rows))
    found.notes.append(
        "The batch norm stands behind the first Dense layer, whose outputs mix miles and hours as "
        "they come: normalising the mixture cannot bring back hours that are a hundredth of it. "
        "Unit scaling of a trip leaves its speed alone, as the angle of the row, but nearly all of "
        "it in the hours: 0.05 at 20 miles an hour and 0.0125 at 80, beside miles of nearly 1."
    )
    return found


EXPERIMENT = Experiment(
    number=1,
    name="scaling",
    title="Scaling of the data before the network",
    about="The reference network (Dense 300, Dense 100, Dense 10 with ReLU) on images, and one "
    "hidden layer of 16 on 2,000 trips given in miles and hours, faster than 50 miles an hour or "
    "not. Plain SGD, batches of 64. Inputs are scaled to z-scores, to 0..1 (min-max), each row to "
    "unit norm, or not at all; pixels by one pair of numbers, miles and hours each by its own.",
    plan=plan,
    measure=measure,
    findings=findings,
)

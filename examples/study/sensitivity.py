"""Part of experiment 7: how fast two runs part that differ by a rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

import torch_bn
from mlp.data import Dataset
from mlp.training import Batches
from study import plots
from study.experiment import Claim, Group, Run, Settings, Table, grid, spread
from study.training import samples, stack, steps
from torch_bn.diagnostics import Recorder

NETWORKS = {"300-100": (300, 100), "4 x 100": (100,) * 4, "8 x 100": (100,) * 8}
VARIANTS = {
    "none": ("none", True, 1e-5),
    "before": ("before", False, 1e-5),
    "before, biased": ("before", True, 1e-5),
    "after": ("after", True, 1e-5),
    "after, eps 0.01": ("after", True, 1e-2),
    "before, Adam's eps 1e-5": ("before", False, 1e-5),
}
"""Placement, whether the Dense layers have a bias, and the batch norm's eps."""
BLUNT = "before, Adam's eps 1e-5"
"""The variant whose optimizer does not divide by what is smaller than that; with Adam only."""
EVERY = 10
FLOOR = 1e-18
SATURATED = 1e-3
"""Differences above are no longer small beside the weights: growth ends there."""
GROWS, STAYS = 0.5, 0.25
"""Decades per hundred steps."""


def plan(quick: bool) -> list[Settings]:
    shared = {
        "kind": ("sensitivity",),
        "network": ("300-100", "8 x 100") if quick else tuple(NETWORKS),
        "steps": (150 if quick else 400,),
        "limit": (5000,),
        "seed": range(1 if quick else 3),
    }
    usual = [variant for variant in VARIANTS if variant != BLUNT]
    return [
        *grid(variant=usual, optimizer=("adam", "sgd"), **shared),
        *grid(variant=(BLUNT,), optimizer=("adam",), **shared),
    ]


def optimizer_of(settings: Settings, model: torch.nn.Module) -> torch.optim.Optimizer:
    if settings["optimizer"] == "adam":
        eps = 1e-5 if settings["variant"] == BLUNT else 1e-8
        return torch.optim.Adam(model.parameters(), eps=eps)
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    seed, count = settings["seed"], settings["steps"]
    placement, bias, eps = VARIANTS[settings["variant"]]
    train, _ = samples(data, "zscore", settings["limit"])
    models = [
        stack(
            data.features, NETWORKS[settings["network"]], placement, seed=seed, bias=bias,
            norm=partial(torch_bn.BatchNorm1d, eps=eps), dtype=torch.float64,
        )
        for _ in range(2)
    ]  # fmt: skip
    with torch.no_grad():
        # One unit's weights go to the next number.
        unit = models[1].get_submodule("dense1").weight[0]
        unit.copy_(torch.nextafter(unit, torch.full_like(unit, math.inf)))
    optimizers = [optimizer_of(settings, model) for model in models]
    batches = Batches(*train, 64, seed)
    apart, steepest = [], []
    for first in range(0, count, EVERY):
        for index, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            taken = steps(model, optimizer, batches, EVERY, first=first)
            if index or placement == "none":
                list(taken)
                continue
            with Recorder(model) as record:
                list(taken)
            stds = torch.cat([each.input.std.flatten() for each in record.values()])
            steepest.append(float((stds.square() + eps).rsqrt().max()))
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        apart.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    return {"apart": apart, "growth": growth(apart), "steepest": max(steepest, default=0.0)}


def growth(apart: Sequence[float]) -> float:
    """Decades per hundred steps by which the difference grows, fitted until it is large.

    The first fifty steps are left out: there the one rounding spreads to all weights.
    """
    kept = []
    for place, value in enumerate(apart, start=1):
        if value > SATURATED:
            break
        if place * EVERY > 50:
            kept.append((place * EVERY / 100, math.log10(max(value, FLOOR))))
    if len(kept) < 3:
        return math.inf
    return float(np.polyfit(*np.array(kept).T, 1)[0])


def judge(runs: Sequence[Run]) -> list[Claim]:
    groups = Group(runs, "variant")
    adam = Group([run for run in runs if run.settings["optimizer"] == "adam"], "variant")
    early = {v: [run.result["apart"][-1] for run in adam[v,]] for v in ("before", BLUNT)}
    found = {variant: groups.results(variant, of="growth") for variant in VARIANTS}
    steep = {variant: groups.results(variant, of="steepest") for variant in VARIANTS}
    stays = f"less than {STAYS} decades per hundred steps in every network, optimizer and seed"
    claims = [
        Claim(
            "with BN after the ReLU, a difference of one rounding grows",
            f"at least {GROWS} decades per hundred steps in every network, optimizer and seed",
            spread(found["after"], ".2f"),
            min(found["after"]) >= GROWS,
        )
    ]
    for variant, words in (("before", "with BN before the ReLU"), ("none", "without BN")):
        claims.append(
            Claim(
                f"{words}, it does not",
                stays,
                spread(found[variant], ".2f"),
                max(found[variant]) < STAYS,
            )
        )
    claims.append(
        Claim(
            "it grows because batch norm divides by the deviation of units that are nearly off",
            f"with eps 0.01 instead of 1e-5, after the ReLU: {stays}",
            f"{spread(found['after, eps 0.01'], '.2f')}; largest 1 / sqrt(var + eps) "
            f"{max(steep['after, eps 0.01']):.0f} instead of {max(steep['after']):.0f}",
            max(found["after, eps 0.01"]) < STAYS,
        )
    )
    claims.append(
        Claim(
            "with Adam and BN before the ReLU weights part early because Adam divides gradients "
            "that are nothing but rounding by their own size",
            "with Adam's eps 1e-5 instead of 1e-8 the weights end at least a thousand times "
            "closer, the worst against the best of all networks and seeds",
            f"{max(early[BLUNT]):.1e} at most against {min(early['before']):.1e} at least",
            max(early[BLUNT]) <= min(early["before"]) / 1000,
        )
    )
    return claims


def draw(runs: Sequence[Run]) -> Any:
    networks = list(dict.fromkeys(run.settings["network"] for run in runs))
    figure, axes = plots.subplots(2, len(networks), height=3.0, sharex=True, sharey=True)
    groups = Group(runs, "network", "optimizer", "variant")
    for column, network in enumerate(networks):
        for row, optimizer in enumerate(("adam", "sgd")):
            ax = axes[row, column]
            for index, variant in enumerate(VARIANTS):
                for seed, run in enumerate(groups.get((network, optimizer, variant), [])):
                    values = np.maximum(run.result["apart"], FLOOR)
                    at = np.arange(1, len(values) + 1) * EVERY
                    ax.plot(
                        at, values, color=plots.CYCLE[index], linewidth=1.2,
                        marker=plots.MARKERS[index], markersize=4, markevery=len(at) // 5,
                        label=variant if seed == 0 else None,
                    )  # fmt: skip
            ax.set(yscale="log", title=f"{network}, {optimizer}")
            if row:
                ax.set_xlabel("step")
            if not column:
                ax.set_ylabel("largest difference\nof a weight")
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def table(runs: Sequence[Run]) -> Table:
    groups = Group(runs, "network", "optimizer", "variant")
    rows = [
        [
            ", ".join(key),
            spread([run.result["growth"] for run in found], ".2f"),
            f"{max(run.result['apart'][-1] for run in found):.1e}",
            f"{max(run.result['steepest'] for run in found):.1f}",
        ]
        for key, found in groups.items()
    ]
    columns = [
        "network, optimizer, placement", "decades per 100 steps", "largest at the end",
        "largest 1 / sqrt(var + eps)",
    ]  # fmt: skip
    return Table("How fast two float64 runs part that differ by a rounding", columns, rows)


NOTE = (
    "Why: after a ReLU a unit may be on for a row or two of a batch and off for the rest. Its "
    "variance is then tiny, and batch norm divides by its root: whatever small value the unit "
    "has in that row is blown up to the root of the batch size, and a rounding in it with it, by "
    "up to 1 / sqrt(eps), 316 for eps 1e-5. The gradient takes the same factor back. Before the "
    "ReLU a Dense layer's output varies in every row, its deviation is far from zero, and "
    "nothing is blown up. The control is eps: at 0.01 the factor is at most 10, and what growth "
    "is left is of the size of the other networks', which rises with their depth. Adam adds a "
    "step of its own with batch norm before the ReLU: what is constant over a batch, as a pixel "
    "that is black in all its images, or a bias, is subtracted again, so that the gradient of "
    "its weights is nothing but rounding, which Adam divides by its own size, or by its eps of "
    "1e-8. Those weights part early, to about 1e-10, and no further: nothing depends on them. "
    "The control is Adam's eps: at 1e-5 it does not divide by so little."
)

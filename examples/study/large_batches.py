"""Experiment 8: large batches, and ghost batch norm."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import torch_bn
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
from study.training import epoch, samples, score, stack

SMALL, LARGE = 128, 4096
RATE = 0.1
METHODS = {
    "small": f"batch {SMALL}",
    "large": f"batch {LARGE}",
    "rate": f"{LARGE}, rate x √{LARGE // SMALL}",
    "ghost": f"{LARGE}, rate, ghost batches of {SMALL}",
}


def plan(quick: bool) -> list[Settings]:
    return grid(
        method=tuple(METHODS),
        limit=(6000 if quick else None,),
        epochs=(4 if quick else 40,),
        drop_every=(1 if quick else 10,),
        seed=range(1 if quick else 3),
    )


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    method, seed = settings["method"], settings["seed"]
    train, validation = samples(data, "zscore", settings["limit"])
    size = min(SMALL if method == "small" else LARGE, len(train[1]))
    ghost = SMALL if method == "ghost" else None
    model = stack(
        data.features,
        (512,) * 5,
        "before",
        seed=seed,
        bias=False,
        norm=partial(torch_bn.BatchNorm1d, virtual_batch_size=ghost),
    )
    rate = RATE * math.sqrt(size / SMALL) if method in ("rate", "ghost") else RATE
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [settings["drop_every"] * drop for drop in (1, 2, 3)]
    )
    batches = Batches(*train, size, seed)
    losses, accuracies = [], []
    for number in range(settings["epochs"]):
        losses.append(epoch(model, optimizer, batches, number, clip=5.0))
        accuracies.append(score(model, validation)[1])
        schedule.step()
    result = {
        "loss": losses,
        "accuracy": accuracies,
        "final": accuracies[-1],
        "updates": batches.per_epoch * settings["epochs"],
        "training": score(model, train)[1],
    }
    if ghost is not None:
        result["cost"] = cost(model, train[0][:size])
    return result


def cost(model: torch.nn.Sequential, x: torch.Tensor, repetitions: int = 9) -> float:
    """The time of a training step's passes with ghost batches over that without.

    The two take turns, in the thread's own time, so that it does not matter what else runs.
    """
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, torch_bn.BatchNorm1d):
            module.virtual_batch_size = None
    times: dict[torch.nn.Module, list[float]] = {model: [], plain: []}
    for _ in range(repetitions):
        for each, found in times.items():
            each.train()
            began = time.thread_time()
            each(x).sum().backward()
            found.append(time.thread_time() - began)
    return statistics.median(times[model]) / statistics.median(times[plain])


def judge(runs: Sequence[Run]) -> list[Claim]:
    groups = Group(runs, "method")
    finals = {method: mean(groups.results(method, of="final")) for method in METHODS}

    def seen(better: str, worse: str) -> str:
        found = (spread(groups.results(method, of="final")) for method in (better, worse))
        return " against ".join(found)

    costs = groups.results("ghost", of="cost")
    gap = finals["small"] - finals["large"]
    closed = finals["ghost"] - finals["large"]
    return [
        Claim(
            "large batches generalise worse at the same schedule",
            f"mean final accuracy of batch {LARGE} below that of batch {SMALL}",
            seen("large", "small"),
            finals["large"] < finals["small"],
        ),
        Claim(
            "a learning rate larger by the root of the batches' ratio helps",
            f"mean final accuracy above that of batch {LARGE} at the rate for {SMALL}",
            seen("rate", "large"),
            finals["rate"] > finals["large"],
        ),
        Claim(
            "ghost batches help beyond that",
            "mean final accuracy above that of the larger rate alone",
            seen("ghost", "rate"),
            finals["ghost"] > finals["rate"],
        ),
        Claim(
            "both together close at least half of the gap",
            f"mean final accuracy at most half as far below batch {SMALL}, where there is a gap",
            f"{closed * 100:+.2f} points of {gap * 100:.2f}",
            gap > 0 and closed >= gap / 2,
        ),
        Claim(
            "ghost batches cost little time",
            "a forward and backward of the network takes at most 1.2 times as long as with whole "
            "batches of 4096, medians of runs in turn, every seed",
            f"{spread(costs, '.2f')} times",
            max(costs) <= 1.2,
        ),
    ]


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, 2)
    groups = Group(runs, "method")
    for index, (method, words) in enumerate(METHODS.items()):
        curves = (groups.results(method, of=of) for of in ("loss", "accuracy"))
        plots.loss_and_error_bands(
            *axes[0], *curves, color=plots.CYCLE[index], marker=plots.MARKERS[index], markersize=4,
            label=words,
        )  # fmt: skip
    plots.loss_and_error(*axes[0])
    plots.legend_below(figure, axes[0, 0], 2)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(runs, "method")
    rows = [
        [
            words,
            f"{groups.results(method, of='updates')[0]:,}",
            spread(groups.results(method, of="training")),
            spread(groups.results(method, of="final")),
        ]
        for method, words in METHODS.items()
    ]
    columns = ["method", "updates", "training accuracy", "validation accuracy"]
    settings = runs[0].settings
    return Findings(
        judge(runs),
        [Table("After the last epoch, mean (lowest to highest seed)", columns, rows)],
        [(draw(runs), "Loss and error by epoch; bands are the extremes of the seeds.")],
        [
            f"{settings['epochs']} epochs, the rate divided by 10 every {settings['drop_every']} "
            "of them up to three times; the paper divides at epochs 10, 20 and 30. The same epochs "
            "are fewer updates with large batches. The paper's table is not compared with these "
            "figures: its networks and data are others."
        ],
    )


EXPERIMENT = Experiment(
    number=8,
    name="large_batches",
    title="Large batches",
    about="After Hoffer, Hubara and Soudry 2017, network F1: five layers of 512 with BN and ReLU "
    "and a Dense to the classes. SGD with momentum 0.9 and weight decay 1e-4, rate 0.1, gradients "
    "clipped to norm 5. Batches of 128 and of 4096; then the rate times the root of their ratio; "
    "then ghost batches of 128 too (virtual_batch_size).",
    plan=plan,
    measure=measure,
    findings=findings,
)

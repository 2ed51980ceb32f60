"""Experiment 7: where batch norm stands, and what it does to the sensitivity of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from scipy import stats

from mlp.data import Dataset
from mlp.training import Batches
from study import plots, sensitivity
from study.experiment import (
    Claim,
    Experiment,
    Findings,
    Group,
    Run,
    Settings,
    Table,
    grid,
    of_kind,
    spread,
)
from study.training import samples, score, stack, steps
from torch_bn.diagnostics import Recorder

NETWORKS = {"300-100": (300, 100), "6 x 100": (100,) * 6}
VARIANTS = {
    "none": ("none", True),
    "before": ("before", False),
    "before, biased": ("before", True),
    "after": ("after", True),
    "after, unbiased": ("after", False),
}
"""Placement, and whether the Dense layers have a bias."""
PAIRS = (
    ("before", "after"),
    ("before", "none"),
    ("before, biased", "before"),
    ("after", "after, unbiased"),
)
LEVEL = 0.05
ZERO = 100 * torch.finfo(torch.float32).eps
"""Of the gradient that the bias's is the sum of, in norm; some roundings of each of 64 rows."""


def plan(quick: bool) -> list[Settings]:
    training: list[Settings] = grid(
        kind=("training",),
        network=tuple(NETWORKS),
        variant=tuple(VARIANTS),
        limit=(3000 if quick else None,),
        epochs=(2 if quick else 5,),
        seed=range(5 if quick else 7),
    )
    return training + sensitivity.plan(quick)


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    if settings["kind"] == "sensitivity":
        return sensitivity.measure(settings, data)
    seed = settings["seed"]
    placement, bias = VARIANTS[settings["variant"]]
    train, validation = samples(data, "zscore", settings["limit"])
    model = stack(data.features, NETWORKS[settings["network"]], placement, seed=seed, bias=bias)
    optimizer = torch.optim.Adam(model.parameters())
    batches = Batches(*train, 64, seed)
    with Recorder(model, ["dense1", "dense2"], every=25, gradients=True) as record:
        list(steps(model, optimizer, batches, settings["epochs"] * batches.per_epoch))
    ratios = [
        float((each.parameter_gradients["bias"] / each.output_gradient).max())
        for each in record.values()
        if "bias" in each.parameter_gradients
    ]
    return {"accuracy": score(model, validation)[1], "bias_gradient": max(ratios, default=None)}


def compare(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float, float]:
    """Of the differences seed by seed: the mean, its 95% interval, and p of a paired t test."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    average = sum(differences) / len(differences)
    if len(set(differences)) == 1:
        # There is no variance to test against.
        return average, average, average, 1.0 if average == 0 else 0.0
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(0.95)
    return average, float(low), float(high), float(test.pvalue)


def judge(runs: Sequence[Run]) -> list[Claim]:
    groups = Group(of_kind(runs, "training"), "network", "variant")
    claims = []
    for network in NETWORKS:
        found = {
            pair: compare(*(groups.results(network, v, of="accuracy") for v in pair))
            for pair in PAIRS
        }

        def seen(pair: tuple[str, str], found: Any = found) -> str:
            average, low, high, p = found[pair]
            return f"{average * 100:+.2f} points ({low * 100:+.2f} to {high * 100:+.2f}), p {p:.2g}"

        average, _, _, p = found["before", "after"]
        claims.append(
            Claim(
                f"BN before or after the ReLU makes a difference, {network}",
                f"p below {LEVEL} in a paired t test of the final accuracies over the seeds",
                f"before less after: {seen(('before', 'after'))}",
                p < LEVEL,
            )
        )
        average, _, _, p = found["before", "none"]
        claims.append(
            Claim(
                f"BN before the ReLU is better than none, {network}",
                f"higher mean accuracy, p below {LEVEL}",
                seen(("before", "none")),
                average > 0 and p < LEVEL,
            )
        )
        average, _, _, p = found["before, biased", "before"]
        claims.append(
            Claim(
                f"a Dense bias before BN changes nothing, {network}",
                f"no difference in accuracy with p below {LEVEL}",
                seen(("before, biased", "before")),
                p >= LEVEL,
            )
        )
    ratios = {
        variant: [
            run.result["bias_gradient"]
            for (_, name), each in groups.items()
            for run in each
            if name == variant
        ]
        for variant in ("before, biased", "after")
    }
    worst, usual = max(ratios["before, biased"]), max(ratios["after"])
    claims.append(
        Claim(
            "the gradient of a bias before BN is zero to rounding",
            f"its norm at most {ZERO:.1e} of that of the gradient for the Dense layer's output",
            f"{worst:.1e} ({usual:.1e} where BN comes after the ReLU)",
            worst <= ZERO,
        )
    )
    return claims + sensitivity.judge(of_kind(runs, "sensitivity"))


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, len(NETWORKS))
    groups = Group(of_kind(runs, "training"), "network", "variant")
    for ax, network in zip(axes[0], NETWORKS, strict=True):
        for place, variant in enumerate(VARIANTS):
            values = groups.results(network, variant, of="accuracy")
            shifts = [place + 0.3 * (i / (len(values) - 1) - 0.5) for i in range(len(values))]
            ax.scatter(shifts, values, color=plots.CYCLE[place], marker=plots.MARKERS[place], s=22)
            average = sum(values) / len(values)
            ax.hlines(average, place - 0.3, place + 0.3, color=plots.CYCLE[place], linewidth=2)
        ax.set_xticks(range(len(VARIANTS)), [name.replace(", ", ",\n") for name in VARIANTS])
        ax.set(title=network, xlabel="batch norm, and the Dense layers' bias")
        plots.percent(ax)
    axes[0, 0].set_ylabel("final validation accuracy")
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(of_kind(runs, "training"), "network", "variant")
    others = of_kind(runs, "sensitivity")
    rows = [
        [f"{network}, {variant}", spread(values)]
        for (network, variant), values in groups.each("accuracy")
    ]
    tests = []
    for network in NETWORKS:
        for pair in PAIRS:
            average, low, high, p = compare(
                *(groups.results(network, v, of="accuracy") for v in pair)
            )
            tests.append(
                [
                    f"{network}: {pair[0]} less {pair[1]}",
                    f"{average * 100:+.3f}",
                    f"{low * 100:+.3f} to {high * 100:+.3f}",
                    f"{p:.3g}",
                ]
            )
    columns = ["difference", "points of accuracy", "95% interval", "p"]
    return Findings(
        judge(runs),
        [
            Table("Final accuracy, mean (lowest to highest seed)", ["network", "accuracy"], rows),
            Table("Paired t tests over the seeds, not corrected for their number", columns, tests),
            sensitivity.table(others),
        ],
        [
            (draw(runs), "Final accuracy of every seed; bars are means."),
            (
                sensitivity.draw(others),
                "Two float64 runs, of which one begins with one unit's weights a rounding apart: "
                "the largest difference of any weight. Every seed is a line.",
            ),
        ],
        [sensitivity.NOTE],
    )


EXPERIMENT = Experiment(
    number=7,
    name="placement",
    title="Placement, and the sensitivity of training",
    about="The reference network and one of six layers of 100, BN before or after the ReLU, with "
    "and without biases in the Dense layers, Adam at 0.001, batches of 64; seeds share weights and "
    "batches, so that they can be compared in pairs. Then pairs of float64 runs that differ by a "
    "rounding, with Adam at 0.001 and SGD at 0.01 with momentum 0.9.",
    plan=plan,
    measure=measure,
    findings=findings,
)

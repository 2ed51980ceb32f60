"""Experiment 4: gradients that vanish and explode with depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from mlp.data import Dataset
from study import plots
from study.experiment import Claim, Experiment, Findings, Group, Run, Settings, Table, grid
from study.training import ACTIVATIONS, samples, stack
from torch_bn.diagnostics import Recorder

DEPTHS = (2, 5, 10, 20, 30, 50)
WIDTH = 100
GAINS = {"sigmoid": 4.0, "tanh": 1.0, "relu": math.sqrt(2)}
"""Standard deviations times sqrt(inputs) that keep a gradient's size, as near as each allows."""
FACTORS = {"small": 0.1, "right": 1.0, "large": 10.0}
EVEN = 1.0
"""Decades by which first and last hidden layer may differ and still count as even."""
SAME = 0.5
"""Decades that eps may cost: 1e-5 beside a variance of 0.01, in each of fifty layers."""


def plan(quick: bool) -> list[Settings]:
    return grid(
        activation=tuple(ACTIVATIONS),
        weights=tuple(FACTORS),
        placement=("none", "before"),
        rows=(128 if quick else 256,),
        seed=range(1 if quick else 3),
    )


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    activation = settings["activation"]
    (x, y), _ = samples(data, "zscore", settings["rows"])
    scale = GAINS[activation] * FACTORS[settings["weights"]]
    norms: dict[str, list[float]] = {}
    weights: dict[str, list[float]] = {}
    for depth in DEPTHS:
        # float64: gradients of these sizes would be zero or infinite in float32.
        model = stack(
            data.features, (WIDTH,) * depth, settings["placement"], seed=settings["seed"],
            activation=activation, std=lambda inputs: scale / math.sqrt(inputs), bias=False,
            dtype=torch.float64,
        )  # fmt: skip
        names = [f"dense{number}" for number in range(1, depth + 1)]
        with Recorder(model, names, gradients=True) as record:
            F.cross_entropy(model(x.double()), y).backward()
        found = [record[name] for name in names]
        norms[str(depth)] = [float(each.output_gradient[0]) for each in found]
        weights[str(depth)] = [float(each.parameter_gradients["weight"][0]) for each in found]
    return {"norms": norms, "weights": weights}


def decades(norms: Sequence[float]) -> float:
    """How many powers of ten the first hidden layer has more than the last."""
    first, last = norms[0], norms[-1]
    if not (0 < first < math.inf and 0 < last < math.inf):
        return -math.inf if first == 0 or last == math.inf else math.inf
    return math.log10(first / last)


def deepest(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[float]]:
    """By activation, weights and placement: decades at the largest depth, of each seed."""
    groups = Group(runs, "activation", "weights", "placement")
    return {
        key: [decades(run.result["norms"][str(DEPTHS[-1])]) for run in found]
        for key, found in groups.items()
    }


def judge(runs: Sequence[Run]) -> list[Claim]:
    found = deepest(runs)
    deep = f"{DEPTHS[-1]} layers"
    claims = [
        Claim(
            "without BN, small weights make gradients vanish",
            f"at least 10 decades smaller in the first than in the last hidden layer of {deep}, "
            "every activation and seed",
            ", ".join(f"{a} {max(found[a, 'small', 'none']):+.1f}" for a in ACTIVATIONS),
            all(max(found[a, "small", "none"]) <= -10 for a in ACTIVATIONS),
        ),
        Claim(
            "without BN, large weights make gradients explode",
            f"at least 10 decades larger in the first than in the last hidden layer of {deep}, "
            "every activation and seed",
            ", ".join(f"{a} {min(found[a, 'large', 'none']):+.1f}" for a in ACTIVATIONS),
            all(min(found[a, "large", "none"]) >= 10 for a in ACTIVATIONS),
        ),
        Claim(
            "with BN before a ReLU, the scale of the initial weights hardly matters",
            f"small, right and large weights agree within {SAME} decades at {deep}, every seed",
            f"apart by {apart(found):.2g} decades",
            apart(found) <= SAME,
        ),
    ]
    for a in ACTIVATIONS:
        values = found[a, "right", "before"]
        worst = max(values, key=abs)
        claims.append(
            Claim(
                f"with BN, gradients of {a} stay even over {deep}",
                f"first and last hidden layer within {EVEN:g} decade, weights of the right size",
                f"{worst:+.1f} decades",
                abs(worst) <= EVEN,
            )
        )
    return claims


def apart(found: Mapping[tuple[str, str, str], Sequence[float]]) -> float:
    """The most that the three sizes of weights differ with BN before ReLU, in any seed."""
    three = np.array([found["relu", weights, "before"] for weights in FACTORS])
    return float((three.max(0) - three.min(0)).max())


def draw(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(2, 3, height=3.1, sharex=True, sharey="row")
    groups = Group(runs, "activation", "weights", "placement")
    for column, activation in enumerate(ACTIVATIONS):
        for row, placement in enumerate(("none", "before")):
            ax = axes[row, column]
            for index, weights in enumerate(FACTORS):
                norms = groups[activation, weights, placement][0].result["norms"][str(DEPTHS[-1])]
                ax.plot(
                    range(1, len(norms) + 1), norms, color=plots.CYCLE[index],
                    marker=plots.MARKERS[index], markersize=3, label=f"{weights} weights",
                )  # fmt: skip
            ax.set(yscale="log", title=f"{activation}, {'no' if row == 0 else 'with'} BN")
            if row:
                ax.set_xlabel("hidden layer")
            if not column:
                ax.set_ylabel("norm of the gradient for\nDense outputs (nats / unit)")
    plots.legend_below(figure, axes[0, 0], 3)
    return figure


def draw_depths(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, 3, sharex=True)
    groups = Group(runs, "activation", "weights", "placement")
    for ax, activation in zip(axes[0], ACTIVATIONS, strict=True):
        for placement, dash in (("none", "-"), ("before", "--")):
            for index, weights in enumerate(FACTORS):
                curves = [
                    [decades(run.result["norms"][str(depth)]) for depth in DEPTHS]
                    for run in groups[activation, weights, placement]
                ]
                plots.band(
                    ax, DEPTHS, curves, color=plots.CYCLE[index], linestyle=dash,
                    marker=plots.MARKERS[index], markersize=4,
                    label=f"{weights}, {'no BN' if placement == 'none' else 'BN'}",
                )  # fmt: skip
        ax.set(xlabel="hidden layers", title=activation, yscale="symlog")
    axes[0, 0].set_ylabel("gradient of first over last\nhidden layer (decades)")
    plots.legend_below(figure, axes[0, 0], 6)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    found = deepest(runs)
    groups = Group(runs, "activation", "weights", "placement")
    rows = [
        [f"{a}, {w} weights"] + [
            f"{min(found[a, w, p]):+.1f} to {max(found[a, w, p]):+.1f}" for p in ("none", "before")
        ]
        for a in ACTIVATIONS
        for w in FACTORS
    ]  # fmt: skip
    return Findings(
        judge(runs),
        [
            Table(
                f"Decades from the last to the first of {DEPTHS[-1]} hidden layers, all seeds",
                ["network", "without BN", "with BN"],
                rows,
            ),
            Table(
                "Norm of the first Dense weight's gradient (nats / unit), seed 0, right weights",
                ["network", *(f"{depth} layers" for depth in DEPTHS)],
                [
                    [f"{a}, {'no BN' if p == 'none' else 'BN'}"]
                    + [
                        f"{groups[a, 'right', p][0].result['weights'][str(d)][0]:.1e}"
                        for d in DEPTHS
                    ]
                    for a in ACTIVATIONS
                    for p in ("none", "before")
                ],
            ),
        ],
        [
            (draw(runs), f"Gradient norm of every layer of {DEPTHS[-1]}, seed 0; axes differ."),
            (draw_depths(runs), "Decades between the first and the last hidden layer by depth."),
        ],
        [
            "What goes back through a layer without BN is multiplied by its weights and by the "
            "slope of its activation, so that fifty layers take the fiftieth power. With BN a "
            "layer's output, and the gradient's ratio from layer to layer, do not depend on the "
            "size of its weights, up to eps. That ratio is still not one: where the claims on "
            "evenness did not hold, gradients grow towards the input at a rate that the initial "
            "weights cannot change."
        ],
    )


EXPERIMENT = Experiment(
    number=4,
    name="depth",
    title="Vanishing and exploding gradients",
    about="The norm of the loss's gradient for every Dense layer's output before the first step, "
    "for 2 to 50 hidden layers of 100 without biases, in float64, on one batch of images. Gaussian "
    "initial weights: right is a standard deviation of g / sqrt(inputs) with g 4 for sigmoid, 1 "
    "for tanh and sqrt(2) for ReLU; small and large are a tenth and ten times of it.",
    plan=plan,
    measure=measure,
    findings=findings,
)

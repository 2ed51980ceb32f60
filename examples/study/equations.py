"""Experiment 2: the layer's own equations, over a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import torch_bn
from mlp.data import Dataset
from mlp.model import build_mlp
from mlp.training import Batches
from study import plots
from study.experiment import Claim, Experiment, Findings, Group, Run, Settings, Table, grid
from study.training import samples, score, steps
from torch_bn.diagnostics import Recorder

EPS32 = torch.finfo(torch.float32).eps
BOUND = 4
"""Roundings of float32, relative to the layer's largest output."""
SHOWN = 4


def plan(quick: bool) -> list[Settings]:
    return grid(
        placement=("before", "after"),
        limit=(6400 if quick else None,),
        epochs=(2 if quick else 5,),
        every=(10 if quick else 50,),
        seed=range(1 if quick else 3),
    )


def measure(settings: Settings, data: Dataset) -> Mapping[str, Any]:
    seed = settings["seed"]
    train, validation = samples(data, "zscore", settings["limit"])
    model = build_mlp(data.features, settings["placement"], torch_bn.BatchNorm1d, seed=seed)
    batches = Batches(*train, 64, seed)
    optimizer = torch.optim.Adam(model.parameters())
    weights: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"bn1": [], "bn2": []}
    every = settings["every"]
    with Recorder(model, every=every, percentiles=(0, 100)) as record:
        # Between two steps the weights are those of the next forward.
        for step in range(settings["epochs"] * batches.per_epoch):
            if step % every == 0:
                for name, kept in weights.items():
                    layer = model.get_submodule(name)
                    kept.append((layer.weight.detach().double(), layer.bias.detach().double()))
            list(steps(model, optimizer, batches, 1, first=step))
    result: dict[str, Any] = {"steps": record["bn1"].steps.tolist(), "layers": {}}
    for name, kept in weights.items():
        found = record[name]
        gamma, beta = (torch.stack(values) for values in zip(*kept, strict=True))
        variance = found.input.std.square()
        expected = gamma.abs() * (variance / (variance + model.get_submodule(name).eps)).sqrt()
        largest = found.output.percentiles.abs().amax((1, 2))
        scale = largest[:, None]
        result["layers"][name] = {
            "mean": found.output.mean[:, :SHOWN].tolist(),
            "beta": beta[:, :SHOWN].tolist(),
            "std": found.output.std[:, :SHOWN].tolist(),
            "gamma": gamma[:, :SHOWN].tolist(),
            "mean_error": ((found.output.mean - beta).abs() / scale).amax(1).tolist(),
            "std_error": ((found.output.std - expected).abs() / scale).amax(1).tolist(),
            "without_eps": ((found.output.std - gamma.abs()).abs() / scale).amax(1).tolist(),
            "dead": (variance == 0).double().mean(1).tolist(),
        }
    return {**result, "accuracy": score(model, validation)[1]}


def worst(runs: Sequence[Run], what: str, placement: str | None = None) -> float:
    """The largest figure of all steps and layers, of that placement or all."""
    return max(
        value
        for run in runs
        if placement in (None, run.settings["placement"])
        for layer in run.result["layers"].values()
        for value in layer[what]
    )


def judge(runs: Sequence[Run]) -> list[Claim]:
    bound = BOUND * EPS32
    mean_error, std_error = worst(runs, "mean_error"), worst(runs, "std_error")
    naive = {place: worst(runs, "without_eps", place) for place in ("before", "after")}
    claims = [
        Claim(
            "the mean of a channel's output is beta",
            f"apart by at most {BOUND} roundings of float32 ({bound:.1e}) of the layer's largest "
            "output, in every channel at every recorded step",
            f"{mean_error:.1e}, {mean_error / EPS32:.2f} roundings",
            mean_error <= bound,
        ),
        Claim(
            "its standard deviation is |gamma| sqrt(var / (var + eps))",
            f"apart by at most {BOUND} roundings ({bound:.1e}) of the layer's largest output",
            f"{std_error:.1e}, {std_error / EPS32:.2f} roundings",
            std_error <= bound,
        ),
    ]
    for place, value in naive.items():
        claims.append(
            Claim(
                f"with BN {place} the ReLU, it is gamma to 0.1%",
                "apart by at most 0.1% of the layer's largest output",
                f"{value:.2%}",
                value <= 1e-3,
            )
        )
    return claims


def draw(run: Run) -> Any:
    figure, axes = plots.subplots(1, 2)
    layer, at = run.result["layers"]["bn2"], run.result["steps"]
    pairs = (("beta", "mean", "mean of the output"), ("gamma", "std", "standard deviation"))
    for ax, (parameter, moment, words) in zip(axes[0], pairs, strict=True):
        for channel in range(SHOWN):
            colour = plots.CYCLE[channel]
            values = np.array(layer[moment])[:, channel]
            ax.plot(at, values, plots.MARKERS[channel], color=colour, alpha=0.5, markersize=5,
                    label=f"channel {channel}: measured")  # fmt: skip
            own = np.array(layer[parameter])[:, channel]
            if parameter == "gamma":
                own = np.abs(own)
            ax.plot(at, own, color=colour, linewidth=1.2, label=f"channel {channel}: parameter")
        symbol = "β" if parameter == "beta" else "|γ|"
        ax.set(xlabel="step", ylabel=f"{words}, and {symbol}\n(no unit)")
    plots.legend_below(figure, axes[0, 0], 4)
    figure.suptitle(f"Second batch norm, {run.settings['placement']} the ReLU")
    return figure


def draw_errors(runs: Sequence[Run]) -> Any:
    figure, axes = plots.subplots(1, 2, sharey=True)
    groups = Group(runs, "placement")
    for ax, place in zip(axes[0], ("before", "after"), strict=True):
        run = groups[place,][0]
        for layer, dash in (("bn1", "-"), ("bn2", "--")):
            found = run.result["layers"][layer]
            for key, colour, words in (
                ("mean_error", plots.BLUE, "mean - β"),
                ("std_error", plots.ORANGE, "std - |γ| √(var/(var+eps))"),
                ("without_eps", plots.GREEN, "std - |γ|"),
            ):
                # A log axis has no zero.
                values = np.maximum(found[key], EPS32 / 100)
                ax.plot(run.result["steps"], values, dash, color=colour, label=f"{layer}: {words}")
        ax.axhline(BOUND * EPS32, color=plots.RED, linestyle=":", label=f"{BOUND} roundings")
        ax.set(xlabel="step", yscale="log", title=f"BN {place} the ReLU")
    axes[0, 0].set_ylabel("worst channel's error /\nlargest output")
    plots.legend_below(figure, axes[0, 0], 4)
    return figure


def findings(runs: Sequence[Run]) -> Findings:
    groups = Group(runs, "placement")
    found = Findings(claims=judge(runs))
    for place in ("before", "after"):
        words = "Measured moments of four channels lie on their parameters"
        found.figures.append((draw(groups[place,][0]), f"{words} (BN {place} the ReLU, seed 0)."))
    found.figures.append(
        (draw_errors(runs), "The worst channel's error at every recorded step, seed 0.")
    )
    rows = [
        [
            f"{place}, {layer}",
            *(
                f"{max(max(run.result['layers'][layer][key]) for run in groups[place,]):.1e}"
                for key in ("mean_error", "std_error", "without_eps")
            ),
            f"{max(max(run.result['layers'][layer]['dead']) for run in groups[place,]):.1%}",
        ]
        for place in ("before", "after")
        for layer in ("bn1", "bn2")
    ]
    columns = ["placement, layer", "mean", "std", "std without eps", "channels of no variance"]
    found.tables.append(Table("Worst errors of all steps and seeds", columns, rows))
    found.notes.append(
        "The deviation is gamma only where the batch's variance is well above eps. After a ReLU a "
        "unit may be zero in all rows of a batch: its output is then beta everywhere, and its "
        "deviation zero whatever gamma is. The fuller equation holds there too."
    )
    return found


EXPERIMENT = Experiment(
    number=2,
    name="equations",
    title="The layer's own equations",
    about="The reference network with BN before and after the ReLU, Adam at 0.001, batches of 64. "
    "torch_bn.diagnostics.Recorder measures in float64 what the layers give in training.",
    plan=plan,
    measure=measure,
    findings=findings,
)

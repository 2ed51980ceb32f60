"""The pictures of a run, as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mlp.files import written_beside
from mlp.free_proofs import SEEDS, FreeFloat32, FreeFloat64
from mlp.step_proof import StepProof
from mlp.training import BUILTIN, OURS, WITHOUT, Training

# Okabe and Ito's palette, told apart with every kind of colour vision. The builtin is a broad pale
# line under ours, as the two mostly coincide.
COLOURS = {OURS: "#0072B2", BUILTIN: "#E69F00", WITHOUT: "#009E73"}
WIDTHS = {OURS: 1.4, BUILTIN: 4.5, WITHOUT: 1.4}
ORDER = (BUILTIN, WITHOUT, OURS)
BOUND = "#D55E00"

STYLE = {
    "figure.dpi": 130,
    "font.size": 9.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "figure.constrained_layout.use": True,
}


def plot_curves(training: Training, title: str, path: Path) -> None:
    """Loss and accuracy of every network over the epochs."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
        for name in (n for n in ORDER if n in training.history):
            curve = training.history[name]
            epochs = range(1, len(curve) + 1)
            for ax, quantity in zip(axes, ("loss", "accuracy"), strict=True):
                for split, dash, marker in (("train", (0, (3, 1.5)), ""), ("validation", "-", "o")):
                    ax.plot(
                        epochs,
                        [epoch[f"{split}_{quantity}"] for epoch in curve],
                        color=COLOURS[name],
                        linewidth=WIDTHS[name],
                        alpha=0.6 if name == BUILTIN else 1,
                        linestyle=dash,
                        marker=marker or ("." if len(curve) == 1 else ""),
                        markersize=WIDTHS[name] + 2.5,
                        label=f"{name}, {'training' if split == 'train' else split}",
                    )
        axes[0].set_ylabel("cross-entropy (nats)")
        axes[0].set_yscale("log")
        axes[1].set_ylabel("accuracy")
        axes[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        for ax in axes:
            _epoch_axis(ax, len(curve))
        legend_below(figure, axes[0], columns=len(training.history))
        figure.suptitle(title)
        _save(figure, path)


def plot_steps(proof: StepProof, title: str, path: Path) -> None:
    """Error against float64 of ours and the builtin at every step that was compared."""
    errors = proof.errors.numpy()
    steps = np.array(proof.steps)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(2, 2, figsize=(9.5, 6.4), sharex=True, sharey=True)
        # Masks are left out: their errors are zero at nearly every step.
        groups = [group for group in proof.groups().items() if group[0] != "ReLU masks"]
        for ax, (group, columns) in zip(axes.flat, groups, strict=True):
            for which, name in ((1, BUILTIN), (0, OURS)):
                # A log axis has no zero: an exact result is drawn at a tenth of a rounding.
                worst = np.maximum(errors[:, columns, which].max(1), proof.eps / 10)
                # Thinned out, as thousands of dots would hide the other network's.
                some = slice(None, None, 1 + len(steps) // 500)
                ax.plot(
                    steps[some], worst[some], ".", color=COLOURS[name], markersize=3, alpha=0.45
                )
                ax.plot(
                    steps,
                    _running_median(worst, half=10 + len(steps) // 100),
                    zorder=3,
                    color=COLOURS[name],
                    linewidth=WIDTHS[name] / 1.5,
                    label=f"{name} (line: running median)",
                )
            ax.axhline(
                proof.eps, color="#555555", linewidth=0.9, linestyle=":", label="one rounding (eps)"
            )
            ax.set_yscale("log")
            ax.set_title(group, fontsize=10)
        for ax in axes[1]:
            ax.set_xlabel("step")
        for ax in axes[:, 0]:
            ax.set_ylabel("largest error / size")
        legend_below(figure, axes[0, 0], columns=3)
        figure.suptitle(title)
        _save(figure, path)


def plot_float64(stage: FreeFloat64, title: str, path: Path) -> None:
    """How far the weights of ours and the builtin are apart in float64."""
    # A log axis has no zero: equal weights are drawn at a tenth of a rounding.
    floor = np.finfo(np.float64).eps / 10
    differences = np.maximum(stage.differences, floor)
    steps = np.arange(1, len(differences) + 1)
    with plt.rc_context(STYLE):
        figure, ax = plt.subplots(figsize=(8, 4.4))
        ax.plot(
            steps,
            np.maximum(stage.control, floor),
            color=COLOURS[BUILTIN],
            linewidth=3,
            label="torch.nn, rows of a batch reversed",
        )
        ax.plot(steps, differences, color=COLOURS[OURS], linewidth=1.4, label="torch_bn")
        ax.plot(
            steps[: stage.judged],
            stage.bounds()[: stage.judged],
            color=BOUND,
            linestyle="--",
            label="bound for torch_bn",
        )
        if stage.judged < len(differences):
            ax.axvspan(stage.judged, len(differences), color="#EEEEEE", label="not judged: chaos")
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel("largest difference of a weight\nfrom torch.nn")
        legend_below(figure, ax, columns=2)
        figure.suptitle(title)
        _save(figure, path)


def plot_float32(stage: FreeFloat32, title: str, path: Path) -> None:
    """Validation accuracy of ours and the builtin over several seeds."""
    with plt.rc_context(STYLE):
        # A single epoch makes no curve.
        figure, axes = plt.subplots(
            1,
            1 if stage.epochs == 1 else 2,
            figsize=(9.5, 4.2),
            squeeze=False,
            sharey=True,
        )
        if stage.epochs > 1:
            _plot_seeds(stage, axes[0, 0])
        _plot_finals(stage, axes[0, -1])
        axes[0, 0].set_ylabel("validation accuracy")
        axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        if stage.epochs > 1:
            legend_below(figure, axes[0, 0], columns=2)
        figure.suptitle(title)
        _save(figure, path)


def _plot_seeds(stage: FreeFloat32, ax: Axes) -> None:
    for name in (BUILTIN, OURS):
        for index, curve in enumerate(stage.accuracies[name]):
            ax.plot(
                range(1, stage.epochs + 1),
                curve,
                color=COLOURS[name],
                linewidth=WIDTHS[name] / 1.5,
                alpha=0.6 if name == BUILTIN else 0.9,
                label=name if index == 0 else None,
            )
    ax.set_title(f"{SEEDS} seeds", fontsize=10)
    _epoch_axis(ax, stage.epochs)


def _epoch_axis(ax: Axes, epochs: int) -> None:
    ax.set_xlabel("epoch")
    ax.set_xlim(1 - 0.03 * epochs - 0.2, 1.03 * epochs + 0.2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plot_finals(stage: FreeFloat32, ax: Axes) -> None:
    # Seeds stand side by side, as equal accuracies would hide one another.
    shifts = np.linspace(-0.12, 0.12, SEEDS)
    for place, name in enumerate((BUILTIN, OURS)):
        values = [curve[-1] for curve in stage.accuracies[name]]
        ax.scatter(place + shifts, values, color=COLOURS[name], zorder=3)
        ax.hlines(np.mean(values), place - 0.25, place + 0.25, color=COLOURS[name], linewidth=2.5)
    ax.set_xticks((0, 1), (BUILTIN, OURS))
    ax.set_xlim(-0.5, 1.5)
    ax.set_title(f"{SEEDS} seeds after the last epoch; bar: mean", fontsize=10)


def _running_median(values: np.ndarray, half: int) -> np.ndarray:
    return np.array(
        [np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def legend_below(figure: Figure, ax: Axes, columns: int) -> None:
    """The legend of `ax` under all axes, in so many columns."""
    handles: Sequence[object]
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    with written_beside(path) as beside:
        figure.savefig(beside, format="png")
        plt.close(figure)

"""What the experiments' figures have in common."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no display
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from numpy.typing import ArrayLike

from mlp.plots import STYLE
from mlp.plots import legend_below as legend_below

# Okabe and Ito's palette, told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
CYCLE = (BLUE, ORANGE, GREEN, RED, PINK, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# The same colour for the same thing in every figure.
WITH, WITHOUT = BLUE, RED


def subplots(rows: int = 1, columns: int = 1, height: float = 3.8, **more: Any) -> Any:
    """A figure and its axes, (rows, columns), in the study's style."""
    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(9.6, height * rows), squeeze=False, **more)


def percent(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))


def error_axis(ax: Axes, label: str = "validation error") -> None:
    """A logarithmic axis of 1 - accuracy: accuracies near 100% would all lie on one line."""
    ax.set(yscale="log", ylabel=label)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def loss_and_error(loss: Axes, error: Axes) -> None:
    """Titles and scales of two axes with curves over the epochs, as of `loss_and_error_bands`."""
    loss.set(ylabel="training cross-entropy (nats)", yscale="log")
    error_axis(error)
    for ax in (loss, error):
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def band(ax: Axes, x: Sequence[float], curves: ArrayLike, **style: Any) -> None:
    """The mean of the curves, and a band between the extremes of the seeds."""
    values = np.array(curves, dtype=float)
    (line,) = ax.plot(x, values.mean(0), **style)
    ax.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.18, lw=0)


def error_band(
    ax: Axes, x: Sequence[float], accuracies: Sequence[Sequence[float]], **style: Any
) -> None:
    """As `band`, of the errors that belong to accuracies."""
    band(ax, x, 1 - np.array(accuracies, dtype=float), **style)


def loss_and_error_bands(
    loss: Axes,
    error: Axes,
    losses: Sequence[Sequence[float]],
    accuracies: Sequence[Sequence[float]],
    **style: Any,
) -> None:
    """Curves over the epochs, from 1, of several seeds."""
    epochs = range(1, len(losses[0]) + 1)
    band(loss, epochs, losses, **style)
    error_band(error, epochs, accuracies, **style)


def embedded(figure: Figure) -> str:
    """The figure as the address of an image that is part of the page."""
    file = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

"""All experiments, by name and in their order."""

from __future__ import annotations

from study import (
    depth,
    equations,
    evaluation,
    large_batches,
    placement,
    rates,
    regularisation,
    scaling,
    shift,
)
from study.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each
    for each in (
        scaling.EXPERIMENT,
        equations.EXPERIMENT,
        shift.EXPERIMENT,
        depth.EXPERIMENT,
        rates.EXPERIMENT,
        regularisation.EXPERIMENT,
        placement.EXPERIMENT,
        large_batches.EXPERIMENT,
        evaluation.EXPERIMENT,
    )
}

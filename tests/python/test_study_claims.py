"""The study's verdicts, on made-up results for which they are plain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import torch_bn
from study import (
    depth,
    equations,
    evaluation,
    large_batches,
    placement,
    rates,
    regularisation,
    scaling,
    sensitivity,
    shift,
)
from study.experiment import Claim, Run, grid
from study.training import ACTIVATIONS


def verdicts(claims: Sequence[Claim]) -> dict[str, bool]:
    return {claim.statement: claim.held for claim in claims}


def scaling_runs(accuracies: dict[tuple[str, str], float], divergent_from: float) -> list[Run]:
    """Accuracies by scaling and placement, where the rate is not too large for raw data."""
    return [
        Run(s, {"final": 0.1 if s["preprocess"] == "none" and s["rate"] >= divergent_from
                else accuracies[s["preprocess"], s["placement"]]})
        for s in grid(data=("images", "trips"), preprocess=scaling.MODES,
                      placement=("none", "before"), rate=scaling.RATES, seed=(0,))
    ]  # fmt: skip


def test_scaling() -> None:
    places = grid(mode=scaling.MODES, place=("none", "before"))
    good = {(p["mode"], p["place"]): 0.95 for p in places}
    good["none", "none"] = 0.9
    found = verdicts(scaling.judge(scaling_runs(good, divergent_from=0.1)))
    assert len(found) == 9
    assert all(found.values())
    bad = dict.fromkeys(good, 0.9)
    bad["none", "none"] = 0.899
    bad["none", "before"] = 0.88
    found = verdicts(scaling.judge(scaling_runs(bad, divergent_from=99)))
    assert not any(found.values())


def test_trips_are_faster_or_slower_than_fifty() -> None:
    x, y = scaling.trips(500, 0)
    assert ((x[:, 0] / x[:, 1] > 50).long() == y).all()
    z = scaling.scaled("zscore", x, x).double()
    # Each value is below 4 and rounded to float32 once, by 2^-23 = 1.2e-7 at most.
    assert z.mean(0).abs().max() < 1.2e-7
    assert (z.std(0, correction=0) - 1).abs().max() < 1.2e-7


def equations_run(**errors: float) -> Run:
    usual = {"mean_error": 1e-8, "std_error": 1e-8, "without_eps": 1e-5, **errors}
    layer = {key: [1e-9, value] for key, value in usual.items()}
    return Run({"placement": "after"}, {"layers": {"bn1": layer}})


def test_equations() -> None:
    def judged(**errors: float) -> list[bool]:
        before = Run({"placement": "before"}, equations_run().result)
        return [c.held for c in equations.judge([before, equations_run(**errors)])]

    assert judged() == [True, True, True, True]
    assert judged(mean_error=1e-6) == [False, True, True, True]
    assert judged(std_error=1e-6) == [True, False, True, True]
    assert judged(without_eps=0.1) == [True, True, True, False]


def shift_runs(gain: float, wander: float) -> list[Run]:
    """Accuracies that rise, with BN ahead by the gain; all units wander so much without BN."""
    return [
        Run(s, {"steps": [1, 2], "wander": [wander * 0.1, wander * 0.1] if bn else [0.1, 0.1],
                "accuracy": [0.5 + gain * bn, 0.9 + gain * bn]})
        for s in grid(placement=("none", "before"), rate=(0.1, 1.0), seed=(0, 1))
        for bn in (s["placement"] == "before",)
    ]  # fmt: skip


def test_shift() -> None:
    assert [c.held for c in shift.judge(shift_runs(0.05, wander=0.5))] == [True] * 5
    assert [c.held for c in shift.judge(shift_runs(-0.01, wander=2))] == [False] * 5


def test_wander_is_of_place_and_free_of_scale() -> None:
    steady = np.array([[-1.0, 0.0, 1.0]] * 4)
    moving = steady + np.array([[0.0], [1.0], [0.0], [1.0]])
    assert shift.wander(steady) == 0
    assert shift.wander(moving) == 0.25
    assert shift.wander(moving * 8) == 0.25


def depth_runs(slopes: dict[tuple[str, str, str], float]) -> list[Run]:
    """Networks whose gradients' first layer is so many decades above the last."""
    return [
        Run(s, {"norms": {str(d): [10.0 ** slopes[s["activation"], s["weights"], s["placement"]], 1]
                          for d in depth.DEPTHS}})
        for s in grid(activation=ACTIVATIONS, weights=depth.FACTORS, placement=("none", "before"),
                      seed=(0, 1))
    ]  # fmt: skip


def test_depth() -> None:
    keys = [tuple(k.values()) for k in grid(a=ACTIVATIONS, w=depth.FACTORS, p=("none", "before"))]
    sizes = {"small": -20.0, "right": 0.0, "large": 20.0}
    good = {key: sizes[key[1]] if key[2] == "none" else 0.2 for key in keys}
    assert [c.held for c in depth.judge(depth_runs(good))] == [True] * 6
    bad = {key: 5.0 if key[2] == "before" else 0.0 for key in keys}
    bad["relu", "small", "before"] = 0.0
    assert [c.held for c in depth.judge(depth_runs(bad))] == [False] * 6


def test_decades_of_gradients_that_are_gone() -> None:
    assert depth.decades([1e-3, 1.0, 1e2]) == -5
    assert depth.decades([0.0, 1.0]) == -math.inf
    assert depth.decades([math.inf, 1.0]) == math.inf


def rates_runs(largest: dict[str, float], best: dict[str, float]) -> list[Run]:
    return [
        Run(s, {"accuracy": best[s["placement"]] if s["rate"] <= largest[s["placement"]] else 0.1})
        for s in grid(placement=rates.PLACEMENTS, rate=rates.RATES, seed=(0, 1))
    ]


def test_rates() -> None:
    best = {"none": 0.95, "before": 0.96, "after": 0.96}
    good = rates_runs({"none": 0.3, "before": 3.0, "after": 1.0}, best)
    assert [c.held for c in rates.judge(good)] == [True] * 5
    bad = rates_runs({"none": 0.3, "before": 0.3, "after": 0.1}, {**best, "before": 0.9})
    assert [c.held for c in rates.judge(bad)] == [False] * 5


def regularisation_runs(gain: float, power: float) -> list[Run]:
    """BN and dropout with so much more validation accuracy and less gap; noise by that power."""
    better = {"none": 0.0, "bn": 2 * gain, "dropout": gain, "both": gain}
    training = [
        Run(s, {"gap": 0.2 - better[s["method"]], "validation": 0.8 + better[s["method"]]})
        for s in grid(kind=("training",), method=regularisation.METHODS, size=(10, 20), seed=(0, 1))
    ]
    noise = [Run(s, {"mean": s["batch"] ** power}) for s in grid(kind=("noise",), batch=(2, 8, 32))]
    return training + noise


def test_regularisation() -> None:
    good, bad = regularisation_runs(0.05, -0.52), regularisation_runs(-0.05, -0.4)
    assert [c.held for c in regularisation.judge(good)] == [True] * 5
    assert [c.held for c in regularisation.judge(bad)] == [False] * 5


def placement_runs(
    gain: float, bias_gradient: float, growth: dict[str, float], apart: dict[str, float]
) -> list[Run]:
    """Accuracies that scatter by seed; BN before the ReLU is ahead of the rest by the gain."""

    def accuracy(s: Any) -> float:
        unlike = 0.001 * (s["seed"] * len(s["variant"]) % 4)
        return 0.9 + 0.001 * s["seed"] + 0.1 * unlike + gain * s["variant"].startswith("before")

    training = [
        Run(s, {"accuracy": accuracy(s), "bias_gradient": bias_gradient})
        for s in grid(kind=("training",), network=placement.NETWORKS, variant=placement.VARIANTS,
                      seed=range(6))
    ]  # fmt: skip
    return training + [
        Run(
            {"kind": "sensitivity", "variant": v, "optimizer": "adam"},
            {"growth": growth.get(v, 0.0), "steepest": 3.0, "apart": [1e-16, apart.get(v, 1e-15)]},
        )
        for v in sensitivity.VARIANTS
    ]


def test_placement() -> None:
    good = placement_runs(0.05, 1e-7, {"after": 2.0}, {"before": 1e-11})
    assert [c.held for c in placement.judge(good)] == [True] * 12
    grown = dict.fromkeys(sensitivity.VARIANTS, 1.0) | {"after": 0.1}
    bad = placement_runs(0.0, 0.1, grown, {"before": 1e-13})
    # A bias makes no difference here either.
    assert [c.held for c in placement.judge(bad)] == [False, False, True] * 2 + [False] * 6


def test_paired_differences() -> None:
    average, low, high, p = placement.compare([0.91, 0.92, 0.96], [0.90, 0.90, 0.93])
    # By hand: differences 1, 2, 3 of mean 2 and deviation 1; t(2) = 4.303 at 97.5%.
    assert abs(average - 0.02) < 1e-12
    assert abs((high - low) / 2 - 0.01 * 4.3027 / math.sqrt(3)) < 1e-6
    assert abs(p - 0.0742) < 1e-4
    assert placement.compare([1.0, 2.0], [1.0, 2.0])[3] == 1
    assert placement.compare([1.5, 2.5], [1.0, 2.0])[3] == 0


def test_growth_is_in_decades_per_hundred_steps() -> None:
    apart = [10 ** (-16 + 0.02 * step) for step in range(10, 400, 10)]
    assert abs(sensitivity.growth(apart) - 2) < 1e-9
    # Where it is no longer small, it is left out.
    assert abs(sensitivity.growth([*apart, 1.0, 1.0]) - 2) < 1e-9
    assert abs(sensitivity.growth([1e-16] * 20)) < 1e-9
    assert sensitivity.growth([1e-16, 1.0, 1.0]) == math.inf


def large_batches_runs(cost: float, **finals: float) -> list[Run]:
    return [
        Run(s, {"final": finals[s["method"]] + 0.001 * s["seed"], "cost": cost})
        for s in grid(method=large_batches.METHODS, seed=(0, 1))
    ]  # fmt: skip


def test_large_batches() -> None:
    good = large_batches_runs(1.1, small=0.98, large=0.96, rate=0.965, ghost=0.975)
    assert [c.held for c in large_batches.judge(good)] == [True] * 5
    bad = large_batches_runs(1.3, small=0.95, large=0.96, rate=0.955, ghost=0.95)
    assert [c.held for c in large_batches.judge(bad)] == [False] * 5


def evaluation_runs(running: dict[tuple[int, str], float], small: float, ones: float) -> list[Run]:
    """Large batches' statistics give 0.95, those of 2 and 4 that of `small`."""
    sizes = [small if size <= 4 else 0.95 for size in evaluation.EVALUATED]
    return [
        Run(s, {"running": running.get((s["batch"], s["momentum"]), 0.95),
                "batch_statistics": sizes, "normalised_pairs": ones})
        for s in grid(batch=evaluation.TRAINED, momentum=evaluation.MOMENTA, seed=(0, 1))
    ]  # fmt: skip


def test_evaluation() -> None:
    good = {(2, "0.1"): 0.6, (2, "0.01"): 0.8, (2, "cumulative"): 0.85}
    assert [c.held for c in evaluation.judge(evaluation_runs(good, 0.7, 1.0))] == [True] * 5
    bad = {(64, "0.1"): 0.96, (2, "0.1"): 0.95, (2, "0.01"): 0.94}
    assert [c.held for c in evaluation.judge(evaluation_runs(bad, 0.94, 0.9))] == [False] * 5


def test_batch_statistics_leave_the_running_ones_alone() -> None:
    model = nn.Sequential(torch_bn.BatchNorm1d(2))
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 9.0], [9.0, 5.0], [0.0, 0.0]])
    # Each pair by itself: the larger of each column is +1. Running statistics would see none.
    labels = torch.tensor([1, 0, 1, 0, 7])
    assert evaluation.by_batch(model, (x, labels), 2) == 1.0
    assert model[0].track_running_stats
    assert model[0].num_batches_tracked == 0
    assert torch.equal(model[0].running_mean, torch.zeros(2))

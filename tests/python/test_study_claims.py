"""The study's verdicts, on made-up results for which they are plain."""

from __future__ import annotations

from collections.abc import Sequence

from study import equations, scaling
from study.experiment import Claim, Run, grid


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
    found = verdicts(scaling.judge(scaling_runs(bad, divergent_from=9)))
    assert not any(found.values())


def test_trips_are_faster_or_slower_than_fifty() -> None:
    x, y = scaling.trips(500, 0)
    assert ((x[:, 0] / x[:, 1] > 50).long() == y).all()
    z = scaling.scaled("zscore", x, x).double()
    assert z.mean(0).abs().max() < 1e-6
    assert (z.std(0, correction=0) - 1).abs().max() < 1e-6


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

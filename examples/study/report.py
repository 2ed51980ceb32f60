"""The report: one HTML file that refers to nothing outside itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mlp.files import written_beside
from study.experiment import Experiment, Findings, Run
from study.plots import embedded
from study.runner import SECONDS


def axes_of(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Every setting of the runs with the values it takes, in order."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    values = {
        name: dict.fromkeys(str(run.settings[name]) for run in runs if name in run.settings)
        for name in names
    }
    return [(name.replace("_", " "), ", ".join(found)) for name, found in values.items()]


def section(experiment: Experiment, runs: Sequence[Run]) -> dict[str, Any]:
    """What the page shows of an experiment."""
    findings: Findings = experiment.findings(runs)
    return {
        "experiment": experiment,
        "claims": findings.claims,
        "tables": findings.tables,
        "figures": [(embedded(figure), caption) for figure, caption in findings.figures],
        "notes": findings.notes,
        "axes": axes_of(runs),
        "runs": len(runs),
        "seconds": sum(run.result[SECONDS] for run in runs),
    }


def write(
    path: Path, sections: Sequence[Mapping[str, Any]], facts: Mapping[str, str], quick: bool
) -> None:
    """The page, written beside and renamed."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = Counter(claim.held for each in sections for claim in each["claims"])
    page = templates.get_template("report.html").render(
        sections=sections, facts=facts, quick=quick, held=count[True], fell=count[False]
    )
    with written_beside(path) as beside:
        beside.write_text(page, encoding="utf-8")

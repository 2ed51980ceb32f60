"""The results of a run: tables on the console, JSON and weights in files."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from mlp.files import written_beside
from mlp.options import Settings
from mlp.proof import Proof
from mlp.training import Training

VERDICTS = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]"}


def versions() -> dict[str, str]:
    """Of everything that has a say in the figures."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    try:
        found["torch_bn"] = metadata.version("torch_bn")
    except metadata.PackageNotFoundError:
        found["torch_bn"] = "not installed as a package"
    found["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return found


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: equal only when every bit is."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def assemble(
    settings: Settings,
    data: dict[str, Any],
    training: Training,
    test: dict[str, tuple[float, float]],
    proofs: Sequence[Proof],
    seconds: float,
) -> dict[str, Any]:
    """Everything a run found out, ready for JSON."""
    return {
        "passed": all(proof.passed for proof in proofs),
        "settings": asdict(settings),
        "versions": versions(),
        "data": data,
        "seconds": seconds,
        "test": {
            name: {"loss": loss, "accuracy": accuracy} for name, (loss, accuracy) in test.items()
        },
        "weights_sha256": {
            learner.name: weights_digest(learner.model) for learner in training.learners
        },
        "proofs": [
            {
                "name": proof.name,
                "passed": proof.passed,
                "how": proof.how,
                "why": proof.why,
                "lines": [line._asdict() for line in proof.lines],
                "figures": proof.figures,
            }
            for proof in proofs
        ],
        "epochs": training.history,
    }


def _for_json(value: Any) -> Any:
    """JSON has no NaN or infinity: they become strings."""
    if isinstance(value, dict):
        return {key: _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def write_json(report: dict[str, Any], path: Path) -> None:
    """One line for each top-level key: readable, though some hold thousands of figures."""
    lines = (f"  {json.dumps(key)}: {json.dumps(_for_json(report[key]))}" for key in report)
    with written_beside(path) as beside:
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def print_proofs(console: Console, settings: Settings, proofs: Sequence[Proof]) -> None:
    """The table of proofs, and in words how each was made and why its bound is what it is."""
    if not proofs:
        reason = (
            "placement none has no batch norm to prove"
            if settings.placement == "none"
            else "switched off by --validate off"
        )
        console.print(f"Proofs: not run, {reason}.")
        return
    table = Table(title="Proofs", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("worst figures against their bounds", no_wrap=True)
    for column in ("ours", "builtin", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for number, proof in enumerate(proofs, start=1):
        table.add_row(f"[bold]{number} {proof.name}", "", "", "", VERDICTS[proof.passed])
        for line in proof.lines:
            table.add_row(
                f"  {line.what}", line.ours, line.builtin, line.bound, VERDICTS[line.passed]
            )
        table.add_section()
    console.print(table)
    for number, proof in enumerate(proofs, start=1):
        console.print(
            f"[bold]{number} {proof.name}: {VERDICTS[proof.passed]}[/] {proof.how}. {proof.why}",
            highlight=False,
        )


def print_accuracies(
    console: Console, training: Training, test: dict[str, tuple[float, float]]
) -> None:
    """The table of how good the networks have become."""
    table = Table(
        title="After the last epoch", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("network")
    for column in ("training loss", "training", "validation", "test loss", "test"):
        table.add_column(column, justify="right")
    for name, curve in training.history.items():
        last = curve[-1]
        loss, accuracy = test[name]
        table.add_row(
            name,
            f"{last['train_loss']:.4f}",
            f"{last['train_accuracy']:.2%}",
            f"{last['validation_accuracy']:.2%}",
            f"{loss:.4f}",
            f"{accuracy:.2%}",
        )
    console.print(table)

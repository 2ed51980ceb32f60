"""The parts of the job that train_mlp.py puts in order: prepare, run the stages, write results."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from mlp import report
from mlp.checkpoint import Checkpoint, Interruption, save_atomically
from mlp.data import Dataset, Preprocessor
from mlp.free_proofs import FreeFloat32, FreeFloat64
from mlp.model import Layer
from mlp.options import Settings
from mlp.progress import StageProgress
from mlp.proof import Proof
from mlp.step_proof import StepProof
from mlp.training import Arrays, Batches, Stage, Training, evaluate
from mlp.world import World


def fingerprint(data: Dataset) -> str:
    """SHA-256 of all images and labels, for telling one data set from another."""
    digest = hashlib.sha256()
    for split in (data.train, data.validation, data.test):
        for tensor in (split.images, split.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


class Job:
    """One run: its data as the networks take it, and its stages in their order."""

    def __init__(
        self, settings: Settings, data: Dataset, layer: Layer, world: World | None = None
    ) -> None:
        self._world = world or World()
        scaling = Preprocessor.fit(settings.preprocess, data.train.images)
        dtype = settings.torch_dtype
        arrays = Arrays(
            train=Batches(
                scaling(data.train.images, dtype),
                data.train.labels,
                settings.batch_size,
                settings.seed,
                self._world,
            ),
            validation=(scaling(data.validation.images, dtype), data.validation.labels),
            test=(scaling(data.test.images, dtype), data.test.labels),
            features=data.features,
        )
        self.settings = settings
        self.description: dict[str, Any] = {
            "name": data.name,
            "source": data.source,
            "sha256": fingerprint(data),
            "train": len(data.train.labels),
            "validation": len(data.validation.labels),
            "test": len(data.test.labels),
            "features": data.features,
            "preprocess": scaling.state_dict(),
        }
        self._arrays = arrays
        self.step_proof: StepProof | None = None
        self.float64: FreeFloat64 | None = None
        self.float32: FreeFloat32 | None = None
        if settings.placement != "none" and settings.validate != "off":
            self.step_proof = StepProof(settings, data.features)
            self.float64 = FreeFloat64(settings, arrays, layer)
            self.float32 = FreeFloat32(settings, arrays, layer)
        self.training = Training(settings, arrays, layer, self.step_proof, self._world)
        self.stages: list[Stage] = [
            stage for stage in (self.training, self.float64, self.float32) if stage is not None
        ]

    def identity(self) -> dict[str, str | int | float]:
        """All that the figures depend on, by the names of the options."""
        named = {name.replace("_", "-"): value for name, value in asdict(self.settings).items()}
        found = report.versions()
        return {
            **named,
            "data": f"{self.description['name']} (sha256 {self.description['sha256'][:12]})",
            **{f"version of {name}": found[name] for name in ("torch", "torch_bn", "machine")},
        }

    def run(self, checkpoint: Checkpoint, stop: Interruption, console: Console) -> bool:
        """Go on with the stages until all are complete; False when interrupted before.

        Either way the checkpoint then holds the state. A signal to one process stops all of them
        after the same step.
        """
        with StageProgress(console, self.stages) as progress:
            for stage in self.stages:
                while stage.position < stage.total:
                    line = stage.advance()
                    progress.stepped(stage, line)
                    if self._world.any(stop.requested):
                        checkpoint.save(self.stages)
                        return False
                    if line:
                        checkpoint.save(self.stages)
                    else:
                        checkpoint.stepped(self.stages)
        return True

    def proofs(self) -> list[Proof]:
        parts = (self.step_proof, self.float64, self.float32)
        return [part.proof() for part in parts if part is not None]

    def finish(self, out: Path, console: Console, seconds: float) -> bool:
        """Test, print the tables, write all files to `out`. Whether all proofs passed.

        Rank 0 does it for all.
        """
        if not self._world.main:
            return True
        test = {
            learner.name: evaluate(learner.model, *self._arrays.test)
            for learner in self.training.learners
        }
        proofs = self.proofs()
        report.print_proofs(console, self.settings, proofs)
        report.print_accuracies(console, self.training, test)
        found = report.assemble(
            self.settings, self.description, self.training, test, proofs, seconds
        )
        save_atomically(self.training.learners[0].model.state_dict(), out / "model.pt")
        report.write_json(found, out / "report.json")
        written = ["model.pt", "report.json", *self._plot(out)]
        console.print(f"Written to {out}: {', '.join(written)}", highlight=False, soft_wrap=True)
        failed = [proof.name for proof in proofs if not proof.passed]
        if failed:
            console.print(f"[bold red]FAILED[/]: {', '.join(failed)}")
        return not failed

    def _plot(self, out: Path) -> Sequence[str]:
        # Imported where it is needed: it takes about a second.
        from mlp import plots

        settings = self.settings
        about = (
            f"{self.description['name']}, batch norm {settings.placement} ReLU, "
            f"{settings.optimizer} {settings.lr:g}, batches of {settings.batch_size}"
        )
        if settings.processes > 1:
            about += f" in {settings.processes} processes"
        if settings.fused:
            about += ", fused"
        if settings.placement == "none":
            about = about.replace("batch norm none ReLU", "no batch norm")
        plots.plot_curves(self.training, f"Loss and accuracy: {about}", out / "curves.png")
        names = ["curves.png"]
        if self.step_proof and self.float64 and self.float32:
            plots.plot_steps(
                self.step_proof,
                f"Error of a {settings.dtype} step against float64: {about}",
                out / "per_step.png",
            )
            plots.plot_float64(
                self.float64, f"Free-running float64: {about}", out / "free_float64.png"
            )
            plots.plot_float32(
                self.float32, f"Free-running float32: {about}", out / "free_float32.png"
            )
            names += ["per_step.png", "free_float64.png", "free_float32.png"]
        return names

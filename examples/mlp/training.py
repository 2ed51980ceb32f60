"""Batches, learners, and the stage that trains ours, the builtin and no batch norm side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlp.model import Layer, build_mlp, generator
from mlp.options import Settings
from mlp.world import World

OURS, BUILTIN, WITHOUT = "torch_bn", "torch.nn", "no BN"

State = dict[str, Any]
"""What a checkpoint can hold: tensors, numbers, strings, and lists and dicts of them."""


class StepCheck(Protocol):
    """The per-step proof, as training sees it."""

    def due(self, step: int) -> bool: ...
    def check(
        self, model: nn.Sequential, x: Tensor, y: Tensor, step: int
    ) -> tuple[Tensor, Tensor]: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> None: ...


class Stage(Protocol):
    """A part of the job that goes on step by step and can be saved between any two steps."""

    name: str
    title: str
    total: int
    position: int

    def advance(self) -> str | None:
        """Take one step. A line to show when it completed something, as an epoch."""

    def status(self) -> str: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> None: ...


class Batches:
    """The batches of a split, in an order that depends on the seed and the epoch alone.

    So nothing about the order has to be saved to resume. Inputs are (n, features), labels (n,).
    Each process gets its share of the rows of every batch.
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, size: int, seed: int, world: World | None = None
    ) -> None:
        self._world = world or World()
        count = len(inputs)
        # A single row has no variance: batch norm refuses it in training.
        self.per_epoch = count // size if count % size == 1 else math.ceil(count / size)
        if self.per_epoch == 0:
            raise ValueError(f"the training split has {count} images: at least 2 are needed")
        self.darkest = inputs.min().item()
        self._inputs, self._labels = inputs, labels
        self._size, self._seed = size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def at(self, step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The batch of the step counted over all epochs: inputs of that dtype, and labels."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            source = generator("order", self._seed, epoch)
            self._order = torch.randperm(len(self._inputs), generator=source)
            self._epoch = epoch
        rows = self._order[index * self._size : (index + 1) * self._size]
        rows = rows[self._world.share(len(rows))]
        return self._inputs[rows].to(dtype), self._labels[rows]

    def rows(self, step: int) -> int:
        """Rows of the step's batch in all processes together."""
        return min(self._size, len(self._inputs) - step % self.per_epoch * self._size)


class Learner:
    """A model and its optimizer."""

    def __init__(
        self, name: str, model: nn.Sequential, settings: Settings, world: World | None = None
    ) -> None:
        self.name = name
        self.model = model
        self.parallel = (world or World()).parallel(model)
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(model.parameters(), lr=settings.lr)
            if settings.optimizer == "adam"
            else torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9)
        )

    def state_dict(self) -> State:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: State) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def gradients(model: nn.Sequential, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward of one batch from empty gradients.

    Returns the output (N, classes) and the mean loss, both detached.
    """
    model.zero_grad(set_to_none=True)
    output = model(x)
    loss = F.cross_entropy(output, y)
    loss.backward()
    return output.detach(), loss.detach()


def make_learner(
    name: str,
    settings: Settings,
    features: int,
    layer: Layer,
    *,
    dtype: torch.dtype,
    seed: int | None = None,
    world: World | None = None,
) -> Learner:
    """A learner with the initial weights of the seed (the settings' own when None)."""
    model = build_mlp(
        features,
        "none" if name == WITHOUT else settings.placement,
        layer,
        seed=settings.seed if seed is None else seed,
        dtype=dtype,
    )
    if name == OURS and (settings.sync_bn or settings.fused):
        # Imported here: the job's networks know layers by their interface alone.
        import torch_bn

        if settings.fused:
            torch_bn.convert(model, fuse=True)
        if settings.sync_bn:
            torch_bn.convert_sync(model)
    return Learner(name, model, settings, world)


def gradients_of_share(
    model: nn.Module, x: Tensor, y: Tensor, rows: int, world: World
) -> tuple[Tensor, Tensor]:
    """The same on this process's share of a batch of `rows`, which may be empty.

    The processes' losses are averaged with their gradients, so each counts its rows that many
    times; the sum of all is the mean over the batch.
    """
    model.zero_grad(set_to_none=True)
    output = model(x)
    loss = F.cross_entropy(output, y, reduction="sum") / rows
    (loss * world.size).backward()
    return output.detach(), loss.detach()


@torch.no_grad()
def evaluate(model: nn.Sequential, inputs: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy of the model in evaluation mode."""
    dtype = next(model.parameters()).dtype
    model.eval()
    loss, correct = 0.0, 0
    # In pieces, so that activations of a whole split never sit in memory at once.
    for x, y in zip(inputs.split(8192), labels.split(8192), strict=True):
        output = model(x.to(dtype))
        loss += F.cross_entropy(output, y, reduction="sum").item()
        correct += int((output.argmax(1) == y).sum())
    model.train()
    return loss / len(labels), correct / len(labels)


@dataclass
class Arrays:
    """The data as the networks take it: inputs (n, features) scaled, labels (n,)."""

    train: Batches
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    features: int


class Training:
    """Trains all variants on the same batches from the same weights, as settings say.

    The curves of training are means over the epoch's batches while the weights move; those of
    validation come from the weights at the end of the epoch.
    """

    name = "training"
    title = "training"

    def __init__(
        self,
        settings: Settings,
        arrays: Arrays,
        layer: Layer,
        check: StepCheck | None,
        world: World | None = None,
    ) -> None:
        self._world = world = world or World()
        names = [WITHOUT] if settings.placement == "none" else [OURS, BUILTIN, WITHOUT]
        layers = {OURS: layer, BUILTIN: nn.BatchNorm1d, WITHOUT: nn.BatchNorm1d}
        self.learners = [
            make_learner(
                name,
                settings,
                arrays.features,
                layers[name],
                dtype=settings.torch_dtype,
                world=world,
            )
            for name in names
        ]
        self.total = settings.epochs * arrays.train.per_epoch
        self.position = 0
        self.history: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        self._epochs = settings.epochs
        self._dtype = settings.torch_dtype
        self._arrays = arrays
        self._check = check
        self._tally = self._empty_tally()

    def advance(self) -> str | None:
        x, y = self._arrays.train.at(self.position, self._dtype)
        rows = self._arrays.train.rows(self.position)
        for learner in self.learners:
            if self._world.size > 1:
                output, loss = gradients_of_share(learner.parallel, x, y, rows, self._world)
            elif learner.name == OURS and self._check and self._check.due(self.position):
                output, loss = self._check.check(learner.model, x, y, self.position)
            else:
                output, loss = gradients(learner.model, x, y)
            tally = self._tally[learner.name]
            correct = (output.argmax(1) == y).sum()
            found = self._world.sum(torch.stack((loss.double(), correct.double()))).tolist()
            tally["loss"] += found[0] * rows
            tally["correct"] += int(found[1])
            tally["rows"] += rows
            learner.optimizer.step()
        self.position += 1
        if self.position % self._arrays.train.per_epoch:
            return None
        return self._end_epoch()

    def status(self) -> str:
        tally = self._tally[self.learners[0].name]
        if not tally["rows"]:
            return ""
        loss, accuracy = tally["loss"] / tally["rows"], tally["correct"] / tally["rows"]
        return f"loss {loss:.4f}  accuracy {accuracy:.2%}"

    def state_dict(self) -> State:
        return {
            "position": self.position,
            "learners": {learner.name: learner.state_dict() for learner in self.learners},
            "history": self.history,
            "tally": self._tally,
            "check": self._check.state_dict() if self._check else None,
        }

    def load_state_dict(self, state: State) -> None:
        self.position = state["position"]
        for learner in self.learners:
            learner.load_state_dict(state["learners"][learner.name])
        self.history = state["history"]
        self._tally = state["tally"]
        if self._check:
            self._check.load_state_dict(state["check"])

    def _empty_tally(self) -> dict[str, dict[str, float]]:
        return {learner.name: {"loss": 0.0, "correct": 0, "rows": 0} for learner in self.learners}

    def _end_epoch(self) -> str:
        for learner in self.learners:
            tally = self._tally[learner.name]
            loss, accuracy = evaluate(learner.model, *self._arrays.validation)
            self.history[learner.name].append(
                {
                    "train_loss": tally["loss"] / tally["rows"],
                    "train_accuracy": tally["correct"] / tally["rows"],
                    "validation_loss": loss,
                    "validation_accuracy": accuracy,
                }
            )
        self._tally = self._empty_tally()
        name = self.learners[0].name
        now = self.history[name][-1]
        line = (
            f"epoch {len(self.history[name])}/{self._epochs}  {name}: "
            f"loss {now['train_loss']:.4f}  accuracy {now['train_accuracy']:.2%}  "
            f"validation {now['validation_loss']:.4f} {now['validation_accuracy']:.2%}"
        )
        others = [
            f"{other.name} {self.history[other.name][-1]['validation_accuracy']:.2%}"
            for other in self.learners[1:]
        ]
        return line + (f"  ({', '.join(others)})" if others else "")

"""Proof 1: at every step, ours and the builtin against float64, from the same weights and batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlp.model import PinnedReLU, Trace, build_mlp
from mlp.options import Settings
from mlp.proof import Line, Proof
from mlp.training import State, gradients

# Measured with two correct float32 layers at every step of ten epochs of the digits and of one of
# MNIST, both placements, several seeds, optimizers, learning rates and batch sizes. The error of
# one exceeded twice that of the other by at most 12 roundings at a step, in channels that were
# all but dead; its mean over a run never exceeded 1.1 times the other's, and over the first
# three steps by less than one rounding. So the mean is the sharp criterion: a doubled eps, the
# least of the faults tried, makes errors of about 5e-6, 40 roundings in the mean. The other is for
# a fault at few steps: a biased variance at batch 64 makes an error of 8e-3, 67,000 roundings.
STEP_FACTOR, STEP_ROUNDINGS = 2.0, 64
MEAN_FACTOR, MEAN_ROUNDINGS = 1.1, 2
# A float64 run is compared with a float64 builtin whose own error is zero by definition, so the
# allowance must hold all rounding: up to 1,700 roundings were seen in all but dead channels. 65,536
# of them are 1.5e-11, still five orders below a doubled eps.
FLOAT64_ROUNDINGS = 1 << 16


@dataclass
class Observation:
    """One forward and backward of a model, with all that is compared, by name."""

    output: Tensor
    loss: Tensor
    figures: dict[str, Tensor]
    counters: dict[str, int]
    trace: Trace


def _observe(model: nn.Sequential, x: Tensor, y: Tensor, settings: Settings) -> Observation:
    with Trace(model) as trace:
        output, loss = gradients(model, x, y)
    figures = {"output": output, "loss": loss}
    for name, parameter in model.named_parameters():
        figures[f"{name} gradient"] = parameter.grad
    for name in trace.names("bn"):
        # Where a fused layer has the ReLU before the norm in it, its input is that of the ReLU.
        first = name.replace("bn", "relu") if _is_relu_inside(settings) else name
        figures[f"{name}.input gradient"] = trace.input[first].grad
    counters = {}
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            counters[name] = int(buffer)
        else:
            figures[name] = buffer
    with torch.no_grad():
        model.eval()
        figures["output in evaluation"] = model(x)
        model.train()
    return Observation(output, loss, figures, counters, trace)


def _is_relu_inside(settings: Settings) -> bool:
    return settings.fused and settings.placement == "after"


def _scales(exact: nn.Sequential, seen: Observation, placement: str) -> dict[str, float]:
    """What the error of each figure is measured by: its largest value, unless that may cancel.

    The loss is a difference of outputs, and measured by them. The gradient of a batch norm's input
    is measured by weight * invstd * grad_output, the term that the other two correct, and may all
    but cancel: a channel with a single positive value among zeros, after a ReLU, has no gradient
    left. The gradient of a parameter is a sum over the batch that may cancel: it is measured by the
    root of the sum of its squared terms, where that is largest. For the Dense below a batch norm
    the terms are the three of the gradient of its input, added without cancelling.
    """
    scales = {name: _largest(figure) for name, figure in seen.figures.items()}
    scales["loss"] = scales["output"]
    trace = seen.trace
    terms = {name: trace.output[name].grad for name in trace.names("dense")}
    for name in trace.names("bn"):
        layer = exact.get_submodule(name)
        x, grad = trace.input[name].detach(), trace.output[name].grad
        invstd = torch.rsqrt(x.var(0, correction=0) + layer.eps)
        normalised = (x - x.mean(0)) * invstd
        factor = layer.weight.detach() * invstd
        scales[f"{name}.weight gradient"] = _root_of_squares(grad * normalised)
        scales[f"{name}.bias gradient"] = _root_of_squares(grad)
        scales[f"{name}.input gradient"] = _largest(factor * grad)
        size = grad.abs() + grad.abs().mean(0)
        size += normalised.abs() * (grad * normalised).abs().mean(0)
        number = name.removeprefix("bn")
        passed = exact.get_submodule(f"relu{number}").mask if placement == "after" else 1
        terms[f"dense{number}"] = factor * size * passed
    for name, term in terms.items():
        squares = term.square().T @ trace.input[name].detach().square()
        scales[f"{name}.weight gradient"] = math.sqrt(_largest(squares))
        scales[f"{name}.bias gradient"] = _root_of_squares(term)
    return scales


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item()


def _root_of_squares(terms: Tensor) -> float:
    """Of the terms (N, C) of a sum over N: the largest channel's root of the sum of squares."""
    return math.sqrt(_largest(terms.square().sum(0)))


def _error(a: Tensor, b: Tensor, scale: float) -> float:
    difference = _largest(a.double() - b.double())
    # A difference where there is nothing to measure it by is wrong without bound.
    return difference / scale if scale > 0 else (0.0 if difference == 0 else math.inf)


def _errors(seen: Observation, exact: Observation, scales: dict[str, float]) -> dict[str, float]:
    """The error of every figure against float64, and of the masks that float64 was given.

    A mask may differ from the sign of the float64 pre-activation only where that is within
    rounding of zero: its error is the largest pre-activation on the wrong side.
    """
    errors = {
        name: _error(figure, exact.figures[name], scales[name])
        for name, figure in seen.figures.items()
    }
    for name, mask in seen.trace.masks().items():
        x = exact.trace.input[name].detach()
        errors[f"{name} mask"] = _error(x * (mask != (x > 0)), torch.zeros(()), _largest(x))
    return errors


def _share(error: Tensor, bound: Tensor) -> float:
    """How much of its bound an error takes; a NaN takes more than all."""
    share = (error / bound).item()
    return math.inf if math.isnan(share) else share


class StepProof:
    """Compares our model with a builtin twin and a float64 twin that take its state each time.

    The first 100 steps are compared and every 50th after them; with `validate` full, all.
    """

    def __init__(self, settings: Settings, features: int) -> None:
        self.eps = torch.finfo(settings.torch_dtype).eps
        self.names: list[str] = []
        self.steps: list[int] = []
        self.wrong_counters: list[int] = []
        self._rows: list[Tensor] = []
        self._settings = settings
        self._builtin = build_mlp(
            features, settings.placement, seed=settings.seed, dtype=settings.torch_dtype
        )
        self._exact = build_mlp(
            features, settings.placement, seed=settings.seed, dtype=torch.float64, relu=PinnedReLU
        )

    def due(self, step: int) -> bool:
        return self._settings.validate == "full" or step < 100 or step % 50 == 0

    def check(self, model: nn.Sequential, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Run the batch through `model`, leaving its gradients filled, and through the twins.

        Returns the output (N, classes) and the loss of `model`.
        """
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        ours = _observe(model, x, y, self._settings)
        self._builtin.load_state_dict(before)
        builtin = _observe(self._builtin, x, y, self._settings)
        masks, builtin_masks = ours.trace.masks(), builtin.trace.masks()
        exact, scales = self._observe_exact(before, x, y, masks)
        errors = _errors(ours, exact, scales)
        apart = {
            name: _error(figure, builtin.figures[name], scales[name])
            for name, figure in ours.figures.items()
        }
        same_counters = ours.counters == builtin.counters == exact.counters
        if any(not torch.equal(masks[name], builtin_masks[name]) for name in masks):
            exact, scales = self._observe_exact(before, x, y, builtin_masks)
        builtin_errors = _errors(builtin, exact, scales)

        self.names = list(errors)
        self.steps.append(step)
        triples = [(errors[n], builtin_errors[n], apart.get(n, 0.0)) for n in self.names]
        self._rows.append(torch.tensor(triples, dtype=torch.float64))
        if not same_counters:
            self.wrong_counters.append(step)
        return ours.output, ours.loss

    @property
    def errors(self) -> Tensor:
        """(steps, names, 3) float64: ours and builtin against float64, and against each other."""
        return torch.stack(self._rows)

    def proof(self) -> Proof:
        """The verdict over all steps that were compared."""
        float64 = self._settings.dtype == "float64"
        step_allowance = (FLOAT64_ROUNDINGS if float64 else STEP_ROUNDINGS) * self.eps
        mean_allowance = (FLOAT64_ROUNDINGS if float64 else MEAN_ROUNDINGS) * self.eps
        ours, builtin, apart = self.errors.unbind(2)
        bounds = STEP_FACTOR * builtin + step_allowance
        mean, builtin_mean = ours.mean(0), builtin.mean(0)
        mean_bounds = MEAN_FACTOR * builtin_mean + mean_allowance
        # `<=` and not `>`, so that a NaN fails.
        step_good, mean_good = (ours <= bounds).all(0), mean <= mean_bounds
        worst = (ours / bounds).nan_to_num(nan=math.inf, posinf=math.inf).argmax(0).tolist()
        figures = {}
        for i, name in enumerate(self.names):
            figures[name] = {
                "ours": ours[:, i].tolist(),
                "builtin": builtin[:, i].tolist(),
                "apart": apart[:, i].tolist(),
                "ours_mean": mean[i].item(),
                "builtin_mean": builtin_mean[i].item(),
                "mean_bound": mean_bounds[i].item(),
                "worst_step": self.steps[worst[i]],
                "worst_step_bound": bounds[worst[i], i].item(),
                "passed": bool(step_good[i] and mean_good[i]),
            }
        lines: list[Line] = []
        for members in self.groups().values():
            step_of = max(members, key=lambda i: _share(ours[worst[i], i], bounds[worst[i], i]))
            row = worst[step_of]
            lines.append(
                Line(
                    f"{self.names[step_of]}, step {self.steps[row]}",
                    f"{ours[row, step_of]:.1e}",
                    f"{builtin[row, step_of]:.1e}",
                    f"{bounds[row, step_of]:.1e}",
                    bool(step_good[members].all()),
                )
            )
            mean_of = max(members, key=lambda i: _share(mean[i], mean_bounds[i]))
            lines.append(
                Line(
                    f"{self.names[mean_of]}, mean",
                    f"{mean[mean_of]:.1e}",
                    f"{builtin_mean[mean_of]:.1e}",
                    f"{mean_bounds[mean_of]:.1e}",
                    bool(mean_good[members].all()),
                )
            )
        wrong = self.wrong_counters
        counter = f"{len(wrong)} wrong" if wrong else "equal"
        lines.append(Line("num_batches_tracked", counter, "", "equal", not wrong))
        return Proof(
            name="per step",
            how=f"{len(self.steps)} steps, ours and the builtin against float64 from the same "
            "weights, buffers and batch",
            why="A wrong term shows in full at a single step, before chaos can hide it. An error "
            "is max|a - a64| / s with s the size of what was summed. Float64 takes the ReLU masks "
            "of the model it judges, as a pre-activation within rounding of zero may fall on "
            "either side, and a flipped mask would be an error far beyond rounding in a correct "
            f"implementation. Bound at each step: {STEP_FACTOR:g} times the builtin's error and "
            f"{step_allowance:.1e}; of the mean over the run: {MEAN_FACTOR:g} times the builtin's "
            f"and {mean_allowance:.1e}.",
            lines=lines,
            figures={
                "steps": self.steps,
                "wrong_counters": wrong,
                "step_factor": STEP_FACTOR,
                "step_allowance": step_allowance,
                "mean_factor": MEAN_FACTOR,
                "mean_allowance": mean_allowance,
                "errors": figures,
            },
        )

    def groups(self) -> dict[str, list[int]]:
        """What is compared, by kind: indices into `names`."""
        kinds = {
            "output and loss": lambda name: name.startswith(("output", "loss")),
            "gradients of batch norm": lambda n: n.startswith("bn") and n.endswith("gradient"),
            "gradients of Dense": lambda name: name.startswith("dense"),
            "running statistics": lambda name: "running" in name,
            "ReLU masks": lambda name: name.startswith("relu"),
        }
        return {
            kind: [i for i, name in enumerate(self.names) if belongs(name)]
            for kind, belongs in kinds.items()
        }

    def state_dict(self) -> State:
        return {
            "names": self.names,
            "steps": self.steps,
            "errors": self.errors if self._rows else None,
            "wrong_counters": self.wrong_counters,
        }

    def load_state_dict(self, state: State) -> None:
        self.names = state["names"]
        self.steps = state["steps"]
        self._rows = [] if state["errors"] is None else list(state["errors"])
        self.wrong_counters = state["wrong_counters"]

    def _observe_exact(
        self, before: State, x: Tensor, y: Tensor, masks: dict[str, Tensor]
    ) -> tuple[Observation, dict[str, float]]:
        self._exact.load_state_dict(before)
        for name, mask in masks.items():
            self._exact.get_submodule(name).mask = mask
        seen = _observe(self._exact, x.double(), y, self._settings)
        return seen, _scales(self._exact, seen, self._settings.placement)

"""The three proofs by themselves: what they compare, and what their verdicts do."""

from __future__ import annotations

import math

import mlp_settings
import pytest
import torch

import torch_bn
from mlp.free_proofs import FreeFloat32, FreeFloat64
from mlp.model import PinnedReLU, Trace, build_mlp, generator
from mlp.options import Settings
from mlp.step_proof import StepProof
from mlp.training import BUILTIN, OURS, Arrays, Batches


def settings(**changes: object) -> Settings:
    return mlp_settings.settings(**{"epochs": 1, **changes})


def batch(rows: int = 16, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 8, generator=generator("batch"))
    return x.to(dtype), x.argmax(1)


def arrays() -> Arrays:
    x, y = batch(40)
    return Arrays(Batches(x, y, 16, 0), (x, y), (x, y), 8)


def checked(chosen: Settings, steps: int = 3) -> StepProof:
    proof = StepProof(chosen, 8)
    model = build_mlp(8, chosen.placement, torch_bn.BatchNorm1d, seed=0, dtype=chosen.torch_dtype)
    for step in range(steps):
        proof.check(model, *batch(dtype=chosen.torch_dtype), step)
    return proof


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("placement", ["before", "after"])
def test_step_proof_compares_everything_and_passes(placement: str, dtype: str) -> None:
    step_proof = checked(settings(placement=placement, dtype=dtype))
    model = build_mlp(8, placement, seed=0)
    expected = {"output", "loss", "output in evaluation", "relu1 mask", "relu2 mask"}
    expected |= {f"{name} gradient" for name, _ in model.named_parameters()}
    expected |= {f"bn{i}.input gradient" for i in (1, 2)}
    expected |= {f"bn{i}.running_{what}" for i in (1, 2) for what in ("mean", "var")}
    assert set(step_proof.names) == expected
    assert sorted(i for members in step_proof.groups().values() for i in members) == list(
        range(len(expected))
    ), "a figure is in no group, or in two"
    proof = step_proof.proof()
    assert proof.passed
    assert proof.figures["steps"] == [0, 1, 2]


def test_check_leaves_what_training_alone_leaves() -> None:
    x, y = batch()
    watched = build_mlp(8, "before", torch_bn.BatchNorm1d, seed=0)
    alone = build_mlp(8, "before", torch_bn.BatchNorm1d, seed=0)
    output, loss = StepProof(settings(), 8).check(watched, x, y, 0)
    expected = alone(x)
    torch.nn.functional.cross_entropy(expected, y).backward()
    assert torch.equal(output, expected)
    assert loss.item() == torch.nn.functional.cross_entropy(expected, y).item()
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    for a, b in zip(watched.buffers(), alone.buffers(), strict=True):
        assert torch.equal(a, b)
    assert watched.training


def test_due_steps() -> None:
    short, full = StepProof(settings(), 8), StepProof(settings(validate="full"), 8)
    assert [s for s in range(260) if short.due(s)] == [*range(100), 100, 150, 200, 250]
    assert all(full.due(s) for s in range(260))


def test_flipped_mask_is_no_error_but_a_wrong_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # Half of the rows have pre-activations w * (a + b - fl(a + b)): within rounding of zero, and
    # of either sign in float32.
    model = build_mlp(8, "after", torch_bn.BatchNorm1d, seed=0)
    x, y = batch(64)
    x[:32, 3:] = 0
    x[:32, 2] = -(x[:32, 0] + x[:32, 1])
    with torch.no_grad():
        model.dense1.weight[:, 1:3] = model.dense1.weight[:, :1]
        model.dense1.bias.zero_()
        exact = x.double() @ model.dense1.weight.double().T
        assert ((model.dense1(x) > 0) != (exact > 0)).any(), "no mask flips"

    step_proof = StepProof(settings(placement="after"), 8)
    step_proof.check(model, x, y, 0)
    proof = step_proof.proof()
    assert proof.passed, [line for line in proof.lines if not line.passed]

    # That is the doing of the pinned masks: without them the proof fails a correct layer.
    with monkeypatch.context() as patch:
        patch.setattr(PinnedReLU, "forward", lambda self, x: torch.relu(x))
        unpinned = StepProof(settings(placement="after"), 8)
        unpinned.check(model, x, y, 0)
        assert max(unpinned.errors[0, :, :2].flatten().tolist()) > 1e-3

    # And pinning hides nothing: a mask that is wrong far from zero is an error itself.
    with monkeypatch.context() as patch:
        patch.setattr(
            Trace, "masks", lambda self: {n: self.input[n] > 0.1 for n in self.names("relu")}
        )
        wrong = StepProof(settings(placement="after"), 8)
        wrong.check(model, x, y, 0)
        assert wrong.errors[0, wrong.names.index("relu1 mask"), 0] > 1e-2


@pytest.mark.parametrize("where", ["one step", "mean", "nan", "counter"])
def test_step_verdict(where: str) -> None:
    step_proof = checked(settings(), steps=4)
    assert step_proof.proof().passed
    state = step_proof.state_dict()
    index = step_proof.names.index("bn1.input gradient")
    eps = torch.finfo(torch.float32).eps
    if where == "one step":
        state["errors"][2, index, 0] = 2 * state["errors"][2, index, 1] + 65 * eps
    elif where == "mean":
        # Each step within its own bound, all of them above the builtin.
        state["errors"][:, index, 0] = 1.1 * state["errors"][:, index, 1] + 4 * eps
    elif where == "nan":
        state["errors"][1, index, 0] = math.nan
    else:
        state["wrong_counters"] = [3]
    step_proof.load_state_dict(state)
    proof = step_proof.proof()
    assert not proof.passed
    wrong = [line.what for line in proof.lines if not line.passed]
    expected = {
        "one step": ["bn1.input gradient, step 2", "bn1.input gradient, mean"],
        "mean": ["bn1.input gradient, mean"],
        "nan": ["bn1.input gradient, step 1", "bn1.input gradient, mean"],
        "counter": ["num_batches_tracked"],
    }
    assert wrong == expected[where]


@pytest.mark.parametrize(
    ("placement", "validate", "total", "judged", "bound"),
    [
        ("before", "short", 300, 300, 1e-10),
        ("before", "full", 360, 360, 1e-10),  # 120 epochs of 3 batches
        ("after", "short", 100, 100, 1e-9),
        ("after", "full", 400, 100, 1e-9),
    ],
)
def test_float64_bounds(
    placement: str, validate: str, total: int, judged: int, bound: float
) -> None:
    chosen = settings(placement=placement, validate=validate, epochs=120)
    stage = FreeFloat64(chosen, arrays(), torch_bn.BatchNorm1d)
    assert (stage.total, stage.judged) == (total, judged)
    stage.control = [bound / 2000] * total
    stage.differences = [0.99 * bound] * judged + [1.0] * (total - judged)
    assert stage.proof().passed, "steps that are only shown must not be judged"
    for wrong in (1.01 * bound, math.nan, math.inf):
        stage.differences[judged // 2] = wrong
        proof = stage.proof()
        assert not proof.passed
        assert proof.figures["worst_step"] == judged // 2


def test_float64_bound_follows_the_control() -> None:
    stage = FreeFloat64(settings(placement="after"), arrays(), torch_bn.BatchNorm1d)
    # From step 50 on chaos has the control 1e-9 apart: 1e-6 is allowed from there, not before.
    stage.control = [1e-15] * 50 + [1e-9, 1e-12] * 25
    stage.differences = [0.9e-9] * 50 + [0.9e-6] * 50
    assert stage.proof().passed
    stage.differences[49] = 0.9e-6
    assert not stage.proof().passed


@pytest.mark.parametrize("placement", ["before", "after"])
def test_float64_passes_and_trains_both(placement: str) -> None:
    stage = FreeFloat64(settings(placement=placement), arrays(), torch_bn.BatchNorm1d)
    lines = [stage.advance() for _ in range(stage.total)]
    assert [line is not None for line in lines] == [False] * (stage.total - 1) + [True]
    assert stage.proof().passed
    assert len(stage.differences) == stage.total
    assert 0 < max(stage.control) < 1e-10, "the control is not the same but for rounding"


def test_float32_runs_every_seed() -> None:
    stage = FreeFloat32(settings(epochs=2), arrays(), torch_bn.BatchNorm1d)
    assert (stage.epochs, stage.total) == (2, 5 * 2 * 3)
    for _ in range(stage.total):
        stage.advance()
    for name in (OURS, BUILTIN):
        assert [len(curve) for curve in stage.accuracies[name]] == [2] * 5
    # Other seeds are other runs, or they would say nothing about noise.
    assert len({tuple(curve) for curve in stage.accuracies[OURS]}) > 1
    assert stage.proof().passed


def test_float32_short_form_ends_with_the_epoch_of_step_300() -> None:
    assert FreeFloat32(settings(epochs=500), arrays(), torch_bn.BatchNorm1d).epochs == 100
    full = settings(epochs=500, validate="full")
    assert FreeFloat32(full, arrays(), torch_bn.BatchNorm1d).epochs == 500


@pytest.mark.parametrize(
    ("ours", "passed"),
    [
        ([0.96, 0.97, 0.98, 0.97, 0.96], True),
        # 4.04 % below, where 5.041 standard errors and an image of 40 are 5.15 %
        ([0.92, 0.93, 0.94, 0.93, 0.92], True),
        # 7.04 % below
        ([0.89, 0.90, 0.91, 0.90, 0.89], False),
        ([math.nan, 0.97, 0.98, 0.97, 0.96], False),
    ],
)
def test_float32_verdict(ours: list[float], passed: bool) -> None:
    stage = FreeFloat32(settings(), arrays(), torch_bn.BatchNorm1d)
    builtin = [0.969, 0.978, 0.961, 0.97, 0.964]
    stage.accuracies = {OURS: [[a] for a in ours], BUILTIN: [[a] for a in builtin]}
    assert stage.proof().passed is passed

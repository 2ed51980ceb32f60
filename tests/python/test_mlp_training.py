"""Batches, evaluation, and the three networks that train side by side."""

from __future__ import annotations

import mlp_settings
import pytest
import torch
from torch.nn import functional as F

import torch_bn
from mlp.model import build_mlp, generator
from mlp.options import Settings
from mlp.training import BUILTIN, OURS, WITHOUT, Arrays, Batches, Training, evaluate


def settings(**changes: object) -> Settings:
    return mlp_settings.settings(**{"validate": "off", **changes})


def arrays(count: int = 40, size: int = 16, seed: int = 0) -> Arrays:
    inputs = torch.randn(count, 8, generator=generator("inputs"))
    labels = inputs[:, :3].argmax(1)
    return Arrays(Batches(inputs, labels, size, seed), (inputs, labels), (inputs, labels), 8)


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (40, 16, [16, 16, 8]),
        (33, 16, [16, 16]),  # the single row left over is dropped
        (34, 16, [16, 16, 2]),
        (32, 16, [16, 16]),
        (5, 16, [5]),
        (3, 2, [2]),
    ],
)
def test_batch_sizes(count: int, size: int, sizes: list[int]) -> None:
    rows = torch.arange(count)
    batches = Batches(rows[:, None].float(), rows, size, seed=0)
    assert batches.per_epoch == len(sizes)
    found = [batches.at(step, torch.float32)[1] for step in range(len(sizes))]
    assert [len(rows) for rows in found] == sizes
    assert len(set(torch.cat(found).tolist())) == sum(sizes), "a row came twice"


@pytest.mark.parametrize("count", [0, 1])
def test_no_batch_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"has {count} images: at least 2"):
        Batches(torch.zeros(count, 4), torch.zeros(count, dtype=torch.int64), 64, seed=0)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    rows = torch.arange(64)

    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(rows[:, None].float(), rows, 16, seed)
        return torch.cat([batches.at(epoch * 4 + i, torch.float32)[1] for i in range(4)]).tolist()

    # Asked for on its own or after others: the same.
    batches = Batches(rows[:, None].float(), rows, 16, seed=3)
    walked = [batches.at(step, torch.float32)[1] for step in range(12)]
    assert torch.cat(walked[8:]).tolist() == order(3, 2)
    assert order(3, 2) != order(3, 1)
    assert order(3, 2) != order(4, 2)


def test_batches_have_rows_with_their_labels_in_the_dtype() -> None:
    rows = torch.arange(20)
    x, y = Batches(rows[:, None].float(), rows, 8, seed=0).at(0, torch.float64)
    assert x.dtype == torch.float64
    assert torch.equal(x[:, 0].long(), y)


def test_evaluate_is_the_mean_over_all_rows_and_leaves_the_model_alone() -> None:
    model = build_mlp(8, "before", seed=0)
    inputs = torch.randn(20_000, 8, generator=generator("many"))
    labels = inputs.argmax(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, accuracy = evaluate(model, inputs, labels)
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        output = model.eval()(inputs)
    # Sums of 20,000 float32 losses in another order: errors stay below sqrt(n) roundings.
    assert loss == pytest.approx(F.cross_entropy(output.double(), labels).item(), rel=1e-5)
    assert accuracy == (output.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_three_networks_learn(optimizer: str, dtype: str) -> None:
    lr = 1e-3 if optimizer == "adam" else 0.05
    chosen = settings(epochs=20, optimizer=optimizer, dtype=dtype, lr=lr)
    training = Training(chosen, arrays(), torch_bn.BatchNorm1d, None)
    assert [learner.name for learner in training.learners] == [OURS, BUILTIN, WITHOUT]
    assert type(training.learners[0].model.bn1) is torch_bn.BatchNorm1d
    assert type(training.learners[1].model.bn1) is torch.nn.BatchNorm1d
    lines = [training.advance() for _ in range(training.total)]
    # A line at the end of each epoch of three batches, none between.
    assert [step for step, line in enumerate(lines) if line] == list(range(2, 60, 3))
    for learner in training.learners:
        assert next(learner.model.parameters()).dtype == chosen.torch_dtype
        curve = training.history[learner.name]
        assert len(curve) == 20
        assert curve[-1]["train_loss"] < curve[0]["train_loss"] / 2
        assert curve[-1]["validation_accuracy"] > 0.9


def test_momentum_of_sgd() -> None:
    training = Training(settings(optimizer="sgd", lr=0.25), arrays(), torch_bn.BatchNorm1d, None)
    for learner in training.learners:
        group = learner.optimizer.param_groups[0]
        assert (group["lr"], group["momentum"]) == (0.25, 0.9)


def test_without_placement_one_network_trains() -> None:
    training = Training(settings(placement="none"), arrays(), torch_bn.BatchNorm1d, None)
    assert [learner.name for learner in training.learners] == [WITHOUT]


def test_figures_of_an_epoch_are_means_over_rows() -> None:
    chosen = settings(epochs=1, lr=1e-30)  # nothing moves: the epoch is one evaluation in pieces
    training = Training(chosen, arrays(), torch_bn.BatchNorm1d, None)
    while training.position < training.total:
        training.advance()
    now = training.history[WITHOUT][0]
    # The same 40 losses, added in another order in float32.
    assert now["train_loss"] == pytest.approx(now["validation_loss"], rel=1e-6)
    assert now["train_accuracy"] == now["validation_accuracy"]

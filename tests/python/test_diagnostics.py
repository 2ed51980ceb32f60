"""The recorder: its figures against float64, what it leaves alone, and TensorBoard."""

from __future__ import annotations

import builtins
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torch_bn
from torch_bn.diagnostics import Recorder


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 4), torch_bn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3, bias=False)
    )


def train(model: nn.Module, steps: int) -> list[Tensor]:
    inputs = [torch.randn(32, 5) + 3 for _ in range(steps)]
    for x in inputs:
        model.zero_grad()
        model(x).square().sum().backward()
    return inputs


def hooks(model: nn.Module) -> int:
    modules = list(model.modules())
    of_tensors = sum(len(p._backward_hooks or ()) for p in model.parameters())
    return of_tensors + sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def test_moments_and_percentiles_are_those_of_float64() -> None:
    model = network()
    with Recorder(model, ["0", "1"], percentiles=(0, 15, 50, 100), units=(2, 0)) as record:
        inputs = train(model, 3)
    # The weights stay as they are: float64 gives what each layer saw from the same input.
    for row, x in enumerate(inputs):
        y = model[0](x).detach().double()
        found = record["0"].output
        # The same float64 arithmetic in another order: a few roundings.
        torch.testing.assert_close(found.mean[row], y.mean(0), rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(found.std[row], y.std(0, correction=0), rtol=1e-13, atol=0)
        assert torch.equal(record["1"].input.mean[row], found.mean[row])
        percents = torch.tensor([0.0, 0.15, 0.5, 1.0], dtype=torch.float64)
        assert torch.equal(found.percentiles[row], torch.quantile(y[:, [2, 0]], percents, 0))


def test_a_large_mean_costs_no_digits() -> None:
    x = torch.randn(1000, 2, dtype=torch.float32) + 1e4
    layer = nn.Identity()
    with Recorder(layer, [""]) as record:
        layer(x)
    expected = x.double().std(0, correction=0)
    # Sums of squares would be off by 1e-8 here even in float64. Those of distances from the mean
    # are off by its rounding, 1e4 * 1e-16.
    torch.testing.assert_close(record[""].input.std[0], expected, rtol=1e-12, atol=0)


def test_channels_of_sequences_are_dimension_one() -> None:
    x = torch.randn(6, 3, 7)
    layer = nn.Identity()
    with Recorder(layer, [""]) as record:
        layer(x)
    expected = x.double().mean((0, 2))
    # The same float64 sums of 42 values in another order.
    torch.testing.assert_close(record[""].output.mean[0], expected, rtol=1e-14, atol=1e-15)


def test_channels_last_are_the_layers_channels() -> None:
    model = nn.Sequential(torch_bn.BatchNorm1d(3, channels_last=True))
    x = torch.randn(6, 7, 3)
    with Recorder(model, percentiles=(50,)) as record:
        model(x)
        model(x[:, 0])  # a matrix, whose channels are where they always are
    expected = torch.stack([x.double().mean((0, 1)), x[:, 0].double().mean(0)])
    # The same float64 sums of 42 values in another order.
    torch.testing.assert_close(record["0"].input.mean, expected, rtol=1e-14, atol=1e-15)
    assert record["0"].output.percentiles.shape == (2, 1, 3)


def test_a_forward_without_channels_has_a_row_of_nan() -> None:
    model = nn.Identity()
    with Recorder(model, [""], percentiles=(50,)) as record:
        for x in (torch.ones(3), torch.ones(2, 3), torch.ones(3)):
            model(x)
    found = record[""]
    assert found.steps.tolist() == [0, 1, 2]
    for values in (found.input.mean, found.output.std, found.output.percentiles[:, 0]):
        assert values.isnan().all(1).tolist() == [True, False, True]


def test_units_that_a_layer_has_not() -> None:
    layer = torch_bn.BatchNorm1d(4)
    for units in ((4,), (-1,)):
        with pytest.raises(ValueError, match="units"):
            Recorder(layer, percentiles=(50,), units=units)
    model = nn.Linear(2, 3)
    with Recorder(model, [""], percentiles=(50, 90), units=(2, 1)) as record:
        model(torch.randn(5, 2))
    assert record[""].input.percentiles.isnan()[0].tolist() == [[True, False]] * 2
    assert not record[""].output.percentiles.isnan().any()


def test_gradient_norms() -> None:
    model = network()
    with Recorder(model, ["0", "3"], gradients=True) as record:
        train(model, 2)
    for name in ("0", "3"):
        layer: Any = model.get_submodule(name)
        norm = layer.weight.grad.double().norm()
        # At most 20 squares, whose float64 sum is off by 20 * 1.1e-16 in any order.
        assert record[name].parameter_steps["weight"].tolist() == [0, 1]
        torch.testing.assert_close(
            record[name].parameter_gradients["weight"][1], norm, rtol=1e-14, atol=0
        )
    assert list(record["3"].parameter_gradients) == ["weight"]
    # The loss is the sum of squares, whose gradient is twice the output, exactly: what differs is
    # the order of float64 sums of 32 values.
    rms = (record["3"].output.std[0].square() + record["3"].output.mean[0].square()).sum()
    torch.testing.assert_close(
        record["3"].output_gradient[0], 2 * (32 * rms).sqrt(), rtol=1e-14, atol=0
    )


def test_frozen_parameters_have_no_gradient_norms() -> None:
    model = network()
    model[0].bias.requires_grad_(False)
    with Recorder(model, ["0"], gradients=True) as record:
        train(model, 1)
    assert list(record["0"].parameter_gradients) == ["weight"]


def test_every_so_many_steps_of_training_are_recorded() -> None:
    model = network()
    with Recorder(model, every=3, gradients=True) as record:
        train(model, 1)
        model.eval()
        for _ in range(3):
            model(torch.randn(2, 5))
        model.train()
        train(model, 6)
    assert record["1"].steps.tolist() == [0, 3, 6]
    assert record["1"].gradient_steps.tolist() == [0, 3, 6]
    assert record["1"].parameter_steps["weight"].tolist() == [0, 3, 6]
    assert record["1"].input.mean.shape == (3, 4)


def test_evaluation_is_recorded_on_request() -> None:
    model = network().eval()
    with Recorder(model, evaluation=True) as record, torch.no_grad():
        model(torch.randn(2, 5))
    assert record["1"].steps.tolist() == [0]


def test_a_backward_belongs_to_the_step_of_its_forward() -> None:
    model = network()
    with Recorder(model, gradients=True) as record:
        first, second = model(torch.randn(4, 5)), model(torch.randn(4, 5))
        first.sum().backward()
        second.sum().backward()
    assert record["1"].gradient_steps.tolist() == [0, 1]
    assert record["1"].parameter_steps["weight"].tolist() == [0, 1]


def test_gradients_of_a_step_that_is_not_recorded_go_to_no_other() -> None:
    model = network()
    with Recorder(model, every=2, gradients=True) as record:
        recorded, skipped = model(torch.randn(4, 5)), model(torch.randn(4, 5))
        skipped.sum().backward()
        recorded.sum().backward()
        model.eval()
        later = model(torch.randn(4, 5))
        later.sum().backward()
    assert record["1"].parameter_steps == {"weight": torch.tensor([0]), "bias": torch.tensor([0])}


def test_an_evaluation_before_the_backward_takes_no_gradients_away() -> None:
    model = network()
    with Recorder(model, gradients=True) as record:
        loss = model(torch.randn(4, 5)).sum()
        model.eval()
        model(torch.randn(4, 5))
        loss.backward()
    assert record["1"].parameter_steps["weight"].tolist() == [0]


def test_gradients_of_a_layer_with_several_outputs() -> None:
    model = nn.LSTM(2, 3)
    with Recorder(model, [""], every=2, gradients=True) as record:
        for _ in range(3):
            model(torch.randn(4, 2))[0].sum().backward()
    assert record[""].parameter_steps["weight_ih_l0"].tolist() == [0, 2]


def test_what_a_checkpoint_computes_again_is_no_step() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = network()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.part, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = Checkpointed()
    with Recorder(model, gradients=True) as record:
        train(model, 2)
    assert record["part.1"].steps.tolist() == [0, 1]
    assert record["part.1"].parameter_steps["weight"].tolist() == [0, 1]


def test_results_keep_their_bits() -> None:
    def weights(recorded: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with Recorder(model if recorded else nn.BatchNorm1d(1), gradients=True):
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.randn(16, 5)).square().sum().backward()
                optimizer.step()
        return [t.detach().clone() for t in model.state_dict().values()]

    torch.manual_seed(1)
    for with_it, without in zip(weights(True), weights(False), strict=True):
        assert torch.equal(with_it, without)


def test_hooks_go_even_after_an_exception() -> None:
    model = network()
    record = Recorder(model, gradients=True)

    def fail() -> None:
        with record:
            assert hooks(model) > 0
            train(model, 1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert hooks(model) == 0
    train(model, 1)
    assert record["1"].steps.tolist() == [0]
    assert not record["1"].input.mean.requires_grad


def test_a_backward_after_the_block_is_not_recorded() -> None:
    model = network()
    with Recorder(model, gradients=True) as record:
        loss = model(torch.randn(4, 5)).sum()
    loss.backward()
    assert len(record["1"].output_gradient) == 0
    assert len(record["1"].parameter_gradients["weight"]) == 0


def test_the_choice_of_layers() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(torch_bn.BatchNorm1d(2), nn.ReLU()))
    assert list(Recorder(model)) == ["0", "1.0"]
    assert list(Recorder(model, [nn.ReLU, "0"])) == ["0", "1.1"]
    with pytest.raises(ValueError, match="no layer '7'"):
        Recorder(model, ["0", "7"])
    with pytest.raises(ValueError, match="none of the layers"):
        Recorder(model, [nn.Tanh])


@pytest.mark.parametrize("options", [{"every": 0}, {"percentiles": (50, 101)}])
def test_options_out_of_range(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Recorder(network(), **options)


def test_a_layer_of_no_channels_has_no_statistics() -> None:
    model = nn.Sequential(nn.Embedding(3, 2))
    with Recorder(model, [nn.Embedding]) as record:
        model(torch.tensor([0, 1]))
    assert record["0"].input.mean.shape == (0, 0)
    assert record["0"].output.mean.shape == (1, 2)


class _Writer:
    """What SummaryWriter is asked to write."""

    def __init__(self, directory: str) -> None:
        self.rows: list[tuple[str, Any, int]] = []
        self.closed = False
        _Writer.last = self

    last: _Writer

    def add_scalar(self, tag: str, value: Any, step: int) -> None:
        self.rows.append((tag, value, step))

    add_histogram = add_scalar

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's writer, where that need not be installed."""
    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = _Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)


@pytest.mark.usefixtures("stand_in")
def test_tensorboard_gets_everything() -> None:
    model = network()
    with Recorder(model, every=2, percentiles=(50,), units=(3,), gradients=True) as record:
        train(model, 3)
    record.to_tensorboard("anywhere")
    assert _Writer.last.closed
    rows = {(tag, step): value for tag, value, step in _Writer.last.rows}
    found = record["1"]
    assert torch.equal(rows["1/input/mean", 2], found.input.mean[1])
    assert rows["1/output/unit 3/p50", 0] == found.output.percentiles[0, 0, 0]
    assert rows["1/gradient norm/weight", 2] == found.parameter_gradients["weight"][1]
    assert len(rows) == 2 * (4 + 2 + 3)


@pytest.mark.usefixtures("stand_in")
def test_tensorboard_gets_no_histogram_of_nan() -> None:
    model = nn.Identity()
    with Recorder(model, [""]) as record:
        model(torch.ones(3))
        model(torch.ones(2, 3))
    record.to_tensorboard("anywhere")
    assert {step for _, _, step in _Writer.last.rows} == {1}


def test_tensorboard_itself(tmp_path: Any) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    with Recorder(model, gradients=True, percentiles=(15, 85), units=(0,)) as record:
        train(model, 2)
    record.to_tensorboard(tmp_path)
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    values = [event.value for event in events.Scalars("1/gradient norm/output")]
    # An event holds a float32.
    assert values == record["1"].output_gradient.float().tolist()
    assert len(events.Histograms("1/output/std")) == 2


def test_without_tensorboard_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    load = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch.utils.tensorboard":
            raise ModuleNotFoundError("No module named 'tensorboard'")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install tensorboard"):
        Recorder(network()).to_tensorboard(tmp_path)

"""fold: a copy for inference in which no batch norm is left."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from folded import EXACT, agree, fold
from hypothesis import given, settings
from stacks import apart, scatter, seeded, stacks
from torch import Tensor, nn
from torch.nn.utils import parametrize

import torch_bn
from torch_bn._affine import Affine1d

C = 4
NORMS = (nn.BatchNorm1d, torch_bn.BatchNorm1d)

# A float32 product or sum is off by 6e-8 of its result; the sums of up to a few hundred such that
# make an output err by a random walk, to which the fold adds one rounding of each weight: a few
# 1e-7 of the largest output.
FLOAT32 = 1e-6


def names(model: nn.Module) -> list[str]:
    return [type(each).__name__ for each in model]


# ------------------------------------------------------------------------------------------------
# Where a norm goes
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_into_the_linear_before(norm: type, bias: bool, options: dict[str, bool]) -> None:
    model = nn.Sequential(nn.Linear(3, C, bias=bias), norm(C, **options), nn.ReLU())
    folded, report = agree(model, 6, 3)
    assert names(folded) == ["Linear", "Identity", "ReLU"]
    package = "torch.nn" if norm is nn.BatchNorm1d else "torch_bn"
    assert report == [f"1: {package}.BatchNorm1d folded into 0"]
    assert isinstance(folded[0].bias, nn.Parameter)


@pytest.mark.parametrize("groups", [1, 2])
def test_into_the_convolution_before(groups: int) -> None:
    conv = nn.Conv1d(6, C, 3, stride=2, padding=2, dilation=2, groups=groups, bias=False)
    folded, _ = agree(nn.Sequential(conv, nn.BatchNorm1d(C)), 5, 6, 9)
    assert names(folded) == ["Conv1d", "Identity"]


def test_into_the_linear_after() -> None:
    folded, report = agree(nn.Sequential(nn.BatchNorm1d(C), nn.Linear(C, 3, bias=False)), 6, C)
    assert names(folded) == ["Identity", "Linear"]
    assert report == ["0: torch.nn.BatchNorm1d folded into 1"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("padding", [0, "valid"])
def test_into_the_convolution_after(padding: int | str, groups: int) -> None:
    conv = nn.Conv1d(C, 6, 3, stride=2, padding=padding, groups=groups)
    folded, report = agree(nn.Sequential(nn.BatchNorm1d(C), conv), 5, C, 9)
    assert names(folded) == ["Identity", "Conv1d"]
    assert report == ["0: torch.nn.BatchNorm1d folded into 1"]


@pytest.mark.parametrize("padding", [1, "same"])
def test_not_across_padding(padding: int | str) -> None:
    folded, report = agree(
        nn.Sequential(nn.BatchNorm1d(C), nn.Conv1d(C, 2, 3, padding=padding)), 5, C, 9
    )
    assert names(folded) == ["Affine1d", "Conv1d"]
    assert report == ["0: torch.nn.BatchNorm1d made a multiply-add"]


def test_into_a_pointwise_convolution_that_pads_by_name() -> None:
    folded, _ = agree(nn.Sequential(nn.BatchNorm1d(C), nn.Conv1d(C, 2, 1, padding="same")), 5, C, 9)
    assert names(folded) == ["Identity", "Conv1d"]


def test_norms_after_relu_go_forward() -> None:
    layers = [nn.Linear(3, C), nn.ReLU(), nn.BatchNorm1d(C), nn.Linear(C, 5), nn.ReLU()]
    folded, report = agree(nn.Sequential(*layers, nn.BatchNorm1d(5), nn.Linear(5, 2)), 6, 3)
    assert names(folded) == ["Linear", "ReLU", "Identity", "Linear", "ReLU", "Identity", "Linear"]
    assert report == [
        "2: torch.nn.BatchNorm1d folded into 3",
        "5: torch.nn.BatchNorm1d folded into 6",
    ]


def test_fused_layers_leave_their_relu() -> None:
    folded, report = agree(
        nn.Sequential(
            *(nn.Linear(3, C), torch_bn.BatchNormReLU1d(C)),
            *(torch_bn.ReLUBatchNorm1d(C), nn.Linear(C, 2)),
        ),
        *(6, 3),
    )
    assert names(folded) == ["Linear", "ReLU", "ReLU", "Linear"]
    assert report == [
        "1: torch_bn.BatchNormReLU1d folded into 0, its ReLU stays",
        "2: torch_bn.ReLUBatchNorm1d folded into 3, its ReLU stays",
    ]


@pytest.mark.parametrize("shape", [(6, C), (6, C, 5)])
def test_multiply_adds(shape: tuple[int, ...]) -> None:
    kinds = {
        "Affine1d": nn.BatchNorm1d(C),
        "AffineReLU1d": torch_bn.BatchNormReLU1d(C),
        "ReLUAffine1d": torch_bn.ReLUBatchNorm1d(C),
    }
    for name, norm in kinds.items():
        folded, report = agree(nn.Sequential(nn.Tanh(), norm, nn.Tanh()), *shape)
        assert names(folded) == ["Tanh", name, "Tanh"]
        assert report[0].endswith(" made a multiply-add")
        assert list(folded.state_dict()) == ["1.scale", "1.shift"]
        assert f"(1): {name}({C})" in str(folded)
        with pytest.raises(AssertionError, match="another number of channels"):
            folded(torch.zeros(3, 1, dtype=torch.float64))
    model = nn.BatchNorm1d(C).double()
    folded, report = fold(model)
    assert type(folded) is Affine1d
    assert report == ["the model itself: torch.nn.BatchNorm1d made a multiply-add"]


def test_several_norms_into_one_layer() -> None:
    norms = [nn.BatchNorm1d(C) for _ in range(4)]
    folded, report = agree(nn.Sequential(*norms[:2], nn.Linear(C, C), *norms[2:]), 6, C)
    assert names(folded) == ["Identity", "Identity", "Linear", "Identity", "Identity"]
    assert sorted(report) == [f"{i}: torch.nn.BatchNorm1d folded into 2" for i in (0, 1, 3, 4)]


def test_what_is_nothing_at_inference_is_looked_through() -> None:
    between = [nn.Dropout(), nn.Identity(), nn.AlphaDropout(), nn.Dropout1d(), nn.Flatten()]
    folded, _ = agree(nn.Sequential(nn.Linear(3, C), *between, nn.BatchNorm1d(C)), 6, 3)
    assert type(folded[-1]) is nn.Identity
    folded, _ = agree(nn.Sequential(nn.BatchNorm1d(3), *between, nn.Linear(3, C)), 6, 3)
    assert type(folded[0]) is nn.Identity


def test_flatten_after_a_norm_of_sequences() -> None:
    model = nn.Sequential(nn.BatchNorm1d(C), nn.Flatten(), nn.Linear(C * 5, 2))
    folded, _ = agree(model, 6, C, 5)
    assert names(folded) == ["Identity", "Flatten", "Linear"]


def test_flatten_before_a_norm_over_more_channels() -> None:
    model = nn.Sequential(nn.Conv1d(3, C, 2), nn.Flatten(), nn.BatchNorm1d(C * 4))
    folded, _ = agree(model, 6, 3, 5)
    assert names(folded) == ["Conv1d", "Flatten", "Affine1d"]
    other = nn.Sequential(nn.BatchNorm1d(C), nn.Flatten(0, 1), nn.Linear(5, 2))
    assert names(agree(other, 6, C, 5)[0]) == ["Affine1d", "Flatten", "Linear"]


# ------------------------------------------------------------------------------------------------
# What is not folded into, and what is refused
# ------------------------------------------------------------------------------------------------


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Tanh(), nn.Linear(C, C))
    model[3].weight = model[0].weight
    return model


def parametrised(index: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
    parametrize.register_parametrization(model[index], "weight", nn.Softplus())
    return model


def hooked(index: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C))
    model[index].register_forward_hook(lambda module, args, output: output + 1)
    return model


def shared() -> nn.Sequential:
    dense = nn.Linear(C, C)
    return nn.Sequential(dense, nn.BatchNorm1d(C), nn.Tanh(), dense)


ALONE = {
    "tied": tied,
    "shared": shared,
    "parametrised Linear": lambda: parametrised(0),
    "parametrised norm": lambda: parametrised(1),
    "hooked Linear": lambda: hooked(0),
    "hooked norm": lambda: hooked(1),
    "other channels": lambda: nn.Sequential(nn.Linear(C, 5), nn.BatchNorm1d(C)),
}


@pytest.mark.parametrize("case", ALONE)
def test_a_multiply_add_where_no_layer_can_take_it(case: str) -> None:
    shape = (6, C, C) if case == "other channels" else (6, C)
    folded, report = agree(ALONE[case](), *shape)
    assert type(folded[1]) is Affine1d
    assert report == ["1: torch.nn.BatchNorm1d made a multiply-add"]


class ClampedNorm(nn.BatchNorm1d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-0.5, 0.5)


def test_derived_classes_stay() -> None:
    model = nn.Sequential(nn.Linear(3, C), ClampedNorm(C))
    folded, report = fold(model)
    assert report == ["1: left alone, a subclass"]
    x = torch.randn(5, 3)
    assert torch.equal(folded(x), model.eval()(x))


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C, track_running_stats=False))
    with pytest.raises(ValueError, match=r"cannot fold 1 .*it has no running statistics"):
        torch_bn.fold(model)
    for lazy in (nn.LazyBatchNorm1d(), torch_bn.LazyBatchNorm1d(), nn.LazyLinear(C)):
        with pytest.raises(ValueError, match=r"before its first batch: 1 .*does not know its"):
            torch_bn.fold(nn.Sequential(nn.Tanh(), lazy))


@pytest.mark.parametrize("wrap", [lambda m: m, copy.deepcopy, lambda m: nn.ModuleList([m])])
def test_revert_of_a_folded_model_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), torch_bn.BatchNorm1d(C))
    folded = wrap(torch_bn.fold(nn.Sequential(model[0], model[1])))
    ours = nn.Sequential(torch_bn.BatchNorm1d(C), folded)
    with pytest.raises(ValueError, match="folding cannot be undone"):
        torch_bn.revert(ours)
    assert type(ours[0]) is torch_bn.BatchNorm1d


# ------------------------------------------------------------------------------------------------
# The copy
# ------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Dropout(), nn.BatchNorm1d(C))
    scatter(model)
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    folded = torch_bn.fold(model)
    assert repr(model) == text
    assert all(each.training for each in model.modules())
    assert not any(each.training for each in folded.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    # Folding again finds nothing to do.
    assert repr(torch_bn.fold(folded)) == repr(folded)


def test_train_changes_nothing_but_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Tanh(), nn.BatchNorm1d(C))
    folded, _ = fold(model)
    x = torch.randn(5, 3)
    want = folded(x)
    assert torch.equal(folded.train()(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(folded))(x), want)
    again, _ = fold(copy.deepcopy(model))
    again.load_state_dict(folded.state_dict())
    assert torch.equal(again(x), want)


@pytest.mark.parametrize("inputs", [(64, 784), (1, 784)])
def test_the_mlp_in_float32(inputs: tuple[int, int]) -> None:
    for order in ("norm first", "ReLU first"):
        middle = [nn.BatchNorm1d(300), nn.ReLU()]
        second = [nn.BatchNorm1d(100), nn.ReLU()]
        if order == "ReLU first":
            middle, second = middle[::-1], second[::-1]
        model = nn.Sequential(
            *(nn.Linear(784, 300), *middle, nn.Linear(300, 100), *second, nn.Linear(100, 10))
        )
        scatter(model)
        folded, x = torch_bn.fold(model), torch.rand(inputs)
        assert apart(folded(x), model.eval()(x)) < FLOAT32
        exact = copy.deepcopy(model).double()(x.double())
        assert apart(folded(x).double(), exact) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C), nn.Tanh(), nn.BatchNorm1d(C))
    scatter(model)
    model.to(dtype)
    for norms in (dtype, torch.float32):  # torch takes 16-bit input with float32 parameters too
        model[1].to(norms)
        model[3].to(norms)
        folded = torch_bn.fold(model)
        assert folded[0].weight.dtype == dtype
        x = torch.randn(50, 3).to(dtype)
        assert folded(x).dtype == dtype
        assert folded[3].scale.dtype == torch.float32
        exact = copy.deepcopy(model).double().eval()(x.double())
        # Each of four layers rounds to 8 (or 11) bits, weights once more.
        assert apart(folded(x).double(), exact) < 8 * torch.finfo(dtype).eps


def test_a_folded_model_is_traced_compiled_and_exported() -> None:
    folded, _ = fold(nn.Sequential(nn.Tanh(), torch_bn.BatchNormReLU1d(C), nn.Tanh()))
    x = torch.randn(5, C)
    want = folded(x)
    assert torch.equal(torch.fx.symbolic_trace(folded)(x), want)
    assert torch.equal(torch.compile(folded, backend="eager", fullgraph=True)(x), want)
    assert torch.equal(torch.export.export(folded, (x,)).module()(x), want)
    assert torch.equal(torch.jit.script(folded)(x), want)


@settings(max_examples=100)
@given(stacks(tracked=True))
def test_any_stack_computes_the_same(drawn: tuple[nn.Sequential, tuple[int, ...]]) -> None:
    model, shape = drawn
    folded = torch_bn.fold(model)
    assert not any(isinstance(each, nn.BatchNorm1d) for each in folded.modules())
    x = torch.randn(shape, dtype=torch.float64)
    want = seeded(model.eval(), x)
    assert apart(seeded(folded, x), want) < EXACT
    fused = torch_bn.convert(copy.deepcopy(model), fuse=True, drop_bias=True)
    assert apart(seeded(torch_bn.fold(fused), x), want) < EXACT


def test_channels_as_the_last_dimension_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch_bn.BatchNorm1d(3, channels_last=True))
    with pytest.raises(ValueError, match=r"cannot fold 1 \(torch_bn.BatchNorm1d\): its channels"):
        torch_bn.fold(model)


def test_a_ghost_batch_norm_is_folded_as_any_other() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch_bn.BatchNorm1d(3, virtual_batch_size=2)).double()
    x = torch.randn(8, 4, dtype=torch.double)
    model(x)
    folded = torch_bn.fold(model)
    assert not any(isinstance(each, nn.BatchNorm1d) for each in folded.modules())
    assert apart(folded(x), model.eval()(x)) < EXACT


def test_layers_of_several_processes_are_folded_as_those_of_one() -> None:
    fused = nn.Sequential(nn.Linear(3, C), torch_bn.BatchNormReLU1d(C), nn.Linear(C, C))
    model = torch_bn.convert_sync(
        nn.Sequential(*fused, nn.BatchNorm1d(C), nn.Tanh(), torch_bn.ReLUBatchNorm1d(C), nn.Tanh())
    )
    folded, report = agree(model, 6, 3)
    assert names(folded)[1] == "ReLU"
    assert names(folded)[3:6] == ["Identity", "Tanh", "ReLUAffine1d"]
    assert report == [
        "1: torch_bn.SyncBatchNormReLU1d folded into 0, its ReLU stays",
        "3: torch_bn.SyncBatchNorm1d folded into 2",
        "5: torch_bn.SyncReLUBatchNorm1d made a multiply-add",
    ]


def test_a_norm_with_a_forward_of_its_own_stays() -> None:
    model = nn.Sequential(nn.Linear(3, C), nn.BatchNorm1d(C))
    model[1].forward = torch.neg
    folded, report = fold(model)
    assert report == ["1: left alone, it has a forward of its own"]
    x = torch.randn(5, 3)
    assert torch.equal(folded(x), -model[0](x))


def test_a_flattened_linear_of_a_size_that_does_not_fit_is_left() -> None:
    # The model could not run; it is not for fold to say so.
    folded, report = fold(nn.Sequential(nn.BatchNorm1d(C), nn.Flatten(), nn.Linear(C + 1, 2)))
    assert names(folded) == ["Affine1d", "Flatten", "Linear"]
    assert report == ["0: torch.nn.BatchNorm1d made a multiply-add"]

"""SyncBatchNorm1d in groups of 2, 3 and 4 processes against one process with the whole batch."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel

import torch_bn
from accuracy import bound
from errors import QUANTITIES, Problem, errors, make_problem
from errors import run as run_alone
from processes import join, run_well

PROCESSES = 4
WORLDS = (2, 3, 4)
SHAPES = [(48, 33), (26, 5, 40)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Rows of each process out of all, from its share on: the last one gets the rest.
SHARES = {"equal": None, "unequal": (7, 1, 3), "empty": (0, 10, 0)}

Results = dict[str, Any]


def cut(count: int, world: int, share: str) -> list[slice]:
    sizes = SHARES[share] or [count // world] * world
    ends = [0, *(sum(sizes[: i + 1]) for i in range(world - 1)), count]
    return [slice(a, b) for a, b in pairwise(ends)]


def problem(shape: tuple[int, ...], dtype: torch.dtype) -> Problem:
    return make_problem(shape, 100.0, 1.0, dtype=dtype)


def fill(layer: torch.nn.Module, source: Problem) -> None:
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(source, name))


def one_step(layer: torch.nn.Module, source: Problem, rows: slice) -> Results:
    """This process's share of a forward and backward."""
    fill(layer, source)
    x = source.x[rows].detach().requires_grad_()
    y = layer(x)
    y.backward(source.grad_output[rows])
    return {
        "y": y.detach(),
        "grad_input": x.grad,
        "grad_weight": layer.weight.grad,
        "grad_bias": layer.bias.grad,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }


def make_model(layer: Any) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), layer(8), torch.nn.Tanh(), torch.nn.Linear(8, 8), layer(8)
    ).double()


def batches(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(24, 4, dtype=torch.double, generator=generator)


def train(model: Any, world: int, rank: int, halves: bool = False, steps: int = 3) -> None:
    """Steps on this process's share of each batch; in two halves, the first without DDP's sum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        own = batches(step)[cut(24, world, "equal")[rank]]
        parts = own.chunk(2) if halves else [own]
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                (model(part).square().sum(1).mean() / len(parts)).backward()
        optimizer.step()


def refused(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def work(rank: int, world: int, directory: str) -> None:
    """Everything that needs several processes, once: starting them takes longer than all of it."""
    join(rank, world, directory)
    groups = {n: dist.new_group(list(range(n))) for n in WORLDS}
    results: Results = {}
    for n, group in groups.items():
        if rank >= n:
            continue
        for shape in SHAPES:
            for dtype in DTYPES:
                source = problem(shape, dtype)
                for share in SHARES:
                    rows = cut(shape[0], n, share)[rank]
                    for again in (False, True):
                        layer = torch_bn.SyncBatchNorm1d(
                            shape[1], process_group=group, dtype=source.weight.dtype
                        )
                        key = (n, shape, dtype, share, again)
                        results[key] = one_step(layer, source, rows)
        for case in ("ddp", "halves", "compiled"):
            model = torch_bn.convert_sync(make_model(torch.nn.BatchNorm1d), group)
            parallel: Any = DistributedDataParallel(model, process_group=group)
            if case == "compiled":
                parallel = torch.compile(parallel, backend="aot_eager")
            train(parallel, n, rank, halves=case == "halves")
            results[n, case] = model.state_dict()

    # Two groups in one model: the first layer among pairs, the second among all.
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = make_model(torch_bn.SyncBatchNorm1d)
    model[1].process_group = pairs[rank // 2]
    x = batches(0)[cut(24, world, "equal")[rank]]
    model(x)
    results["pairs"] = [model[1].running_mean, model[4].running_mean]

    # Copies belong to the same group.
    twin = copy.deepcopy(model[1])
    twin = pickle.loads(pickle.dumps(twin))
    results["twin"] = twin.process_group.group_name == pairs[rank // 2].group_name

    # Evaluation asks nobody: only rank 0 does it.
    if rank == 0:
        results["evaluation"] = model.eval()(x)
    alone = torch_bn.SyncBatchNorm1d(3, process_group=dist.new_group([rank], backend="gloo"))
    layer = torch_bn.SyncBatchNorm1d(3)
    one = torch.ones(1, 3) if rank == 2 else torch.ones(0, 3)
    wide = torch.randn(4, 3, requires_grad=True)

    def twice() -> None:
        first = torch.autograd.grad(layer(wide).square().sum(), wide, create_graph=True)[0]
        first.sum().backward()

    def weight_with_tangent() -> None:
        ones = torch.ones(3)
        with forward_ad.dual_level(), torch.no_grad():
            weight = forward_ad.make_dual(ones, ones)
            torch.func.functional_call(layer, {"weight": weight}, (wide,))

    def gradient_with_tangent() -> None:
        with forward_ad.dual_level():
            gradient = forward_ad.make_dual(torch.ones(4, 3), torch.ones(4, 3))
            torch.autograd.grad(layer(wide), wide, gradient)

    results["errors"] = {
        "one row": refused(lambda: layer(one)),
        "no row": refused(lambda: layer(torch.ones(0, 3)).sum().backward()),
        "twice": refused(twice),
        "jvp": refused(lambda: torch.func.jvp(layer, (wide,), (wide,))),
        "weight with a tangent": refused(weight_with_tangent),
        "gradient with a tangent": refused(gradient_with_tangent),
        "alone": refused(lambda: alone(torch.randn(4, 3)).sum().backward()),
        "not a member": refused(
            lambda: torch_bn.SyncBatchNorm1d(3, process_group=groups[2])(torch.randn(4, 3))
        ),
    }
    torch.save(results, f"{directory}/{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process found."""
    directory = tmp_path_factory.mktemp("sync")
    run_well(__file__, "work", PROCESSES, directory)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def together(parts: list[Results]) -> Results:
    """The whole batch's results from those of its shares; gradients of parameters add up."""
    whole = dict(parts[0])
    for name in ("y", "grad_input"):
        whole[name] = torch.cat([part[name] for part in parts])
    for name in ("grad_weight", "grad_bias"):
        whole[name] = torch.stack([part[name].double() for part in parts]).sum(0)
    return whole


def case(
    results: list[Results], world: int, shape: tuple[int, ...], dtype: torch.dtype, share: str
) -> list[Results]:
    return [results[rank][world, shape, dtype, share, False] for rank in range(world)]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_error_against_float64(
    results: list[Results], world: int, shape: tuple[int, ...], dtype: torch.dtype, share: str
) -> None:
    source = problem(shape, dtype)
    whole = together(case(results, world, shape, dtype, share))
    found = errors(whole, source)
    # Each process rounds its part of a parameter's gradient to the parameter's type.
    roundings = {"grad_weight": world, "grad_bias": world}
    assert {
        name: found[name]
        for name in QUANTITIES
        if not found[name] <= bound(source, name) * roundings.get(name, 1)
    } == {}


@pytest.mark.parametrize("world", WORLDS)
def test_processes_hold_the_same_bits_every_time(results: list[Results], world: int) -> None:
    keys = [key for key in results[0] if key[0] == world and key[-1] is False]
    assert len(keys) == len(SHAPES) * len(DTYPES) * len(SHARES)
    for key in keys:
        for rank in range(world):
            first, again = results[rank][key], results[rank][(*key[:-1], True)]
            assert all(torch.equal(first[name], again[name]) for name in first)
            for name in ("running_mean", "running_var"):
                assert torch.equal(first[name], results[0][key][name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_with_empty_others_every_bit_is_the_ordinary_layers(
    shape: tuple[int, ...], dtype: torch.dtype, results: list[Results]
) -> None:
    """Merging one process's statistics changes nothing, nor does its sums' path."""
    source = problem(shape, dtype)
    whole = one_step(
        torch_bn.BatchNorm1d(shape[1], dtype=source.weight.dtype), source, slice(0, shape[0])
    )
    parts = case(results, 2, shape, dtype, "empty")
    assert [len(part["y"]) for part in parts] == [0, shape[0]]
    found = together(parts)
    for name in QUANTITIES:
        assert torch.equal(found[name].to(whole[name].dtype), whole[name]), name


@pytest.mark.parametrize("name", ["ddp", "halves", "compiled"])
@pytest.mark.parametrize("world", WORLDS)
def test_training_under_ddp(results: list[Results], world: int, name: str) -> None:
    """Equal shares of a batch train like one process on the whole of it."""
    alone = make_model(torch_bn.BatchNorm1d)
    if name == "halves":
        # Each half of every share goes through the layer together with its like.
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            shares = [batches(step)[rows].chunk(2) for rows in cut(24, world, "equal")]
            for half in (0, 1):
                x = torch.cat([share[half] for share in shares])
                (alone(x).square().sum(1).mean() / 2).backward()
            optimizer.step()
    else:
        train(alone, 1, 0)
    for rank in range(world):
        state = results[rank][world, name]
        # The same sums of a few dozen float64 numbers in another order, over three steps.
        torch.testing.assert_close(dict(state), dict(alone.state_dict()), rtol=1e-11, atol=1e-12)
        assert all(torch.equal(state[key], results[0][world, name][key]) for key in state)


def test_several_groups_in_one_model(results: list[Results]) -> None:
    first = [result["pairs"][0] for result in results]
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.equal(first[0], first[2])
    assert all(torch.equal(result["pairs"][1], results[0]["pairs"][1]) for result in results)
    assert all(result["twin"] for result in results)


def test_evaluation_asks_nobody(results: list[Results]) -> None:
    assert torch.isfinite(results[0]["evaluation"]).all()
    assert "evaluation" not in results[1]


def test_refusals(results: list[Results]) -> None:
    for rank, result in enumerate(results):
        words = result["errors"]
        assert words["one row"].startswith(
            "ValueError: Expected more than 1 value per channel when training, got 1 in all 4 "
            f"processes together, here input size torch.Size([{int(rank == 2)}, 3])"
        )
        assert words["no row"] == "nothing"
        assert words["alone"] == "nothing"
        assert words["twice"].startswith("NotImplementedError: SyncBatchNorm1d 'number ")
        assert "has no second derivative" in words["twice"]
        for case in ("jvp", "weight with a tangent", "gradient with a tangent"):
            assert words[case].startswith("NotImplementedError: SyncBatchNorm1d 'number "), case
            assert "serves neither the transforms of torch.func nor forward-mode" in words[case]
        if rank >= 2:
            assert "there is no process group" in words["not a member"]


def test_without_a_group_it_is_the_ordinary_layer() -> None:
    source = problem((48, 33), torch.float32)
    found = run_alone(torch_bn.SyncBatchNorm1d, source)
    assert torch_bn.SyncBatchNorm1d(33).process_group is None
    want = run_alone(torch_bn.BatchNorm1d, source)
    assert all(torch.equal(found[name], want[name]) for name in QUANTITIES)


def test_converting() -> None:
    inner = torch.nn.BatchNorm1d(3)
    mine = type("Mine", (torch.nn.BatchNorm1d,), {})(3)
    model = torch.nn.Sequential(inner, torch_bn.BatchNorm1d(4), torch.nn.Sequential(inner), mine)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch_bn.convert_sync(model) is model
    assert [type(model[i]) for i in (0, 1, 3)] == [torch_bn.SyncBatchNorm1d] * 2 + [type(mine)]
    assert model[0] is inner is model[2][0]
    assert (model[0]._sync_name, model[1]._sync_name) == ("0", "1")
    assert model.state_dict().keys() == state.keys()
    assert isinstance(torch_bn.convert_sync(torch.nn.BatchNorm1d(2)), torch_bn.SyncBatchNorm1d)
    with pytest.raises(ValueError, match="the layer '0' does not know its number of channels yet"):
        torch_bn.convert_sync(torch.nn.Sequential(torch_bn.LazyBatchNorm1d()))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (torch_bn.BatchNorm1d(3, channels_last=True), "'0' has channels_last=True"),
        (torch_bn.BatchNorm1d(3, virtual_batch_size=4), "'0' has virtual_batch_size=4"),
    ],
    ids=["channels_last", "ghost"],
)
def test_layers_that_cannot_be_synchronised_are_refused(layer: torch.nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        torch_bn.convert_sync(torch.nn.Sequential(layer))
    # Layers of other derived classes are left alone, whatever they have.
    layer.__class__ = type("Mine", (torch_bn.BatchNorm1d,), {})
    assert torch_bn.convert_sync(layer) is layer


def test_a_trained_model_goes_back_to_torchs_layers() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    written = torch_bn.SyncReLUBatchNorm1d(4)
    model = torch_bn.convert_sync(torch_bn.convert(model, fuse=True).append(written))
    model(torch.randn(8, 3) * 5)
    state, x, report = model.state_dict(), torch.randn(6, 3), []
    want = model.eval()(x)
    assert torch_bn.revert(model, report=report) is model
    assert [type(model[i]) for i in (1, 2)] == [torch.nn.BatchNorm1d, torch.nn.ReLU]
    assert model[3] is written
    assert report == [
        "1 + 2: torch_bn.SyncBatchNormReLU1d -> torch.nn.BatchNorm1d + torch.nn.ReLU",
        "3: torch_bn.SyncReLUBatchNorm1d left alone, torch.nn has no such layer",
    ]
    assert vars(model[1]).keys() == vars(torch.nn.BatchNorm1d(4)).keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    # The builtin multiplies by scale and adds a shift: a few roundings of numbers of order one.
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)
    alone = torch_bn.convert_sync(torch.nn.BatchNorm1d(4))
    assert type(torch_bn.revert(alone)) is torch.nn.BatchNorm1d
    assert vars(alone).keys() == vars(model[1]).keys()


def test_a_group_that_is_gone_is_named() -> None:
    layer = torch_bn.SyncBatchNorm1d(2)
    layer._sync_name, layer._group_name = "norm", "gone"
    words = "SyncBatchNorm1d 'norm': there is no process group 'gone' with this process in it"
    with pytest.raises(RuntimeError, match=words):
        _ = layer.process_group


def test_inputs_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = torch_bn.SyncBatchNorm1d(2)
    # Any group of several processes: the input is looked at before the group is.
    monkeypatch.setattr(torch_bn.SyncBatchNorm1d, "_group", lambda _: object())
    with pytest.raises(RuntimeError, match=r"expected its input on CPU \(got meta\)"):
        layer(torch.empty(4, 2, device="meta"))
    layer.channels_last = True
    with pytest.raises(ValueError, match="neither virtual_batch_size nor channels_last"):
        layer(torch.empty(4, 2))
    assert layer.num_batches_tracked == 0

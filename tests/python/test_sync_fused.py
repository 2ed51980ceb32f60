"""The synchronised layers with a ReLU are SyncBatchNorm1d and torch's ReLU in one, to the bit.

SyncBatchNorm1d itself is judged against float64 in test_sync.py.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import torch_bn
from processes import join, run_well

PROCESSES = 3
WORLDS = (2, 3)
ORDERS: dict[str, Any] = {
    "after": (torch_bn.SyncBatchNormReLU1d, torch_bn.BatchNormReLU1d),
    "before": (torch_bn.SyncReLUBatchNorm1d, torch_bn.ReLUBatchNorm1d),
}
SHAPES = [(23, 40), (9, 5, 40)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Where the rows of each process end, as shares of all; the last process has the rest.
SHARES = {"unequal": (0.25, 0.5), "empty": (0.0, 1.0)}
TENSORS = ("y", "grad_input", "grad_weight", "grad_bias", "running_mean", "running_var")

Results = dict[Any, Any]


def rows_of(count: int, world: int, share: str, rank: int) -> slice:
    ends = [0, *(int(count * end) for end in SHARES[share][: world - 1]), count]
    return slice(ends[rank], ends[rank + 1])


def step(model: nn.Module, norm: torch_bn.BatchNorm1d, x: Tensor, g: Tensor) -> list[Tensor]:
    """A forward and backward of some rows, in the order of TENSORS."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(norm.num_features, generator=generator))
        norm.bias.copy_(torch.randn(norm.num_features, generator=generator))
    x = x.detach().requires_grad_()
    y = model(x)
    grads = torch.autograd.grad(y, [x, norm.weight, norm.bias], g)
    return [y.detach(), *grads, norm.running_mean, norm.running_var]


def data(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, g = torch.randn(2, *shape, generator=generator).to(dtype)
    return x, g


def two_modules(order: str, norm: nn.Module) -> nn.Module:
    return nn.Sequential(norm, nn.ReLU()) if order == "after" else nn.Sequential(nn.ReLU(), norm)


def model_of(order: str) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 8), two_modules(order, nn.BatchNorm1d(8)), nn.Linear(8, 2)
    ).double()


def train(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def work(rank: int, world: int, directory: str) -> None:
    join(rank, world, directory)
    results: Results = {}
    for n in WORLDS:
        group = dist.new_group(list(range(n)))
        if rank >= n:
            continue
        for order, (layer, _) in ORDERS.items():
            for shape in SHAPES:
                for dtype in DTYPES:
                    x, g = data(shape, dtype)
                    for share in SHARES:
                        rows = rows_of(shape[0], n, share, rank)
                        one = layer(shape[1], process_group=group, dtype=dtype)
                        norm = torch_bn.SyncBatchNorm1d(shape[1], process_group=group, dtype=dtype)
                        results[n, order, shape, dtype, share] = (
                            step(one, one, x[rows], g[rows]),
                            step(two_modules(order, norm), norm, x[rows], g[rows]),
                        )
            x, _ = data((12, 4), torch.double)
            for case in ("eager", "aot_eager", "inductor"):
                if case == "inductor" and (n, order) != (2, "after"):
                    continue  # compiling takes seconds
                model = torch_bn.convert_sync(torch_bn.convert(model_of(order), fuse=True), group)
                assert type(model[1][order == "before"]) is layer
                parallel: Any = DistributedDataParallel(model, process_group=group)
                if case != "eager":
                    parallel = torch.compile(parallel, backend=case)
                train(parallel, x[12 // n * rank : 12 // n * (rank + 1)])
                results[n, order, case] = model.state_dict()
    if rank < 2:
        odd: Any = ORDERS["after" if rank else "before"][0](5)
        odd.process_group = dist.new_group([0, 1], use_local_synchronization=True)
        try:
            odd(torch.randn(4, 5))
        except RuntimeError as error:
            results["differ"] = str(error)
    torch.save(results, f"{directory}/{rank}.pt")
    dist.barrier()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each process found."""
    directory = tmp_path_factory.mktemp("sync_fused")
    run_well(__file__, "work", PROCESSES, directory)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


orders = pytest.mark.parametrize("order", ORDERS)


@orders
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("world", WORLDS)
def test_has_the_bits_of_the_two_modules(
    results: list[Results], world: int, shape: tuple[int, ...], dtype: torch.dtype, order: str
) -> None:
    for rank in range(world):
        for share in ("unequal", "empty"):
            one, two = results[rank][world, order, shape, dtype, share]
            for name, ours, want in zip(TENSORS, one, two, strict=True):
                assert torch.equal(ours, want), (rank, share, name)


@orders
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alone_with_empty_others_every_bit_is_the_layers_of_one_process(
    results: list[Results], shape: tuple[int, ...], dtype: torch.dtype, order: str
) -> None:
    layer = ORDERS[order][1](shape[1], dtype=dtype)
    want = step(layer, layer, *data(shape, dtype))
    for world, rank in ((2, 1), (3, 1)):
        got = results[rank][world, order, shape, dtype, "empty"][0]
        for name, ours, expected in zip(TENSORS, got, want, strict=True):
            assert torch.equal(ours, expected), (world, name)


CASES = [(order, case) for order in ORDERS for case in ("eager", "aot_eager")]


@pytest.mark.parametrize(("order", "case"), [*CASES, ("after", "inductor")])
def test_trains_like_one_process(results: list[Results], order: str, case: str) -> None:
    """A fused model that was converted, under DDP, against torch's modules on the whole batch."""
    alone = model_of(order)
    train(alone, data((12, 4), torch.double)[0])
    want = dict(alone.state_dict())
    keys = {key for result in results for key in result if key[1:] == (order, case)}
    assert len(keys) == (1 if case == "inductor" else 2)
    for key in keys:
        for result in results[: key[0]]:
            # The same sums of a dozen float64 numbers in another order, over three steps.
            torch.testing.assert_close(dict(result[key]), want, rtol=1e-11, atol=1e-12)


def test_processes_with_the_relu_at_other_places_are_refused(results: list[Results]) -> None:
    for rank in (0, 1):
        words = results[rank]["differ"]
        assert "Rank 0: " in words
        assert "ReLU before. Rank 1: " in words
        assert "ReLU after." in words


@orders
def test_in_one_process_it_is_the_fused_layer(order: str) -> None:
    sync, plain = ORDERS[order]
    x, g = data((23, 40), torch.float32)
    one, two = sync(40), plain(40)
    for ours, want in zip(step(one, one, x, g), step(two, two, x, g), strict=True):
        assert torch.equal(ours, want)
    assert torch.equal(one.eval()(x), two.eval()(x))


@orders
def test_converting_and_copies(order: str) -> None:
    sync, plain = ORDERS[order]
    model = nn.Sequential(plain(3), nn.Linear(3, 2))
    assert torch_bn.convert_sync(model) is model
    assert type(model[0]) is sync
    assert isinstance(model[0], (torch_bn.SyncBatchNorm1d, plain))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model[0])))
    x = torch.randn(6, 3)
    assert torch.equal(twin(x), plain(3)(x))
    assert plain(3).state_dict().keys() == twin.state_dict().keys()
    assert repr(twin) == repr(plain(3)).replace(plain.__name__, sync.__name__)

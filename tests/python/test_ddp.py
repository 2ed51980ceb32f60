"""DistributedDataParallel over gloo with two processes on this machine's loopback device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import torch_bn
from processes import join, run_well

LAYERS = {"torch": torch.nn.BatchNorm1d, "torch_bn": torch_bn.BatchNorm1d}
CASES: dict[str, dict[str, Any]] = {
    "as is": {},
    "own buffers": {"broadcast_buffers": False},
    "bucket views, unused parameters": {
        "gradient_as_bucket_view": True,
        "find_unused_parameters": True,
    },
    "static graph": {"static_graph": True},
    "compiled": {},
}
WORLD = 2
STEPS = 3


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), LAYERS[name](8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    ).double()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(6 + rank, 4, dtype=torch.double, generator=generator) + rank


def train(model: torch.nn.Module, rank: int) -> None:
    """A few steps of gradient descent, on this rank's batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()


def work(rank: int, world: int, directory: str) -> None:
    """All cases one after the other, for starting a process takes longer than any of them."""
    join(rank, world, directory, seconds=120)  # compiling takes one of them longer than the other
    states = {}
    for name in LAYERS:
        for case, options in CASES.items():
            model = make(name)
            parallel: Any = DistributedDataParallel(model, **options)
            if case == "compiled":
                parallel = torch.compile(parallel, backend="aot_eager")
            train(parallel, rank)
            states[name, case] = model.state_dict()
    torch.save(states, f"{directory}/{rank}.pt")
    dist.barrier()


States = dict[tuple[str, str], dict[str, Tensor]]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> list[States]:
    """For each rank, the state of its model after the steps of each case."""
    directory = tmp_path_factory.mktemp("ddp")
    run_well(__file__, "work", WORLD, directory)
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


def expected(name: str, broadcast_buffers: bool) -> list[dict[str, Tensor]]:
    """The same steps in this process: both models' gradients averaged by hand."""
    models = [make(name) for _ in range(WORLD)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for step in range(STEPS):
        if broadcast_buffers:
            for mine, first in zip(models[1].buffers(), models[0].buffers(), strict=True):
                mine.copy_(first)
        for rank, model in enumerate(models):
            model.zero_grad()
            model(batch(rank, step)).square().mean().backward()
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = (one.grad + other.grad) / WORLD
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    return [copy.deepcopy(model.state_dict()) for model in models]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_two_processes(states: list[States], name: str, case: str) -> None:
    want = expected(name, CASES[case].get("broadcast_buffers", True))
    got = [states[rank][name, case] for rank in range(WORLD)]
    # Sums of a dozen float64 numbers, halved before or after they are added.
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert got[0]["1.num_batches_tracked"] == STEPS
    # Statistics are each rank's own, be it of its last batch alone.
    assert not torch.equal(got[0]["1.running_mean"], got[1]["1.running_mean"])


@pytest.mark.parametrize("case", CASES)
def test_ours_and_torchs_train_alike(states: list[States], case: str) -> None:
    for rank in range(WORLD):
        # The same formulas in float64, in another order of summation.
        torch.testing.assert_close(
            states[rank]["torch_bn", case], states[rank]["torch", case], rtol=1e-10, atol=1e-10
        )

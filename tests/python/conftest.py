from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

# Derandomised: a failure seen once is seen again, in any order of the tests.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """For tests that set the number of threads, or run what does."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

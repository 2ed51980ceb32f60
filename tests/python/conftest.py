from __future__ import annotations

import hypothesis
import pytest
import torch

# Derandomised: a failure seen once is seen again, in any order of the tests.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)

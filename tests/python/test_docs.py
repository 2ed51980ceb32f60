"""The documentation's code runs, and its links lead somewhere; for cpp.md see test_cpp_docs.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))


def blocks(page: str) -> str:
    """All Python of a page: a later block may build on an earlier one."""
    text = (DOCS / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page not in ("cpp.md", "distributed.md")]
)
def test_the_code_of_a_page_runs(page: str) -> None:
    exec(compile(blocks(page), page, "exec"), {"__name__": page})


def test_the_code_of_distributed_runs_in_a_group_of_one() -> None:
    model = "import torch\nmodel = torch.nn.Sequential(torch.nn.BatchNorm1d(3))\n"
    train = "def train():\n    print(model, dist.get_world_size())\n"
    code = model + train + blocks("distributed.md")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code], text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "SyncBatchNorm1d" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (DOCS / page).read_text()):
        assert (DOCS / target).exists(), target

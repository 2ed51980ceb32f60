"""The documentation's code runs, and its links lead somewhere; for cpp.md see test_cpp_docs.py."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_bn

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(page.relative_to(ROOT)) for folder in (ROOT, ROOT / "docs") for page in folder.glob("*.md")
)
# Their code runs elsewhere: in a C++ program's test, and in a group of processes.
ELSEWHERE = ("docs/cpp.md", "docs/distributed.md")


def blocks(page: str) -> str:
    """All Python of a page: a later block may build on an earlier one."""
    text = (ROOT / page).read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page) and page not in ELSEWHERE])
def test_the_code_of_a_page_runs(page: str) -> None:
    exec(compile(blocks(page), page, "exec"), {"__name__": page})


def test_the_code_of_distributed_runs_in_a_group_of_one() -> None:
    model = "import torch\nmodel = torch.nn.Sequential(torch.nn.BatchNorm1d(3))\n"
    train = "def train():\n    print(model, dist.get_world_size())\n"
    code = model + train + blocks("docs/distributed.md")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # The host's name need not resolve: the loopback device's address does.
    command += ["--local-addr", "127.0.0.1", "--no-python"]
    done = subprocess.run(
        [*command, sys.executable, "-c", code],
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "SyncBatchNorm1d" in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_links_of_a_page_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    files = [path for kind in ("*.py", "*.cpp") for path in (ROOT / "tests").rglob(kind)]
    text = "".join(path.read_text() for path in files)
    there = {*re.findall(r"^def (test_\w+)", text, re.MULTILINE), *(path.stem for path in files)}
    named = re.findall(r"(?<!\w)test_\w+", (ROOT / page).read_text())
    assert {name for name in named if name not in there} == set()


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_make_that_a_page_names_are_there(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][a-z0-9-]*)", (ROOT / page).read_text(), re.MULTILINE)
    assert {name for name in named if name not in targets} == set()


def test_the_citation_is_of_this_version() -> None:
    version = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version is not None
    assert version[1] == torch_bn.__version__

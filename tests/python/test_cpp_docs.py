"""docs/cpp.md: its program is built and run by its own commands, its fragments compile."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/cpp.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def test_the_page_takes_a_user_to_a_trained_model(tmp_path: Path) -> None:
    (cmake,) = blocks("cmake")
    program, *fragments = blocks("cpp")
    assert len(fragments) == 4
    functions = [f"void fragment_{i}() {{\n{text}}}\n" for i, text in enumerate(fragments)]
    source = "#include <fstream>\n#include <iterator>\n" + program + "".join(functions)
    (tmp_path / "main.cpp").write_text(source)
    (tmp_path / "CMakeLists.txt").write_text(cmake)
    (commands,) = (text for text in blocks("sh") if "./build/first" in text)
    # Optimising would take most of the time.
    assert "CMAKE_BUILD_TYPE=Release" in commands
    commands = commands.replace("CMAKE_BUILD_TYPE=Release", "CMAKE_BUILD_TYPE=None")
    # An editable install is not torch's neighbour.
    torch = f"{sys.executable} -c 'import torch; print(torch.utils.cmake_prefix_path)'"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "Torch_DIR": subprocess.check_output(torch, shell=True, text=True).strip() + "/Torch",
    }
    done = subprocess.run(
        ["bash", "-e", "-c", commands],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    assert "torch_bn::BatchNorm1d(32, eps=1e-05" in done.stdout
    assert float(done.stdout.split("accuracy ")[1]) > 0.97


def test_the_links_of_the_page_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]*)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target

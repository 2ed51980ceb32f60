"""docs/cpp.md: its program is built and run by its own commands, its fragments compile. And the
examples in the public headers, which are run in that program."""

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


def header_examples() -> list[str]:
    """The code in the comments of the public headers."""
    found = []
    for header in sorted((ROOT / "csrc/include/torch_bn").glob("*.h")):
        text = re.sub(r"^ *///( |$)", "//| ", header.read_text(), flags=re.MULTILINE)
        fences = re.findall(r"^//\| ```(.*)\n((?://\| .*\n)*?)//\| ```$", text, re.MULTILINE)
        assert all(language == "cpp" for language, _ in fences), header
        found += [code.replace("//| ", "") for _, code in fences]
    return found


def test_the_page_takes_a_user_to_a_trained_model(tmp_path: Path) -> None:
    (cmake,) = blocks("cmake")
    program, *fragments = blocks("cpp")
    assert len(fragments) == 4
    functions = [f"void fragment_{i}() {{\n{text}}}\n" for i, text in enumerate(fragments)]
    examples = header_examples()
    assert len(examples) > 10
    functions += [
        f"void example_{i}() {{\n{re.sub('#include .*', '', text)}}}\n"
        for i, text in enumerate(examples)
    ]
    # The examples run, with what they assert, before the page's program.
    calls = "".join(f"  example_{i}();\n" for i in range(len(examples)))
    functions.append(f"void run_examples() {{\n{calls}}}\n")
    assert program.count("int main() {\n") == 1
    program = program.replace(
        "int main() {\n", "void run_examples();\nint main() {\n  run_examples();\n"
    )
    headers = "".join(f"#include <{name}>\n" for name in ("cassert", "fstream", "iterator"))
    source = headers + program + "".join(functions)
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

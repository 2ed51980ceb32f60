"""Applies deliberate faults to a copy of the source, and shows that the tests catch each.

The list is tests/mutation/faults.toml. A fault whose tests all pass has survived: a test is
missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mutation_faults import ROOT, Command, Fault, ListError, read_faults

TREE = ROOT / "build" / "mutation"
SOURCE = TREE / "source"
BUILD = TREE / "build"
LOGS = TREE / "logs"
# Most of the time is the compiler's, and goes down without optimisation. The kernels have -O1, a
# third of the time of -O3, because their tests take long without any. Neither changes a bit:
# contraction stays off.
FLAGS = "-O0 -DNDEBUG"
KERNEL_OPTIMISATION = "-O1"
FOLDERS = ("benchmarks", "cmake", "csrc", "examples", "scripts", "tests", "torch_bn")
BUILT = ("torch_bn/lib/", "torch_bn/include/", "torch_bn/share/", "torch_bn/_build_config.py")
# Seconds until a fault's tests are given up as hanging; on the source as it is they take no minute.
LIMIT = 240
STYLES = {"caught": "green", "hang": "green", "survived": "bold red", "did not compile": "bold red"}

# Logs have room for a row of the table in a line.
console = Console(width=None if sys.stdout.isatty() else 160)


@dataclass(frozen=True)
class Ended:
    """How a command ended; `status` is None if it was given up."""

    status: int | None
    output: str


@dataclass(frozen=True)
class Result:
    """What became of a fault."""

    name: str
    kind: str
    files: list[str]
    outcome: str
    by: str
    seconds: float


def fail(words: str) -> None:
    """End the program with an error in words."""
    sys.exit(f"torch_bn: {words}")


def run(
    command: list[str],
    log: Path,
    limit: float | None = None,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a command in the copy; one that hangs is ended with all its processes."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=SOURCE,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return Ended(status, log.read_text(errors="replace"))


def source_files() -> list[str]:
    """What belongs to the source: what git has or would have; without git, the known folders."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode == 0 and listed.stdout:
        names = [name for name in listed.stdout.split("\0") if name]
    else:
        files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
        names = [str(path.relative_to(ROOT)) for path in (*files, *ROOT.iterdir())]
    return [
        name
        for name in names
        if (ROOT / name).is_file()
        and "__pycache__" not in name
        and not name.endswith((".so", ".pyc"))
        and not name.startswith(BUILT)
    ]


def copy_source() -> None:
    """Make the copy what the source is. Files that are so already are left, and not built again."""
    manifest = TREE / "files.json"
    before = json.loads(manifest.read_text()) if manifest.exists() else []
    names = source_files()
    for name in set(before) - set(names):
        (SOURCE / name).unlink(missing_ok=True)
    for name in names:
        restore(name)
    manifest.write_text(json.dumps(names))


def restore(name: str) -> None:
    """Give a file of the copy the source's text, if it has another."""
    path, text = SOURCE / name, (ROOT / name).read_bytes()
    if not path.exists() or path.read_bytes() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def configure() -> None:
    """Configure the copy's build tree, as setup.py does the project's, but with tests."""
    import pybind11
    import torch

    prefixes = [torch.utils.cmake_prefix_path, pybind11.get_cmake_dir()]
    command = [
        *("cmake", f"-S{SOURCE}", f"-B{BUILD}"),
        f"-DCMAKE_PREFIX_PATH={';'.join(prefixes)}",
        f"-DPython_EXECUTABLE={sys.executable}",
        *("-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={FLAGS}"),
        f"-DTORCH_BN_KERNEL_OPTIMISATION={KERNEL_OPTIMISATION}",
        *("-DTORCH_BN_PYTHON=ON", "-DTORCH_BN_TESTS=ON"),
    ]
    if not (BUILD / "CMakeCache.txt").exists():
        command.append("-GNinja")
    ended = run(command, LOGS / "configure.log")
    if ended.status != 0:
        fail(f"CMake cannot configure the copy:\n{ended.output}")


def build(programs: list[str], with_python: bool, log: Path) -> str | None:
    """Build programs, and the Python package into the copy; the compiler's words if it refuses."""
    targets = [*programs, *(("torch_bn", "_C") if with_python else ())]
    jobs = str(os.cpu_count() or 1)
    commands = [["cmake", "--build", str(BUILD), "--parallel", jobs, "--target", *targets]]
    if with_python:
        install = ["cmake", "--install", str(BUILD), "--prefix", str(SOURCE / "torch_bn")]
        commands += [[*install, "--component", part] for part in ("library", "python")]
    for command in commands:
        ended = run(command, log)
        if ended.status != 0:
            return ended.output
    return None


def first_failure(output: str, is_python: bool) -> str:
    """The first test that failed, by what pytest or GoogleTest wrote; empty if it names none."""
    pattern = r"^(?:FAILED|ERROR) (.+?)(?: - |$)" if is_python else r"^\[  FAILED  \] (\S+?),? "
    if found := re.search(pattern, output, re.MULTILINE):
        return found[1].rsplit("/", 1)[-1] if is_python else found[1]
    return ""


def running(output: str) -> str:
    """The test of GoogleTest that had begun last."""
    begun = re.findall(r"^\[ RUN      \] (\S+)", output, re.MULTILINE)
    return begun[-1] if begun else "before any test"


def judge(test: Command, ended: Ended) -> tuple[str, str] | None:
    """The outcome and which test found it; None if all passed."""
    program = test.words[0].rsplit("/", 1)[-1]
    where = "" if test.is_python else f": {running(ended.output)}"
    if ended.status is None:
        return "hang", f"{program}{where} did not end"
    if ended.status == 0:
        return None
    if ended.status < 0:
        return "caught", f"{program}{where} (ended by {signal.Signals(-ended.status).name})"
    failure = first_failure(ended.output, test.is_python)
    if test.is_python:
        return "caught", failure or f"{program}, before any test"
    return "caught", f"{program}: {failure or running(ended.output)}"


def run_test(test: Command, log: Path) -> Ended:
    """Run one test command on what was built."""
    if test.is_python:
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        return run([*pytest, *test.words], log, LIMIT, {"PYTHONPATH": str(SOURCE)})
    program = BUILD / "tests" / "cpp" / test.words[0]
    return run([str(program), *test.words[1:], "--gtest_fail_fast"], log, LIMIT)


def check_package() -> None:
    """Pytest would say little of the faults if it imported another torch_bn than the copy's."""
    command = [sys.executable, "-c", "import torch_bn; print(torch_bn.__file__)"]
    ended = run(command, LOGS / "package.log", LIMIT, {"PYTHONPATH": str(SOURCE)})
    if ended.status != 0 or str(SOURCE / "torch_bn" / "__init__.py") not in ended.output:
        fail(f"Python does not import torch_bn from the copy:\n{ended.output}")


def check_unchanged(faults: list[Fault]) -> None:
    """Every test must pass on the source as it is, and there must be one."""
    programs = list(dict.fromkeys(program for fault in faults for program in fault.programs))
    with_python = any(fault.needs_python for fault in faults)
    console.print("torch_bn: building the source as it is")
    if words := build(programs, with_python, LOGS / "unchanged-build.log"):
        fail(f"the source as it is does not compile:\n{words[-4000:]}")
    if with_python:
        check_package()
    console.print("torch_bn: its tests")
    for number, test in enumerate(dict.fromkeys(test for fault in faults for test in fault.tests)):
        words = " ".join(test.words)
        ended = run_test(test, LOGS / f"unchanged-{number}.log")
        if found := judge(test, ended):
            fail(f"{words} fails on the source as it is, {found[1]}:\n{ended.output[-4000:]}")
        if not test.is_python and "Running 0 tests" in ended.output:
            fail(f"{words} runs no test")


def try_fault(fault: Fault) -> Result:
    """Apply a fault, build, run its tests, take it back."""
    begin = time.monotonic()
    outcome, by = "survived", ", ".join(" ".join(test.words) for test in fault.tests)
    try:
        for edit in fault.edits:
            edit.apply(SOURCE)
        words = build(fault.programs, fault.needs_python, LOGS / f"{fault.name}-build.log")
        if words is not None:
            found = re.search(r"error: (.*)", words)
            outcome, by = "did not compile", found[1] if found else "see the log"
        else:
            for number, test in enumerate(fault.tests):
                if judged := judge(test, run_test(test, LOGS / f"{fault.name}-{number}.log")):
                    outcome, by = judged
                    break
    finally:
        for name in fault.files:
            restore(name)
    seconds = round(time.monotonic() - begin, 1)
    return Result(fault.name, fault.kind, fault.files, outcome, by, seconds)


def table_of(results: list[Result]) -> Table:
    """The results as a table."""
    table = Table()
    for heading in ("fault", "kind", "file", "outcome", "by", "s"):
        table.add_column(heading, overflow="fold")
    for result in results:
        style = STYLES[result.outcome]
        files = ", ".join(name.removeprefix("csrc/") for name in result.files)
        outcome = f"[{style}]{result.outcome}[/]"
        # Not markup: names of tests have brackets.
        by = result.by.replace("[", r"\[")
        table.add_row(result.name, result.kind, files, outcome, by, f"{result.seconds:.0f}")
    return table


def chosen(faults: list[Fault], only: list[str] | None) -> list[Fault]:
    """The faults that were asked for."""
    unknown = sorted(set(only or ()) - {fault.name for fault in faults})
    if unknown:
        fail(f"no fault has the name {', '.join(unknown)}; --list shows them")
    return [fault for fault in faults if not only or fault.name in only]


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these faults alone")
    parser.add_argument("--list", action="store_true", help="print the faults, and do nothing")
    arguments = parser.parse_args()
    begin = time.monotonic()
    try:
        faults = chosen(read_faults(), arguments.only)
    except ListError as error:
        fail(str(error))
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:24} {fault.kind}, {', '.join(fault.files)}: {fault.why}")
        return
    if problems := [problem for fault in faults for problem in fault.problems()]:
        fail("the list of faults does not fit the source\n  " + "\n  ".join(problems))
    # CMake and Ninja are those of the environment that runs this.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shutil.rmtree(LOGS, ignore_errors=True)
    SOURCE.mkdir(parents=True, exist_ok=True)
    copy_source()
    configure()
    check_unchanged(faults)
    results = []
    for fault in faults:
        results.append(try_fault(fault))
        result = results[-1]
        console.print(f"torch_bn: {result.name}: {result.outcome}, {result.by}", markup=False)
    console.print(table_of(results))
    missed = [result.name for result in results if result.outcome not in ("caught", "hang")]
    minutes = (time.monotonic() - begin) / 60
    report = {"minutes": round(minutes, 1), "faults": [asdict(result) for result in results]}
    (TREE / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    count = len(results) - len(missed)
    console.print(f"torch_bn: {count} of {len(results)} faults caught in {minutes:.0f} min")
    if missed:
        fail(f"not caught: {', '.join(missed)}; the logs are in {LOGS}")


if __name__ == "__main__":
    main()

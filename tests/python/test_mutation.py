"""The list of deliberate faults fits the source: `make mutation` can apply every one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mutate import Ended, judge, source_files

from mutation_faults import LIST, ROOT, Command, Edit, Fault, ListError, read_faults

FAULTS = read_faults()
ENTRY = """
[[fault]]
name = "one"
kind = "wrong term"
why = "because"
tests = ["kernels_test --gtest_filter=*"]
edit = [{ file = "a.h", find = "x", replace = "y" }]
"""


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_fits_the_source(fault: Fault) -> None:
    assert fault.problems() == []


def test_there_are_a_dozen_in_kernels_and_operators() -> None:
    folders = [file.split("/")[1] for fault in FAULTS for file in fault.files]
    assert min(folders.count("kernels"), folders.count("ops")) >= 6
    assert len(FAULTS) >= 12


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (Edit("a.h", "gone", "y"), "a.h has its text 0 times, not 1: 'gone'"),
        (Edit("a.h", "x", "y"), "a.h has its text 2 times, not 1: 'x'"),
        (Edit("a.h", "x", "x", times=2), "the replacement is the text itself"),
        (Edit("b.h", "x", "y"), "there is no file b.h"),
    ],
)
def test_an_edit_that_no_longer_fits_is_named(tmp_path: Path, edit: Edit, words: str) -> None:
    (tmp_path / "a.h").write_text("x + x\n")
    assert edit.problem(tmp_path) == words
    assert Edit("a.h", "x", "y", times=2).problem(tmp_path) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("gone_test", "there is no file tests/cpp/gone_test.cpp"),
        ("tests/python/test_gone.py", "there is no file tests/python/test_gone.py"),
        ("tests/python/test_mutation.py::test_gone", "has no test test_gone"),
    ],
)
def test_a_test_that_is_gone_is_named(command: str, words: str) -> None:
    fault = replace(FAULTS[0], tests=(Command((command,)),))
    (problem,) = fault.problems(ROOT)
    assert problem.startswith(f"{fault.name}: ")
    assert problem.endswith(words)


def test_an_edit_is_applied(tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text("x + z\n")
    Edit("a.h", "x", "y").apply(tmp_path)
    assert (tmp_path / "a.h").read_text() == "y + z\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENTRY.replace("why", "reason"), "'why'"),
        (ENTRY.replace("file =", "path ="), "path"),
        (ENTRY * 2, "two faults have the name one"),
        ("fault = ", "TOMLDecodeError"),
    ],
)
def test_a_list_that_cannot_be_read_is_refused_in_words(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / LIST.name
    path.write_text(text)
    with pytest.raises(ListError, match=words):
        read_faults(path)


PROGRAM = Command(("kernels_test", "--gtest_filter=*"))
PYTEST = Command(("tests/python/test_layer.py",))
BEGUN = "[ RUN      ] A.Good\n[       OK ] A.Good (0 ms)\n[ RUN      ] A.Bad/avx2\n"


@pytest.mark.parametrize(
    ("command", "ended", "outcome"),
    [
        (PROGRAM, Ended(0, BEGUN), None),
        (
            PROGRAM,
            Ended(1, f"{BEGUN}[  FAILED  ] A.Bad/avx2, where GetParam() = x (0 ms)\n"),
            ("caught", "kernels_test: A.Bad/avx2"),
        ),
        (PROGRAM, Ended(-11, BEGUN), ("caught", "kernels_test: A.Bad/avx2 (ended by SIGSEGV)")),
        (PROGRAM, Ended(None, BEGUN), ("hang", "kernels_test: A.Bad/avx2 did not end")),
        (PROGRAM, Ended(1, ""), ("caught", "kernels_test: before any test")),
        (PYTEST, Ended(0, "1 passed"), None),
        (
            PYTEST,
            Ended(1, "FAILED tests/python/test_layer.py::test_a[one row] - assert False\n"),
            ("caught", "test_layer.py::test_a[one row]"),
        ),
        (PYTEST, Ended(2, "cannot import"), ("caught", "test_layer.py, before any test")),
        (PYTEST, Ended(None, ""), ("hang", "test_layer.py did not end")),
    ],
)
def test_what_became_of_a_test(
    command: Command, ended: Ended, outcome: tuple[str, str] | None
) -> None:
    assert judge(command, ended) == outcome


def test_the_copy_has_the_source_and_nothing_built() -> None:
    names = source_files()
    assert {"csrc/kernels/team.h", "tests/cpp/CMakeLists.txt", "pyproject.toml"} <= set(names)
    assert [name for name in names if name.endswith(".so") or name.startswith("build/")] == []

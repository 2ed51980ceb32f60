"""The study as a whole: end to end on little data, going on after an interruption, the report."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mlp.checkpoint import Interruption
from mlp.data import Dataset, Split, load_dataset
from mlp.files import written_beside
from study import __main__ as program
from study import runner
from study.catalogue import EXPERIMENTS
from study.experiment import Claim, Experiment, Findings, Table, grid
from study.report import section, write
from study.store import Store

pytestmark = pytest.mark.usefixtures("restored_threads")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    # Nothing answers there: the embedded digits are taken.
    cache = tmp_path_factory.mktemp("cache")
    return load_dataset(None, url="http://127.0.0.1:9/", cache=cache, notify=lambda _: None)


class Page(HTMLParser):
    """What a page refers to, its tables' rows and whether its tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def self_contained(path: Path) -> Page:
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.references)
    assert not any(word in text for word in ("http:", "https:", "url(", "@import", "<script"))
    return page


def study(out: Path, *more: str) -> int:
    cache = str(out / "cache")
    return program.main(
        ["--data-url", "http://127.0.0.1:9/", "--cache", cache, "--out", str(out), "--quick",
         "--jobs", "1", *more]
    )  # fmt: skip


def test_two_experiments_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert study(tmp_path, "--only", "equations", "1") == 0
    page = self_contained(tmp_path / "report.html")
    words = " ".join(page.words)
    for name in ("scaling", "equations"):
        experiment = EXPERIMENTS[name]
        assert f"{experiment.number}. {experiment.title}" in words
        files = list((tmp_path / "results" / name).glob("*.json"))
        assert len(files) == len(experiment.plan(True))
    assert "quick form" in words
    assert sum(each.startswith("data:") for each in page.references) == 5
    # The layer's equations hold on any data.
    assert "2  held          the mean of a channel's output is beta" in capsys.readouterr().out
    # Everything is there: nothing is made again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("results/*/*.json")}
    assert study(tmp_path, "--only", "1", "2") == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.glob("results/*/*.json")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_from_its_plan_to_the_page(
    name: str, tmp_path: Path, digits: Dataset
) -> None:
    """On so little data that claims fall as they like; the page says what was seen of each."""
    splits = [
        Split(split.images[:count], split.labels[:count])
        for split, count in ((digits.train, 160), (digits.validation, 40), (digits.test, 40))
    ]
    experiment, little = EXPERIMENTS[name], Dataset("few digits", digits.source, *splits)
    runs = run_all(experiment, little, tmp_path, Interruption())[name]
    assert [run.settings for run in runs] == experiment.plan(True)
    found = section(experiment, runs)
    write(tmp_path / "report.html", [found], {"torch": "1"}, quick=True)
    page = self_contained(tmp_path / "report.html")
    words = " ".join(" ".join(page.words).split())
    assert found["claims"]
    for claim in found["claims"]:
        for each in (claim.statement, claim.expected, claim.seen):
            assert " ".join(each.split()) in words
    assert sum(each.startswith("data:") for each in page.references) == len(found["figures"]) > 0


def test_wrong_usage_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        study(tmp_path, "--only", "unheard-of")
    assert "no experiment 'unheard-of'" in capsys.readouterr().err
    assert program.main(["--data", str(tmp_path / "nowhere")]) == 2
    assert "no such directory" in capsys.readouterr().err


def counting(made: list[Any], stop: Interruption | None = None, after: int = 0) -> Experiment:
    """Four runs that note their settings; the stop is requested by the one after so many."""

    def measure(settings: Mapping[str, Any], data: Dataset) -> dict[str, Any]:
        made.append(settings["seed"])
        if stop is not None and len(made) == after:
            stop.requested = True
        return {"square": settings["seed"] ** 2, "nothing": float("nan")}

    def findings(runs: Any) -> Findings:
        raise AssertionError("not asked for")

    return Experiment(9, "counting", "t", "a", lambda quick: grid(seed=range(4)), measure, findings)


def run_all(experiment: Experiment, data: Dataset, out: Path, stop: Interruption) -> Any:
    store = Store(out, {"data": "x"})
    return runner.run_all([experiment], True, data, store, 1, Console(quiet=True), stop)


def test_an_interrupted_study_goes_on_where_it_was(tmp_path: Path, digits: Dataset) -> None:
    stop, made = Interruption(), []
    assert run_all(counting(made, stop, after=2), digits, tmp_path, stop) is None
    assert made == [0, 1]
    runs = run_all(counting(made), digits, tmp_path, Interruption())
    assert made == [0, 1, 2, 3]
    assert [run.result["square"] for run in runs["counting"]] == [0, 1, 4, 9]


def test_restart_forgets_no_other_experiments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        return None

    monkeypatch.setattr("study.runner.run_all", interrupted)
    chosen, other = list(EXPERIMENTS.values())[:2]
    for each in (chosen, other):
        (tmp_path / "results" / each.name).mkdir(parents=True)
    options = ["--only", str(chosen.number), "--restart", "--quick", "--out", str(tmp_path)]
    options += ["--data-url", "http://127.0.0.1:9/", "--cache", str(tmp_path / "cache")]
    assert program.main(options) == 130
    assert [path.name for path in (tmp_path / "results").iterdir()] == [other.name]


def test_a_file_that_could_not_be_written_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def write() -> None:
        with written_beside(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_results_belong_to_settings_and_identity(tmp_path: Path) -> None:
    store = Store(tmp_path, {"torch": "1"})
    store.save("e", {"seed": 0}, {"loss": 0.5})
    assert store.load("e", {"seed": 0}) == {"loss": 0.5}
    assert store.load("e", {"seed": 1}) is None
    assert store.load("f", {"seed": 0}) is None
    assert Store(tmp_path, {"torch": "2"}).load("e", {"seed": 0}) is None
    assert not list(tmp_path.glob("**/*.part"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": {"seed": 1}}', "[" * 100_000])
def test_a_damaged_result_is_made_again(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path, {})
    store.save("e", {"seed": 0}, {"loss": 0.5})
    store.path("e", {"seed": 0}).write_text(text)
    assert store.load("e", {"seed": 0}) is None


def test_a_result_that_was_changed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = Store(tmp_path, {}), {"seed": 0}
    # Keys that are numbers sort otherwise than the text that JSON makes of them.
    store.save("e", settings, {"loss": (0.5, float("inf")), 9: 1, 10: 2})
    assert store.load("e", settings) == {"loss": [0.5, float("inf")], "9": 1, "10": 2}
    path = store.path("e", settings)
    whole = path.read_text()
    path.write_text(whole.replace("0.5", "0.25"))
    assert store.load("e", settings) is None
    path.write_text(whole)
    monkeypatch.setattr("study.store.MAX_BYTES", len(whole) - 1)
    assert store.load("e", settings) is None


def test_workers_give_the_results_of_this_process(tmp_path: Path, digits: Dataset) -> None:
    # The digits are smaller than the limit: the settings of the quick form do.
    whole = EXPERIMENTS["scaling"]
    few = [settings for settings in whole.plan(True) if settings["data"] == "trips"][:2]
    part = Experiment(
        whole.number, whole.name, "t", "a", lambda quick: few, whole.measure, whole.findings
    )
    found = []
    for jobs in (1, 2):
        store = Store(tmp_path / str(jobs), {})
        runs = runner.run_all(
            [part], True, digits, store, jobs, Console(quiet=True), Interruption()
        )
        assert runs is not None
        found.append([{**run.result, runner.SECONDS: 0} for run in runs[whole.name]])
    assert found[0] == found[1]


def test_an_interruption_ends_the_workers(tmp_path: Path, digits: Dataset) -> None:
    # By then the workers have begun to import torch or to train; many runs are left.
    stop = Interruption()
    timer = threading.Timer(1.0, setattr, (stop, "requested", True))
    timer.start()
    store = Store(tmp_path, {})
    slow = EXPERIMENTS["shift"]
    started = time.monotonic()
    found = runner.run_all([slow], False, digits, store, 2, Console(quiet=True), stop)
    assert found is None
    # All of it would take minutes, and a run of it half of one.
    assert time.monotonic() - started < 15
    assert multiprocessing.active_children() == []


def test_the_data_reach_the_workers_whole(digits: Dataset) -> None:
    there = runner._unpack(runner._pack(digits))
    assert (there.name, there.source) == (digits.name, digits.source)
    assert torch.equal(there.validation.images, digits.validation.images)
    assert torch.equal(there.test.labels, digits.test.labels)


def test_the_report_escapes_and_counts(tmp_path: Path) -> None:
    claims = [
        Claim("a < b & <script>", "expected", "seen", True),
        Claim("falls", "x", "y", False),
    ]
    experiment = Experiment(
        1, "one", "One", "about", lambda quick: [], lambda s, d: {},
        lambda runs: Findings(claims, [Table("t", ["a"], [["<b>"]])]),
    )  # fmt: skip
    write(tmp_path / "r.html", [section(experiment, [])], {"torch": "1"}, quick=False)
    page = self_contained(tmp_path / "r.html")
    words = " ".join(page.words)
    assert "1 claims held, 1 did not." in words
    assert words.count("did not hold") == 2
    assert "a < b & <script>" in words
    assert "quick form" not in words


def test_plans_are_settings_that_json_keeps() -> None:
    for experiment in EXPERIMENTS.values():
        for quick in (True, False):
            plan = experiment.plan(quick)
            assert json.loads(json.dumps(plan)) == plan
            assert len({json.dumps(settings, sort_keys=True) for settings in plan}) == len(plan)


def test_numbers_run_in_order() -> None:
    numbers = [experiment.number for experiment in EXPERIMENTS.values()]
    assert numbers == sorted(set(numbers))

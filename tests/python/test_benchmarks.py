"""The benchmark tool: its arithmetic, files and words. Nothing here depends on a time."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import fused, guard, layers, models, native, page, peers, tables, timing
from benchmarks.figures import draw
from benchmarks.memory import allocated_peak, resident_peak
from benchmarks.result import Ratio, Record, Result, Sample, geometric_mean
from benchmarks.timing import SAMPLE_SECONDS, Budget, Call, interleave


def test_sample_has_median_and_quartiles() -> None:
    assert Sample.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Sample(3.0, 2.0, 4.0, 5)
    assert Sample.of([2.5]) == Sample(2.5, 2.5, 2.5, 1)
    with pytest.raises(ValueError, match="no measurements"):
        Sample.of([])


def test_ratio_is_of_medians_with_quartiles_of_pairs() -> None:
    above, below = [2.0, 8.0, 6.0, 8.0, 10.0], [1.0, 2.0, 3.0, 8.0, 5.0]
    # Medians 8 and 3; pairs 2, 4, 2, 1, 2.
    assert Ratio.of(above, below) == Ratio(8 / 3, 2.0, 2.0, "higher")
    with pytest.raises(ValueError, match="2 repetitions above, 1 below"):
        Ratio.of([1.0, 2.0], [1.0])


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == 4.0
    assert geometric_mean([0.25, 4.0]) == 1.0
    assert geometric_mean([3.0] * 7) == pytest.approx(3.0, rel=1e-15)
    for bad in ([], [1.0, 0.0], [1.0, -1.0]):
        with pytest.raises(ValueError, match=r"geometric mean|positive|domain"):
            geometric_mean(bad)


def test_share_of_a_step() -> None:
    times = {"ours": [3.0, 4.0, 5.0], "builtin": [6.0, 6.0, 6.0], "without": [2.0, 2.0, 2.0]}
    assert models.share_of(times) == Ratio(0.5, 0.375, 0.625, "lower")
    assert models.share_of({**times, "builtin": [2.0, 2.0, 2.0]}) is None


class Turns:
    """Calls by a clock of their own, twice as long right after a call of another."""

    def __init__(self, seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = seconds
        self.called: list[str] = []
        self.now = 0.0
        self.calls = {name: lambda name=name: self._call(name) for name in seconds}
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(timing, "time", clock)

    def _call(self, name: str) -> None:
        cold = bool(self.called) and self.called[-1] != name
        self.called.append(name)
        self.now += self.seconds[name] * (1 + cold)


def test_every_repetition_calls_all_in_varying_order(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(dict.fromkeys("abc", 2 * SAMPLE_SECONDS), monkeypatch)
    samples = interleave(turns.calls, Budget(0.0, repetitions=12))
    assert {name: len(times) for name, times in samples.items()} == {"a": 12, "b": 12, "c": 12}
    rounds = [tuple(turns.called[i : i + 3]) for i in range(9, 45, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 2


@pytest.mark.parametrize(
    ("seconds", "calls_of_a_sample"),
    [
        ({"a": SAMPLE_SECONDS / 4, "b": SAMPLE_SECONDS / 2}, 5 + 3),
        ({"a": SAMPLE_SECONDS / 4, "b": 2 * SAMPLE_SECONDS}, 5 + 2),  # both, or one is favoured
    ],
)
def test_a_sample_follows_a_call_that_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], calls_of_a_sample: int
) -> None:
    turns = Turns(seconds, monkeypatch)
    samples = interleave(turns.calls, Budget(0.0, repetitions=4))
    for name, times in samples.items():
        # The clock goes to 0.2 s in 50 roundings of 2^-54 of that, 1e-12 of the shortest call.
        assert times == pytest.approx([seconds[name]] * 4, rel=1e-12)
    warming_up = turns.called[: -4 * calls_of_a_sample]
    assert sorted(set(warming_up)) == ["a", "b"]
    assert len(warming_up) == 2 * 3


def test_grad_mode_of_the_calls() -> None:
    seen = set()
    interleave({"call": lambda: seen.add(torch.is_grad_enabled())}, Budget(0.0, 1, 1), grad=False)
    assert seen == {False}
    assert torch.is_grad_enabled()


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with layers.threads_set(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def record(value: float = 2.0, better: str | None = "higher", name: str = "builtin/ours") -> Record:
    ratio = Ratio(value, value * 0.9, value * 1.1, better)  # type: ignore[arg-type]
    sample = Sample(1e-3, 0.9e-3, 1.1e-3, 9)
    samples = {"ours": sample, "builtin": sample}
    return Record("grid", "step", "64x100", "float32", 2, samples, {name: ratio}, size=25600)


def result(*records: Record, cpu: str = "one") -> Result:
    environment = {
        "cpu": cpu,
        "processors": 2,
        "torch": "2.13.0",
        "isa": "avx2",
        "date": "2026-01-01",
    }
    return Result(environment, {"quick": True}, list(records))


def test_json_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    whole = result(record(), record(0.7, None, "x"))
    whole.miss("grid", "jax", "jax is not installed")
    whole.miss("grid", "jax", "jax is not installed")
    whole.write(path)
    assert Result.read(path) == whole
    assert len(whole.absent) == 1


def test_malformed_results_are_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    result(record()).write(path)
    good = path.read_text()
    data = json.loads(good)
    kept = ("environment", "settings", "records", "absent")
    without = [json.dumps({k: v for k, v in data.items() if k != name}) for name in kept]
    cases = {
        "not JSON": ["{", "[" * 100_000, good[: len(good) // 2]],
        "not a result": ["[]", '{"format": 0}'],
        "damaged record": [
            *without,
            json.dumps({**data, "records": [7]}),
            json.dumps({**data, "records": [{**data["records"][0], "threads": "two"}]}),
            json.dumps({**data, "records": [{**data["records"][0], "more": 1}]}),
            good.replace('"value": ', '"value": "x", "was": '),
            good.replace('"median": ', '"median": null, "was": '),
        ],
    }
    for words, texts in cases.items():
        for text in texts:
            path.write_text(text)
            assert guard.main([str(path), str(path)], Console(width=2000)) == 2
            (line,) = capsys.readouterr().out.splitlines()
            assert words in line
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not JSON"):
        Result.read(path)
    path.write_text(good)
    monkeypatch.setattr("benchmarks.result.MAX_BYTES", len(good) - 1)
    with pytest.raises(ValueError, match="larger than"):
        Result.read(path)


def compared(tmp_path: Path, old: Result, new: Result, *options: str) -> tuple[int, str]:
    """The exit code of the guard and what it says."""
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for each, path in zip((old, new), paths, strict=True):
        each.write(path)
    said = io.StringIO()
    code = guard.main([*map(str, paths), *options], Console(file=said, width=160))
    return code, said.getvalue()


@pytest.mark.parametrize(
    ("better", "old", "new", "code"),
    [
        ("higher", 2.0, 2.0, 0),
        ("higher", 2.0, 1.81, 0),
        ("higher", 2.0, 1.79, 1),
        ("higher", 2.0, 4.0, 0),
        ("lower", 2.0, 2.2, 0),
        ("lower", 2.0, 2.25, 1),
        ("lower", 2.0, 1.0, 0),
        ("lower", 0.5, -0.1, 0),
        ("lower", -0.1, 0.2, 1),
        ("higher", 0.5, -0.8, 1),
    ],
)
def test_guard(tmp_path: Path, better: str, old: float, new: float, code: int) -> None:
    found, said = compared(tmp_path, result(record(old, better)), result(record(new, better)))
    assert found == code
    assert f"{code} of 1 ratios fell" in said
    assert ("grid: step, 64x100, float32, threads 2: builtin/ours" in said) == bool(code)


def test_guard_tolerance(tmp_path: Path) -> None:
    before, after = result(record(2.0)), result(record(1.5))
    assert compared(tmp_path, before, after, "--tolerance", "0.3")[0] == 0
    code, said = compared(tmp_path, before, after, "--tolerance", "0.2")
    assert code == 1
    assert said.split().count("apart") == 1  # 1.8 to 2.2, and 1.35 to 1.65
    assert "overlap" in compared(tmp_path, before, result(record(1.7)))[1]
    with pytest.raises(SystemExit):
        compared(tmp_path, before, after, "--tolerance", "1.5")


def test_guard_says_what_only_one_file_holds(tmp_path: Path) -> None:
    old = result(record(), record(9.0, name="jax/ours"))
    new = result(record(), record(0.1, name="onednn/ours"), cpu="another")
    code, said = compared(tmp_path, old, new)
    assert code == 0
    assert "only the old file has them (1):\n  grid: step, 64x100, float32, threads 2: jax" in said
    assert (
        "only the new file has them (1):\n  grid: step, 64x100, float32, threads 2: onedn" in said
    )
    assert "cpu: one before, another now" in said


def test_guard_passes_over_information_and_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    code, said = compared(tmp_path, result(record(2.0, None)), result(record(1.0, None)))
    assert code == 2
    assert "no ratio in common" in said
    console = Console(file=io.StringIO())
    assert guard.main(["absent.json", "absent.json"], console) == 2


class Floor(SimpleNamespace):
    """What floor.cpp does, in Python; memory is reused in name only."""

    reuses = False

    def reuse_memory(self, on: bool) -> None:
        self.reuses = on

    @staticmethod
    def can_stream() -> bool:
        return True

    @staticmethod
    def copy(to: Tensor, source: Tensor, streaming: bool, threads: int) -> None:
        to.copy_(source)

    @staticmethod
    def allocate_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.empty_like(x)

    @staticmethod
    def empty_function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x * weight + bias

    @staticmethod
    def passing_function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def one_pass_function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def inside_a_region(x: Tensor, weight: Tensor, bias: Tensor, threads: int) -> None: ...


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SMALL", ((5, 3),))
    monkeypatch.setattr(models, "CROWD", (5, 3))
    monkeypatch.setattr(models, "MLPS", ((6, 5, 4, 3),))
    monkeypatch.setattr(fused, "DEEP", (5, 4, 4, 3))


def use_floor(monkeypatch: pytest.MonkeyPatch, floor: object) -> None:
    for module in (native, layers, models):
        monkeypatch.setattr(module, "floor", lambda: floor)


TINY = ["--quick", "--shape", "5x3", "--threads", "2", "1", "--seconds", "0.01"]


@pytest.mark.usefixtures("tiny")
def test_a_whole_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_floor(monkeypatch, Floor())
    docs, path = tmp_path / "docs", tmp_path / "result.json"
    docs.mkdir()
    written = docs / "performance.md"
    written.write_text(f"# By hand\n\n{page.BEGIN}\nold\n{page.END}\n\nAlso by hand.\n")
    arguments = [*TINY, "--peers", "onednn", "--json", str(path), "--docs", str(docs)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    found = Result.read(path)
    assert {r.part for r in found.records} == set(command.PARTS)
    for r in found.records:
        for sample in r.samples.values():
            assert 0 <= sample.q1 <= sample.median <= sample.q3
    steps = found.of("grid", "step", 1)
    assert [r.case for r in steps] == ["5x3"]
    assert set(steps[0].samples) == {"ours", "builtin"}
    ratio = steps[0].samples["builtin"].median / steps[0].samples["ours"].median
    assert steps[0].ratios["builtin/ours"].value == pytest.approx(ratio)
    for part in ("mlp", "fused-mlp"):
        assert all(set(models.FLOORS.values()) <= set(r.samples) for r in found.of(part))
    assert {"cpu", "caches", "torch", "torch_bn", "isa", "date", "threads"} <= set(
        found.environment
    )
    text = written.read_text()
    assert text.startswith(f"# By hand\n\n{page.BEGIN}\n")
    assert text.endswith(f"{page.END}\n\nAlso by hand.\n")
    assert "old" not in text.split()
    for table in tables.all_tables(found):
        assert table.title in said
        assert f"### {table.title}" in text
    for name in ("speed-up", "fused", "kernels", "threads", "mlp"):
        assert (docs / f"performance-{name}.png").stat().st_size > 10_000
        assert f"(performance-{name}.png)" in text
    # A second run keeps the other parts, and compares with the first.
    again = [*TINY, "--only", "memory", "--add", "--json", str(path)]
    assert command.main(again) == 0
    assert {r.part for r in Result.read(path).records} == set(command.PARTS)
    assert command.main(["compare", str(path), str(path)]) == 0
    path.write_text(path.read_text().replace(f'"isa": "{found.environment["isa"]}"', '"isa": "x"'))
    assert command.main(again) == 2
    assert "measured with another isa" in capsys.readouterr().err


def status_of(main: Callable[[list[str]], int], arguments: list[str]) -> object:
    """The status that a program ends with, returned or raised."""
    try:
        return main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "folder"],
        ["--json", "file/result.json"],
        ["--docs", "file"],
        ["--docs", "half"],
        ["--add", "--json", "file"],
        ["--seconds", "0"],
        ["--seconds", "-1"],
        ["--seconds", "nan"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_said_before_measuring(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("half").mkdir()
    Path("half/performance.md").write_text(page.BEGIN)
    Path("file").write_text("not JSON")
    monkeypatch.setattr(command, "measure", None)  # nothing comes as far as that
    assert status_of(command.main, arguments) == 2
    assert "error: " in capsys.readouterr().err
    assert Path("file").read_text() == "not JSON"


@pytest.mark.usefixtures("tiny")
def test_an_interrupted_run_keeps_the_parts_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    use_floor(monkeypatch, Floor())
    path, partial = tmp_path / "result.json", tmp_path / "result.partial.json"
    arguments = [*TINY, "--only", "grid", "memory", "--json", str(path)]
    assert command.main(arguments) == 0
    assert not partial.exists()
    whole = path.read_text()
    with monkeypatch.context() as patch:
        patch.setitem(command.PARTS, "memory", interrupted)
        assert command.main(arguments) == 130
    assert f"what was measured is in {partial}" in capsys.readouterr().err
    assert {r.part for r in Result.read(partial).records} == {"grid"}
    assert path.read_text() == whole


def test_kernels_are_measured_onto_reused_memory_and_with_their_allocation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    native_calls = Floor()
    use_floor(monkeypatch, native_calls)
    groups = []

    def interleave(calls: Mapping[str, Call], *_: object, **__: object) -> dict[str, list[float]]:
        groups.append((native_calls.reuses, set(calls)))
        if len(groups) == 3:
            raise KeyboardInterrupt
        for call in calls.values():
            call()
        return {name: [float(len(groups))] for name in calls}

    monkeypatch.setattr(layers, "interleave", interleave)
    problem = peers.Problem.of((5, 3), torch.float32, 1)
    times = layers.kernel_times(problem, Budget(0.01))
    copies = {"memcpy", "streaming"}
    operators = {f"{peer}{o}" for peer in ("", "builtin ") for o in tables._OPERATORS}
    assert groups == [(True, operators | copies), (False, operators | copies)]
    assert {name for name, (seconds,) in times.items() if seconds == 1.0} == operators | copies
    ratios = layers.kernel_ratios(times | {"memcpy": [4.0], "memcpy, new": [0.5]})
    assert ratios["forward/copy"].value == 1.0  # the faster copy, 1 s as the operator
    assert ratios["forward/new copy"].value == 2 / 0.5
    with pytest.raises(KeyboardInterrupt):
        layers.kernel_times(problem, Budget(0.01))
    assert not native_calls.reuses  # torch's allocator is back


@pytest.mark.usefixtures("tiny")
def test_absent_peers_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_fails(*_: object, **__: object) -> object:
        raise RuntimeError("no C++ compiler here\nmore")

    use_floor(monkeypatch, "benchmarks/floor/floor.cpp could not be built: no compiler")
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch, "compile", compile_fails)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    path = tmp_path / "result.json"
    arguments = [*TINY, "--peers", "compile", "onednn", "jax", "--json", str(path)]
    parts = ["--only", "peers", "kernels", "small", "mlp", "fused-mlp", "threads"]
    assert command.main([*arguments, *parts]) == 0
    said = " ".join(capsys.readouterr().out.split())
    absent = {(a["part"], a["peer"]): a["reason"] for a in json.loads(path.read_text())["absent"]}
    assert set(absent) == {
        ("peers", "compile"),
        ("peers", "onednn"),
        ("peers", "jax"),
        ("kernels", "copy"),
        ("small", "calls that only allocate"),
        *((part, name) for part in ("mlp", "fused-mlp") for name in models.FLOORS.values()),
        ("threads", "calls inside a parallel region"),
    }
    assert "needs a C++ compiler" in absent["peers", "compile"]
    assert "no C++ compiler here" in absent["peers", "compile"]
    assert "more" not in absent["peers", "compile"]
    assert "not installed" in absent["peers", "jax"]
    for (_, peer), reason in absent.items():
        assert f"Not measured: {peer}, because {reason}." in said
    assert {r.part for r in Result.read(path).records} == {
        "kernels",
        "mlp",
        "fused-mlp",
        "threads",
    }


def test_jax_is_not_measured_on_other_threads_than_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(peers, "processors", lambda: 4)
    problem = peers.Problem.of((5, 3), torch.float32, 1)
    with pytest.raises(peers.AbsentError, match=r"as many as the processors, 4, .*taskset"):
        peers.jax(problem)


@pytest.mark.parametrize("name", ["ours", "builtin", "onednn"])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5)], ids=str)
def test_peers_do_the_same_work(name: str, shape: tuple[int, ...]) -> None:
    problem = peers.Problem.of(shape, torch.float32, 1)
    work = peers.PEERS[name](problem)
    out = work["forward"]()
    out = out.to_dense() if out.layout != torch.strided else out
    x = problem.x.transpose(1, -1).reshape(-1, 3).double()
    want = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    got = out.detach().reshape(*shape).transpose(1, -1).reshape(-1, 3).double()
    # x * a + b makes seven roundings, each 6e-8 of terms below 3.
    assert torch.allclose(got, want, rtol=0, atol=1.3e-6)
    work["step"]()


def test_a_page_without_a_place_for_the_figures_gets_one() -> None:
    assert page.replace_between("# Title\n", "new") == (
        f"# Title\n\n{page.BEGIN}\n\nnew\n\n{page.END}\n"
    )
    for broken in (page.BEGIN, page.END, f"{page.END}{page.BEGIN}"):
        with pytest.raises(ValueError, match="the page needs"):
            page.replace_between(broken, "new")


def test_memory_is_counted() -> None:
    held = []

    def call() -> None:
        held.clear()
        temporary = torch.ones(1 << 24)  # so large that its release gives it back to the system
        held.append(temporary[: 1 << 20].clone())

    # 64 MiB and, while they are held, 4 MiB; the 4 MiB of the call before are gone by then.
    assert allocated_peak(call, held.clear) == 68 << 20
    resident = resident_peak(call, held.clear)
    if isinstance(resident, str):
        pytest.skip(resident)
    assert 67 << 20 < resident < 70 << 20


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    assert draw(result(), tmp_path) == []


@pytest.mark.parametrize("text", ["64", "64x", "axb", "0x3", "1x3", "2x3x4x5"])
def test_shapes_that_are_refused(text: str) -> None:
    with pytest.raises(SystemExit):
        command.options(["--shape", text])


def test_times_in_words() -> None:
    assert tables.time_text(999.4e-6) == "999 us"
    assert tables.time_text(999.6e-6) == "1.00 ms"
    assert command.shape("32x64x512") == (32, 64, 512)

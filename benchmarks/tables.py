"""What a run found, as tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .machine import one_line
from .result import Ratio, Record, Result, Sample, geometric_mean

PART_NAMES = {
    "grid": "Layers",
    "peers": "Other peers",
    "fused": "Fused",
    "kernels": "Kernels against the best copy",
    "small": "Small layers against calls that only allocate",
    "mlp": "Batch norm's share of an MLP's step",
    "fused-mlp": "Fused: the pair's share of an MLP's step",
    "bf16": "bfloat16",
    "threads": "Threads",
    "memory": "Peak memory of a step",
    "fused-memory": "Fused: memory of a deep MLP's step",
}


@dataclass(frozen=True)
class Table:
    """Cells as text; the first column to the left, figures to the right."""

    title: str
    heading: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str = ""

    def rich(self) -> RichTable:
        table = RichTable(
            title=self.title,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            min_width=len(self.title),  # a longer title would be broken
        )
        for i, name in enumerate(self.heading):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [
            f"### {self.title}",
            "",
            "| " + " | ".join(self.heading) + " |",
            "| --- |" + " ---: |" * (len(self.heading) - 1),
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        if self.caption:
            lines += ["", self.caption]
        return "\n".join(lines)


def time_text(seconds: float) -> str:
    """Three digits in a unit that suits.

    >>> [time_text(t) for t in (2.9e-5, 0.00123, 1.5)]
    ['29.0 us', '1.23 ms', '1.50 s']
    """
    for unit, scale in (("us", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds)} s"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ratio_text(ratio: Ratio | None) -> str:
    """The value and its quartiles, or a dash for what was not measured.

    >>> ratio_text(Ratio(1.5, 1.42, 1.61)), ratio_text(None)
    ('1.50 [1.42 1.61]', '-')
    """
    return "-" if ratio is None else f"{ratio.value:.2f} [{ratio.q1:.2f} {ratio.q3:.2f}]"


def sample_text(sample: Sample | None) -> str:
    """The median, and half the distance between the quartiles in percent of it.

    >>> sample_text(Sample(1e-3, 0.9e-3, 1.1e-3, 9))
    '1.00 ms ±10%'
    """
    if sample is None:
        return "-"
    spread = (sample.q3 - sample.q1) / 2 / sample.median
    return f"{time_text(sample.median)} ±{spread:.0%}"


def absences(result: Result, part: str) -> str:
    """What is missing from a part, in words."""
    return " ".join(
        f"Not measured: {a.peer}, because {a.reason}." for a in result.absent if a.part == part
    )


def _names(records: Sequence[Record], of: str) -> list[str]:
    found: dict[str, None] = {}
    for record in records:
        found.update(dict.fromkeys(getattr(record, of)))
    return list(found)


def _bottom(records: Sequence[Record], names: Sequence[str], blanks: int) -> list[tuple[str, ...]]:
    """Rows of the geometric mean and the least of each ratio."""
    columns = [[r.ratios[n].value for r in records if n in r.ratios] for n in names]
    rows = []
    for what, function in (("geometric mean", geometric_mean), ("least", min)):
        cells = (f"{function(c):.2f}" if c else "-" for c in columns)
        rows.append((what, *("" for _ in range(blanks)), *cells))
    return rows


def layer_tables(result: Result, part: str) -> list[Table]:
    """One table per direction, or what else was measured, and number of threads."""
    tables = []
    title = "" if part == "grid" else f"{PART_NAMES[part]}: "
    for what in _in_order(result, part):
        for threads in sorted({r.threads for r in result.of(part, what)}, reverse=True):
            records = result.of(part, what, threads)
            peers, ratios = _names(records, "samples"), _names(records, "ratios")
            rows = [
                (
                    r.case,
                    *(sample_text(r.samples.get(p)) for p in peers),
                    *(ratio_text(r.ratios.get(n)) for n in ratios),
                )
                for r in records
            ]
            tables.append(
                Table(
                    f"{title}{_layer_title(what)}, {records[0].dtype}, {_threads(threads)}",
                    ("shape", *peers, *ratios),
                    rows + _bottom(records, ratios, len(peers)),
                )
            )
    missing = absences(result, part)
    if tables and missing:
        tables[-1] = replace(tables[-1], caption=missing)
    elif missing:
        tables.append(Table(PART_NAMES[part], ("shape",), [], missing))
    return tables


def _in_order(result: Result, part: str) -> list[str]:
    """What was measured, by direction, and each direction's as it came."""
    found = dict.fromkeys(r.what for r in result.of(part))
    return sorted(found, key=lambda what: list(_LAYER_TITLES).index(what.partition(",")[0]))


def _layer_title(what: str) -> str:
    """
    >>> _layer_title("step"), _layer_title("step, BN then ReLU")
    ('Layer step', 'Layer step, BN then ReLU')
    """
    direction, comma, rest = what.partition(",")
    return _LAYER_TITLES[direction] + comma + rest


def summary_tables(result: Result, part: str) -> list[Table]:
    """The others' times over ours in a line for each direction and number of threads."""
    own, title, caption = _SUMMARIES[part]
    rows = []
    for what in _in_order(result, part):
        for threads in sorted({r.threads for r in result.of(part, what)}, reverse=True):
            records = result.of(part, what, threads)
            # The first ratio is that which counts.
            name = next(iter(records[0].ratios))
            found = {r.case: r.ratios[name].value for r in records}
            case, least = min(found.items(), key=lambda item: item[1])
            mean = geometric_mean(found.values())
            rows.append((f"{what}, {_threads(threads)}", f"{mean:.2f}", f"{least:.2f}", case))
    heading = (f"time/{own}", "geometric mean", "least", "at")
    return [Table(title, heading, rows, caption)] if rows else []


_SPREAD = (
    "Times are medians ± half the distance of the quartiles; a ratio is the quotient of the "
    "medians, with the quartiles of the quotients taken repetition by repetition in brackets; "
    "above 1, ours is faster."
)
_PAIR = (
    "fused: torch_bn.BatchNormReLU1d or ReLUBatchNorm1d. unfused: torch_bn.BatchNorm1d and "
    "torch.nn.ReLU in a Sequential. builtin: torch.nn.BatchNorm1d and torch.nn.ReLU in a "
    "Sequential; compile: torch.compile of that, measured apart. Lines without torch.compile are "
    "against the builtin."
)
# What stands below the line of the quotients, the table's title and its caption.
_SUMMARIES = {
    "grid": ("ours", "Layers in short", _SPREAD),
    "fused": ("fused", "Fused layers in short", _PAIR),
}
_LAYER_TITLES = {
    "step": "Layer step",
    "forward": "Forward of the step",
    "evaluation": "Evaluation forward",
}


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def kernel_tables(result: Result) -> list[Table]:
    """Multiples of the copy."""
    tables = []
    shown = [f"{o}/{c}" for o in _OPERATORS for c in ("copy", "new copy")]
    shown += [f"builtin {o}/copy" for o in _OPERATORS]
    for threads in sorted({r.threads for r in result.of("kernels")}, reverse=True):
        records = result.of("kernels", None, threads)
        present = [n for n in shown if any(n in r.ratios for r in records)]
        present = present or [f"builtin {o}/{o}" for o in _OPERATORS]
        rows = [
            (r.case, _copy_text(r), *(_short(r.ratios.get(n)) for n in present)) for r in records
        ]
        tables.append(
            Table(
                f"{PART_NAMES['kernels']}, {records[0].dtype}, {_threads(threads)}",
                ("shape", "copy", *map(_kernel_heading, present)),
                rows + _bottom(records, present, 1),
                f"{_COPY} {absences(result, 'kernels')}".strip(),
            )
        )
    return tables


_OPERATORS = ("forward", "backward", "evaluation")
_COPY = (
    "Multiples of the time of the best copy: the faster of memcpy and a non-temporal copy of the "
    "input with as many threads. Results and copies lie in memory that was used before, large "
    "ones in huge pages; under new/new torch's allocator puts both wherever it does. A forward's "
    "floor is 1, a backward's 1.5."
)


def _kernel_heading(ratio: str) -> str:
    """Narrow enough for nine columns.

    >>> _kernel_heading("backward/new copy"), _kernel_heading("builtin evaluation/copy")
    ('new/new', 'builtin eval.')
    """
    above, below = ratio.split("/")
    return "new/new" if below == "new copy" else above.replace("evaluation", "eval.")


def _copy_text(record: Record) -> str:
    times = [record.samples[n] for n in ("memcpy", "streaming") if n in record.samples]
    return sample_text(min(times, key=lambda s: s.median)) if times else "-"


def _short(ratio: Ratio | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio.value:.2f} ±{(ratio.q3 - ratio.q1) / 2:.2f}"


def other_tables(result: Result) -> list[Table]:
    """The parts whose records are rows of times and ratios as they stand."""
    tables = []
    for part in _CAPTIONS:
        groups = list(dict.fromkeys(tuple(r.samples) for r in result.of(part)))
        for samples in groups:
            records = [r for r in result.of(part) if tuple(r.samples) == samples]
            names = _names(records, "ratios")
            rows = [
                (
                    f"{r.what}, {r.case}, {_threads(r.threads)}",
                    *(_value(r, n) for n in samples),
                    *(ratio_text(r.ratios.get(n)) for n in names),
                )
                for r in records
            ]
            caption = ""
            if samples == groups[-1]:
                caption = f"{_CAPTIONS[part]} {absences(result, part)}".strip()
            title = PART_NAMES[part]
            if len(groups) > 1:
                title += f": {records[0].what.partition(',')[0]}"
            tables.append(Table(title, ("case", *samples, *names), rows, caption))
        if not result.of(part) and absences(result, part):
            tables.append(Table(PART_NAMES[part], ("case",), [], absences(result, part)))
    return tables


def _value(record: Record, name: str) -> str:
    sample = record.samples.get(name)
    if sample is None:
        return "-"
    return sample_text(sample) if record.unit == "s" else f"{sample.median / 2**20:.2f} MiB"


_CAPTIONS = {
    "small": (
        "forward: a module in training whose x requires no gradient, beside a module that calls "
        "one C++ function which allocates an output and a (2, C) float64 tensor (empty call), and "
        "one that does so in a torch::autograd::Function of three inputs (empty Function). step: "
        "the layer step, beside that Function with a backward that allocates three gradients."
    ),
    "mlp": (
        "share: (step with ours - step without batch norm) / (step with builtin - step without), "
        "with batch norm after each ReLU. A step is zero_grad, forward, cross entropy and "
        "backward, without an optimiser; the networks share their dense layers. share of calls: "
        "the same of a torch::autograd::Function of three inputs that hands on the first and "
        "allocates its parameters' gradients (passing Function). share of one pass: of one that "
        "copies the first, and in the backward writes over the gradient what it reads of that and "
        "of its input (one-pass Function); a batch norm reads its operands twice."
    ),
    "fused-mlp": (
        "share: (step with the fused layers - step without batch norm and ReLU) / (step with the "
        "builtin pair - step without), with the layer or the pair between the dense layers. share "
        "of calls and of one pass: the same of the passing and the one-pass Function."
    ),
    "bf16": (
        "The layer step with input in bfloat16 and parameters in float32, and the step of as many "
        "elements in float32; builtin/ours is in bfloat16."
    ),
    "threads": (
        "gain: one thread's time over that of all. Two callers and calls inside an OpenMP region: "
        "time a call, over all calls that run at once; 1 means that nothing is lost against "
        "calling one after the other."
    ),
    "memory": (
        "From no gradients on, beyond x and g, which are made beforehand. allocated: the largest "
        "sum of what torch's allocator has handed out, exactly, from the profiler's record, "
        "touched or not. resident: the rise of the process's VmHWM, reset before the step, which "
        "counts all memory that is touched."
    ),
    "fused-memory": (
        "Ten times a dense layer of width 512 with batch norm and ReLU, and a dense layer to ten "
        "classes; bytes that torch's allocator has handed out beyond model and data, exactly. "
        "held for the backward: what is left when the forward has returned. peak: the largest sum "
        "during a step; without gradients, each parameter's gradient is dropped as soon as it is "
        "whole. lean: the fused layers, with the forward under torch_bn.lean()."
    ),
}


def all_tables(result: Result) -> list[Table]:
    """In the order in which they are read."""
    return [
        *layer_tables(result, "grid"),
        *summary_tables(result, "grid"),
        *layer_tables(result, "peers"),
        *layer_tables(result, "fused"),
        *summary_tables(result, "fused"),
        *kernel_tables(result),
        *other_tables(result),
    ]


def print_tables(result: Result, console: Console) -> None:
    for table in all_tables(result):
        console.print(table.rich())
        if table.caption:
            # Not rich's caption, which is no wider than its table.
            console.print(table.caption, highlight=False)
            console.print()
    console.print(one_line(result.environment))

"""The command line of the job."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlp.data import DEFAULT_URL
from mlp.model import PLACEMENTS
from mlp.world import processes

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Settings:
    """Whatever changes the figures of a run; a resumed run must have the same."""

    placement: str
    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    seed: int
    dtype: str
    threads: int
    preprocess: str
    validate: str
    processes: int = 1
    sync_bn: bool = False
    fused: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Options:
    """The whole command line."""

    settings: Settings
    data: Path | None
    data_url: str
    cache: Path | None
    out: Path
    resume: bool
    backend: str = "gloo"


def whole(low: int, high: int) -> Callable[[str], int]:
    """For argparse: a whole number between the two."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return parse


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive, finite number")
    return value


def add_data_arguments(data: argparse._ArgumentGroup) -> None:
    """The options that say where the data are, for `mlp.data.load_dataset`."""
    data.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        default=os.environ.get("TORCH_BN_MNIST") or None,
        help="directory with MNIST's four IDX files, plain or .gz; "
        "the environment variable TORCH_BN_MNIST gives the default",
    )
    data.add_argument(
        "--data-url",
        metavar="URL",
        default=DEFAULT_URL,
        help="where MNIST is fetched from (default: %(default)s)",
    )
    data.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="where fetched files are kept (default: the user's cache)",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_mlp.py",
        description="Train an MLP with torch_bn.BatchNorm1d, with torch.nn.BatchNorm1d and without "
        "batch norm, and prove step by step that torch_bn computes the right thing.",
        epilog="Exit status: 0 all proofs passed, 1 a proof failed, 2 wrong usage or data, "
        "130 interrupted (continue with --resume).",
    )
    data = parser.add_argument_group("data")
    add_data_arguments(data)
    data.add_argument(
        "--preprocess",
        choices=("zscore", "minmax", "unit", "none"),
        default="zscore",
        help="scaling of the inputs, fitted on the training split (default: %(default)s)",
    )

    train = parser.add_argument_group("training")
    train.add_argument(
        "--placement",
        choices=PLACEMENTS,
        default="before",
        help="batch norm nowhere, after each hidden ReLU, or before it (default: %(default)s)",
    )
    train.add_argument(
        "--fused",
        action="store_true",
        help="torch_bn does each batch norm and the ReLU beside it in one operation",
    )
    train.add_argument(
        "--epochs",
        type=whole(1, 100_000),
        default=10,
        metavar="N",
        help="passes over the training split (default: %(default)s)",
    )
    train.add_argument(
        # Batch norm has no variance to divide by when a channel has a single value.
        "--batch-size",
        type=whole(2, 1 << 20),
        default=64,
        metavar="N",
        help="rows in a batch, of all processes together (default: %(default)s)",
    )
    train.add_argument(
        "--optimizer",
        choices=("adam", "sgd"),
        default="adam",
        help="sgd: momentum 0.9 (default: %(default)s)",
    )
    train.add_argument(
        "--lr",
        type=_rate,
        default=1e-3,
        metavar="RATE",
        help="learning rate (default: %(default)s)",
    )
    train.add_argument(
        "--seed",
        type=whole(0, 2**62),
        default=0,
        metavar="N",
        help="of initial weights and batches (default: %(default)s)",
    )
    train.add_argument(
        "--dtype",
        choices=tuple(DTYPES),
        default="float32",
        help="of the training (default: %(default)s)",
    )
    train.add_argument(
        "--threads",
        type=whole(1, 1024),
        metavar="N",
        help="CPU threads (default: Torch's own choice)",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "--validate",
        choices=("off", "short", "full"),
        help="how much of the three proofs to run (default: short; off under torchrun)",
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: runs/mlp-PLACEMENT)"
    )
    run.add_argument("--resume", action="store_true", help="go on from an interrupted run in --out")

    together = parser.add_argument_group("several processes, started by torchrun")
    together.add_argument(
        "--sync-bn",
        action="store_true",
        help="torch_bn normalises by the statistics of the whole batch, not of each process's part",
    )
    together.add_argument(
        "--backend",
        default="gloo",
        metavar="NAME",
        help="of torch.distributed: gloo, or mpi where torch has it (default: %(default)s)",
    )
    return parser


def parse(argv: Sequence[str] | None) -> Options:
    """The options in `argv` (the process's own when None). Exits with 2 when they are wrong."""
    parser = _parser()
    values = parser.parse_args(argv)
    count = processes()
    if count > 1 and values.validate not in (None, "off"):
        parser.error("argument --validate: the proofs are of one process; under torchrun it is off")
    if values.sync_bn and count == 1:
        parser.error("argument --sync-bn: there is one process; start several with torchrun")
    if values.placement == "none" and (values.fused or values.sync_bn):
        option, purpose = ("--fused", "fuse") if values.fused else ("--sync-bn", "synchronise")
        parser.error(f"argument {option}: placement none has no batch norm to {purpose}")
    return Options(
        settings=Settings(
            placement=values.placement,
            epochs=values.epochs,
            batch_size=values.batch_size,
            optimizer=values.optimizer,
            lr=values.lr,
            seed=values.seed,
            dtype=values.dtype,
            threads=values.threads or torch.get_num_threads(),
            preprocess=values.preprocess,
            validate=values.validate or ("short" if count == 1 else "off"),
            processes=count,
            sync_bn=values.sync_bn,
            fused=values.fused,
        ),
        data=values.data,
        data_url=values.data_url,
        cache=values.cache,
        out=values.out or Path("runs") / f"mlp-{values.placement}",
        resume=values.resume,
        backend=values.backend,
    )

"""Data of the training job: MNIST or scikit-learn's digits, split, and scaled for an MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mlp.fetch import DEFAULT_URL, FetchError, fetch_mnist
from mlp.idx import read_idx

CLASSES = 10
"""Number of classes of MNIST and of the digits: labels are 0 to 9."""

Mode = Literal["zscore", "minmax", "unit", "none"]


class DatasetError(ValueError):
    """Files that are not a usable MNIST; its one line names the directory and what is wrong."""


@dataclass(frozen=True, eq=False)
class Split:
    """Samples in a fixed order: images (n, height, width) uint8 and labels (n,) int64."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three disjoint splits of one data set, none of them empty; `source` says where from."""

    name: str
    source: str
    train: Split
    validation: Split
    test: Split

    @property
    def features(self) -> int:
        """Pixels of one image, height times width."""
        return self.train.images[0].numel()


def load_dataset(
    directory: Path | None,
    *,
    url: str = DEFAULT_URL,
    cache: Path | None = None,
    notify: Callable[[str], None] = print,
) -> Dataset:
    """Load MNIST from `directory`; without one, fetch it; where that is impossible, the digits.

    MNIST is fetched from the folder `url` into `cache` (default: the user's cache directory),
    see fetch_mnist. When that fails, `notify` is given one line that says why and that
    scikit-learn's digits (1,797 images of 8 by 8) are used instead.

    MNIST's validation split is the last tenth of its training images. The split is fixed, so that
    runs with different seeds are measured on the same samples.

    Raises DatasetError or idx.IdxError for unusable files.
    """
    if directory is None:
        try:
            directory = fetch_mnist(url, cache)
        except FetchError as error:
            notify(
                f"MNIST cannot be fetched ({error}); "
                "using scikit-learn's digits (1797 images of 8 by 8) instead."
            )
            return _load_digits()
    training, test = load_mnist(directory)
    held_out = len(training.labels) // 10
    if held_out == 0:
        raise DatasetError(
            f"{directory}: {len(training.labels)} training images, expected at least 10, "
            "of which the last tenth is for validation"
        )
    return Dataset(
        name="mnist",
        source=str(directory),
        train=Split(training.images[:-held_out], training.labels[:-held_out]),
        validation=Split(training.images[-held_out:], training.labels[-held_out:]),
        test=test,
    )


def load_mnist(directory: Path) -> tuple[Split, Split]:
    """Read MNIST's training and test samples from its four IDX files in `directory`.

    Each file may be plain or gzip, and is found under its standard name
    (`train-images-idx3-ubyte`) or with a dot before `idx`, with or without `.gz`.

    Raises DatasetError for a missing file or files that do not fit together, and idx.IdxError
    for a file that is not IDX.
    """
    directory = Path(directory)
    train = _load_pair(directory, "train")
    test = _load_pair(directory, "t10k")
    train_size, test_size = (tuple(split.images.shape[1:]) for split in (train, test))
    if train_size != test_size:
        raise DatasetError(
            f"{directory}: test images of size {test_size}, "
            f"expected {train_size} as in the training images"
        )
    return train, test


def _load_pair(directory: Path, prefix: str) -> Split:
    images_path = _find(directory, f"{prefix}-images", "idx3-ubyte")
    labels_path = _find(directory, f"{prefix}-labels", "idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dim() != 3 or images.numel() == 0:
        raise DatasetError(
            f"{images_path}: images of shape {tuple(images.shape)}, "
            "expected (count, height, width) and at least one"
        )
    if labels.dim() != 1 or len(labels) != len(images):
        raise DatasetError(
            f"{labels_path}: labels of shape {tuple(labels.shape)}, expected "
            f"({len(images)},), one for each image of {images_path.name}"
        )
    if (largest := int(labels.max())) >= CLASSES:
        raise DatasetError(f"{labels_path}: label {largest}, expected 0 to {CLASSES - 1}")
    return Split(images, labels.to(torch.int64))


def _find(directory: Path, stem: str, suffix: str) -> Path:
    names = [f"{stem}{sep}{suffix}{end}" for sep in "-." for end in ("", ".gz")]
    for name in names:
        if (directory / name).is_file():
            return directory / name
    where = "no such directory" if not directory.is_dir() else "MNIST is incomplete"
    raise DatasetError(f"{directory}: {where}: looked for {', '.join(names)}")


def _load_digits() -> Dataset:
    """scikit-learn's digits, stratified 70/10/20, pixels scaled from 0..16 to 0..255."""
    # Imported where it is needed: it takes about a second.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).to(torch.int64)
    rest, test = train_test_split(
        range(len(labels)), test_size=360, stratify=labels.numpy(), random_state=0
    )
    train, validation = train_test_split(
        rest, test_size=180, stratify=labels[rest].numpy(), random_state=0
    )
    splits = (Split(images[part], labels[part]) for part in (train, validation, test))
    return Dataset("digits", "sklearn.datasets.load_digits", *splits)


@dataclass(frozen=True)
class Preprocessor:
    """Scaling of images to an MLP's inputs; made by `fit`, restored by `from_state_dict`.

    With x the raw pixel values 0..255 of one image as float64:

    - zscore: (x - mean) / std, the mean and population standard deviation over all pixels of
      all training images;
    - minmax: (x - min) / (max - min), the extremes over all pixels of all training images;
    - unit: x / sqrt(sum of x**2), the image's own Euclidean norm; a black image stays zero;
    - none: x.

    A std or max - min of zero is replaced by 1.

    zscore and minmax have one pair of numbers for all pixels, not a pair per pixel: at MNIST's
    rim some pixels are lit in a handful of training images and some in none. Per pixel, the
    standard deviation falls to 0.035 (of 0..255), and |z| reaches 433 in the test images and 515
    in the validation images, where this way it stays below 2.9; and per-pixel minmax, meant for
    0..1, gives 24 at a pixel that no training image lights.
    """

    mode: Mode
    shift: float = 0.0
    scale: float = 1.0

    @classmethod
    def fit(cls, mode: Mode, images: torch.Tensor) -> Preprocessor:
        """Fit to the training images, (n, height, width) uint8 and at least one pixel.

        Raises ValueError for an unknown mode or other images.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r}, expected one of {', '.join(get_args(Mode))}")
        _check_images(images)
        if images.numel() == 0:
            raise ValueError("no images to fit to, expected at least one")
        if mode == "zscore":
            return cls(mode, *_mean_and_std(images))
        if mode == "minmax":
            low, high = int(images.min()), int(images.max())
            return cls(mode, float(low), float(high - low) or 1.0)
        return cls(mode)

    def __call__(self, images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scale images (n, height, width) uint8 to (n, height * width) of `dtype`.

        Computed in float64 and rounded once. Raises ValueError for other images.
        """
        _check_images(images)
        values = images.flatten(1).to(torch.float64)
        if self.mode == "unit":
            # The sum is of integers and so exact: the norm's bits depend on no order of summation.
            norm = values.square().sum(1, keepdim=True).sqrt_()
            values /= norm.masked_fill_(norm == 0, 1.0)
        else:
            values -= self.shift
            values /= self.scale
        return values.to(dtype)

    def state_dict(self) -> dict[str, str | float]:
        """What `from_state_dict` needs, in plain values that torch.load takes weights_only."""
        return {"mode": self.mode, "shift": self.shift, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Preprocessor:
        """Restore from `state_dict()`. Raises ValueError for anything else."""
        mode, shift, scale = (state.get(key) for key in ("mode", "shift", "scale"))
        plain = len(state) == 3 and isinstance(shift, float) and isinstance(scale, float)
        if not (plain and mode in get_args(Mode) and math.isfinite(shift) and 0 < scale < math.inf):
            raise ValueError(
                "not the state of a Preprocessor: expected valid mode, shift and scale"
            )
        return cls(mode, shift, scale)


def _check_images(images: torch.Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 3:
        raise ValueError(
            f"images of {images.dtype} and shape {tuple(images.shape)}, "
            "expected torch.uint8 and (n, height, width)"
        )


def _mean_and_std(images: torch.Tensor) -> tuple[float, float]:
    """Mean and population standard deviation over all values, the latter 1 if it is zero.

    From the histogram, in integers: exact whatever the number of threads, and without a copy of
    the images in float64.
    """
    histogram = torch.bincount(images.flatten()).tolist()
    count = sum(histogram)
    total = sum(value * times for value, times in enumerate(histogram))
    squares = sum(value * value * times for value, times in enumerate(histogram))
    std = math.sqrt((count * squares - total * total) / (count * count))
    return total / count, std or 1.0

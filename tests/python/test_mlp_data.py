"""Data sets of examples/mlp: MNIST's directory, the splits, the digits."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import torch
from idx_files import contents

from mlp import data, fetch, idx

TRAINING, TEST = 25, 7
STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")


def samples() -> dict[str, torch.Tensor]:
    """What each of the four files holds, all images different, labels 0 to 9."""
    pixels = torch.randperm(256, generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    return {
        "train-images": pixels[: TRAINING * 6].reshape(TRAINING, 2, 3),
        "train-labels": torch.arange(TRAINING, dtype=torch.uint8) % 10,
        "t10k-images": pixels[-TEST * 6 :].reshape(TEST, 2, 3),
        "t10k-labels": torch.arange(TEST, dtype=torch.uint8) + 3,
    }


def lay(folder: Path, dot: bool = False, zipped: bool = False, **changed: torch.Tensor) -> Path:
    for stem, values in (samples() | changed).items():
        name = f"{stem}{'.' if dot else '-'}idx{values.dim()}-ubyte{'.gz' if zipped else ''}"
        (folder / name).write_bytes(gzip.compress(contents(values)) if zipped else contents(values))
    return folder


def replace(folder: Path, stem: str, values: torch.Tensor) -> Path:
    """Write `values` under the standard name of `stem`, whatever their rank."""
    lay(folder)
    (path,) = folder.glob(f"{stem}*")
    path.write_bytes(contents(values))
    return folder


def refusal(folder: Path) -> str:
    """The message of the DatasetError, which must be one line that names the directory."""
    with pytest.raises(data.DatasetError) as raised:
        data.load_dataset(folder)
    message = str(raised.value)
    assert str(folder) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dot", [False, True], ids=["dash", "dot"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_load_mnist(tmp_path: Path, dot: bool, zipped: bool) -> None:
    expected = samples()
    train, test = data.load_mnist(lay(tmp_path, dot, zipped))
    for split, prefix in ((train, "train"), (test, "t10k")):
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, expected[f"{prefix}-images"])
        assert torch.equal(split.labels, expected[f"{prefix}-labels"].long())


def test_the_last_tenth_is_for_validation(tmp_path: Path) -> None:
    dataset = data.load_dataset(lay(tmp_path), notify=pytest.fail)
    expected = samples()
    assert torch.equal(dataset.train.images, expected["train-images"][:23])
    assert torch.equal(dataset.train.labels, expected["train-labels"][:23].long())
    assert torch.equal(dataset.validation.images, expected["train-images"][23:])
    assert torch.equal(dataset.validation.labels, expected["train-labels"][23:].long())
    assert torch.equal(dataset.test.images, expected["t10k-images"])
    assert (dataset.name, dataset.source) == ("mnist", str(tmp_path))
    assert dataset.features == 6


@pytest.mark.parametrize("stem", STEMS)
def test_a_missing_file(tmp_path: Path, stem: str) -> None:
    (path,) = lay(tmp_path).glob(f"{stem}*")
    path.unlink()
    suffix = path.name.removeprefix(f"{stem}-")
    message = refusal(tmp_path)
    for name in (f"{stem}-{suffix}", f"{stem}.{suffix}"):
        assert f"{name}," in message
        assert f"{name}.gz" in message


def test_a_missing_directory(tmp_path: Path) -> None:
    assert "no such directory" in refusal(tmp_path / "missing")


@pytest.mark.parametrize("stem", STEMS)
def test_counts_differ(tmp_path: Path, stem: str) -> None:
    count = len(samples()[stem])
    message = refusal(lay(tmp_path, **{stem: samples()[stem][:-1]}))
    images, labels = (count - 1, count) if "images" in stem else (count, count - 1)
    assert f"labels of shape ({labels},), expected ({images},)" in message


@pytest.mark.parametrize("stem", ["train-labels", "t10k-labels"])
def test_label_out_of_range(tmp_path: Path, stem: str) -> None:
    labels = samples()[stem]
    labels[-1] = 10
    assert "label 10, expected 0 to 9" in refusal(lay(tmp_path, **{stem: labels}))


@pytest.mark.parametrize(
    ("stem", "shape"),
    [
        ("train-images", (TRAINING, 6)),
        ("t10k-images", (0, 2, 3)),
        ("t10k-images", (TEST, 0, 3)),
        ("train-labels", (TRAINING, 1)),
    ],
)
def test_wrong_rank_or_no_sample(tmp_path: Path, stem: str, shape: tuple[int, ...]) -> None:
    folder = replace(tmp_path, stem, torch.zeros(shape, dtype=torch.uint8))
    assert f"of shape {shape}" in refusal(folder)


def test_sizes_of_training_and_test_images_differ(tmp_path: Path) -> None:
    images = samples()["t10k-images"].reshape(TEST, 3, 2)
    assert "size (3, 2), expected (2, 3)" in refusal(lay(tmp_path, **{"t10k-images": images}))


def test_too_few_images_for_a_validation_split(tmp_path: Path) -> None:
    few = {stem: samples()[stem][:9] for stem in ("train-images", "train-labels")}
    data.load_mnist(lay(tmp_path, **few))
    assert "9 training images, expected at least 10" in refusal(tmp_path)


def test_a_damaged_file_is_reported_as_such(tmp_path: Path) -> None:
    (path,) = lay(tmp_path).glob("t10k-images*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(idx.IdxError, match="t10k-images-idx3-ubyte: cut file"):
        data.load_dataset(tmp_path)


def test_without_a_directory_mnist_is_fetched(tmp_path: Path, monkeypatch) -> None:
    asked = []

    def fetched(url: str, cache: Path) -> Path:
        asked.append((url, cache))
        return lay(tmp_path)

    monkeypatch.setattr(data, "fetch_mnist", fetched)
    dataset = data.load_dataset(None, url="address", cache=tmp_path, notify=pytest.fail)
    assert asked == [("address", tmp_path)]
    assert (dataset.name, dataset.source) == ("mnist", str(tmp_path))
    assert torch.equal(dataset.test.images, samples()["t10k-images"])


@pytest.fixture
def digits(tmp_path: Path) -> tuple[data.Dataset, list[str]]:
    """What a run without network gets, and what it is told."""
    told: list[str] = []
    dataset = data.load_dataset(None, url="nowhere", cache=tmp_path, notify=told.append)
    return dataset, told


def test_where_nothing_can_be_fetched_the_digits_are_used(digits) -> None:
    dataset, told = digits
    (line,) = told
    assert "\n" not in line
    assert "nowhere/train-images-idx3-ubyte.gz" in line
    assert "digits (1797 images of 8 by 8)" in line
    assert (dataset.name, dataset.features) == ("digits", 64)


def test_the_digits_are_split_stratified_and_complete(digits) -> None:
    from sklearn.datasets import load_digits

    dataset, _ = digits
    splits = (dataset.train, dataset.validation, dataset.test)
    # 70, 10 and 20 % of 1797.
    assert [len(split.labels) for split in splits] == [1257, 180, 360]
    raw = load_digits()
    total = torch.from_numpy(raw.target).bincount()
    for split in splits:
        assert split.images.dtype == torch.uint8
        assert split.images.shape == (len(split.labels), 8, 8)
        share = total * len(split.labels) / len(raw.target)
        # Stratified: a class is off its exact share by rounding only, in each of two splits.
        assert (split.labels.bincount(minlength=10) - share).abs().max() < 2
    # As multisets of (image, label): every sample once, in the value range of MNIST.
    scaled = torch.from_numpy(raw.images).mul(255).div(16).round().to(torch.uint8)
    assert scaled.max() == 255
    expected = torch.cat([scaled.flatten(1), torch.from_numpy(raw.target)[:, None]], 1)
    found = torch.cat(
        [torch.cat([split.images.flatten(1), split.labels[:, None]], 1) for split in splits]
    )
    assert sorted(found.tolist()) == sorted(expected.tolist())


def test_the_split_of_the_digits_is_fixed(digits, tmp_path: Path) -> None:
    torch.manual_seed(99)
    again = data.load_dataset(None, url="nowhere", cache=tmp_path, notify=lambda _: None)
    assert torch.equal(again.train.images, digits[0].train.images)
    assert torch.equal(again.test.labels, digits[0].test.labels)


@pytest.mark.skipif(
    "TORCH_BN_MNIST" not in os.environ,
    reason="TORCH_BN_MNIST is not set to a directory with MNIST's four files",
)
def test_real_mnist() -> None:
    folder = Path(os.environ["TORCH_BN_MNIST"])
    dataset = data.load_dataset(folder)
    splits = (dataset.train, dataset.validation, dataset.test)
    assert [tuple(split.images.shape) for split in splits] == [
        (54_000, 28, 28),
        (6_000, 28, 28),
        (10_000, 28, 28),
    ]
    for name, md5 in fetch.MNIST_MD5.items():
        stem, suffix = name.removesuffix(".gz").rsplit("-idx", 1)
        (path,) = (p for p in folder.iterdir() if p.name.startswith(stem) and suffix in p.name)
        assert fetch.content_md5(path) == md5, path.name
    # Why zscore is not per pixel: it would leave the range of a few standard deviations.
    scale = data.Preprocessor.fit("zscore", dataset.train.images)
    assert max(scale(split.images).abs().max() for split in splits) < 3

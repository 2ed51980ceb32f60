"""Download of MNIST's four files into the user's cache, once, checked."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pooch
import requests
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from mlp import idx

DEFAULT_URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
"""Public mirror of MNIST."""

MNIST_MD5: Mapping[str, str] = {
    "train-images-idx3-ubyte.gz": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte.gz": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte.gz": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte.gz": "27ae3e4e09519cfbb04c329615203637",
}
"""MD5 of each file's *uncompressed* contents: mirrors compress the same contents differently."""

MAX_DOWNLOAD = 1 << 25
"""Largest file that is downloaded, in bytes: three times MNIST's compressed training images."""

TIMEOUT = 5.0
"""Seconds without an answer, or without a further byte, after which a server is given up."""

_CHUNK = 1 << 16


class FetchError(RuntimeError):
    """MNIST could not be fetched; its one line names the address or file and the reason."""


def fetch_mnist(
    url: str = DEFAULT_URL,
    cache: Path | None = None,
    *,
    checksums: Mapping[str, str] = MNIST_MD5,
    timeout: float = TIMEOUT,
    max_bytes: int = MAX_DOWNLOAD,
    progress: bool = True,
) -> Path:
    """Return a directory that holds the files of `checksums`, downloading those not yet there.

    Files already in `cache` (default: `torch_bn/mnist` in the user's cache directory) whose
    contents match are kept, and when all do, the network is not touched. Any other is
    downloaded from the folder `url` into a temporary folder, checked, and then renamed: a wrong
    or partial download never has a final name, and nothing that was there is lost for it.

    `checksums` maps file names to the MD5 of the uncompressed contents (against damage, not
    against malice), `timeout` is in seconds, `max_bytes` bounds each download, and `progress`
    shows a bar on standard error.

    Raises FetchError.
    """
    directory = pooch.os_cache("torch_bn") / "mnist" if cache is None else Path(cache)
    wanted = [name for name, md5 in checksums.items() if not _matches(directory / name, md5)]
    if not wanted:
        return directory

    folder = url.rstrip("/") + "/"
    with _progress_bar(progress) as bar:
        for name in wanted:
            address = folder + name
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch:
                    path = Path(scratch) / name
                    _transfer(address, path, timeout, max_bytes, bar)
                    _check(address, path, checksums[name])
                    path.replace(directory / name)
            # What requests raises is an OSError; a malformed answer may be a ValueError.
            except (OSError, ValueError) as error:
                raise FetchError(f"{address}: {_reason(error)}") from error
    return directory


def content_md5(path: Path) -> str:
    """MD5, in hexadecimal, of the contents of `path`, decompressed if they are gzip's.

    Raises idx.IdxError for an unreadable or damaged file, or one beyond any that idx reads.
    """
    digest = hashlib.md5(usedforsecurity=False)
    total = 0
    with idx.open_plain_or_gzip(path) as stream:
        while chunk := stream.read(_CHUNK):
            total += len(chunk)
            if total > idx.MAX_BYTES + _CHUNK:
                raise idx.IdxError(f"{path}: contents of more than {idx.MAX_BYTES} bytes")
            digest.update(chunk)
    return digest.hexdigest()


def _matches(path: Path, md5: str) -> bool:
    try:
        return content_md5(path) == md5
    except idx.IdxError:
        return False


def _transfer(url: str, path: Path, timeout: float, max_bytes: int, bar: Progress) -> None:
    # "identity": the file as it is stored, without a second compression in transit.
    headers = {"Accept-Encoding": "identity"}
    with (
        requests.get(url, stream=True, timeout=timeout, headers=headers) as response,
        path.open("wb") as file,
    ):
        response.raise_for_status()
        total = int(response.headers.get("Content-Length", 0)) or None
        task = bar.add_task(url.rpartition("/")[2], total=total)
        received = 0
        for chunk in response.iter_content(_CHUNK):
            received += len(chunk)
            if received > max_bytes:
                raise FetchError(f"{url}: larger than the {max_bytes} bytes allowed")
            file.write(chunk)
            bar.update(task, completed=received)


def _check(url: str, path: Path, md5: str) -> None:
    try:
        found = content_md5(path)
    except idx.IdxError as error:
        # The temporary path says nothing to the user.
        reason = str(error).removeprefix(f"{path}: ")
        raise FetchError(f"{url}: damaged download: {reason}") from error
    if found != md5:
        raise FetchError(f"{url}: wrong contents: MD5 {found}, expected {md5}")


def _progress_bar(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: what requests raises wraps it in several long ones."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(error).split()) or type(error).__name__

"""Reader of IDX files of unsigned bytes, the format of MNIST, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

MAX_BYTES = 1 << 28
"""Largest body of an IDX file that is read, in bytes: five times MNIST's training images."""

_CHUNK = 1 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_MAX_DIMENSIONS = 3


class IdxError(ValueError):
    """A file that cannot be read as IDX; its one line names the file and what is wrong."""


@contextmanager
def open_plain_or_gzip(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open the contents of `path`, decompressed when its first bytes are gzip's.

    A failure to open or to read, also later in the block, raises IdxError. Decompression goes on
    only as far as the caller reads (and the stream's small fixed buffer).
    """
    path = Path(path)
    # Opening a named pipe would wait for a writer for ever.
    if not path.is_file():
        raise IdxError(f"{path}: no such file, expected a readable regular file")
    compressed = False
    try:
        with path.open("rb") as raw:
            compressed = raw.peek(2)[:2] == _GZIP_MAGIC
            if compressed:
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream
            else:
                yield raw
    except (EOFError, OSError, zlib.error) as error:
        what = "cut or corrupt gzip stream" if compressed else "cannot be read"
        raise IdxError(f"{path}: {what}: {error}") from error


def read_idx(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read an IDX file of unsigned bytes.

    Returns a uint8 tensor of one to three dimensions, of the shape that the header announces.

    Raises IdxError for anything but a complete, exact file: wrong magic number, a body longer or
    shorter than announced, a size beyond MAX_BYTES, a damaged gzip stream, an unreadable file.
    """
    with open_plain_or_gzip(path) as stream:
        shape = _read_shape(stream, path)
        values = torch.empty(shape, dtype=torch.uint8)
        announced = values.numel()
        found = _fill(stream, memoryview(values.view(-1).numpy()))
        if found < announced:
            raise IdxError(
                f"{path}: cut file: {found} bytes after the header, expected {announced} "
                f"for the announced shape {shape}"
            )
        # This read also makes gzip compare its checksum.
        if stream.read(1):
            raise IdxError(
                f"{path}: trailing bytes after the {announced} bytes of the announced shape "
                f"{shape}, expected the end of the file"
            )
    return values


def _read_shape(stream: BinaryIO, path: str | os.PathLike[str]) -> tuple[int, ...]:
    magic = _read_header(stream, 4, path)
    dimensions = magic[3]
    if magic[:3] != bytes((0, 0, _UNSIGNED_BYTE)) or not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise IdxError(
            f"{path}: magic number 0x{magic.hex()}, expected 0x00000801 to 0x0000080"
            f"{_MAX_DIMENSIONS} (IDX of unsigned bytes)"
        )
    shape = struct.unpack(f">{dimensions}I", _read_header(stream, 4 * dimensions, path))
    # An empty dimension must not hide how large the others are.
    if math.prod(max(size, 1) for size in shape) > MAX_BYTES:
        raise IdxError(
            f"{path}: the header announces the shape {shape}, expected at most {MAX_BYTES} bytes"
        )
    return shape


def _read_header(stream: BinaryIO, count: int, path: str | os.PathLike[str]) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise IdxError(
            f"{path}: cut header: {len(found)} bytes where {count} more bytes were expected"
        )
    return found


def _fill(stream: BinaryIO, target: memoryview) -> int:
    """Read into `target` until it is full or the stream ends; returns the bytes read."""
    filled = 0
    # In chunks, since GzipFile.readinto makes a temporary copy of what it reads.
    while count := stream.readinto(target[filled : filled + _CHUNK]):
        filled += count
    return filled

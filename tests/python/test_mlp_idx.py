"""The IDX reader of examples/mlp: what it reads, and what it refuses and how."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest
import torch
from idx_files import header

from mlp import idx

VALUES = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 4)


def body(values: torch.Tensor) -> bytes:
    return values.numpy().tobytes()


PLAIN = header(2, 3, 4) + body(VALUES)
ZIPPED = gzip.compress(PLAIN)


def write(folder: Path, contents: bytes) -> Path:
    path = folder / "some-file"
    path.write_bytes(contents)
    return path


def refusal(path: Path) -> str:
    """The message of the IdxError, which must be one line that names the file."""
    with pytest.raises(idx.IdxError) as raised:
        idx.read_idx(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("shape", [(24,), (6, 4), (2, 3, 4), (0,), (0, 28, 28)])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_reads_plain_and_gzip_whatever_the_name(tmp_path: Path, shape, pack) -> None:
    values = VALUES.flatten()[: torch.Size(shape).numel()].reshape(shape)
    found = idx.read_idx(write(tmp_path, pack(header(*shape) + body(values))))
    assert found.dtype == torch.uint8
    assert found.shape == values.shape
    assert torch.equal(found, values)


def test_reads_a_body_of_several_chunks(tmp_path: Path) -> None:
    values = torch.randint(
        256, (3, 1000, 1000), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    contents = header(3, 1000, 1000) + body(values)
    assert torch.equal(idx.read_idx(write(tmp_path, contents)), values)
    assert torch.equal(idx.read_idx(write(tmp_path, gzip.compress(contents, 1))), values)


@pytest.mark.parametrize(
    "magic",
    [b"\0\0\x09\x01", b"\0\0\x08\0", b"\0\0\x08\x04", b"\0\1\x08\x01", b"<!DO"],
    ids=["signed", "no dimension", "four dimensions", "not zero", "a web page"],
)
def test_refuses_a_wrong_magic_number(tmp_path: Path, magic: bytes) -> None:
    message = refusal(write(tmp_path, magic + PLAIN[4:]))
    assert f"0x{magic.hex()}" in message
    assert "0x00000801 to 0x00000803" in message


@pytest.mark.parametrize("length", [0, 3, 4, 15])
def test_refuses_a_cut_header(tmp_path: Path, length: int) -> None:
    assert "cut header" in refusal(write(tmp_path, PLAIN[:length]))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_refuses_a_cut_body(tmp_path: Path, pack) -> None:
    assert "23 bytes after the header, expected 24" in refusal(write(tmp_path, pack(PLAIN[:-1])))


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_refuses_trailing_bytes(tmp_path: Path, pack) -> None:
    assert "trailing bytes after the 24 bytes" in refusal(write(tmp_path, pack(PLAIN + b"\0")))


def test_refuses_every_cut_of_a_gzip_stream(tmp_path: Path) -> None:
    for length in range(2, len(ZIPPED)):
        assert "cut or corrupt gzip stream" in refusal(write(tmp_path, ZIPPED[:length]))


@pytest.mark.parametrize(
    "damaged",
    [
        ZIPPED[:12] + b"\xff\xff" + ZIPPED[14:],
        ZIPPED[:-8] + bytes(4) + ZIPPED[-4:],
        ZIPPED + b"garbage",
    ],
    ids=["deflate", "checksum", "garbage after"],
)
def test_refuses_a_corrupt_gzip_stream(tmp_path: Path, damaged: bytes) -> None:
    assert "cut or corrupt gzip stream" in refusal(write(tmp_path, damaged))


def test_a_gzip_bomb_is_not_inflated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = gzip.compress(PLAIN + bytes(1 << 26))
    assert len(bomb) < 1 << 17
    inflated = 0
    read = gzip._GzipReader.read

    def counting_read(reader, size=-1):
        nonlocal inflated
        chunk = read(reader, size)
        inflated += len(chunk)
        return chunk

    monkeypatch.setattr(gzip._GzipReader, "read", counting_read)
    assert "trailing bytes" in refusal(write(tmp_path, bomb))
    # The stream reads ahead by its buffer, at most 128 KiB in any Python; the file holds 64 MiB.
    assert len(PLAIN) < inflated <= len(PLAIN) + (1 << 17)


@pytest.mark.parametrize(
    "shape", [(idx.MAX_BYTES + 1,), (1 << 31, 1 << 31, 1 << 31), (0, 1 << 31, 1 << 31)]
)
def test_bounds_the_announced_size_before_allocating(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    assert f"at most {idx.MAX_BYTES} bytes" in refusal(write(tmp_path, header(*shape)))


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing")
    assert "no such file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refusal(tmp_path / "pipe")

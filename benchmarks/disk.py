"""Plain reading and writing of a folder's bytes: what no conversion can be faster than."""

import os
import time
from pathlib import Path

_BLOCK = 16 * 2**20  # bytes


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def tree_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def drop_cached(folder: Path) -> None:
    """Bring a folder's files to the disk and out of the page cache."""
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def plain_read(folder: Path) -> float:
    """Seconds to read every file from beginning to end."""
    buffer = bytearray(_BLOCK)
    began = time.perf_counter()
    for path in _files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
        os.close(descriptor)
    return time.perf_counter() - began


def plain_write(folder: Path, destination: Path, size: int) -> float:
    """Seconds to write `size` bytes into one file and bring them to the disk; the file is removed.

    The bytes are the beginning of a file of `folder`, again and again.
    """
    largest = max(_files(folder), key=lambda path: path.stat().st_size)
    with largest.open("rb") as file:
        block = file.read(_BLOCK)
    began = time.perf_counter()
    descriptor = os.open(destination, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    left = size
    while left > 0:
        left -= os.write(descriptor, block[: min(left, len(block))])
    os.fsync(descriptor)
    seconds = time.perf_counter() - began
    os.close(descriptor)
    destination.unlink()
    return seconds

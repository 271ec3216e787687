"""One safetensors file, memory-mapped. Its header is checked before a value is touched."""

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES
from mis_jax.parsing import parse_json
from mis_jax.storage.files import map_file, open_binary

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own bound


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: str  # ours where it is one of them, else the file's own name
    shape: tuple[int, ...]
    start: int  # byte in the file
    size: int  # bytes


class TensorFile:
    """Tensors by key; values come as read-only views of the file.

    Raises ValueError, with the remedy, for a file that is cut short or whose header lies.
    """

    def __init__(self, path: Path):
        self.path = path
        self.entries = _header(path)
        self._map = map_file(path)

    def tensor(self, key: str) -> np.ndarray:
        """A view of one tensor, of a dtype of `NUMPY_DTYPES`."""
        entry = self.entries[key]
        values = np.frombuffer(self._map, np.uint8, entry.size, entry.start)
        dtype = NUMPY_DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:  # a header of a length that nothing aligned
            values = values.copy()
        return values.view(dtype).reshape(entry.shape)

    def read_ahead(self, key: str, start: int, stop: int) -> None:
        """Let the disk bring these bytes of a tensor, several times as fast as page by page."""
        entry = self.entries[key]
        begin = (entry.start + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_WILLNEED"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, entry.start + stop - begin)

    def release(self) -> None:
        """Let go of the pages read so far; the next look at them reads them again."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def _header(path: Path) -> dict[str, Entry]:
    try:
        with open_binary(path) as file:
            held, length = path.stat().st_size, int.from_bytes(file.read(8), "little")
            if held < 8 or length > _LONGEST_HEADER or 8 + length > held:
                raise _Unsound(f"{held} bytes, and the header is said to take {8 + length}")
            with safe_open(path, framework="np"):  # sizes, offsets, overlaps, length of the file
                pass
            header = parse_json(file.read(length))
    except (SafetensorError, _Unsound, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    entries = {}
    for key, fields in header.items():
        start, stop = fields["data_offsets"]
        stored: str = fields["dtype"]
        dtype = _DTYPES.get(stored, stored)
        entry = Entry(dtype, tuple(fields["shape"]), 8 + length + start, stop - start)
        wanted = (
            NUMPY_DTYPES[dtype].itemsize * math.prod(entry.shape) if dtype in NUMPY_DTYPES else 0
        )
        assert not wanted or entry.size == wanted, key  # the library has checked it
        entries[key] = entry
    return entries


class _Unsound(Exception):
    """What is wrong with a header."""

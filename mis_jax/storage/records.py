"""Byte strings in a temporary file that every process of this machine maps: they are there once."""

import mmap
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.storage.files import map_file


class Records:
    """Byte strings by number. Sent to another process, only the place of the file goes there.

    The file is removed when the process that wrote it ends, or no longer holds them. Raises OSError
    where there is no room for it.
    """

    def __init__(self, items: Iterable[bytes]):
        ends = array("q", [0])
        try:
            with tempfile.NamedTemporaryFile(prefix="mis-jax-records-", delete=False) as file:
                self._path = Path(file.name)
                weakref.finalize(self, _remove, self._path, os.getpid())
                for item in items:
                    file.write(item)
                    ends.append(ends[-1] + len(item))
        except OSError as error:
            if error.filename:  # none is told where the file itself cannot be written
                raise
            reason = f"{self._path}: {error.strerror}; make room, or set TMPDIR to a larger disk"
            raise OSError(error.errno, reason) from error
        self._ends = np.array(ends, np.int64)
        self._content: mmap.mmap | bytes | None = None if ends[-1] else b""

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        if self._content is None:
            self._content = map_file(self._path)
        return self._content[self._ends[number] : self._ends[number + 1]]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_content": None if self._ends[-1] else b""}


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a process forked from it, which ends before it
        path.unlink(missing_ok=True)

"""Content hashes of JSON values, files and folders."""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mis_jax.storage.paths import files_below, is_inside

_AT_ONCE = min(8, os.cpu_count() or 1)  # files; hashing lets other threads run
_PART = 16 * 2**20
_BLOCKS, _BLOCK = 64, 2**16  # of a sampled file: 4 MiB in all


def digest(value: Any) -> str:
    """A hash of a JSON value that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    # surrogatepass: a model's text may hold a lone surrogate, which must not stop a run.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def bytes_digest(content: bytes | memoryview) -> str:
    """The hash that `file_digest` gives a file of these bytes."""
    return hashlib.sha256(content).hexdigest()


def file_digest(path: Path, stop: threading.Event | None = None) -> str:
    """The hash of a file's bytes; InterruptedError once `stop` is set."""
    found = hashlib.sha256()
    with open(path, "rb", buffering=0) as stream:
        while part := stream.read(_PART):
            if stop and stop.is_set():
                raise InterruptedError
            found.update(part)
    return found.hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of every file of these names in a folder, a few files at once."""
    names = list(names)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = pool.map(lambda name: file_digest(folder / name), names)
        return dict(zip(names, found, strict=True))


def changed_files(folder: Path, saved: Mapping[str, str]) -> list[str]:
    """Every file that is missing or is not what its digest was taken of, one line each."""
    there = [name for name in sorted(saved) if is_inside(name) and (folder / name).is_file()]
    found = file_digests(folder, there)
    return [
        f"{folder / name}: {'is not what was saved' if name in found else 'missing'}"
        for name in sorted(saved)
        if found.get(name) != saved[name]
    ]


def sampled_digest(path: Path) -> str:
    """A hash of a file's size and of blocks all over it: of all its bytes where they are few.

    Tells a file from every other one of a different training or download in the time of a few
    hundred reads; a flipped byte of a large file it may miss.
    """
    size = path.stat().st_size
    if size <= _BLOCKS * _BLOCK:
        return file_digest(path)
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as stream:
        for number in range(_BLOCKS):
            stream.seek((size - _BLOCK) * number // (_BLOCKS - 1))
            found.update(stream.read(_BLOCK))
    return found.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """The hash of every file under ``folder``, for use as a model fingerprint.

    It reads the weights whole: a checkpoint overwritten in place must not pass for the old one.
    """
    # Sorted as paths, not as text: what runs have recorded was taken in that order.
    names = [str(path) for path in sorted(map(Path, files_below(folder)))]
    if not names:
        raise ValueError(f"{folder} holds no files to fingerprint; give the model's folder")
    return digest([[name, found] for name, found in file_digests(folder, names).items()])

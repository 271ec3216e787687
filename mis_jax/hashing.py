"""Content hashes of JSON values, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any

_BLOCKS, _BLOCK = 512, 2**16  # of a sampled file: 32 MiB in all


def digest(value: Any) -> str:
    """A hash of a JSON value that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    # surrogatepass: a model's text may hold a lone surrogate, which must not stop a run.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files to fingerprint; give the model's folder")
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])

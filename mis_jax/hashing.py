"""Content hashes of JSON values, files and folders."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(value: Any) -> str:
    """A hash of a JSON value that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    # surrogatepass: a model's text may hold a lone surrogate, which must not stop a run.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """The hash of every file under ``folder``, for use as a model fingerprint.

    It reads the weights whole: a checkpoint overwritten in place must not pass for the old one.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files to fingerprint; give the model's folder")
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])

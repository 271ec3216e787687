"""Content hashes: what was asked, what was answered, and which model answered."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mis_jax.evals.types import Benchmark, Sample


def digest(value: Any) -> str:
    """A hash of a JSON value that does not depend on the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    # surrogatepass: a model's text may hold a lone surrogate, which must not stop a run.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def file_digest(path: Path) -> str:
    """The hash of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sample_hash(benchmark: Benchmark, sample: Sample) -> str:
    """Everything that decides what the model is asked: prompt, pictures and protocol.

    The generation settings are included beside the protocol's name, so that a changed setting
    cannot reuse old answers by keeping the name.
    """
    asked = {
        "conversation": sample.conversation,
        "images": [file_digest(path) for path in sample.images],
        "protocol": benchmark.protocol,
        "system": benchmark.system,
        "max_new_tokens": benchmark.max_new_tokens,
        "max_tiles_per_image": benchmark.tiles_for(sample),
    }
    if sample.first_image_scale != 1:  # left out otherwise: hashes of earlier runs stay valid
        asked["first_image_scale"] = sample.first_image_scale
    return digest(asked)


def answer_hash(sample_digest: str, text: str) -> str:
    """An answer in its context: the same words to another question are another answer."""
    return digest([sample_digest, text])


def folder_fingerprint(folder: Path) -> str:
    """The hash of every file under ``folder``, for use as a model fingerprint.

    It reads the weights whole: a checkpoint overwritten in place must not pass for the old one.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files to fingerprint; give the model's folder")
    return digest([[str(path.relative_to(folder)), file_digest(path)] for path in files])

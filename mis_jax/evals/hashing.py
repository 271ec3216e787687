"""Content hashes of what was asked and what was answered."""

from __future__ import annotations

from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.hashing import digest, file_digest


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

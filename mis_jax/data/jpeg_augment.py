"""The one augmentation of InternVL's training: tiles are encoded as JPEG again."""

import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_QUALITY = 75, 100  # both included, as upstream draws it


def encoded_again(
    tiles: UInt8[np.ndarray, "tiles size size 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "tiles size size 3"]:
    """Each tile through JPEG of a quality drawn for it (facts: OpenGVLab/InternVL `dataset.py`)."""
    qualities = rng.integers(*_QUALITY, size=len(tiles), endpoint=True)
    return np.stack([_through_jpeg(t, int(q)) for t, q in zip(tiles, qualities, strict=True)])


def _through_jpeg(tile: np.ndarray, quality: int) -> np.ndarray:
    encoded = io.BytesIO()
    Image.fromarray(tile).save(encoded, format="JPEG", quality=quality)
    return np.asarray(Image.open(encoded, formats=["JPEG"]))

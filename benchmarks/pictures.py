"""Drawn photographs, and transformers' processor for them."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def draw_picture(path: Path, size: tuple[int, int], rng: np.random.Generator) -> None:
    """Soft shapes with some grain: a file about as large and as slow to decode as a photograph."""
    coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    soft = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    grain = rng.normal(0, 4, (size[1], size[0], 1))
    Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)).save(path)


def image_processor(max_patches: int) -> tuple[Any, str]:
    """transformers' faster class, which needs torchvision, or else the other; and its name."""
    settings = dict(
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_patches,
        size={"height": 448, "width": 448},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    try:
        import torchvision  # noqa: F401
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

        return GotOcr2ImageProcessor(**settings), "GotOcr2ImageProcessor, torchvision"
    except ImportError:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        return GotOcr2ImageProcessorPil(**settings), "GotOcr2ImageProcessorPil"


def pixels_of(normalised: np.ndarray) -> np.ndarray:
    """Of such a processor's `pixel_values` the uint8 tiles, [tiles, size, size, 3]."""
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = normalised.transpose(0, 2, 3, 1) * std + mean
    return np.rint(pixels * 255).astype(np.uint8)

"""Fixed prompts with pictures, made here, on which two checkpoints are compared."""

import numpy as np
from PIL import Image

from mis_jax.data.processor import Processor
from mis_jax.model.batch import Batch

_TEXTS = (
    "Describe what is written on a calendar.",
    "Which of the two pictures is brighter, and why?",
    "List three things that belong in a kitchen.",
    "这张图片里有什么？",
)


def probe_batches(processor: Processor) -> list[Batch]:
    """One batch a prompt: text only, one picture, two pictures of different shapes, Chinese."""
    rng = np.random.default_rng(0)
    size = processor.config.vision.image_size
    square, wide = _picture(rng, size, size), _picture(rng, 2 * size, size)
    images = ([], [square, wide], [], [wide])
    prefixes = ("", "Image-1: <image>\nImage-2: <image>\n", "", "<image>\n")
    return [
        processor([[{"role": "user", "content": prefix + text}]], [pictures])
        for prefix, text, pictures in zip(prefixes, _TEXTS, images, strict=True)
    ]


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth coloured blobs."""
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)

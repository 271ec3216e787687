"""The pictures of a sample as its protocol shows them to a model."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mis_jax.data.images import open_image
from mis_jax.evals.types import Sample


def shown_images(sample: Sample) -> list[Path | Image.Image]:
    """A sample's pictures in order; only one that is enlarged is opened here.

    The enlargement is bilinear, as in the evaluation of MMMU that published it.
    """
    images: list[Path | Image.Image] = list(sample.images)
    if images and sample.first_image_scale != 1:
        image = open_image(sample.images[0])
        scale = sample.first_image_scale
        size = (image.width * scale, image.height * scale)
        images[0] = image.resize(size, Image.Resampling.BILINEAR)
    return images

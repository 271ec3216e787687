"""A sample's images: as its protocol shows them, as a request sends and a page holds them."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mis_jax.data.images import image_format, open_image
from mis_jax.evals.types import Sample
from mis_jax.storage.files import read_bytes

THUMBNAIL_SIZES = (160, 112, 80, 56, 40, 28, 20)
"""Longest sides in pixels, tried from the first."""

_THUMBNAIL_QUALITY = 55
_PAGE_SIZE = 320
_SENT_AS_IS = {"PNG", "JPEG", "WEBP"}


def shown_images(sample: Sample) -> list[Path | Image.Image]:
    """A sample's images in order; only one that is enlarged is opened here.

    The enlargement is bilinear, as in the evaluation of MMMU that published it.
    """
    images: list[Path | Image.Image] = list(sample.images)
    if images and sample.first_image_scale != 1:
        image = open_image(sample.images[0])
        scale = sample.first_image_scale
        size = (image.width * scale, image.height * scale)
        images[0] = image.resize(size, Image.Resampling.BILINEAR)
    return images


def image_part(image: Path | Image.Image) -> dict[str, Any]:
    """An image as a part of a chat message."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def data_url(image: Path | Image.Image) -> str:
    """A file's own bytes, or PNG where servers do not know its format or there is no file.

    ValueError when it is damaged: a server may answer about half an image without a word.
    """
    if isinstance(image, Image.Image):
        return _encoded(image, "PNG")
    content = read_bytes(image)
    opened = open_image(io.BytesIO(content), name=str(image))
    kind = image_format(io.BytesIO(content), name=str(image))
    return _url(kind, content) if kind in _SENT_AS_IS else _encoded(opened, "PNG")


def page_image(path: Path) -> str | None:
    """A data URL of an image, made smaller where that keeps a page small; None if unreadable."""
    image = _readable(path)
    if image is None:
        return None
    if max(image.size) <= _PAGE_SIZE:
        return _encoded(image, "PNG", optimize=True)
    image.thumbnail((_PAGE_SIZE, _PAGE_SIZE))
    return _encoded(image, "JPEG", quality=85)


def thumbnails(paths: Sequence[Path], budget: int) -> dict[Path, str]:
    """A data URL for each image, of at most `budget` characters in all.

    Each image gets an equal share and the largest size that fits it. An image for which even the
    smallest does not, or that cannot be read, is left out: its sample ended as an error, and a
    report has to show that. WebP, because the tables of a JPEG alone would take more than such a
    share.
    """
    different = list(dict.fromkeys(paths))
    share = budget // max(1, len(different))
    urls = {path: _thumbnail(path, share) for path in different}
    return {path: url for path, url in urls.items() if url is not None}


def _thumbnail(path: Path, most: int) -> str | None:
    image = _readable(path)
    if image is None:
        return None
    for size in THUMBNAIL_SIZES:
        image.thumbnail((size, size))  # never enlarges
        url = _encoded(image, "WEBP", quality=_THUMBNAIL_QUALITY, method=2)
        if len(url) <= most:
            return url
    return None


def _readable(path: Path) -> Image.Image | None:
    try:
        return open_image(path)
    except (ValueError, OSError):
        return None


def _encoded(image: Image.Image, kind: str, **options: Any) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return _url(kind, stream.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode('ascii')}"

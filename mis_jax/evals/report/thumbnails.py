"""Small pictures for a page: as large as a budget allows, never larger than needed."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

from mis_jax.data.images import open_image

SIZES = (160, 112, 80, 56, 40, 28, 20)
"""Longest sides in pixels, tried from the first."""

QUALITY = 55
_PREFIX = "data:image/webp;base64,"


def thumbnails(paths: Sequence[Path], budget: int) -> dict[Path, str]:
    """A data URL for each picture, of at most ``budget`` characters in all.

    Each picture gets an equal share and the largest size that fits it. A picture for which even
    the smallest does not, or that cannot be read, is left out: its sample ended as an error, and
    a report has to show that. WebP, because the tables of a JPEG alone would take more
    than such a share.
    """
    different = list(dict.fromkeys(paths))
    share = budget // max(1, len(different))
    urls = {path: _url(path, share) for path in different}
    return {path: url for path, url in urls.items() if url is not None}


def _url(path: Path, share: int) -> str | None:
    try:
        picture = open_image(path)
    except (ValueError, OSError):
        return None
    for size in SIZES:
        picture.thumbnail((size, size))  # never enlarges
        stream = io.BytesIO()
        picture.save(stream, "WEBP", quality=QUALITY, method=2)
        url = _PREFIX + base64.b64encode(stream.getvalue()).decode("ascii")
        if len(url) <= share:
            return url
    return None

"""Pictures as they travel in a chat request."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from mis_jax.data.images import image_format, open_image

_SENT_AS_IS = {"PNG", "JPEG", "WEBP"}


def data_uri(picture: Path | Image.Image) -> str:
    """A file's own bytes, or PNG where servers do not know its format or there is no file.

    ValueError when it is damaged: a server may answer about half a picture without a word.
    """
    if isinstance(picture, Image.Image):
        return _uri("png", _png(picture))
    path = picture
    content = path.read_bytes()
    image = open_image(io.BytesIO(content), name=str(path))
    kind = image_format(io.BytesIO(content), name=str(path))
    if kind not in _SENT_AS_IS:
        kind, content = "PNG", _png(image)
    return _uri(kind.lower(), content)


def picture_part(picture: Path | Image.Image) -> dict[str, Any]:
    """A picture as a part of a message."""
    return {"type": "image_url", "image_url": {"url": data_uri(picture)}}


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"

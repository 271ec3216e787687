"""Images of a request: data URIs, and files below the one folder that the server allows.

Nothing is ever fetched: a server that opens addresses for its clients opens its own network to
them.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from PIL import Image

from mis_jax.data.images import MAX_PIXELS, image_size, open_image
from mis_jax.server.errors import bad_request

NamedUrl = tuple[str, str]  # the field it stands in, and its value
Source = Path | io.BytesIO
_LONGEST_PATH = 4096  # of the system


def sources_of(urls: Sequence[NamedUrl], folder: Path | None) -> list[Source]:
    """Where every image is read from; ApiError 400 for a URL that is not allowed."""
    return [_source(url, name, folder) for name, url in urls]


def sizes_of(
    urls: Sequence[NamedUrl], sources: Sequence[Source], max_pixels: int
) -> list[tuple[int, int]]:
    """Widths and heights, from the headers alone; ApiError 400 for no image or too many pixels."""
    sizes = []
    for (name, _), source in zip(urls, sources, strict=True):
        try:
            sizes.append(image_size(source, name=name, max_pixels=min(max_pixels, MAX_PIXELS)))
        except ValueError as error:
            raise bad_request(str(error), name) from None
        if isinstance(source, io.BytesIO):
            source.seek(0)
    total = sum(width * height for width, height in sizes)
    if total > max_pixels:
        raise bad_request(
            f"the images have {total} pixels together; this server takes {max_pixels} in a "
            "request: scale them down",
            "messages",
        )
    return sizes


def decoded(urls: Sequence[NamedUrl], sources: Sequence[Source]) -> list[Image.Image]:
    """The images as RGB; ApiError 400 for one that is damaged."""
    images = []
    for (name, _), source in zip(urls, sources, strict=True):
        try:
            images.append(open_image(source, name=name))
        except ValueError as error:
            raise bad_request(str(error), name) from None
    return images


def _source(url: str, name: str, folder: Path | None) -> Source:
    scheme = url[: url.find(":")].lower() if ":" in url[:16] else ""
    if scheme == "data":
        return _data(url, name)
    if scheme in ("http", "https", "ftp"):
        raise bad_request(
            f"{name}: this server fetches nothing; send the image as a data URI "
            "(data:image/png;base64,...)",
            name,
        )
    return _file(url, name, folder)


def _data(url: str, name: str) -> io.BytesIO:
    head, comma, content = url.partition(",")
    kind, *options = head[len("data:") :].lower().split(";")
    if not comma or not kind.startswith("image/") or "base64" not in options:
        shown = head[:40]
        raise bad_request(f"{name} must start with 'data:image/...;base64,', not {shown!r}", name)
    try:
        return io.BytesIO(base64.b64decode(content, validate=True))
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{name} is no valid base64 ({error})", name) from None


def _file(url: str, name: str, folder: Path | None) -> Path:
    if folder is None:
        raise bad_request(
            f"{name}: this server opens no files; send the image as a data URI, or start the "
            "server with --allow-image-folder",
            name,
        )
    # One message whatever lies outside the folder: nobody learns which files there are.
    outside = bad_request(f"{name} names no file inside the folder that this server allows", name)
    path = url
    if len(url) > _LONGEST_PATH:
        raise outside
    if url.lower().startswith("file:"):
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise outside
        path = unquote(parts.path)
    try:
        root = folder.resolve(strict=True)
        found = (root / path).resolve(strict=True)  # links are followed before the comparison
    except (OSError, ValueError, RuntimeError):  # absent, too long, a null byte, a loop of links
        raise outside from None
    if not (found.is_relative_to(root) and found.is_file()):
        raise outside
    return found

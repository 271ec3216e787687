"""The one place that opens image files: few formats, strict with damage, one clear line of refusal.

Colours are those of Pillow's `convert("RGB")`, which upstream uses, but for one case: 16-bit
greyscale is scaled to 8 bits by the depth of its values. Pillow clips it to white, and a model
would train on a blank picture.
"""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO, Protocol, cast

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from mis_jax.storage.files import open_binary

#: Pillow's names of the formats that are opened; nothing else is ever decoded. Pillow knows 43, and
#: some of those run a program (PostScript), open what they contain in any other format (IPTC, ICNS)
#: or decode in full where only the size was asked (ICO, FITS). Of an animation the first frame.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
#: Some cameras write several JPEGs one behind the other; Pillow opens the first one.
_FOUND_AS_JPEG = "MPO"
#: Images above this many pixels are refused: Pillow's own limit against decompression bombs.
MAX_PIXELS = 178_956_970
#: Images with a longer side are refused: JPEG's limit. It bounds what resizing a strip of one
#: pixel's width takes to about 120 MB; a PNG's side may have 2^31 pixels.
MAX_SIDE = 65_535
_BLOCK = 1 << 20  # bytes read at once


class EncodedImage(Protocol):
    """An encoded image that is stored in a built data set. `str()` names it."""

    def encoded(self) -> bytes: ...


ImageSource = str | os.PathLike[str] | EncodedImage | BinaryIO | Image.Image


class _Refused(ValueError):
    """An image that cannot be used; the message is complete."""


def open_image(
    path_or_image: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image completely, as RGB.

    The EXIF orientation is not applied and alpha is dropped, as the published models saw their
    images. An animation gives its first frame.

    Args:
        path_or_image: a file's path, a `Picture`, an open binary file, or a Pillow image.
        name: what errors call the image; the path when left out.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        ValueError: the file is missing, cut short, damaged, too large or in none of `FORMATS`, or
            it has values that do not fit 8 bits a channel (see `as_rgb`).
    """
    name = name or _name_of(path_or_image)
    with _explained(name, max_pixels), _strict, _opened(path_or_image, name) as image:
        _check_size(image.size, name, max_pixels)
        if image is path_or_image:
            image.load()
        else:
            if image.format == "PNG":
                _check_chunks(cast(IO[bytes], cast(ImageFile.ImageFile, image).fp))
            image.load()
            # It is dropped with the rest of alpha; convert() would warn about it.
            image.info.pop("transparency", None)
        return as_rgb(image, name)


def image_size(
    path_or_image: ImageSource, *, name: str | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Width and height in pixels, as `open_image` would give; only the file's header is read.

    An image that knows its size (Pillow's, one of a built set) is not opened at all.

    Raises:
        ValueError: as `open_image`, but for damage behind the header.
    """
    name = name or _name_of(path_or_image)
    size = getattr(path_or_image, "size", None)
    if not isinstance(size, tuple):
        with _explained(name, max_pixels), _strict, _opened(path_or_image, name) as image:
            size = image.size
    _check_size(size, name, max_pixels)
    return size


def image_format(path_or_image: ImageSource, *, name: str | None = None) -> str:
    """Which of `FORMATS` a file is in, from its header.

    Raises:
        ValueError: as `image_size`.
    """
    name = name or _name_of(path_or_image)
    with _explained(name, MAX_PIXELS), _strict, _opened(path_or_image, name) as image:
        found = image.format or ""
    return "JPEG" if found == _FOUND_AS_JPEG else found


def as_rgb(image: Image.Image, name: str = "(in memory)") -> Image.Image:
    """An image in 8-bit RGB; alpha is dropped.

    16-bit greyscale keeps the upper 8 of the bits that its values take: 8, 10, 12, 14 or 16, since
    cameras and scanners store 12 bits in 16, and a file does not say which. Greyscale of 32 bits or
    floating point is taken as it stands if all its values lie in 0 to 255.

    Raises:
        ValueError: values outside 0 to 255, or floating-point values that all lie in 0 to 1, where
            nobody can say which of them is white.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        depth = max(8, int(values.max(initial=0)).bit_length())
        upper = values >> (depth + depth % 2 - 8)
        return Image.fromarray(upper.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        low, high = values.min(), values.max()  # not a number if one of them is none
        dim = image.mode == "F" and 0 < high <= 1
        if not (low >= 0 and high <= 255) or dim:
            raise _Refused(
                f"image {name} has 32-bit values from {low:g} to {high:g}, which are no 8-bit "
                "colours; scale them to 0 to 255 and save it as 8-bit greyscale or RGB"
            )
    return image.convert("RGB")


class _Strict:
    """Holds `LOAD_TRUNCATED_IMAGES` off while an image is read here.

    It is a global of Pillow that other libraries switch on (tensorflow-datasets does); a file that
    is cut short would then come out half blank, without a word. Readers are counted, so that
    threads need not wait for each other, and the last one out restores what was found.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._found = False

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            self._found = self._found or ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0 and self._found:
                ImageFile.LOAD_TRUNCATED_IMAGES, self._found = True, False


_strict = _Strict()


@contextmanager
def _opened(source: ImageSource, name: str) -> Iterator[Image.Image]:
    """The image with its header read; a file that is opened here is closed at the end."""
    if isinstance(source, Image.Image):
        unread = bool(getattr(source, "tile", None))  # opened by the caller, not yet decoded
        if unread and source.format not in (*FORMATS, _FOUND_AS_JPEG):
            raise _Refused(_other_format(name, source.format))
        yield source
        return
    stream = _stream(source)
    try:
        if stream is not source and not stream.read(1):
            raise _Refused(f"image {name} is empty (0 bytes); fetch or export it again")
        try:
            image = Image.open(stream, formats=FORMATS)
        except UnidentifiedImageError:
            raise _Refused(_other_format(name, None)) from None
        yield image
    finally:
        if stream is not source:
            stream.close()


def _other_format(name: str, found: str | None) -> str:
    what = f"{found} is not opened" if found else "no image format fits its header"
    return (
        f"image {name} cannot be decoded ({what}); it is damaged, not an image or none of "
        f"{', '.join(FORMATS)}: fetch it again or export it as PNG"
    )


def _stream(source: str | os.PathLike[str] | EncodedImage | BinaryIO) -> BinaryIO:
    if isinstance(source, str | os.PathLike):
        return open_binary(Path(source))
    if hasattr(source, "encoded"):
        return io.BytesIO(cast(EncodedImage, source).encoded())
    return cast(BinaryIO, source)


@contextmanager
def _explained(name: str, max_pixels: int) -> Iterator[None]:
    """Whatever goes wrong with an image, as one line with the remedy."""
    try:
        yield
    except (_Refused, MemoryError):
        raise
    except FileNotFoundError:
        raise ValueError(
            f"image {name} does not exist; check the path and the image root folder"
        ) from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise ValueError(
            f"image {name} cannot be opened ({error.strerror}); give a readable file"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"image {name} is refused as too large ({error}; the limit is {max_pixels} pixels); "
            "scale it down first"
        ) from error
    except Exception as error:
        # Pillow's decoders report damaged files with many exception types (OSError, SyntaxError,
        # ValueError, struct.error, ...): all of them mean that this file is unusable.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"image {name} cannot be decoded ({reason}); it is cut short, damaged or not an image: "
            "fetch or export it again"
        ) from error


def _check_size(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels or max(size) > MAX_SIDE:
        raise _Refused(
            f"image {name} is refused as too large ({width} x {height} pixels; the limit is "
            f"{max_pixels} pixels, {MAX_SIDE} on a side); scale it down first"
        )


def _check_chunks(file: IO[bytes]) -> None:
    """Go through a PNG to its end: Pillow ignores the checksums of the chunks with the pixels.

    Checksums of chunks that a reader may ignore are left to Pillow.
    """
    place = file.tell()
    file.seek(8)  # behind the signature
    kind = b""
    while kind != b"IEND":
        head = file.read(8)
        if len(head) < 8:
            raise OSError("the file ends before its IEND chunk")
        length, kind = struct.unpack(">I4s", head)
        checksum = zlib.crc32(kind)
        while length:
            block = file.read(min(length, _BLOCK))
            if not block:
                raise OSError(f"the file ends inside its {kind.decode('latin-1')} chunk")
            checksum = zlib.crc32(block, checksum)
            length -= len(block)
        if kind[:1].isupper() and file.read(4) != checksum.to_bytes(4, "big"):
            raise OSError(f"wrong checksum of its {kind.decode('latin-1')} chunk")
        if kind[:1].islower():
            file.seek(4, os.SEEK_CUR)
    file.seek(place)


def _name_of(source: ImageSource) -> str:
    """What to call an image in an error."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    if isinstance(source, Path) or hasattr(source, "encoded"):
        return str(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or "(in memory)")

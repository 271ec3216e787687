"""Image files of every unusual and every damaged kind: the right pixels, or one line that helps.

Every file is made here. A file that is cut short gives all of its pixels or is refused; no part of
a picture is ever made up.
"""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hostile_files import POSTSCRIPT, iptc, nothing_started
from PIL import Image, ImageFile, PngImagePlugin

from mis_jax.data.images import (
    FORMATS,
    MAX_PIXELS,
    MAX_SIDE,
    as_rgb,
    image_format,
    image_size,
    open_image,
)
from mis_jax.data.tiling import tile_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes, *, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def colours(width: int = 61, height: int = 47) -> Image.Image:
    """A smooth picture of every colour."""
    small = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def pixels(source) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    assert type(image) is Image.Image  # nothing of the file is left to be read
    if not isinstance(source, Image.Image | io.BytesIO):
        assert image_size(source) == image.size
    return np.asarray(image)


def refusal(source, *, of_header: bool) -> str:
    """The line that `open_image` says, and `image_size` too where a header tells the trouble."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the callers look at the message
        open_image(source)
    message = str(caught.value)
    assert message.startswith(f"image {source} ")
    assert "\n" not in message and "<_io" not in message
    if of_header:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            image_size(source)
        assert str(caught.value) == message
    else:
        assert image_size(source)
    return message


# --- cut short and damaged ---

WHOLE = {
    "png": ("PNG", {}),
    "palette.png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 90}),
    "progressive.jpg": ("JPEG", {"progressive": True}),
    "webp": ("WEBP", {"lossless": True}),
    "lossy.webp": ("WEBP", {}),
    "gif": ("GIF", {}),
    "bmp": ("BMP", {}),
    "tiff": ("TIFF", {"compression": "tiff_deflate"}),
}


@pytest.mark.parametrize("suffix", WHOLE)
@pytest.mark.parametrize("permissive", [False, True], ids=["as set", "switched on elsewhere"])
def test_a_file_cut_anywhere_gives_every_pixel_or_is_refused(suffix, permissive, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", permissive)
    kind, options = WHOLE[suffix]
    image = colours().quantize(16) if "palette" in suffix else colours()
    content = encoded(image, kind, **options)
    whole = pixels(io.BytesIO(content))
    refused = 0
    cuts = sorted({*range(0, len(content), 41), *range(len(content) - 30, len(content))})
    for cut in cuts:
        try:
            found = pixels(io.BytesIO(content[:cut]))
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(found, whole), cut
    assert refused > len(cuts) - 30
    assert ImageFile.LOAD_TRUNCATED_IMAGES is permissive
    if kind == "PNG":
        assert refused == len(cuts)


@pytest.mark.parametrize("suffix", WHOLE)
def test_changed_bytes_are_refused_in_one_line_or_not_noticed(suffix):
    """Never another exception, whatever Pillow's decoders make of them."""
    random = np.random.default_rng(zlib.crc32(suffix.encode()))
    kind, options = WHOLE[suffix]
    content = encoded(colours(), kind, **options)
    for _ in range(60):
        changed = bytearray(content)
        for place in random.integers(0, random.choice([60, len(content)]), 3):
            changed[place] = random.integers(256)
        try:
            found = pixels(io.BytesIO(changed))
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert kind != "PNG" or found.shape == (47, 61, 3)


def test_a_large_png_and_jpeg_cut_in_the_middle(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8)
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG")):
        content = encoded(Image.fromarray(noise), kind)
        assert len(content) > 1 << 17  # Pillow reads 64 KB at a time
        path = write(tmp_path / name, content[: len(content) // 2])
        assert "cut short, damaged" in refusal(path, of_header=False)


def test_strictness_holds_in_threads_and_the_setting_is_restored(monkeypatch):
    """Other readers of the process find the setting as another library left it."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    good = encoded(colours(200, 200), "JPEG")
    bad, wrong = good[:-200], []
    assert Image.open(io.BytesIO(bad)).convert("RGB").size == (200, 200)  # what we must not do

    def read() -> None:
        for _ in range(60):
            open_image(io.BytesIO(good))
            try:
                open_image(io.BytesIO(bad))
                wrong.append("a file cut short was read")
            except ValueError:
                pass

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("name", ["empty.jpg", "empty.png"])
def test_files_of_no_bytes(tmp_path, name):
    message = refusal(write(tmp_path / name, b""), of_header=True)
    assert "is empty (0 bytes); fetch or export it again" in message


def test_a_text_named_png(tmp_path):
    path = write(tmp_path / "text.png", b"<html>404 not found</html>")
    message = refusal(path, of_header=True)
    assert "cannot be decoded (no image format fits its header)" in message


def test_a_missing_file_a_folder_and_a_file_as_a_folder(tmp_path):
    write(tmp_path / "a.png", b"x")
    assert "does not exist" in refusal(tmp_path / "none.png", of_header=True)
    for path in (tmp_path, tmp_path / "a.png" / "b.png"):
        assert "cannot be opened" in refusal(path, of_header=True)


def test_chunks_with_a_wrong_checksum(tmp_path):
    """Pillow itself looks at none of the checksums behind the first IDAT."""
    body = zlib.compress(b"\0" + b"\x10\x20\x30" * 4)
    end = chunk(b"IEND", b"")
    pieces = SIGNATURE, header(4, 1), chunk(b"IDAT", body)
    good = write(tmp_path / "good.png", b"".join(pieces) + end)
    assert pixels(good).tolist() == [[[16, 32, 48]] * 4]
    wrong = chunk(b"IDAT", body, checksum=7)
    assert Image.open(io.BytesIO(b"".join(pieces[:2]) + wrong + end)).load()
    path = write(tmp_path / "pixels.png", b"".join(pieces[:2]) + wrong + end)
    assert "(wrong checksum of its IDAT chunk)" in refusal(path, of_header=False)
    broken = header(4, 1)[:-1] + b"\0"
    path = write(tmp_path / "header.png", SIGNATURE + broken + pieces[2] + end)
    assert "cannot be decoded" in refusal(path, of_header=True)
    comment = chunk(b"tEXt", b"Comment\0harmless", checksum=7)
    path = write(tmp_path / "comment.png", b"".join(pieces) + comment + end)
    assert pixels(path).shape == (1, 4, 3)  # a reader may ignore such a chunk
    path = write(tmp_path / "long.png", b"".join(pieces) + b"\x7f\xff\xff\xffIDATxyz")
    assert "(the file ends inside its IDAT chunk)" in refusal(path, of_header=False)
    path = write(tmp_path / "endless.png", b"".join(pieces))
    assert "(the file ends before its IEND chunk)" in refusal(path, of_header=False)


def test_a_png_with_a_huge_text(tmp_path):
    """As it stands it does no harm; one that unpacks to more than Pillow's limit is refused."""
    image, text = colours(), "a long prompt " * 500_000
    plain = PngImagePlugin.PngInfo()
    plain.add_text("parameters", text)
    path = write(tmp_path / "plain.png", encoded(image, "PNG", pnginfo=plain))
    assert path.stat().st_size > 7_000_000
    np.testing.assert_array_equal(pixels(path), np.asarray(image))
    packed = PngImagePlugin.PngInfo()
    packed.add_text("parameters", text, zip=True)
    path = write(tmp_path / "packed.png", encoded(image, "PNG", pnginfo=packed))
    assert path.stat().st_size < 100_000
    assert "Decompressed data too large" in refusal(path, of_header=True)


# --- too large ---


def test_bombs_are_refused_by_their_header(tmp_path, monkeypatch):
    content = SIGNATURE + header(30_000, 30_000, depth=1, colour=0) + chunk(b"IDAT", b"")
    path = write(tmp_path / "bomb.png", content + chunk(b"IEND", b""))
    assert "is refused as too large" in refusal(path, of_header=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # another library took the limit away
    message = refusal(path, of_header=True)
    assert f"too large (30000 x 30000 pixels; the limit is {MAX_PIXELS} pixels" in message


@pytest.mark.parametrize("size", [(1, MAX_SIDE + 1), (MAX_SIDE + 1, 1), (2, 1 << 26)])
def test_strips_that_would_take_gigabytes_to_resize(tmp_path, size):
    content = SIGNATURE + header(*size, depth=1, colour=0) + chunk(b"IDAT", b"")
    path = write(tmp_path / "strip.png", content + chunk(b"IEND", b""))
    assert f"{size[0]} x {size[1]} pixels; the limit is" in refusal(path, of_header=True)


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1), (1, MAX_SIDE)])
def test_thin_strips_are_tiled_as_upstream_tiles_them(tmp_path, size):
    image = colours(*size)
    path = write(tmp_path / "strip.png", encoded(image, "PNG"))
    tiles = tile_image(open_image(path), 6, image_size=56)
    columns, rows = (1, 6) if size[0] == 1 else (6, 1)
    whole = image.resize((columns * 56, rows * 56), Image.Resampling.BICUBIC)
    for i, tile in enumerate(tiles[:-1]):
        x, y = (0, 56 * i) if size[0] == 1 else (56 * i, 0)
        np.testing.assert_array_equal(tile, np.asarray(whole.crop((x, y, x + 56, y + 56))))
    thumbnail = image.resize((56, 56), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(tiles[-1], np.asarray(thumbnail))


# --- unusual kinds of pixels ---


def test_greyscale_of_16_bits_keeps_its_upper_8(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    for name in ("grey.png", "grey.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        found = pixels(tmp_path / name)
        np.testing.assert_array_equal(found, (values >> 8)[..., None].repeat(3, -1))
    big_endian = Image.frombytes("I;16B", (32, 32), values.astype(">u2").tobytes())
    big_endian.save(tmp_path / "big.tiff")
    np.testing.assert_array_equal(pixels(tmp_path / "big.tiff")[..., 0], values >> 8)
    tiles = tile_image(Image.fromarray(values), 1, image_size=32)
    np.testing.assert_array_equal(tiles[0, ..., 1], values >> 8)
    clipped = np.asarray(Image.fromarray(values).convert("RGB"))
    assert (clipped == 255).mean() > 0.99  # what Pillow makes of it


@pytest.mark.parametrize(("bits", "shift"), [(3, 0), (8, 0), (10, 2), (12, 4), (13, 6), (16, 8)])
def test_greyscale_of_fewer_bits_in_16_is_not_black(tmp_path, bits, shift):
    values = (np.arange(4096).reshape(64, 64) % 2**bits).astype(np.uint16)
    values[0, 0] = 2**bits - 1
    Image.fromarray(values).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png")[..., 0], values >> shift)


def test_colours_of_16_bits_keep_their_upper_8(tmp_path):
    """Pillow does it as it decodes; greyscale goes by the same rule."""
    values = np.random.default_rng(0).integers(0, 65536, (3, 4, 3)).astype(">u2")
    lines = b"".join(b"\0" + line.tobytes() for line in values)
    content = SIGNATURE + header(4, 3, depth=16) + chunk(b"IDAT", zlib.compress(lines))
    path = write(tmp_path / "colour.png", content + chunk(b"IEND", b""))
    np.testing.assert_array_equal(pixels(path), values >> 8)


WIDE = {
    "integers": (np.array([[0, 70_000]], np.int32), "from 0 to 70000"),
    "negative integers": (np.array([[-1, 200]], np.int32), "from -1 to 200"),
    "floats": (np.array([[0, 255.5]], np.float32), "from 0 to 255.5"),
    "floats without a scale": (np.array([[0, 0.25, 1]], np.float32), "from 0 to 1"),
    "no number": (np.array([[np.nan, 3]], np.float32), "from nan to nan"),
    "infinity": (np.array([[0, np.inf]], np.float32), "from 0 to inf"),
}


@pytest.mark.parametrize("case", WIDE)
def test_values_of_32_bits_that_are_no_colours(tmp_path, case):
    values, shown = WIDE[case]
    path = tmp_path / "wide.tiff"
    Image.fromarray(values).save(path)
    message = refusal(path, of_header=False)
    assert f"has 32-bit values {shown}, which are no 8-bit colours; scale them" in message
    with pytest.raises(ValueError, match=r"image \(in memory\) has 32-bit values"):
        tile_image(Image.fromarray(values), 1, image_size=28)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_of_32_bits_from_0_to_255(tmp_path, kind):
    values = np.arange(256).reshape(16, 16)
    Image.fromarray(values.astype(kind)).save(tmp_path / "wide.tiff")
    np.testing.assert_array_equal(pixels(tmp_path / "wide.tiff")[..., 2], values)
    black = as_rgb(Image.fromarray(np.zeros((2, 2), kind)))
    assert not np.asarray(black).any()


def test_a_jpeg_in_cmyk(tmp_path):
    path = tmp_path / "print.jpg"
    colours().convert("CMYK").save(path, quality=95)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
        np.testing.assert_array_equal(pixels(path), np.asarray(image.convert("RGB")))
    difference = pixels(path).astype(int) - np.asarray(colours())
    assert abs(difference).mean() < 12  # not a negative


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 16))])
def test_a_palette_with_transparency(tmp_path, transparency):
    image = colours().quantize(16)
    path = write(tmp_path / "a.png", encoded(image, "PNG", transparency=transparency))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pixels(path)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "L", "1"])
def test_alpha_is_dropped_and_greyscale_repeated(tmp_path, mode):
    image = colours().convert("L" if mode == "LA" else "RGB").convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = write(tmp_path / "a.png", encoded(image, "PNG"))
    found = pixels(path)
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    colour = np.asarray(image.convert("L" if mode in ("LA", "L", "1") else "RGB"))
    np.testing.assert_array_equal(found if colour.ndim == 3 else found[..., 0], colour)


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        with Image.open(tmp_path / name) as image:
            assert getattr(image, "n_frames", 1) == 3
        assert (pixels(tmp_path / name) == (255, 0, 0)).all()


@pytest.mark.parametrize("content", [POSTSCRIPT, iptc(POSTSCRIPT)], ids=["bare", "in IPTC"])
def test_postscript_is_not_run(tmp_path, monkeypatch, content):
    """Pillow would hand it to Ghostscript, whatever the file is called and whatever holds it."""
    monkeypatch.setenv("PATH", "")
    assert len(content) < 369
    path = write(tmp_path / "photo.png", content)
    with nothing_started():
        message = refusal(path, of_header=True)
    assert "no image format fits its header" in message and "JPEG, PNG, WEBP" in message
    lazily = Image.open(path)  # by a caller's own hand, and not yet decoded
    with nothing_started(), pytest.raises(ValueError, match=r"\((EPS|IPTC) is not opened\)"):
        open_image(lazily)


def test_only_the_formats_of_the_list_are_opened(tmp_path):
    """Of everything that this Pillow can write; by their content alone."""
    Image.init()
    opened, path = set(), tmp_path / "photo.any"  # Pillow's SPIDER takes the ending for its own
    written = set()
    for kind in sorted(Image.SAVE.keys() & Image.OPEN.keys()):
        with contextlib.suppress(OSError, ValueError):  # it takes no RGB
            colours(32, 32).save(path, kind)
            written.add(kind)
            with contextlib.suppress(ValueError):
                opened.add(image_format(path))
                assert open_image(path).size == image_size(path) == (32, 32)
    assert opened == set(FORMATS) < written
    assert {"ICO", "PPM", "TGA", "PCX", "SGI"} <= written


def test_pixels_inside_another_file_are_not_decoded(tmp_path):
    """An IPTC of '10x10' held 13300 x 13300: 28 s and 3.2 GB."""
    path = write(tmp_path / "small.png", iptc(encoded(Image.new("L", (13_300, 13_300)), "PNG")))
    assert "no image format fits its header" in refusal(path, of_header=True)


def test_the_first_jpeg_of_several_is_opened(tmp_path):
    """Cameras write such files under the name .jpg; Pillow calls them MPO."""
    path = tmp_path / "camera.jpg"
    colours().save(path, "MPO", save_all=True, append_images=[colours().rotate(90)], quality=95)
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert image_format(path) == "JPEG"
    assert pixels(path).shape == (47, 61, 3)


# --- where the bytes come from ---


class Stored:
    """A picture that is no file of its own, as those of a built data set."""

    def __init__(self, content: bytes, size: tuple[int, int] | None = None):
        self.content = content
        if size:
            self.size = size

    def encoded(self) -> bytes:
        return self.content

    def __str__(self) -> str:
        return "object1.png (record 7)"


def test_pictures_are_read_and_named():
    image = colours()
    np.testing.assert_array_equal(pixels(Stored(encoded(image, "PNG"))), np.asarray(image))
    assert "image object1.png (record 7) is empty" in refusal(Stored(b""), of_header=True)
    refusal(Stored(encoded(image, "PNG")[:-40]), of_header=False)


def test_a_picture_that_knows_its_size_is_not_opened():
    assert image_size(Stored(b"nothing", size=(20, 30))) == (20, 30)
    assert image_size(colours()) == (61, 47)
    with pytest.raises(ValueError, match=r"object1\.png .* too large \(30000 x 30000 pixels"):
        image_size(Stored(b"nothing", size=(30_000, 30_000)))


def test_trouble_in_reading_a_picture_is_told():
    class Broken(Stored):
        def encoded(self) -> bytes:
            raise OSError("record 7\nis damaged")

    assert "(record 7 is damaged)" in refusal(Broken(b""), of_header=True)
    with pytest.raises(ValueError, match=r"^image the second does not exist"):
        image_size("none.png", name="the second")


def test_an_open_file_and_an_image_stay_open_and_unchanged(tmp_path):
    content = encoded(colours().quantize(16), "PNG", transparency=bytes(16))
    stream = io.BytesIO(content)
    assert image_size(stream) == (61, 47)
    np.testing.assert_array_equal(pixels(stream), pixels(io.BytesIO(content)))
    assert not stream.closed
    path = write(tmp_path / "a.png", content)
    with Image.open(path) as image, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.testing.assert_array_equal(pixels(image), pixels(path))
        assert "transparency" in image.info
        assert image.load() and image.mode == "P"

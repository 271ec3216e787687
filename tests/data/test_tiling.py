"""Tiling against Pillow itself and against transformers' image processor."""

from __future__ import annotations

import dataclasses
import io
import itertools

import numpy as np
import pytest
from PIL import Image
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2

from mis_jax.data.images import open_image
from mis_jax.data.processor import Processor
from mis_jax.data.tiling import choose_grid, count_tiles, tile_image, tiles_for_images

BUDGETS = (1, 2, 3, 4, 6, 12, 24)


def random_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours with noise on top: both resampling and clipping are exercised."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    waves = np.stack([np.sin(x + y), np.cos(x * y), np.sin(x - 2 * y), np.cos(y)], -1)
    pixels = 127 * (1 + waves) + random.normal(0, 40, waves.shape)
    pixels = pixels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode)


def test_grid_and_count_agree_with_transformers() -> None:
    sizes = [*range(1, 60, 7), 100, 223, 224, 336, 447, 448, 449, 512, 633, 634, 635, 640, 768]
    sizes += [896, 897, 1024, 1080, 1267, 1344, 1920, 2688, 4032]
    unwrapped = got_ocr2.get_optimal_tiled_canvas.__wrapped__
    for budget in BUDGETS:
        processor = got_ocr2.GotOcr2ImageProcessorPil(
            size={"height": 448, "width": 448}, crop_to_patches=True, max_patches=budget
        )
        for width, height in itertools.product(sizes, sizes):
            grid = choose_grid(width, height, budget)
            assert grid == unwrapped((height, width), (448, 448), 1, budget), (width, height)
        for width, height in itertools.product(sizes[::4], sizes[::4]):
            expected = processor.get_number_of_image_patches(height, width)
            assert count_tiles(width, height, budget) == expected


@pytest.mark.parametrize(
    ("width", "height", "budget", "grid"),
    [
        # By hand, tiles of 448: a square image takes 2 x 2 only above half of 4 tiles' pixels,
        # 0.5 * 4 * 448^2 = 401408, that is from 634 x 634 (401956) on.
        (633, 633, 4, (1, 1)),
        (634, 634, 4, (2, 2)),
        (1024, 1024, 3, (1, 1)),
        (1024, 1024, 12, (3, 3)),
        (800, 400, 6, (2, 1)),
        (400, 800, 6, (1, 2)),
        (5000, 10, 6, (6, 1)),
    ],
)
def test_grid_by_hand(width: int, height: int, budget: int, grid: tuple[int, int]) -> None:
    assert choose_grid(width, height, budget) == grid
    n = grid[0] * grid[1]
    assert count_tiles(width, height, budget) == n + (n > 1)
    assert count_tiles(width, height, budget, use_thumbnail=False) == n


def test_min_tiles_bounds_the_grid_from_below() -> None:
    assert choose_grid(448, 448, 6, min_tiles=4) == (2, 2)
    for arguments in ((448, 448, 0), (0, 10, 6), (10, 0, 6)):
        with pytest.raises(ValueError, match="tile"):
            choose_grid(*arguments)
    with pytest.raises(ValueError, match="min_tiles=3"):
        choose_grid(448, 448, 2, min_tiles=3)


def test_a_checkpoints_least_number_of_tiles(tiny_processor) -> None:
    """`min_dynamic_patch`, by transformers' rule; upstream gives one tile where no grid is left."""
    least = dataclasses.replace(tiny_processor.config, min_tiles=4)
    processor = Processor(least, tiny_processor.tokenizer)
    for budget, size in itertools.product((4, 6, 12), ((56, 56), (112, 56), (40, 150), (300, 80))):
        columns, rows = got_ocr2.get_optimal_tiled_canvas(size[::-1], (56, 56), 4, budget)
        assert processor.tile_count(size, budget) == columns * rows + 1, (size, budget)
        assert len(processor.tiles(random_image(*size), budget)) == columns * rows + 1
    assert processor.tile_count((448, 448), 3) == 1


def test_budget_is_shared_by_images() -> None:
    assert [tiles_for_images(n, 6) for n in (0, 1, 2, 3, 4, 6, 7)] == [6, 6, 3, 2, 1, 1, 1]


@pytest.mark.parametrize("size", [(37, 61), (448, 448), (1300, 600), (500, 1700), (900, 905)])
@pytest.mark.parametrize(("budget", "side"), [(1, 448), (4, 448), (12, 64), (6, 56)])
@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_are_pillows_crops(
    size: tuple[int, int], budget: int, side: int, thumbnail: bool
) -> None:
    image = random_image(*size, seed=sum(size))
    tiles = tile_image(image, budget, image_size=side, use_thumbnail=thumbnail)
    columns, rows = choose_grid(*size, budget, image_size=side)
    resized = image.resize((columns * side, rows * side), Image.Resampling.BICUBIC)
    expected = [
        np.asarray(resized.crop((c * side, r * side, (c + 1) * side, (r + 1) * side)))
        for r in range(rows)
        for c in range(columns)
    ]
    if thumbnail and columns * rows > 1:
        expected.append(np.asarray(image.resize((side, side), Image.Resampling.BICUBIC)))
    assert tiles.dtype == np.uint8
    assert tiles.flags["C_CONTIGUOUS"]
    assert tiles.flags["WRITEABLE"]
    np.testing.assert_array_equal(tiles, np.stack(expected))
    assert len(tiles) == count_tiles(*size, budget, image_size=side, use_thumbnail=thumbnail)


@pytest.mark.parametrize("size", [(300, 200), (1000, 1000), (1500, 400), (450, 1350)])
@pytest.mark.parametrize("budget", [1, 4, 12])
def test_tiles_are_those_of_transformers(size: tuple[int, int], budget: int) -> None:
    image = random_image(*size, seed=3)
    processor = got_ocr2.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        max_patches=budget,
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(image, return_tensors="np")["pixel_values"]
    tiles = tile_image(image, budget)
    np.testing.assert_array_equal(tiles.transpose(0, 3, 1, 2), expected)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK", "1", "LA"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = random_image(90, 50).convert("L" if mode == "LA" else "RGB").convert(mode)
    assert tile_image(image, 4, image_size=28).shape == (3, 28, 28, 3)
    assert open_image(image).mode == "RGB"


def test_open_image_reads_paths_files_and_images(tmp_path) -> None:
    image = random_image(40, 30)
    image.save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), image):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.asarray(image))
    opened = open_image(io.BytesIO((tmp_path / "a.png").read_bytes()))
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))


def test_open_image_drops_alpha_and_ignores_orientation(tmp_path) -> None:
    image = random_image(40, 30, mode="RGBA")
    image.putalpha(7)
    image.save(tmp_path / "a.png")
    expected = np.asarray(image)[..., :3]
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "a.png")), expected)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    random_image(40, 30).save(tmp_path / "b.jpg", exif=exif)
    assert open_image(tmp_path / "b.jpg").size == (40, 30)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
def test_truncated_file_is_one_clear_error(tmp_path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    random_image(200, 200).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=rf"cut\.{suffix}.*again"):
        open_image(path)


def test_unusable_files_name_the_file_and_the_remedy(tmp_path) -> None:
    (tmp_path / "text.png").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    for name, remedy in (
        ("missing.png", "check the path"),
        ("text.png", "fetch it again or export it as PNG"),
        ("empty.png", "fetch or export it again"),
        ("", "readable file"),
    ):
        with pytest.raises(ValueError, match=remedy) as caught:
            open_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ValueError, match="image 2 of request 7"):
        open_image(tmp_path / "missing.png", name="2 of request 7")


def test_decompression_bombs_are_refused_before_decoding(tmp_path, monkeypatch) -> None:
    path = tmp_path / "bomb.png"
    random_image(300, 300).save(path)
    with pytest.raises(ValueError, match=r"bomb\.png is refused as too large.*300 x 300"):
        open_image(path, max_pixels=89_999)
    assert open_image(path, max_pixels=90_000).size == (300, 300)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own guard fires first
    with pytest.raises(ValueError, match=r"bomb\.png is refused as too large"):
        open_image(path)

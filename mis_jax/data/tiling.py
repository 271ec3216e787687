"""Images to tiles: InternVL's dynamic resolution, in Pillow and NumPy alone.

An image is stretched onto a grid of square tiles whose shape is nearest to its own, cut row by
row, and followed by one thumbnail of the whole image when the grid has more than one tile.
Everything stays uint8 RGB here; scaling and normalisation happen on the device.

Source: `dynamic_preprocess` in OpenGVLab/InternVL, `internvl_chat/internvl/train/dataset.py`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mis_jax.data.images import as_rgb


@lru_cache(maxsize=64)
def _candidate_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (columns, rows) of min_tiles to max_tiles tiles, fewest tiles first."""
    grids = [
        (columns, rows)
        for columns in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // columns + 1)
        if columns * rows >= min_tiles
    ]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))


def choose_grid(
    width: int, height: int, max_tiles: int, *, min_tiles: int = 1, image_size: int = 448
) -> tuple[int, int]:
    """The tile grid whose aspect ratio is nearest to the image's.

    Args:
        width, height: the image, in pixels.
        max_tiles, min_tiles: bounds on columns * rows; the thumbnail is not counted.
        image_size: the side of a tile, in pixels.

    Returns:
        (columns, rows).

    Raises:
        ValueError: an empty image, or bounds that leave no grid.
    """
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width} x {height} pixels cannot be tiled; it is empty")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(
            f"max_tiles={max_tiles} with min_tiles={min_tiles} leaves no tile grid; "
            "give 1 <= min_tiles <= max_tiles"
        )
    shape = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _candidate_grids(min_tiles, max_tiles):
        difference = abs(shape - columns / rows)
        # Of two equally near shapes the larger grid wins only if the image has the pixels for it:
        # more than half of what that grid would show.
        enough_pixels = width * height > 0.5 * image_size * image_size * columns * rows
        if difference < best_difference or (difference == best_difference and enough_pixels):
            best, best_difference = (columns, rows), difference
    return best


def count_tiles(
    width: int,
    height: int,
    max_tiles: int,
    *,
    min_tiles: int = 1,
    image_size: int = 448,
    use_thumbnail: bool = True,
) -> int:
    """How many tiles `tile_image` makes of an image of this size, thumbnail included.

    Raises:
        ValueError: as `choose_grid`.
    """
    columns, rows = choose_grid(
        width, height, max_tiles, min_tiles=min_tiles, image_size=image_size
    )
    return columns * rows + int(use_thumbnail and columns * rows > 1)


def tiles_for_images(n_images: int, max_tiles: int) -> int:
    """The `max_tiles` of each image when `n_images` share one budget; at least 1.

    Thumbnails come on top, so 2 images with a budget of 6 make up to 2 * (3 + 1) tiles.
    """
    return max(1, max_tiles // max(1, n_images))


def tile_image(
    image: Image.Image,
    max_tiles: int,
    *,
    min_tiles: int = 1,
    image_size: int = 448,
    use_thumbnail: bool = True,
) -> UInt8[np.ndarray, "tiles size size 3"]:
    """Cut an image into tiles, row by row, the thumbnail last when there is more than one.

    Equal bit for bit to Pillow's bicubic `resize` followed by `crop`.

    Args:
        image: any mode; converted by `as_rgb` (alpha is dropped).
        max_tiles, min_tiles: bounds on the grid, in tiles; the thumbnail is not counted.
        image_size: the side of a tile, in pixels.
        use_thumbnail: append the whole image at tile size when the grid has several tiles.

    Returns:
        uint8 tiles, [tiles, image_size, image_size, 3].

    Raises:
        ValueError: as `choose_grid` and `as_rgb`.
    """
    image = image if image.mode == "RGB" else as_rgb(image)
    columns, rows = choose_grid(
        image.width, image.height, max_tiles, min_tiles=min_tiles, image_size=image_size
    )
    grid, thumbnail = rows * columns, int(use_thumbnail and rows * columns > 1)
    tiles = np.empty((grid + thumbnail, image_size, image_size, 3), np.uint8)
    # A view in which the tiles lie as they do on the resized image, which is then copied once.
    placed = tiles[:grid].reshape(rows, columns, image_size, image_size, 3).swapaxes(1, 2)
    placed[...] = _resized(image, columns * image_size, rows * image_size).reshape(placed.shape)
    if thumbnail:
        tiles[-1] = _resized(image, image_size, image_size)
    return tiles


def _resized(image: Image.Image, width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """The image stretched to width x height, the aspect ratio not kept; read-only."""
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

"""Picture files to tiles on one core: ours against Pillow's own floor and transformers' processor.

Ours is what training does with a file, `Processor.tiles`: read, check, decode, choose the grid,
resize, cut. The floor is the same decoding and the same resizing and cropping written straight in
Pillow, for a grid that is known, and ends with the same uint8 array, since a model takes no Pillow
pictures. Nothing is checked or chosen there. (A floor that ends with Pillow's pictures would be
about 3 % lower.) transformers' processor goes on to `pixel_values`, float32 and normalised, as it
always does, where ours leaves that to the device.

The pictures are 1024 x 1024 PNG and 1024 x 768 JPEG. All tiles are the same to the bit before
anything is timed. Every side has one core; counted are that core's seconds.
"""

import dataclasses
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from benchmarks.common import save
from benchmarks.harness import Cell, Worker, in_turns, serve, show
from benchmarks.pictures import draw_picture, image_processor, pixels_of

TILE = 448
Peer = Literal["pillow", "transformers"]
_TARGETS: dict[Peer, float] = {"pillow": 1.0, "transformers": 1.5}


@dataclasses.dataclass(frozen=True)
class Workload:
    """Pictures of one kind, and the grid (columns, rows) they are cut into."""

    size: tuple[int, int]
    suffix: str
    budget: int
    grid: tuple[int, int]
    reasons: dict[Peer, str] = dataclasses.field(default_factory=dict)


WORKLOADS = {
    "PNG, 1 tile": Workload(
        (1024, 1024),
        "png",
        3,
        (1, 1),
        {
            "pillow": "the checksums of the pixels are compared, which Pillow leaves out: a "
            "damaged file would be trained on",
            "transformers": "both decode the PNG with Pillow, about four fifths of our time",
        },
    ),
    "JPEG, 7 tiles": Workload((1024, 768), "jpg", 6, (3, 2)),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks preprocessing --rounds 9 --save"""

    pictures: int = 8
    """Of each kind; all of them are read in one measurement."""
    rounds: int = 9
    """Turns of each side."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: Literal["", "ours", "pillow", "transformers"] = ""
    """Used by the benchmark itself: serve one side over stdin and stdout."""
    folder: Path = Path()
    """Of the pictures; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        serve(answering(settings))
        return
    folder = Path(tempfile.mkdtemp(prefix="mis_jax_preprocessing."))
    try:
        draw(folder, settings.pictures)
        found = compare(settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show("pictures a second of one core", found["cells"])
    if settings.save:
        print(f"wrote {save('preprocessing', found)}")


def draw(folder: Path, pictures: int) -> None:
    rng = np.random.default_rng(0)
    for workload in WORKLOADS.values():
        for number in range(pictures):
            draw_picture(folder / f"{number}.{workload.suffix}", workload.size, rng)


def compare(settings: Settings, folder: Path) -> dict[str, Any]:
    """Ours with each peer in turn; a cell for each kind of picture and peer."""
    names = {"pillow": "Pillow", "transformers": image_processor(1)[1]}
    short = {"pillow": "Pillow", "transformers": "transformers"}
    cells = {}
    for peer, target in _TARGETS.items():
        workers = {
            side: Worker("preprocessing", [f"--side={which}", f"--folder={folder}"])
            for side, which in (("ours", "ours"), (f"theirs {names[peer]}", peer))
        }
        asked = [
            Cell(
                f"{name}, beside {short[peer]}",
                work=settings.pictures,
                unit="pictures",
                target=target,
                reason=workload.reasons.get(peer, ""),
            )
            for name, workload in WORKLOADS.items()
        ]
        cells |= in_turns(asked, workers, settings.rounds, agree)
        for worker in workers.values():
            worker.close()
    return {
        "benchmark": "preprocessing",
        "settings": {"pictures": settings.pictures},
        "cells": cells,
    }


def agree(cell: Cell, results: dict[str, dict[str, Any]]) -> None:
    if len({result["tiles"] for result in results.values()}) > 1:
        raise RuntimeError(f"{cell.name}: the tiles differ; times mean nothing")


def answering(settings: Settings) -> Callable[[str], dict[str, Any]]:
    """One side, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    made = {name: side_of(settings.side, workload) for name, workload in WORKLOADS.items()}

    def answer(cell: str) -> dict[str, Any]:
        name = cell.partition(", beside ")[0]
        files = sorted(settings.folder.glob(f"*.{WORKLOADS[name].suffix}"))
        began = time.process_time()
        outcomes = [made[name](file) for file in files]
        seconds = time.process_time() - began
        digest = hashlib.sha256()
        for tiles in outcomes:
            whole = tiles if tiles.dtype == np.uint8 else pixels_of(tiles)
            digest.update(np.ascontiguousarray(whole).tobytes())
        return {"seconds": seconds, "tiles": digest.hexdigest()}

    return answer


def side_of(side: str, workload: Workload) -> Callable[[Path], np.ndarray]:
    if side == "ours":
        from mis_jax.data.images import open_image
        from mis_jax.data.tiling import tile_image

        return lambda file: tile_image(open_image(file), workload.budget, image_size=TILE)
    if side == "pillow":
        return lambda file: by_pillow(file, *workload.grid)
    processor, _ = image_processor(workload.budget)

    def by_transformers(file: Path) -> np.ndarray:
        picture = Image.open(file, formats=("PNG", "JPEG")).convert("RGB")
        return processor([picture], return_tensors="np")["pixel_values"]

    return by_transformers


def by_pillow(file: Path, columns: int, rows: int) -> np.ndarray:
    """The floor: decode, resize, crop."""
    picture = Image.open(file, formats=("PNG", "JPEG")).convert("RGB")
    whole = picture.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((x * TILE, y * TILE, (x + 1) * TILE, (y + 1) * TILE))
        for y in range(rows)
        for x in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(picture.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile) for tile in tiles])


if __name__ == "__main__":
    main()

"""The vision tower with its projector: ours against transformers' on the same weights and tiles."""

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, Dtype, compared, expect_close, serve, show
from benchmarks.peer import TILE, normalised, write_weights

_REASON = (
    "attention, norms and GELU between the products are 35 to 40 % of the time; XLA:CPU's row "
    "reductions read 2.4 GB/s"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks vision_tower --rounds 5 --save"""

    model: str = "internvl2_5-1b"
    """Name of a published size with Qwen2.5."""
    tiles: tuple[int, ...] = (1, 14)
    """Tiles of a call."""
    rounds: int = 5
    """Turns of each side."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: str = ""
    """Used by the benchmark itself: serve one side over stdin and stdout."""
    dtype: Dtype = "float32"
    """Of one side; used by the benchmark itself."""
    folder: Path = Path()
    """Of the weights; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        serve((ours if settings.side == "ours" else theirs)(settings))
        return
    folder = Path(tempfile.mkdtemp(prefix="mis_jax_vision."))
    try:
        write_weights(settings.model, folder / "weights")
        found = compare(settings, folder / "weights")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(f"tiles a second, {settings.model}", found["cells"])
    if settings.save:
        save(f"vision_tower-{settings.model}", {"benchmark": "vision_tower"} | found)


def compare(settings: Settings, weights: Path) -> dict[str, Any]:
    from mis_jax.flops import projector_work, tile_work
    from mis_jax.model.family import published

    config = published(settings.model)
    cells = [
        Cell(
            "1 tile" if tiles == 1 else f"{tiles} tiles",
            work=tiles,
            unit="tiles",
            flops=tiles * (tile_work(config.vision) + projector_work(config)),
            target=1.0,
            reason=_REASON,
            expensive=tiles > 4,
        )
        for tiles in settings.tiles
    ]
    words = [f"--folder={weights}"]
    return compared("vision_tower", cells, settings.rounds, agree, words)


def agree(cell: Cell, results: dict[str, dict[str, Any]]) -> None:
    expect_close(cell, results, float32=1e-3, bfloat16=5e-2)


def tiles_of(cell: str) -> np.ndarray:
    count = int(cell.split()[0])
    return np.random.default_rng(0).integers(0, 256, (count, TILE, TILE, 3), dtype=np.uint8)


def ours(settings: Settings):
    import jax
    from flax import nnx

    from mis_jax.checkpoint.load import load, open_checkpoint
    from mis_jax.checkpoint.nnx_state import build
    from mis_jax.model.unrolled import unrolled

    checkpoint = load(open_checkpoint(settings.folder), settings.dtype)
    model = build(checkpoint.config, checkpoint.arrays, compute_dtype=settings.dtype)
    graph, state = nnx.split(unrolled(model, consume=True))
    encode = jax.jit(lambda state, tiles: nnx.merge(graph, state).encode_images(tiles))

    def answer(cell: str) -> dict[str, Any]:
        tiles = tiles_of(cell)
        began = time.perf_counter()
        features = np.asarray(encode(state, tiles), np.float32)
        return {"seconds": time.perf_counter() - began, "sample": sample(features)}

    return answer


def theirs(settings: Settings):
    import torch
    from transformers import InternVLForConditionalGeneration

    torch.set_num_threads(2)
    model: Any = InternVLForConditionalGeneration.from_pretrained(
        settings.folder, dtype=getattr(torch, settings.dtype)
    ).eval()

    @torch.no_grad()
    def answer(cell: str) -> dict[str, Any]:
        pixels = torch.from_numpy(normalised(tiles_of(cell))).to(model.dtype)
        began = time.perf_counter()
        features = model.model.get_image_features(pixel_values=pixels)
        seconds = time.perf_counter() - began
        found = getattr(features, "pooler_output", features)
        return {"seconds": seconds, "sample": sample(found.float().numpy())}

    return answer


def sample(features: np.ndarray) -> list[float]:
    """A few hundred numbers that stand for the features of all tiles."""
    return features.reshape(-1)[:: max(1, features.size // 512)].tolist()


if __name__ == "__main__":
    main()

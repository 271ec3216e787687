"""A train step: ours against transformers + torch, or ours alone on an accelerator.

With the peer both sides take the same random weights and the same batch in float32: forward,
backward, clipping and AdamW on every parameter. They run in turns, each in a process of its own, as
two would not fit in memory together; the first step of a process, which compiles, does not count.
Losses must agree, or the figures mean nothing.
"""

import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import run, save
from benchmarks.peer import TILE, normalised, write_weights

_LEARNING_RATE = 4e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks train_step --rounds 3"""

    model: str = "internvl2_5-1b"
    """Name of a published size."""
    tiles: int = 1
    """Tiles of a row."""
    text: int = 128
    """Tokens of a row that are no image, three quarters of them under the loss."""
    rows: int = 1
    """Rows of a step."""
    steps: int = 2
    """Timed steps of a process."""
    rounds: int = 3
    """Processes of each side, in turns."""
    peer: bool = True
    """Run transformers + torch too (float32, CPU); False times ours on any device."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of parameters and computation; without the peer."""
    lora_rank: int = 0
    """Train adapters; without the peer."""
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    """What ours computes again in the backward pass."""
    unroll: bool = False
    """Write our layers out."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: Literal["ours", "theirs"] | None = None
    """Used by the benchmark itself: run one side and write what came of it to `report`."""
    folder: Path = Path()
    """Of the weights; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        measure = ours if settings.side == "ours" else theirs
        report = settings.folder / f"{settings.side}.json"
        report.write_text(json.dumps(measure(settings)))
        return
    folder = Path(tempfile.mkdtemp(prefix="mis_jax_train_step."))
    try:
        if settings.peer:
            write_weights(settings.model, folder / "weights")
        found = compare(settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(settings, found)
    if settings.save:
        name = f"train_step-{settings.model}-{settings.dtype}"
        name += f"-lora{settings.lora_rank}" if settings.lora_rank else ""
        save(name, {"benchmark": "train_step", "settings": plain(settings)} | found)


def compare(settings: Settings, folder: Path) -> dict[str, Any]:
    """Both sides in turns; medians over all timed steps."""
    sides = ("ours", "theirs") if settings.peer else ("ours",)
    found: dict[str, Any] = {side: {"seconds": [], "peak_gib": []} for side in sides}
    for _ in range(settings.rounds):
        for side in sides:
            words = [f"--{k.replace('_', '-')}={v}" for k, v in plain(settings).items()]
            command = [sys.executable, "-m", "benchmarks", "train_step", f"--side={side}"]
            words.append("--peer" if settings.peer else "--no-peer")
            ran = run([*command, f"--folder={folder}", *words])
            report = json.loads((folder / f"{side}.json").read_text())
            found[side]["seconds"] += report.pop("seconds")
            found[side]["peak_gib"].append(report.pop("peak_gib", None) or ran.peak_gib)
            found[side] |= report
    for side in sides:
        found[side]["median_seconds"] = statistics.median(found[side]["seconds"])
    if settings.peer:
        np.testing.assert_allclose(found["ours"]["losses"], found["theirs"]["losses"], rtol=1e-3)
        mine, peer = found["ours"], found["theirs"]
        found["times_faster"] = round(peer["median_seconds"] / mine["median_seconds"], 3)
        found["memory_ratio"] = round(max(mine["peak_gib"]) / max(peer["peak_gib"]), 3)
    return found


def plain(settings: Settings) -> dict[str, Any]:
    """What both sides must know, as words."""
    names = ["model", "tiles", "text", "rows", "steps", "dtype", "lora_rank", "remat"]
    return {name: getattr(settings, name) for name in names}


def show(settings: Settings, found: dict[str, Any]) -> None:
    table = Table(title=f"a step of {settings.model}: {settings.rows} x {length(settings)} tokens")
    for column in ("", "s / step", "spread", "peak GiB", "tokens/s"):
        table.add_column(column)
    for side in ("ours", "theirs"):
        if side in found:
            seconds, median = found[side]["seconds"], found[side]["median_seconds"]
            table.add_row(
                side,
                f"{median:.3f}",
                f"{min(seconds):.3f} to {max(seconds):.3f}",
                f"{max(found[side]['peak_gib']):.2f}",
                f"{settings.rows * length(settings) / median:.0f}",
            )
    console = Console()
    console.print(table)
    for name in ("times_faster", "memory_ratio"):
        if name in found:
            console.print(f"{name.replace('_', ' ')}: {found[name]}")
    if "mfu" in found["ours"]:
        console.print(f"MFU {found['ours']['mfu']:.1%} (causal, vision included)")


def length(settings: Settings) -> int:
    return settings.tiles * 256 + settings.text


def numbers(settings: Settings, vocab: int, image_token: int) -> dict[str, np.ndarray]:
    """The batch of every step: text, the image tokens, text with the loss."""
    rng = np.random.default_rng(0)
    ids = rng.integers(10, min(vocab, image_token) - 1, (settings.rows, length(settings)))
    before = settings.text // 8
    ids[:, before : before + 256 * settings.tiles] = image_token
    loss = np.arange(ids.shape[1]) >= ids.shape[1] - 3 * settings.text // 4
    tiles = rng.integers(0, 256, (settings.rows * settings.tiles, TILE, TILE, 3), dtype=np.uint8)
    return {"ids": ids, "loss": np.broadcast_to(loss, ids.shape), "tiles": tiles}


def ours(settings: Settings) -> dict[str, Any]:
    import jax

    from mis_jax.config import (
        DataConfig,
        DtypeConfig,
        LoraConfig,
        OptimizerConfig,
        RunConfig,
        Source,
        TrainConfig,
    )
    from mis_jax.model.batch import Batch
    from mis_jax.model.family import published
    from mis_jax.sharding import make_mesh, put_batch
    from mis_jax.train.program import make_program
    from mis_jax.weights.checkpoint import open_checkpoint

    opened = open_checkpoint(settings.folder / "weights") if settings.peer else None
    model = opened.config if opened else published(settings.model)
    config = RunConfig(
        Path("unused"),
        Path("unused"),
        DataConfig(sources=(Source("mis", root=Path("unused")),)),
        TrainConfig(
            steps=100,
            global_batch=settings.rows,
            freeze=("vision", "projector", "language") if settings.lora_rank else (),
            remat=settings.remat,
            unroll=settings.unroll,
        ),
        optimizer=OptimizerConfig(
            learning_rate=_LEARNING_RATE, schedule="constant", warmup_ratio=0
        ),
        dtype=DtypeConfig(params=settings.dtype, compute=settings.dtype, moments=settings.dtype),
        lora=LoraConfig(rank=settings.lora_rank),
    )
    mesh = make_mesh(config.mesh)
    program = make_program(config, model, mesh, 100)
    state = program.load(opened) if opened else program.random(seed=0)
    made = numbers(settings, model.text.vocab_size, model.image_token_id)
    place = np.broadcast_to(np.arange(length(settings), dtype=np.int32), made["ids"].shape)
    flat = Batch(
        made["ids"].astype(np.int32),
        place,
        np.ones_like(place),
        made["loss"].astype(np.float32),
        made["tiles"],
        np.ones(len(made["tiles"]), bool),
    )  # type: ignore[arg-type]
    batch = put_batch(jax.tree.map(lambda x: x[None], flat), mesh, accumulated=True)
    seconds, losses = [], []
    with jax.set_mesh(mesh):
        for _ in range(1 + settings.steps):
            began = time.perf_counter()
            state, metrics = program.step(state, batch)
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
    report: dict[str, Any] = {"seconds": seconds[1:], "losses": losses}
    report["device"] = jax.devices()[0].device_kind
    memory = jax.devices()[0].memory_stats()
    if memory:
        report["peak_gib"] = memory["peak_bytes_in_use"] / 2**30
    return report


def theirs(settings: Settings) -> dict[str, Any]:
    import torch
    from transformers import InternVLForConditionalGeneration

    torch.set_num_threads(2)
    model = InternVLForConditionalGeneration.from_pretrained(
        settings.folder / "weights", dtype=torch.float32
    ).train()
    config: Any = model.config
    made = numbers(settings, config.text_config.vocab_size, config.image_token_id)
    inputs = {
        "input_ids": torch.from_numpy(made["ids"]),
        "attention_mask": torch.ones(made["ids"].shape, dtype=torch.long),
        "labels": torch.from_numpy(np.where(made["loss"], made["ids"], -100)),
        "pixel_values": torch.from_numpy(normalised(made["tiles"])),
    }
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05
    )
    seconds, losses = [], []
    for _ in range(1 + settings.steps):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "losses": losses, "device": "CPU"}

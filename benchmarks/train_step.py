"""A train step: ours against transformers + torch, or ours alone on an accelerator.

With the peer both sides take the same random weights and the same batch in the same number format:
forward, backward, clipping and AdamW on every parameter, or on adapters alone (the peer's are
PEFT's). They run in turns, each in a process of its own, as two would not fit in memory together;
the first step of a process, which compiles, does not count. Losses must agree, or the figures mean
nothing. Memory is the largest resident set of a process.
"""

import dataclasses
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.common import run, save
from benchmarks.harness import Cell, Dtype, round_to, shares, show, summed_up
from benchmarks.peer import TILE, normalised, write_weights

_LEARNING_RATE = 4e-5
_MEMORY = (
    "at its peak a step holds the decoder's gradients, two copies of the table's gradient and what "
    "the tower keeps for its own, all at once"
)
_LORA = (  # float32
    "a profile of a step of 25 s: products are 9.5 s of each core, copies of transposed "
    "activations (for the adapters' gradients and the heads) 1.6, and for a third of the time the "
    "trace shows nothing on a core but what it may do for the other's product"
)
_REASONS = {
    "float32": "",
    "bfloat16": (
        "XLA:CPU computes maps in float32 and converts between them and the products; row "
        "reductions read 2.4 GB/s; moments and parameters are rounded stochastically"
    ),
}


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
    """Run transformers + torch too (CPU); False times ours on any device."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    """Of parameters, moments and computation; one cell each."""
    lora_rank: int = 0
    """Train adapters on the language model."""
    remat: Literal["none", "full", "dots", "attention", "offload"] = "none"
    """What ours computes again in the backward pass."""
    unroll: bool = False
    """Write our layers out."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: Literal["ours", "theirs"] | None = None
    """Used by the benchmark itself: run one side and write what came of it into `folder`."""
    dtype: Dtype = "float32"
    """Of one side; used by the benchmark itself."""
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
    title = f"a step of {settings.model}: {settings.rows} x {length(settings)} tokens"
    show(title, found["cells"])
    for name, cell in found["cells"].items():
        print(name, {key: cell[key] for key in ("peak_gib", "memory_ratio") if key in cell})
    if settings.save:
        lora = f"-lora{settings.lora_rank}" if settings.lora_rank else ""
        save(f"train_step-{settings.model}{lora}", {"benchmark": "train_step"} | found)


def compare(settings: Settings, folder: Path) -> dict[str, Any]:
    """Both sides in turns, one number format after the other."""
    from benchmarks.roofline import limits

    cells = {f"step {dtype}": timed(settings, dtype, folder) for dtype in settings.dtypes}
    measured = limits()
    shares(cells, measured)
    return {"settings": plain(settings), "limits": measured, "cells": cells}


def timed(settings: Settings, dtype: Dtype, folder: Path) -> dict[str, Any]:
    """Medians over all timed steps, and what a process held at most."""
    sides = ("ours", "theirs") if settings.peer else ("ours",)
    seconds: dict[str, list[float]] = {f"{side} {dtype}": [] for side in sides}
    peak: dict[str, float] = dict.fromkeys(seconds, 0.0)
    losses: dict[str, list[float]] = {}
    for _ in range(settings.rounds):
        for side in sides:
            words = [f"--{k.replace('_', '-')}={v}" for k, v in plain(settings).items()]
            words.append("--peer" if settings.peer else "--no-peer")
            words.append("--unroll" if settings.unroll else "--no-unroll")
            command = [sys.executable, "-m", "benchmarks", "train_step", f"--side={side}"]
            ran = run([*command, f"--folder={folder}", f"--dtype={dtype}", *words])
            report = json.loads((folder / f"{side}.json").read_text())
            name = f"{side} {dtype}"
            seconds[name] += report["seconds"]
            peak[name] = max(peak[name], report.get("peak_gib") or ran.peak_gib)
            losses[side] = report["losses"]
    if settings.peer:  # adapters begin at random, and bfloat16 has eight bits
        shared = 1 if settings.lora_rank or dtype == "bfloat16" else None
        loose = 1e-3 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(losses["ours"][:shared], losses["theirs"][:shared], rtol=loose)
    found = summed_up(
        Cell(
            dtype,
            work=settings.rows * length(settings),
            unit="tokens",
            flops=work(settings),
            target=1.1 if dtype == "float32" else 1.0,
            reason=_LORA if settings.lora_rank and dtype == "float32" else _REASONS[dtype],
        ),
        seconds,
    )
    found["peak_gib"] = {name: round_to(value) for name, value in peak.items()}
    if settings.peer:
        found["memory_ratio"] = round_to(peak[f"ours {dtype}"] / peak[f"theirs {dtype}"])
        found["memory_target"] = 0.8
        found["memory_reason"] = _MEMORY
    return found


def work(settings: Settings) -> float:
    """Operations of a step; the head sees the tokens under the loss alone."""
    from mis_jax.flops import forward, training
    from mis_jax.model.family import published

    tokens = settings.rows * length(settings)
    made = forward(
        published(settings.model),
        tokens=tokens,
        tiles=settings.rows * settings.tiles,
        squares=settings.rows * length(settings) ** 2,
        head_tokens=settings.rows * 3 * settings.text // 4,
    )
    if settings.lora_rank:
        return training(made, ("vision", "projector", "language"), lora_on=("language",))
    return training(made)


def plain(settings: Settings) -> dict[str, Any]:
    """What both sides must know, as words."""
    names = ["model", "tiles", "text", "rows", "steps", "lora_rank", "remat"]
    return {name: getattr(settings, name) for name in names}


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

    from mis_jax.checkpoint.load import open_checkpoint
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
    from mis_jax.parallel.sharding import make_mesh, put_batch
    from mis_jax.train.compiled_step import make_train_program

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
    program = make_train_program(config, model, mesh, 100)
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
        settings.folder / "weights", dtype=getattr(torch, settings.dtype)
    ).train()
    if settings.lora_rank:
        model = with_adapters(model, settings.lora_rank)
    config: Any = model.config
    made = numbers(settings, config.text_config.vocab_size, config.image_token_id)
    inputs = {
        "input_ids": torch.from_numpy(made["ids"]),
        "attention_mask": torch.ones(made["ids"].shape, dtype=torch.long),
        "labels": torch.from_numpy(np.where(made["loss"], made["ids"], -100)),
        "pixel_values": torch.from_numpy(normalised(made["tiles"])).to(
            getattr(torch, settings.dtype)
        ),
    }
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=_LEARNING_RATE,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.05,
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


def with_adapters(model: Any, rank: int) -> Any:
    """PEFT's adapters on every linear map of the language model, as ours."""
    from peft import LoraConfig, get_peft_model

    maps = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    targets = rf".*language_model.*\.({maps})"
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))

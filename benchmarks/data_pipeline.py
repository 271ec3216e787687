"""Training data: samples a second and a core, how full packed rows are, and what a chip would wait.

A set like MIS is drawn here (two pictures and a conversation a sample) and read twice, in turns: by
our pipeline, packed into rows of 8,192 tokens, and by transformers' image processor and tokenizer
under a torch DataLoader. Both decode, tile, tokenise, mask and batch; theirs normalises to float32
on the host, as it always does, where ours leaves that to the device. Tiles and target tokens of
both are the same before anything is timed.

A cell "per core" counts the seconds of all processors, children included: what the pipeline costs
however many cores there are. The target is for these. A cell "by the clock" counts time that
passed: ours reads with threads also where the peer has one, and with as many processes as cores
both fill the machine.
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from PIL import Image

from benchmarks.common import save
from benchmarks.harness import Cell, line, show, summed_up
from benchmarks.mis_sizes import mis_like
from benchmarks.pictures import draw_picture, image_processor, pixels_of
from mis_jax.checkpoint.hf.config import read_config
from mis_jax.config import DataConfig, RunConfig, Source, TrainConfig
from mis_jax.data.loader import TrainingData
from mis_jax.data.packing import fill, pack, tiles_per_sequence
from mis_jax.data.processor import Processor

sys.path.append(str(Path(__file__).parents[1] / "tools"))

#: Pictures a second that one H100 takes at 50 % MFU (8B, bf16; performance notes, section 7).
_H100_IMAGES = {"mis": 18.0, "photos": 4.3}
_QUESTION = "<image>\n<image>\nHow do the object in the first image and the one in the second "
_WORDS = "household kettle garden table picture shows something that should be kept dry and away "


@dataclasses.dataclass(frozen=True)
class Workload:
    """What the pictures are like."""

    size: tuple[int, int]
    suffix: str
    max_tiles: int  # of a sample
    reason: str = ""


#: Ours are fresh processes, as forked ones may hang under JAX; torch's are forks.
_START = (
    "by epochs of 48 and 96 samples a reading process takes 1.5 to 2 s to start, "
    "and handing a sample over 10 to 15 ms"
)

WORKLOADS = {
    "mis": Workload(  # 3 a picture: a square one is one tile
        (1024, 1024), "png", 6, "both decode the PNG with Pillow, which is most of our time"
    ),
    "photos": Workload((1024, 768), "jpg", 12),  # 6 a picture: 4:3 becomes 6 tiles and a thumbnail
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks data_pipeline --samples 96 --rounds 3"""

    workload: Literal["mis", "photos", "all"] = "all"
    """mis: 1024 x 1024 PNG, one tile each; photos: 1024 x 768 JPEG, seven tiles each."""
    samples: int = 64
    """In the set; an epoch is read in each measurement."""
    workers: tuple[int, ...] = (0, 1, 2)
    """Reading processes; 0 reads in the process that trains."""
    rounds: int = 5
    """Measurements of each, in turns."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    cells: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name in WORKLOADS if settings.workload == "all" else (settings.workload,):
        folder = Path(tempfile.mkdtemp(prefix="mis_jax_data."))
        try:
            found, extra[name] = measure(name, settings, folder)
            cells |= found
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    packing = packing_fill()
    show("samples a second", cells)
    for name, figures in extra.items():
        print(f"{name}: {figures}")
    print(f"packed rows of sizes like MIRage's: {packing}")
    if settings.save:
        results = {
            "benchmark": "data_pipeline",
            "settings": {"samples": settings.samples},
            "cells": cells,
            "workloads": extra,
            "packing": packing,
        }
        print(f"wrote {save('data_pipeline', results)}")


def measure(name: str, settings: Settings, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides over one workload: cells, and what else was found."""
    from make_random_checkpoint import cut, write

    from mis_jax.model.family import published

    workload = WORKLOADS[name]
    small = cut(published("internvl2_5-1b"), layers=1, vision_layers=1, shrink=16)
    write(small, folder / "model", "hf")
    draw(folder, workload, settings.samples)
    theirs = Peer(folder, workload)
    agree(folder, workload, theirs)
    needed = _H100_IMAGES[name] / 2
    cells: dict[str, Any] = {}
    waits = {}
    for workers in settings.workers:
        sides: dict[str, Callable[[], Iterator[int]]] = {
            "ours": lambda w=workers: ours(folder, workload, settings.samples, w),
            f"theirs {theirs.name}": lambda w=workers: theirs.batches(w),
        }
        rounds = [
            {side: timed(start, settings.samples) for side, start in sides.items()}
            for _ in range(settings.rounds)
        ]
        wanted = {"by the clock": None, "per core": 1.5}
        for index, (counted, target) in enumerate(wanted.items()):
            cell = Cell(
                f"{name}, {workers} workers, {counted}",
                work=settings.samples,
                unit="samples",
                target=target,
                reason="; ".join(filter(None, [workload.reason, _START if workers else ""])),
            )
            seconds = {side: [one[side][index] for one in rounds] for side in sides}
            cells[cell.name] = summed_up(cell, seconds)
            print(line(cell.name, cells[cell.name]), flush=True)
        rate = cells[f"{name}, {workers} workers, by the clock"]["sides"]["ours"]["per_second"]
        waits[workers] = round(max(0.0, 1 - rate / needed), 3)
    return cells, {
        "share_of_time_one_h100_waits_by_workers": waits,
        "ours_cached_samples_per_second": cached(folder, workload, settings.samples),
        "images_per_second_needed_by_one_h100": _H100_IMAGES[name],
    }


def agree(folder: Path, workload: Workload, theirs: "Peer") -> None:
    """RuntimeError where tiles or target tokens of the first sample differ."""
    row, peer = theirs.rows[0], theirs[0]
    processor = Processor.from_folder(folder / "model", read_config(folder / "model")[0])
    roles = {"human": "user", "gpt": "assistant"}
    example = processor.example(
        [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
        [folder / name for name in row["image"]],
        max_tiles=workload.max_tiles,
        add_generation_prompt=False,
    )
    targets = np.asarray(example.input_ids)[np.asarray(example.loss_mask, bool)].tolist()
    expected = [token for token in peer["labels"].tolist() if token != -100]
    if not np.array_equal(example.tiles, pixels_of(peer["pixel_values"].numpy())):
        raise RuntimeError("the tiles of ours and the peer differ; times mean nothing")
    if targets != expected:
        raise RuntimeError(f"targets of ours {targets[-8:]} and the peer {expected[-8:]} differ")


def timed(start: Callable[[], Iterator[int]], samples: int) -> tuple[float, float]:
    """Seconds from the first batch asked for to the last, and of processors, children included."""
    before = os.times()
    began = time.perf_counter()
    assert sum(start()) == samples
    seconds = time.perf_counter() - began
    after = os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def draw(folder: Path, workload: Workload, samples: int) -> None:
    """Pictures, and answers of 130 to 160 words."""
    rng = np.random.default_rng(0)
    words = _WORDS.split()
    rows = []
    for index in range(samples):
        names = [f"{index}-{k}.{workload.suffix}" for k in (1, 2)]
        for name in names:
            draw_picture(folder / name, workload.size, rng)
        answer = " ".join(rng.choice(words, rng.integers(130, 161)))
        question = _QUESTION + " ".join(rng.choice(words, rng.integers(10, 30)))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": index, "image": names, "conversations": turns})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(lines, encoding="utf-8")


def cached(folder: Path, workload: Workload, samples: int) -> float:
    """Samples a second of a second epoch with a tile cache, read by threads."""
    cache = folder / "tiles"
    list(ours(folder, workload, samples, 0, cache))
    seconds, _ = timed(lambda: ours(folder, workload, samples, 0, cache), samples)
    return round(samples / seconds, 1)


def training_data(
    folder: Path, workload: Workload, samples: int, workers: int, cache: Path | None
) -> TrainingData:
    model = folder / "model"
    config = RunConfig(
        model=model,
        output=folder / "run",
        data=DataConfig(
            sources=(Source("jsonl", path=folder / "samples.jsonl"),),
            max_length=8192,
            max_tiles=workload.max_tiles,
            packing=True,
            workers=workers,
            tile_cache=cache,
        ),
        train=TrainConfig(epochs=1, global_batch=1),
    )
    return TrainingData(config, Processor.from_folder(model, read_config(model)[0]))


def ours(
    folder: Path, workload: Workload, samples: int, workers: int, cache: Path | None = None
) -> Iterator[int]:
    """Samples in each batch of an epoch, the look at their sizes included."""
    data = training_data(folder, workload, samples, workers, cache)
    steps = data.iterator()
    try:
        for step in steps:
            yield len(step.ids)
    finally:
        steps.close()


def packing_fill() -> dict[str, float]:
    """How full rows of 8,192 tokens are, of sizes like those of MIRage's 4,427 samples."""
    tokens, tiles = mis_like(4427)
    room = tiles_per_sequence(tokens, tiles, 8192)
    rows = pack(tokens, tiles, max_tokens=8192, max_tiles=room)
    return {
        "rows": len(rows),
        "tiles_of_a_row": room,
        "tokens": round(fill(rows, tokens, 8192), 4),
        "tiles": round(fill(rows, tiles, room), 4),
    }


class Peer:
    """transformers' processor and tokenizer over the same files, under torch's DataLoader."""

    def __init__(self, folder: Path, workload: Workload):
        from transformers import AutoTokenizer

        self.folder = folder
        self.rows = [json.loads(line) for line in (folder / "samples.jsonl").open()]
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "model", local_files_only=True)
        self.processor, self.name = image_processor(workload.max_tiles // 2)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        row = self.rows[index]
        images = [
            Image.open(self.folder / name, formats=("PNG", "JPEG")).convert("RGB")
            for name in row["image"]
        ]
        made = self.processor(images, return_tensors="pt")
        question, answer = (turn["value"] for turn in row["conversations"])
        for count in made["num_patches"]:
            context = "<IMG_CONTEXT>" * (256 * int(count))
            question = question.replace("<image>", f"<img>{context}</img>", 1)
        prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        head = self.tokenizer(prompt)["input_ids"]
        ids = torch.tensor(head + self.tokenizer(f"{answer}<|im_end|>\n")["input_ids"])
        labels = ids.clone()
        labels[: len(head)] = -100
        labels[-1] = -100  # as ours: the line's end behind an answer is no target
        return {"input_ids": ids, "labels": labels, "pixel_values": made["pixel_values"]}

    def batches(self, workers: int) -> Iterator[int]:
        """Samples in each batch of 8, about as many as a packed row holds."""
        import torch
        from torch.utils.data import DataLoader

        def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
            pad = torch.nn.utils.rnn.pad_sequence
            return {
                "input_ids": pad([s["input_ids"] for s in samples], batch_first=True),
                "labels": pad([s["labels"] for s in samples], True, -100),
                "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
            }

        torch.set_num_threads(1 if workers == 0 else torch.get_num_threads())
        for batch in DataLoader(self, 8, shuffle=True, num_workers=workers, collate_fn=collate):
            yield len(batch["input_ids"])


if __name__ == "__main__":
    main()

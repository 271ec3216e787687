"""Training data: samples a second and a core, how full packed rows are, and what a chip would wait.

A set like MIS is drawn here (two pictures and a conversation a sample) and read twice, in turns: by
our pipeline, packed into rows of 8,192 tokens, and by transformers' image processor and tokenizer
under a torch DataLoader. Both decode, tile, tokenise, mask and batch; theirs normalises to float32
on the host, as it always does, where ours leaves that to the device.
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
from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from benchmarks.mis_sizes import mis_like
from mis_jax.config import DataConfig, RunConfig, Source, TrainConfig
from mis_jax.data.packing import fill, pack, tiles_of_a_row
from mis_jax.data.pipeline import TrainingData
from mis_jax.data.processor import Processor
from mis_jax.weights.config_json import read_config

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


WORKLOADS = {
    "mis": Workload((1024, 1024), "png", 6),  # 3 a picture: a square one is one tile
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
    rounds: int = 2
    """Measurements of each, in turns; the fastest counts."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    results: dict[str, Any] = {"benchmark": "data_pipeline", "samples": settings.samples}
    for name in WORKLOADS if settings.workload == "all" else (settings.workload,):
        folder = Path(tempfile.mkdtemp(prefix="mis_jax_data."))
        try:
            results[name] = measure(name, settings, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        show(name, results[name])
    results["packing"] = packing_fill()
    Console().print("packed rows of sizes like MIRage's:", results["packing"])
    if settings.save:
        print(f"wrote {save('data_pipeline', results)}")


def measure(name: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """Both sides over one workload."""
    from make_random_checkpoint import cut, write

    from mis_jax.model.family import published

    workload = WORKLOADS[name]
    small = cut(published("internvl2_5-1b"), layers=1, vision_layers=1, shrink=16)
    write(small, folder / "model", "hf")
    draw(folder, workload, settings.samples)
    theirs = Peer(folder, workload)
    found: dict[str, Any] = {"peer": theirs.name, "workers": {}}
    for workers in settings.workers:
        sides: dict[str, Callable[[], Iterator[int]]] = {
            "ours": lambda w=workers: ours(folder, workload, settings.samples, w),
            "theirs": lambda w=workers: theirs.batches(w),
        }
        best: dict[str, tuple[float, float]] = {}
        for _ in range(settings.rounds):
            for side, start in sides.items():
                once = timed(start, settings.samples)
                best[side] = min(best.get(side, once), once)
        needed = _H100_IMAGES[name] / 2
        row = {
            f"{side}_{what}": round(settings.samples / seconds[i], 2)
            for side, seconds in best.items()
            for i, what in enumerate(("samples_per_second", "samples_per_core_second"))
        }
        row["ratio_per_second"] = round(best["theirs"][0] / best["ours"][0], 3)
        row["ratio_per_core"] = round(best["theirs"][1] / best["ours"][1], 3)
        row["h100_waits"] = round(max(0.0, 1 - row["ours_samples_per_second"] / needed), 3)
        found["workers"][workers] = row
    found["ours_cached_samples_per_second"] = cached(folder, workload, settings.samples)
    found["images_per_second_needed_by_one_h100"] = _H100_IMAGES[name]
    return found


def timed(start: Callable[[], Iterator[int]], samples: int) -> tuple[float, float]:
    """Seconds from the first batch asked for to the last, and of processors, children included."""
    before = os.times()
    began = time.perf_counter()
    assert sum(start()) == samples
    seconds = time.perf_counter() - began
    after = os.times()
    return seconds, sum(after[:4]) - sum(before[:4])


def draw(folder: Path, workload: Workload, samples: int) -> None:
    """Pictures with soft shapes and some grain, and answers of 130 to 160 words."""
    rng = np.random.default_rng(0)
    words = _WORDS.split()
    rows = []
    for index in range(samples):
        names = [f"{index}-{k}.{workload.suffix}" for k in (1, 2)]
        for name in names:
            coarse = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            soft = Image.fromarray(coarse).resize(workload.size, Image.Resampling.BICUBIC)
            grain = rng.normal(0, 4, (workload.size[1], workload.size[0], 1))
            noisy = (np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / name)
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
    room = tiles_of_a_row(tokens, tiles, 8192)
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
        self.processor, self.name = _image_processor(workload.max_tiles // 2)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        row = self.rows[index]
        images = [Image.open(self.folder / name).convert("RGB") for name in row["image"]]
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


def _image_processor(max_patches: int) -> tuple[Any, str]:
    """The faster class where torchvision is there, and its name."""
    settings = dict(
        crop_to_patches=True,
        min_patches=1,
        max_patches=max_patches,
        size={"height": 448, "width": 448},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    try:
        import torchvision  # noqa: F401
        from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor

        return GotOcr2ImageProcessor(**settings), "GotOcr2ImageProcessor, torchvision"
    except ImportError:
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
            GotOcr2ImageProcessorPil,
        )

        return GotOcr2ImageProcessorPil(**settings), "GotOcr2ImageProcessorPil"


def show(name: str, found: dict[str, Any]) -> None:
    """The figures as a table."""
    title = f"{name}; peer: {found['peer']}; ours with cached tiles: "
    title += f"{found['ours_cached_samples_per_second']} /s"
    columns = ("workers", "ours /s", "theirs /s", "ratio", "ours /core s", "theirs /core s")
    table = Table(*columns, "ratio", "one H100 waits", title=title)
    for workers, row in found["workers"].items():
        cells = [workers, row["ours_samples_per_second"], row["theirs_samples_per_second"]]
        cells += [row["ratio_per_second"], row["ours_samples_per_core_second"]]
        cells += [row["theirs_samples_per_core_second"], row["ratio_per_core"]]
        table.add_row(*map(str, cells), f"{100 * row['h100_waits']:.0f} %")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

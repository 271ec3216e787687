"""Controls of a benchmark: the same questions without what the images say.

`mis_hard@black` asks the questions of `mis_hard` over black images, `@white` over white
ones, `@text` with no images at all, `@swapped` with the two images exchanged. A model that
answers a control as it answers the benchmark has not looked. Samples keep their ids, so that a
control can be compared with its benchmark sample by sample; the protocol and the sample hashes
differ, so no answer is ever taken over. A judge that looks at images sees those of the control.
"""

import io
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mis_jax.data.images import image_size
from mis_jax.evals.types import Benchmark, Sample
from mis_jax.storage.files import make_folder, replace_file

_ANNOUNCED = re.compile(r"Image-\d+:\s*")
_MARKER = re.compile(r"(?:Image-\d+:[ \t]*)?<image>\n*")


def control_of(benchmark: Benchmark, control: str) -> Benchmark:
    """The benchmark under one of `CONTROLS`."""
    return replace(
        benchmark,
        name=f"{benchmark.name}@{control}",
        protocol=f"{benchmark.protocol}@{control}",
        load=partial(_load, benchmark, control),
    )


def _load(benchmark: Benchmark, control: str, data_root: Path) -> list[Sample]:
    samples = benchmark.load(data_root)
    try:
        return [CONTROLS[control](sample) for sample in samples]
    except ValueError as error:
        raise ValueError(f"{benchmark.name}@{control}: {error}") from error


def plain_images(sample: Sample, colour: str) -> Sample:
    """The sample with each image replaced by one of a single colour and the same size."""
    if not sample.images:
        raise ValueError(f"sample {sample.id} has no pictures to replace")
    return replace(sample, images=[plain_image(colour, image_size(path)) for path in sample.images])


def without_images(sample: Sample) -> Sample:
    """The sample with its images and the words that announce them left out."""
    if not sample.images:
        raise ValueError(f"sample {sample.id} has no pictures to leave out")
    conversation = [
        message | {"content": _without_markers(message["content"])}
        for message in sample.conversation
    ]
    return replace(sample, images=[], conversation=conversation)


def swapped_images(sample: Sample) -> Sample:
    """The sample with its two images exchanged, and what is known to be on them (mini world)."""
    if len(sample.images) != 2:
        raise ValueError(f"sample {sample.id} has {len(sample.images)} pictures; swapping needs 2")
    meta = dict(sample.meta)
    if "objects" in meta:
        meta["objects"] = meta["objects"][::-1]
    return replace(sample, images=sample.images[::-1], meta=meta)


CONTROLS: dict[str, Callable[[Sample], Sample]] = {
    "black": partial(plain_images, colour="black"),
    "white": partial(plain_images, colour="white"),
    "text": without_images,
    "swapped": swapped_images,
}


def _without_markers(content: Any) -> Any:
    if isinstance(content, str):
        return _MARKER.sub("", content)
    return [
        part
        for part in content
        if part["type"] != "image" and not _ANNOUNCED.fullmatch(part.get("text", ""))
    ]


def plain_image(colour: str, size: tuple[int, int]) -> Path:
    """The file of an image of one colour, drawn once into the user's cache folder."""
    cache_root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache_root / "mis-jax" / "plain" / f"{colour}-{size[0]}x{size[1]}.png"
    if not path.exists():
        make_folder(path.parent)
        drawn = io.BytesIO()
        Image.new("RGB", size, colour).save(drawn, "PNG")
        replace_file(path, drawn.getvalue())  # another process never reads half an image
    return path

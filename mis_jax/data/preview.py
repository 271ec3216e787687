"""What the model will see of a sample: decoded prompt, loss mask, tiles."""

import collections
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from rich.text import Text

from mis_jax.config import RunConfig
from mis_jax.data.collate import Example
from mis_jax.data.loader import TrainingData, make_preprocess
from mis_jax.data.measure import Progress
from mis_jax.data.mixture import read_sources
from mis_jax.data.processor import Processor
from mis_jax.tokenizer.files import IMG_CONTEXT
from mis_jax.tokenizer.tokenizer import Tokenizer

_GAP = 4  # pixels between the tiles of a contact sheet


@dataclass(frozen=True)
class Shown:
    """One training sample, rendered."""

    example: Example
    tokenizer: Tokenizer

    def as_json(self) -> dict[str, Any]:
        """`id, text, input_ids, loss_mask, tiles` (tiles per image; the mask is unshifted)."""
        ids = [int(i) for i in self.example.input_ids]
        return {
            "id": self.example.id,
            "text": self.tokenizer.decode(ids, skip_special_tokens=False),
            "input_ids": ids,
            "loss_mask": [int(flag) for flag in self.example.loss_mask],
            "tiles": list(self.example.tiles_per_image),
        }

    def as_text(self) -> Text:
        """The prompt with the tokens under the loss in green; runs of image tokens shortened."""
        shown = Text()
        for ids, learnt, image in self._runs():
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            if image:
                text = f"{IMG_CONTEXT} x {len(ids)}"
            shown.append(text, style="bold green" if learnt else "dim")
        return shown

    def _runs(self) -> Iterator[tuple[list[int], bool, bool]]:
        """Stretches of ids, whether they are under the loss, whether they are image tokens."""
        example, image = self.example, self.tokenizer.img_context_id
        kinds = [
            (bool(flag), bool(i == image))
            for i, flag in zip(example.input_ids, example.loss_mask, strict=True)
        ]
        start = 0
        for end in range(1, len(kinds) + 1):
            if end == len(kinds) or kinds[end] != kinds[start]:
                yield [int(i) for i in example.input_ids[start:end]], *kinds[start]
                start = end

    def contact_sheet(self) -> Image.Image:
        """All tiles, one image a line."""
        tiles, counts = self.example.tiles, self.example.tiles_per_image
        if not counts:
            raise ValueError(
                f"sample {self.example.id} has no image, so there is no picture to write"
            )
        size = tiles.shape[1]
        sheet = np.full(
            (len(counts) * (size + _GAP) - _GAP, max(counts) * (size + _GAP) - _GAP, 3),
            255,
            np.uint8,
        )
        shown = iter(tiles)
        for line, count in enumerate(counts):
            for column in range(count):
                y, x = line * (size + _GAP), column * (size + _GAP)
                sheet[y : y + size, x : x + size] = next(shown)
        return Image.fromarray(sheet)


def show_sample(config: RunConfig, processor: Processor, index: int) -> Shown:
    """Sample `index` of a run's sources, before shuffling."""
    annotations = read_sources(config.data.sources, config.seed)
    if not 0 <= index < len(annotations):
        raise ValueError(f"--index {index}: the run has samples 0 to {len(annotations) - 1}")
    return Shown(make_preprocess(config, processor)(annotations[index]), processor.tokenizer)


def statistics(
    config: RunConfig, processor: Processor, progress: Progress | None = None
) -> dict[str, Any]:
    """What a run takes its samples from and how well they fill its batches; ready for JSON.

    Bad samples are listed, whatever the run does about them. `fill` is the share of the places of
    all batches that hold a token, or a tile.
    """
    settings = dataclasses.replace(config.data, on_bad_sample="skip")
    data = TrainingData(dataclasses.replace(config, data=settings), processor, progress)
    sizes, good = data.survey, data.survey.good
    batch = config.train.global_batch
    shapes = collections.Counter(data.shape(step) for step in range(data.steps))
    used = [int(size[data.schedule.samples].sum()) for size in (sizes.tokens, sizes.tiles)]
    places = [sum(shape[k] * n for shape, n in shapes.items()) * batch for k in (0, 1)]
    return {
        "samples": len(data.annotations),
        "bad_samples": [sizes.problems[number] for number in sorted(sizes.problems)],
        **({"deviations": data.deviations} if config.data.rows == "upstream" else {}),
        "sources": [{k: v for k, v in s.items() if k != "ids"} for s in data.mixture.sources],
        "tokens": _spread(sizes.tokens[good]),
        "answer_tokens": _spread(sizes.loss_tokens[good]),
        "tiles": _spread(sizes.tiles[good]),
        "truncated": {
            "samples": int((sizes.cut > 0).sum()),
            "tokens": int(sizes.cut.sum()),
        },
        "steps": data.steps,
        "rows": data.schedule.sequences,
        "samples_per_row": round(len(data.schedule.samples) / data.schedule.sequences, 3),
        "shapes": [
            {"tokens": tokens, "tiles": tiles, "steps": n}
            for (tokens, tiles), n in sorted(shapes.items())
        ],
        "fill": {
            name: round(a / b, 4) if b else None
            for name, a, b in zip(("tokens", "tiles"), used, places, strict=True)
        },
    }


def _spread(sizes: np.ndarray) -> dict[str, float]:
    """Mean and a few order statistics."""
    low, middle, high = np.quantile(sizes, (0.05, 0.5, 0.95), method="nearest")
    return {
        "mean": round(float(sizes.mean()), 1),
        "p5": int(low),
        "median": int(middle),
        "p95": int(high),
        "max": int(sizes.max()),
        "total": int(sizes.sum()),
    }

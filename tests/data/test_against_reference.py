"""Batches of a run against a reference written from the specification, with none of our code.

Ids and masks by `preprocess_internvl2_5` of OpenGVLab/InternVL
(`internvl_chat/internvl/train/dataset.py`) with sentencepiece (InternLM2's files) or transformers'
Qwen2 tokenizer; tiles by its `dynamic_preprocess` with Pillow alone; rows from one jsonl file
through the whole pipeline, packed and not.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image
from tiny_world import run_config
from transformers import Qwen2Tokenizer

from mis_jax.checkpoint.hf.config import read_config
from mis_jax.data.loader import TrainingData
from mis_jax.data.processor import Processor
from mis_jax.model.family import published

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import make_random_checkpoint as tool

SIZE, PER_TILE, MAX_TILES = 56, 4, 6
SYSTEM = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的"
    "多模态大语言模型。"
)
PICTURES = {"square": (60, 60), "wide": (180, 60), "tall": (70, 200), "small": (20, 31)}


def turns(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("human", "gpt")
    first = [] if system is None else [{"from": "system", "value": system}]
    return first + [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


CASES = {
    "two turns": ([], turns("What is a cup?", "A cup.", "你好 🙂  Sure?\n", "\nYes, \n\n it is.")),
    "two images": (
        ["wide.png", "tall.png"],
        turns(
            "Image-1: <image>\nImage-2: <image>\nWhich is wider?", "The first image.", "Why?", "x"
        ),
    ),
    "two images at once": (["square.png", "small.png"], turns("<image>\n<image>\nWhat?", "Cups.")),
    "system turn": (["tall.png"], turns("<image>\nWhat?", "A garden.", system="Be brief.\n")),
    "one image, no marker": (["square.png"], turns("What?", "A kettle on a table.")),
    "text alone": ([], turns("Describe the two pictures.", "There are none here.")),
    "truncated": (["square.png"], turns("<image>\nTell it.", "It has a garden. " * 80)),
}


@pytest.fixture(scope="module", params=["internvl2_5-8b", "internvl2_5-1b"])
def world(request, tmp_path_factory):
    """A checkpoint with InternLM2's or Qwen's tokenizer files, and the cases as a jsonl file."""
    folder = tmp_path_factory.mktemp("reference")
    cut = dict(layers=1, vision_layers=1, shrink=16, vocabulary=1200, image_size=SIZE)
    tool.write(tool.cut(published(request.param), **cut), folder / "model")
    rng = np.random.default_rng(0)
    for name, size in PICTURES.items():
        noise = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BILINEAR).save(folder / f"{name}.png")
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for name, (images, conversation) in CASES.items():
            row = {"id": name, "conversations": conversation} | (
                {"image": images} if images else {}
            )
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


class Reference:
    """The specification, in its own words."""

    def __init__(self, folder: Path):
        self.folder = folder
        model = folder / "model"
        special = json.loads((model / "added_tokens.json").read_text(encoding="utf-8"))
        pattern = re.compile("(" + "|".join(map(re.escape, special)) + ")")
        if (model / "tokenizer.model").exists():
            path = str(model / "tokenizer.model")
            plain, self.bos = sentencepiece.SentencePieceProcessor(model_file=path).encode, [1]
        else:
            # For plain text alone: transformers 5 gives added tokens ids of its own after a gap.
            files = str(model / "vocab.json"), str(model / "merges.txt")
            theirs = Qwen2Tokenizer(*files)
            plain, self.bos = lambda text: theirs(text, add_special_tokens=False).input_ids, []

        def tokens(text: str) -> list[int]:
            ids: list[int] = []
            for part in filter(None, pattern.split(text)):
                ids += [special[part]] if part in special else plain(part)
            return ids

        self.tokens = tokens

    def tiles(self, name: str, most: int) -> list[np.ndarray]:
        image = Image.open(self.folder / name).convert("RGB")
        ratio, area = image.width / image.height, image.width * image.height
        grids = [
            (i, j) for n in range(1, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)
        ]
        grids = sorted({g for g in grids if g[0] * g[1] <= most}, key=lambda g: g[0] * g[1])
        best, nearest = (1, 1), float("inf")
        for grid in grids:
            difference = abs(ratio - grid[0] / grid[1])
            large = area > 0.5 * SIZE * SIZE * grid[0] * grid[1]
            if difference < nearest or (difference == nearest and large):
                best, nearest = grid, difference
        resized = image.resize((SIZE * best[0], SIZE * best[1]), Image.Resampling.BICUBIC)
        cut = [
            resized.crop((x * SIZE, y * SIZE, (x + 1) * SIZE, (y + 1) * SIZE))
            for y in range(best[1])
            for x in range(best[0])
        ]
        if len(cut) > 1:
            cut.append(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        return [np.asarray(tile) for tile in cut]

    def sample(self, images: list[str], conversation: list[dict[str, str]], length: int):
        """Ids, labels (-100 where there is no loss) and tiles."""
        tiles = [self.tiles(name, max(1, MAX_TILES // len(images))) for name in images]
        conversation = [dict(turn) for turn in conversation]
        if conversation[0]["from"] != "system":
            conversation.insert(0, {"from": "system", "value": SYSTEM})
        human = next(turn for turn in conversation if turn["from"] == "human")
        if len(images) == 1 and "<image>" not in human["value"]:
            human["value"] = "<image>\n" + human["value"]
        counts = iter(len(t) for t in tiles)
        ids, labels = list(self.bos), [-100] * len(self.bos)
        for turn in conversation:
            role = {"human": "user", "gpt": "assistant", "system": "system"}[turn["from"]]
            text = turn["value"]
            while role == "user" and "<image>" in text:
                context = "<IMG_CONTEXT>" * (PER_TILE * next(counts))
                text = text.replace("<image>", f"<img>{context}</img>", 1)
            segment = self.tokens(f"<|im_start|>{role}\n{text}<|im_end|>\n")
            ids += segment
            if role == "assistant":
                head = len(self.tokens("<|im_start|>assistant\n"))
                labels += [-100] * head + segment[head:-1] + [-100]
            else:
                labels += [-100] * len(segment)
        return ids[:length], labels[:length], [tile for each in tiles for tile in each]


@pytest.mark.parametrize(("packing", "length"), [(False, 260), (True, 600)])
def test_batches_are_those_of_the_specification(world, packing, length, tmp_path):
    config = run_config(
        world / "model", world, tmp_path / "run", data__max_length=length, data__packing=packing,
        data__max_tiles=MAX_TILES, data__too_long="truncate", train__steps=None, train__epochs=1,
        train__global_batch=2,
    )  # fmt: skip
    model = world / "model"
    data = TrainingData(config, Processor.from_folder(model, read_config(model)[0]))
    reference = Reference(world)
    seen, fullest = [], 0
    for step in (iterator := data.iterator()):
        batch = step.batch
        ids = np.asarray(batch.input_ids)[0]
        segments, weights = np.asarray(batch.segment_ids)[0], np.asarray(batch.loss_weights)[0]
        tiles = np.asarray(batch.tiles)[0].reshape(len(ids), -1, SIZE, SIZE, 3)
        names = iter(step.ids)
        for row in range(len(ids)):
            first = 0
            for number in range(1, segments[row].max() + 1):
                seen.append(name := next(names))
                expected, labels, pictures = reference.sample(*CASES[name], length)
                here = segments[row] == number
                assert ids[row, here].tolist() == expected, name
                learnt = [label != -100 for label in labels]
                assert (weights[row, here] > 0).tolist() == learnt, name
                found = tiles[row, first : first + len(pictures)]
                assert all(map(np.array_equal, found, pictures)), name
                first += len(pictures)
            fullest = max(fullest, int(segments[row].max()))
    iterator.close()
    assert sorted(seen) == sorted(CASES)
    assert (fullest > 1) is packing
    assert [data.annotations[i].id for i in np.flatnonzero(data.survey.cut)] == ["truncated"]

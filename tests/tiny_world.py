"""A tiny random InternVL and a handful of samples with pictures, for tests that need real files."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

IMAGE_SIZE = 56  # pixels; 4 x 4 patches, 4 tokens a tile
SYSTEM = "Be careful."
#: Numbers of metrics.jsonl that no two runs have in common.
TIMES = (
    "seconds", "data_seconds", "tokens_per_second", "samples_per_second", "tflops_per_second",
    "mfu",
)  # fmt: skip
_OBJECTS = ("bottle", "cup", "chair", "lamp", "kettle", "plant", "clock")


def tiny_config(image_token_id: int, vocab_size: int) -> Any:
    """The smallest network that has every kind of part."""
    from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig

    return InternVLConfig(
        vision=VisionConfig(
            hidden_size=32, num_layers=2, num_heads=2, mlp_size=64, image_size=IMAGE_SIZE
        ),
        text=TextConfig(
            kind="internlm2", vocab_size=vocab_size, hidden_size=32, num_layers=2, num_heads=4,
            num_kv_heads=2, mlp_size=64, head_dim=8,
        ),
        image_token_id=image_token_id,
        max_tiles=4,
        system_message=SYSTEM,
    )  # fmt: skip


def write_checkpoint_folder(folder: Path, work: Path) -> Path:
    """A random network with a sentencepiece tokenizer, in the original internvl_chat layout."""
    from flax import nnx

    sys.path.insert(0, str(Path(__file__).parent / "data"))
    try:
        from tokenizer_folders import internlm2_folder, train_sentencepiece
    finally:
        sys.path.pop(0)
    from mis_jax.checkpoint import nnx_state
    from mis_jax.checkpoint.convert import write_checkpoint
    from mis_jax.checkpoint.load import Checkpoint
    from mis_jax.model.internvl import InternVL
    from mis_jax.tokenizer.tokenizer import load_tokenizer

    texts = internlm2_folder(work / "tokenizer", train_sentencepiece())
    tokenizer = load_tokenizer(texts)
    config = tiny_config(tokenizer.img_context_id, tokenizer.vocab_size)
    arrays: dict[str, Any] = nnx_state.flat(InternVL(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    for name, value in arrays.items():  # no parameter keeps a value under which it has no effect
        if value.ndim <= 2 and not name.endswith("kernel"):
            noise = 0.1 * rng.standard_normal(value.shape)
            arrays[name] = np.asarray(value) + noise.astype(np.float32)
    checkpoint = Checkpoint(config, arrays, "float32", texts, None)
    write_checkpoint(checkpoint, folder, "internvl")
    return folder


def picture(path: Path, width: int, height: int, seed: int) -> Path:
    """A PNG of smooth blobs."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def sample(index: int, images: list[str]) -> dict[str, Any]:
    """A row in InternVL's jsonl format; questions and answers of different lengths."""
    thing = _OBJECTS[index % len(_OBJECTS)]
    marks = "".join(f"Image-{i + 1}: <image>\n" for i in range(len(images)))
    row: dict[str, Any] = {
        "id": f"s{index}",
        "conversations": [
            {"from": "human", "value": f"{marks}What is a {thing} for?"},
            {"from": "gpt", "value": f"The {thing} is useful." + " It is safe." * (index % 3)},
        ],
    }
    return row | {"image": images} if images else row


def write_samples(folder: Path, count: int = 11) -> Path:
    """`count` rows with none, one or two pictures, as jsonl and as a sharegpt list."""
    rows = []
    for index in range(count):
        names = [f"images/{index}-{k}.png" for k in range((2, 1, 0)[index % 3])]
        for k, name in enumerate(names):
            picture(folder / name, 60 + 50 * k, 56 + 30 * (index % 2), seed=7 * index + k)
        rows.append(sample(index, names))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    (folder / "samples.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return folder


def run_config(checkpoint: Path, data: Path, output: Path, **changes: Any) -> Any:
    """Settings of a short run; `changes` are `section__field=value`."""
    from mis_jax.config import (
        DataConfig,
        DtypeConfig,
        OptimizerConfig,
        RunConfig,
        Source,
        TrainConfig,
    )

    source = Source("jsonl", root=data, path=data / "samples.jsonl")
    config = RunConfig(
        model=checkpoint,
        output=output,
        data=DataConfig(sources=(source,), max_length=96, max_tiles=1),
        train=TrainConfig(steps=6, global_batch=4, save_every=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        seed=7,  # every step has one shape, so that a run compiles once
        dtype=DtypeConfig(compute="float32"),
    )
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        sections.setdefault(section, {})[field] = value
    top = sections.pop("", {})
    for section, fields in sections.items():
        top[section] = dataclasses.replace(getattr(config, section), **fields)
    return dataclasses.replace(config, **top)


def write_yaml(config: Any, path: Path, **changes: Any) -> Path:
    """The YAML file of a run; `changes` are `section__field=value`, unknown fields allowed."""
    from mis_jax.config import config_text

    content = yaml.safe_load(config_text(config))
    for name, value in changes.items():
        *sections, field = name.split("__")
        node = content
        for section in sections:
            node = node[section]
        node[field] = value
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random network of two layers in the internvl_chat layout; do not change the folder."""
    work = tmp_path_factory.mktemp("tiny")
    return write_checkpoint_folder(work / "checkpoint", work)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven samples as samples.jsonl and samples.json; do not change the folder."""
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tiny_processor(tiny_checkpoint: Path) -> Any:
    """Tokenizer, template and tiling of `tiny_checkpoint`."""
    from mis_jax.checkpoint.hf.config import read_config
    from mis_jax.data.processor import Processor

    return Processor.from_folder(tiny_checkpoint, read_config(tiny_checkpoint)[0])

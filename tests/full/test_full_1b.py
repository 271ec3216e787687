"""InternVL2.5-1B at its full shape, random weights: load, one two-image answer, one train step."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import mis_jax
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import find_problems, read_checkpoint
from mis_jax.config import DataConfig, DtypeConfig, RunConfig, Source, TrainConfig
from mis_jax.inference.offline import answer
from mis_jax.model.family import published
from mis_jax.train.trainer import train

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import make_random_checkpoint

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    config = published("internvl2_5-1b")
    assert sum(nnx_state.count(config).values()) == 938_193_024
    make_random_checkpoint.write(config, folder / "internvl", shard_bytes=10**9)
    return folder / "internvl"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(1)
    paths = [folder / "tall.png", folder / "square.png"]
    for path, size in zip(paths, ((300, 500), (600, 600)), strict=True):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return paths


@pytest.mark.slow
def test_answer_about_two_images(checkpoint, pictures):
    assert find_problems(checkpoint) == []
    model, processor = mis_jax.load(checkpoint, dtype="float32")
    conversation = [
        {"role": "user", "content": "Image-1: <image>\nImage-2: <image>\nWhat is shown?"}
    ]
    [found] = answer(
        model, processor, [conversation], [pictures], max_new_tokens=4, max_tiles_per_image=1
    )
    assert found.prompt_tokens > 2 * 256
    assert 1 <= found.completion_tokens <= 4
    jax.clear_caches()


@pytest.mark.slow
def test_one_train_step(checkpoint, pictures, tmp_path):
    row = {
        "id": 7,
        "image": [str(path) for path in pictures],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nHow do I use both?"},
            {"from": "gpt", "value": "Both images show coloured shapes. Nothing is dangerous."},
        ],
    }
    (tmp_path / "train.json").write_text(json.dumps([row]))
    config = RunConfig(
        model=checkpoint,
        output=tmp_path / "run",
        data=DataConfig(
            sources=(Source("sharegpt", path=tmp_path / "train.json"),), max_tiles=2, max_length=832
        ),
        train=TrainConfig(steps=1, global_batch=1, remat="full"),
        # bfloat16 leaves room on a machine of 24 GiB; the second moment is float32
        dtype=DtypeConfig(params="bfloat16", compute="bfloat16", moments="bfloat16"),
    )
    trained = train(config)
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = json.loads(line)
    assert metrics["step"] == 1 and np.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
    before, after = read_checkpoint(checkpoint), read_checkpoint(trained.model, "bfloat16")
    frozen = [name for name in before.arrays if name.startswith("vision.")]
    assert frozen
    for name in frozen:
        np.testing.assert_array_equal(
            np.asarray(after.arrays[name]), np.asarray(before.arrays[name])
        )

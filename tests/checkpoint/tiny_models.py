"""Tiny models of every kind with random parameters, as checkpoints in memory and on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES
from mis_jax.checkpoint.load import Checkpoint
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig

IMAGE_SIZE = 56  # pixels; 4 x 4 patches, 4 tokens a tile
IMAGE_TOKEN = 60
KINDS = ("internlm2", "llama", "qwen2", "qwen3")
TOWERS: dict[str, dict[str, Any]] = {
    "layer_norm": dict(norm="layer_norm", qkv_bias=True, qk_norm=False),
    "rms_norm": dict(norm="rms_norm", qkv_bias=False, qk_norm=True),
}


def tiny_config(kind: str, tower: str = "layer_norm", **text_changes: Any) -> InternVLConfig:
    vision = VisionConfig(
        hidden_size=16, num_layers=2, num_heads=2, mlp_size=24, image_size=IMAGE_SIZE,
        **TOWERS[tower],
    )  # fmt: skip
    text = dict(
        kind=kind, vocab_size=67, hidden_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=10 if kind == "qwen3" else 6, mlp_size=40, norm_eps=1e-5, rope_theta=5e5,
        rope_dynamic_factor=2.0, max_position=64,
    )  # fmt: skip
    return InternVLConfig(
        vision=vision, text=TextConfig(**(text | text_changes)), image_token_id=IMAGE_TOKEN
    )


def write_tokenizer(folder: Path) -> None:
    """Letters, and the tokens that every prompt is built of, in Qwen's files."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = {chr(ord("a") + i): i for i in range(26)}
    (folder / "vocab.json").write_text(json.dumps(letters))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokens = ["<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<quad>"]
    added = {token: IMAGE_TOKEN - 2 + i for i, token in enumerate(tokens)}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def random_checkpoint(
    config: InternVLConfig, rng: np.random.Generator, folder: Path, dtype: str = "float32"
) -> Checkpoint:
    """Every parameter random, norms included; `folder` gets the tokenizer file of the model."""
    write_tokenizer(folder)
    arrays = {}
    for name, shape in nnx_state.shapes(config).items():
        values = rng.standard_normal(shape)
        fan_in = shape[-2] if name.endswith("kernel") else 1
        centre = 1.0 if name.endswith("scale") else 0.0
        spread = fan_in**-0.5 if fan_in > 1 else 0.3
        arrays[name] = (centre + spread * values).astype(np.float32).astype(NUMPY_DTYPES[dtype])
    return Checkpoint(config, arrays, dtype, folder, None)


def assert_same(a: Checkpoint, b: Checkpoint, **config_changes: Any) -> None:
    """Same configuration but for `config_changes`, and every parameter equal to the last bit."""
    assert dataclasses.replace(a.config, **config_changes) == b.config
    assert a.dtype == b.dtype
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        x, y = np.asarray(a.arrays[name]), np.asarray(b.arrays[name])
        assert x.dtype == y.dtype and x.shape == y.shape, name
        assert x.tobytes() == y.tobytes(), name


def random_batch(rng: np.random.Generator, *, length: int = 30) -> Batch:
    """Two rows with three tiles and one tile; the second row is padded."""
    ids = rng.integers(3, 59, (2, length)).astype(np.int32)
    ids[0, 4:16], ids[1, 2:6] = IMAGE_TOKEN, IMAGE_TOKEN
    segments = np.ones_like(ids)
    segments[1, length - 9 :] = 0
    tiles = rng.integers(0, 256, (6, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape) * segments
    mask = np.array([True, True, True, True, False, False])
    return Batch(ids, positions, segments, np.zeros(ids.shape, np.float32), tiles, mask)

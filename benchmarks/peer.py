"""The peer of the model's benchmarks: transformers' InternVL on torch, with random weights."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import run
from mis_jax.model.family import published
from mis_jax.model.vision import IMAGENET_MEAN, IMAGENET_STD

TILE = 448


def normalised(tiles: np.ndarray) -> np.ndarray:
    """Pixels as torch wants them, float32 [tiles, 3, size, size]."""
    pixels = (tiles / np.float32(255) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def write_weights(model: str, folder: Path) -> None:
    """Random weights in transformers' layout, from a process that gives its memory back."""
    program = (
        "from benchmarks.peer import *; import torch; torch.manual_seed(0); "
        f"torch_model({model!r}).save_pretrained({str(folder)!r})"
    )
    run([sys.executable, "-c", program])


def torch_model(name: str) -> Any:
    import torch
    from transformers import (
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLVisionConfig,
        Qwen2Config,
    )

    model = published(name)
    vision, text = model.vision, model.text
    if text.kind != "qwen2":
        raise SystemExit(f"the peer is set up for models with Qwen2.5, not for {name}")
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            intermediate_size=vision.mlp_size,
            image_size=[vision.image_size] * 2,
            patch_size=[vision.patch_size] * 2,
            layer_norm_eps=vision.norm_eps,
            norm_type=vision.norm,
            attention_bias=vision.qkv_bias,
            use_qk_norm=vision.qk_norm,
        ),
        text_config=Qwen2Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.mlp_size,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            rms_norm_eps=text.norm_eps,
            rope_theta=text.rope_theta,
            tie_word_embeddings=True,
        ),
        image_token_id=model.image_token_id,
        tie_word_embeddings=True,
    )
    return InternVLForConditionalGeneration(config).to(torch.float32)

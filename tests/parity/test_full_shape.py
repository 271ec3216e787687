"""Greedy answers of the whole 1B shape against transformers' `generate`, float32."""

import gc
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import letters, run_all
from test_greedy import their_tokens

from mis_jax.checkpoint.load import load, open_checkpoint
from mis_jax.checkpoint.nnx_state import build
from mis_jax.data.collate import Example
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import Request
from mis_jax.model.unrolled import unrolled

sys.path.append(str(Path(__file__).parents[2]))
from benchmarks.peer import TILE, torch_model

pytestmark = pytest.mark.usefixtures("optimized")

NEW_TOKENS = 16
TEXTS, IMAGES = [30, 9, 60], [1, 0, 2]  # of each prompt; every image is one tile


@pytest.mark.slow
def test_three_prompts_in_two_slots(tmp_path, seed, rng):
    torch.manual_seed(seed)
    theirs = torch_model("internvl2_5-1b").eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "lambda" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim > 1:  # larger than torch's own, so that layers matter
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    image_token = theirs.config.image_token_id
    rows, tiles = [], []
    for text, images in zip(TEXTS, IMAGES, strict=True):
        ids = rng.integers(10, image_token - 100, text)
        rows.append(np.insert(ids, 4, [image_token] * (256 * images)))
        tiles.append(rng.integers(0, 256, (images, TILE, TILE, 3), dtype=np.uint8))
    expected = [
        their_tokens(theirs, *prompt, NEW_TOKENS) for prompt in zip(rows, tiles, strict=True)
    ]
    theirs.save_pretrained(tmp_path / "hf")
    del theirs
    gc.collect()

    checkpoint = load(open_checkpoint(tmp_path / "hf"), "float32")
    ours = unrolled(build(checkpoint.config, checkpoint.arrays), consume=True)
    engine = Engine(ours, stop_ids=(), decode=letters, max_num_seqs=2, between=3)
    asked = [
        Request(
            Example(str(i), ids.astype(np.int32), np.zeros(len(ids), bool), own, (1,) * len(own)),
            NEW_TOKENS,
        )
        for i, (ids, own) in enumerate(zip(rows, tiles, strict=True))
    ]
    for row, pieces in enumerate(run_all(engine, asked)):
        mine = [token.id for piece in pieces for token in piece.tokens]
        assert len(mine) == NEW_TOKENS
        np.testing.assert_array_equal(mine[: len(expected[row])], expected[row], f"prompt {row}")
    compared = sum(map(len, expected))
    assert compared >= 2 * NEW_TOKENS, f"only {compared} tokens before a near tie"

"""Many prompts in one continuous batch against transformers' choices, each alone, float32."""

import numpy as np
import pytest
import reference as ref
import torch
from engine_runs import letters, requests_of, run_all
from test_forward import checkpoint_of, our_batch
from test_greedy import NEW_TOKENS

from mis_jax.checkpoint.nnx_state import build
from mis_jax.inference.engine import Engine
from mis_jax.model.unrolled import unrolled

pytestmark = pytest.mark.usefixtures("optimized")

PROMPTS = 200


@pytest.mark.slow
@pytest.mark.parametrize("text", ref.TEXTS)
def test_prompts_mixed_in_one_batch(text, seed, rng, tmp_path):
    """None to three images of one to five tiles, texts of many lengths, more prompts than rows."""
    theirs = ref.reference_model(ref.reference_config(text, "layer_norm"), seed)
    with torch.no_grad():  # never the best: their pass would want a picture for it
        theirs.lm_head.weight[ref.IMAGE_TOKEN] = 0
    checkpoint = checkpoint_of(theirs, tmp_path / "hf")
    ours = unrolled(build(checkpoint.config, checkpoint.arrays))
    counts = [list(rng.integers(1, 6, int(n))) for n in rng.integers(0, 4, PROMPTS)]
    rows = [
        np.concatenate([rng.integers(3, ref.IMAGE_TOKEN, int(more)), row])
        for row, more in zip(
            ref.random_rows(rng, counts), rng.integers(0, 150, PROMPTS), strict=True
        )
    ]
    tiles = ref.random_tiles(rng, counts)
    engine = Engine(ours, stop_ids=(), decode=letters, max_num_seqs=16, groups=4, between=5)
    requests = requests_of(our_batch(rows, tiles), counts, max_new_tokens=NEW_TOKENS)
    pieces = run_all(engine, requests)
    compared = 0
    for i, (row, pixels) in enumerate(zip(rows, tiles, strict=True)):
        mine = [token.id for piece in pieces[i] for token in piece.tokens]
        assert len(mine) == NEW_TOKENS
        compared += ref.assert_best_tokens(theirs, row, pixels, mine, f"prompt {i}")
    assert compared >= 0.95 * NEW_TOKENS * PROMPTS, f"only {compared} tokens without a near tie"

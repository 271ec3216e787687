"""Greedy continuations against transformers' `generate`, float32, fresh random weights."""

import itertools

import numpy as np
import pytest
import reference as ref
import torch
from engine_runs import generate_tokens
from test_forward import checkpoint_of, our_batch

from mis_jax.checkpoint.nnx_state import build

pytestmark = pytest.mark.usefixtures("optimized")

NEW_TOKENS = 64
ROWS = [[], [3], [2, 4], [5], [1, 1]]  # tiles of every image of every row


def their_tokens(model, row: np.ndarray, tiles: np.ndarray, count=NEW_TOKENS) -> np.ndarray:
    """Greedy tokens of one row, unpadded and alone, up to the first near tie."""
    ids = torch.from_numpy(row)[None]
    model.generation_config.eos_token_id = None
    pixels = ref.pixel_values([tiles])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **({} if pixels is None else {"pixel_values": pixels}),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(row) :].numpy()
    assert len(tokens) == count
    best_two = torch.stack(output.logits)[:, 0].topk(2).values
    ties = np.flatnonzero((best_two[:, 0] - best_two[:, 1]).numpy() <= ref.TIE)
    return tokens[: ties[0]] if len(ties) else tokens


# Logits of all six pairs are compared in every run; so are the answers of one pair a text kind.
_EVERY_RUN = {("llama", "layer_norm"), ("qwen2", "rms_norm"), ("qwen3", "layer_norm")}


@pytest.mark.parametrize(
    ("text", "tower"),
    [
        pytest.param(*pair, marks=() if pair in _EVERY_RUN else pytest.mark.slow)
        for pair in itertools.product(ref.TEXTS, ref.TOWERS)
    ],
)
def test_greedy(text, tower, seed, rng, tmp_path):
    theirs = ref.reference_model(ref.reference_config(text, tower), seed)
    checkpoint = checkpoint_of(theirs, tmp_path / "hf")
    ours = build(checkpoint.config, checkpoint.arrays)
    rows, tiles = ref.random_rows(rng, ROWS), ref.random_tiles(rng, ROWS)
    expected = [their_tokens(theirs, r, t) for r, t in zip(rows, tiles, strict=True)]
    made = generate_tokens(ours, our_batch(rows, tiles), max_new_tokens=NEW_TOKENS, stop_ids=())
    for i, (mine, reference) in enumerate(zip(made.tokens, expected, strict=True)):
        assert len(mine) == NEW_TOKENS
        np.testing.assert_array_equal(mine[: len(reference)], reference, f"row {i}")
    compared = sum(map(len, expected))
    assert compared >= NEW_TOKENS * len(ROWS) // 2, f"only {compared} tokens before a near tie"


@pytest.mark.slow
def test_greedy_dynamic_ntk(seed, rng, tmp_path):
    """Beyond `max_position_embeddings` cached keys keep the base they were written with."""
    config = ref.reference_config(
        "llama", "layer_norm", max_position_embeddings=48,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0),
    )  # fmt: skip
    checkpoint = checkpoint_of(ref.reference_model(config, seed), tmp_path / "hf")
    ours = build(checkpoint.config, checkpoint.arrays)
    # the first stays below for long, the second soon crosses the limit, the third starts beyond it
    rows = [rng.integers(3, ref.IMAGE_TOKEN, prompt) for prompt in (9, 40, 70)]
    empty = ref.random_tiles(rng, [[]])[0]
    made = generate_tokens(
        ours, our_batch(rows, [empty] * 3), max_new_tokens=NEW_TOKENS, stop_ids=()
    )
    compared = 0
    for mine, row in zip(made.tokens, rows, strict=True):
        # a fresh copy: transformers keeps the larger base of a longer earlier row
        expected = their_tokens(ref.reference_model(config, seed), row, empty)
        np.testing.assert_array_equal(mine[: len(expected)], expected, f"prompt of {len(row)}")
        compared += len(expected)
    assert compared >= NEW_TOKENS * len(rows) // 2, f"only {compared} tokens before a near tie"

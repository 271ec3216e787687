"""Logits and every layer's activation against transformers, float32, fresh random weights."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as ref
import torch

from mis_jax.checkpoint.load import Checkpoint, read_checkpoint
from mis_jax.checkpoint.nnx_state import build
from mis_jax.model.batch import Batch
from mis_jax.model.execution import Execution
from mis_jax.model.internvl import row_lengths

pytestmark = pytest.mark.usefixtures("optimized")

TOLERANCE = 1e-4
# tiles of every image of every row
PADDED = [[2, 3], [], [5], [1, 1]]
UNPADDED = [[1, 4], [5], [2], []]
LENGTH = 44  # of both batches, so that one compilation serves them; no row above fills it by itself
# every text and every tower with a tied and with an untied head
TIED = {("llama", "layer_norm"), ("qwen2", "rms_norm"), ("qwen3", "layer_norm")}


class Outputs(NamedTuple):
    """Values of one batch; the first layer of each stack is its embeddings."""

    logits: np.ndarray  # [batch, length, vocab]
    vision: np.ndarray  # [layers + 1, tiles, tokens, width]
    text: np.ndarray  # [layers + 1, batch, length, width], the last one normed


@functools.partial(jax.jit, static_argnames="config")
def our_outputs(config, arrays, batch: Batch) -> Outputs:
    """`InternVL.__call__`, and its pieces once more with the layers kept."""
    model = build(config, arrays)
    vision = model.vision(batch.tiles, dtype=jnp.float32, all_layers=True)
    last, _, layers = model.text(
        model.embed(batch),
        positions=batch.positions,
        lengths=row_lengths(batch),
        segment_ids=batch.segment_ids,
        all_layers=True,
    )
    layers = jnp.concatenate([layers[:-1], last[None]])
    return Outputs(model(batch), vision, layers)


def their_outputs(theirs, inputs: dict) -> Outputs:
    tower, seen = theirs.model.vision_tower, []

    def keep(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [m.register_forward_hook(keep) for m in (tower.embeddings, *tower.encoder.layer)]
    with torch.no_grad():
        output = theirs(**inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    stack = lambda layers: np.stack([layer.numpy() for layer in layers])  # noqa: E731
    return Outputs(output.logits.numpy(), stack(seen), stack(output.hidden_states))


def our_batch(rows: list[np.ndarray], tiles: list[np.ndarray], length: int = 0) -> Batch:
    length = max(length, *map(len, rows))
    ids = np.full((len(rows), length), ref.PAD, np.int32)
    segments = np.zeros_like(ids)
    per_row = max(map(len, tiles))
    slots = np.zeros((len(rows), per_row, ref.IMAGE_SIZE, ref.IMAGE_SIZE, 3), np.uint8)
    mask = np.zeros((len(rows), per_row), bool)
    for i, (row, pixels) in enumerate(zip(rows, tiles, strict=True)):
        ids[i, : len(row)], segments[i, : len(row)] = row, 1
        slots[i, : len(pixels)], mask[i, : len(pixels)] = pixels, True
    positions = np.arange(length, dtype=np.int32) * segments
    flat = slots.reshape(-1, ref.IMAGE_SIZE, ref.IMAGE_SIZE, 3)
    return Batch(ids, positions, segments, np.zeros(ids.shape, np.float32), flat, mask.reshape(-1))


def their_inputs(rows: list[np.ndarray], tiles: list[np.ndarray], length: int = 0) -> dict:
    length = max(length, *map(len, rows))
    ids = torch.full((len(rows), length), ref.PAD)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
    return dict(input_ids=ids, attention_mask=mask, pixel_values=ref.pixel_values(tiles))


def checkpoint_of(theirs, folder) -> Checkpoint:
    return read_checkpoint(ref.save(theirs, folder))


def logits_of(checkpoint: Checkpoint, batch: Batch, **options) -> np.ndarray:
    run = jax.jit(lambda arrays, batch: build(checkpoint.config, arrays, **options)(batch))
    return np.asarray(run(checkpoint.arrays, batch))


@pytest.mark.parametrize("tower", ref.TOWERS)
@pytest.mark.parametrize("text", ref.TEXTS)
def test_logits_and_every_layer(text, tower, seed, rng, tmp_path):
    tied = (text, tower) in TIED
    theirs = ref.reference_model(ref.reference_config(text, tower, tied=tied), seed)
    checkpoint = checkpoint_of(theirs, tmp_path / "hf")
    config = checkpoint.config
    assert config.text.tie_embeddings == tied

    for image_tiles in (PADDED, UNPADDED):
        rows, tiles = ref.random_rows(rng, image_tiles), ref.random_tiles(rng, image_tiles)
        if image_tiles is UNPADDED:
            rows = [np.append(row, rng.integers(3, 80, LENGTH - len(row))) for row in rows]
        batch = our_batch(rows, tiles, LENGTH)
        real = batch.segment_ids > 0
        assert real.all() == (image_tiles is UNPADDED)
        mine = Outputs(*map(np.asarray, our_outputs(config, checkpoint.arrays, batch)))
        reference = their_outputs(theirs, their_inputs(rows, tiles, LENGTH))
        assert mine.logits.dtype == np.float32
        difference = np.abs(mine.logits[real] - reference.logits[real])
        assert difference.max() <= TOLERANCE

        assert len(mine.vision) == len(reference.vision) == config.vision.num_layers + 1
        difference = np.abs(mine.vision[:, batch.tile_mask] - reference.vision)
        assert (difference.max((1, 2, 3)) <= TOLERANCE).all(), difference.max((1, 2, 3))

        assert len(mine.text) == len(reference.text) == config.text.num_layers + 1
        difference = np.abs(mine.text[:, real] - reference.text[:, real])
        assert (difference.max((1, 2)) <= TOLERANCE).all(), difference.max((1, 2))


def test_unrolled_and_rematerialised_equal_scanned(seed, rng, tmp_path):
    config = ref.reference_config("qwen2", "layer_norm", num_hidden_layers=2)
    checkpoint = checkpoint_of(ref.reference_model(config, seed), tmp_path / "hf")
    image_tiles = [[2, 1], []]
    batch = our_batch(ref.random_rows(rng, image_tiles), ref.random_tiles(rng, image_tiles))
    plain = logits_of(checkpoint, batch)
    for options in (dict(unroll=True), dict(remat="full"), dict(remat="dots", unroll=True)):
        other = logits_of(checkpoint, batch, execution=Execution(**options))
        np.testing.assert_allclose(other, plain, atol=1e-5)


@pytest.mark.parametrize("length", [40, 100])
def test_dynamic_ntk(length, seed, rng, tmp_path):
    """Below and beyond `max_position_embeddings`; a padded row looks at its own length."""
    config = ref.reference_config(
        "llama", "layer_norm", max_position_embeddings=48,
        rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0),
    )  # fmt: skip
    theirs = ref.reference_model(config, seed)
    checkpoint = checkpoint_of(theirs, tmp_path / "hf")
    assert checkpoint.config.text.rope_dynamic_factor == 2.0
    row = rng.integers(3, 80, length)
    short = rng.integers(3, 80, 20)
    with torch.no_grad():
        expected = theirs(input_ids=torch.from_numpy(row)[None]).logits.numpy()[0]
        # a fresh copy: transformers keeps the larger base of a longer earlier row
        expected_short = ref.reference_model(config, seed)(
            input_ids=torch.from_numpy(short)[None]
        ).logits.numpy()[0]
    empty = np.zeros((0, ref.IMAGE_SIZE, ref.IMAGE_SIZE, 3), np.uint8)
    got = logits_of(checkpoint, our_batch([row, short], [empty, empty]))
    assert np.abs(got[0] - expected).max() <= TOLERANCE
    assert np.abs(got[1, :20] - expected_short).max() <= TOLERANCE

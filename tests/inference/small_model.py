"""A model of a few thousand parameters, and batches for it."""

import jax
import numpy as np
from flax import nnx

from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig
from mis_jax.model.internvl import InternVL

IMAGE_TOKEN, VOCAB, SIZE = 7, 61, 28


def tiny_config(**text_changes) -> InternVLConfig:
    text = dict(
        kind="qwen2", vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4,
        num_kv_heads=2, mlp_size=48, head_dim=8, max_position=512, rope_theta=1e4,
    )  # fmt: skip
    vision = VisionConfig(
        hidden_size=24, num_layers=1, num_heads=2, mlp_size=32, image_size=SIZE, patch_size=7
    )
    return InternVLConfig(vision, TextConfig(**(text | text_changes)), image_token_id=IMAGE_TOKEN)


def random_model(config: InternVLConfig, seed: int) -> InternVL:
    """Embeddings and head large enough that no two tokens are nearly equally likely.

    The model never says the image token: the full forward pass would want a picture for it.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: InternVL(config, rngs=nnx.Rngs(0))))
    weights = jax.jit(lambda key: nnx.state(InternVL(config, rngs=nnx.Rngs(key))))(
        jax.random.key(seed)
    )
    model = nnx.merge(graph, weights)
    model.text.embedding[...] = model.text.embedding[...] * 50
    model.text.head[...] = (model.text.head[...] * 50).at[IMAGE_TOKEN].set(0)
    return model


def random_batch(
    rng: np.random.Generator, lengths: list[int], tiles: list[int] | None = None
) -> Batch:
    """Right-padded rows of so many text tokens; the tokens of a row's tiles stand after two."""
    tiles = tiles or [0] * len(lengths)
    per_tile = tiny_config().tokens_per_tile
    rows = []
    for text, count in zip(lengths, tiles, strict=True):
        ids = rng.integers(IMAGE_TOKEN + 1, VOCAB, text)
        rows.append(np.insert(ids, 2, [IMAGE_TOKEN] * (per_tile * count)))
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    segments, mask = np.zeros_like(ids), np.zeros((len(rows), max(tiles)), bool)
    pixels = rng.integers(0, 256, (len(rows), max(tiles), SIZE, SIZE, 3), dtype=np.uint8)
    for i, (row, count) in enumerate(zip(rows, tiles, strict=True)):
        ids[i, : len(row)], segments[i, : len(row)], mask[i, :count] = row, 1, True
    positions = np.arange(ids.shape[1], dtype=np.int32) * segments
    weights = np.zeros(ids.shape, np.float32)
    return Batch(
        ids, positions, segments, weights, pixels.reshape(-1, SIZE, SIZE, 3), mask.reshape(-1)
    )


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, in that order."""
    count = len(batch.input_ids)
    tiles = batch.tiles.reshape(count, -1, SIZE, SIZE, 3)[rows].reshape(-1, SIZE, SIZE, 3)
    return Batch(
        *(
            getattr(batch, name)[rows]
            for name in ("input_ids", "positions", "segment_ids", "loss_weights")
        ),
        tiles,
        batch.tile_mask.reshape(count, -1)[rows].reshape(-1),
    )


_WIDTH = 224  # tokens; one compilation for all full passes of a model


def full_logits(model: InternVL, batch: Batch, new, forward=None) -> list[np.ndarray]:
    """Of the full forward pass: each row's logits from the prompt's last token to `new`'s last."""
    lengths, count = batch.segment_ids.sum(1), len(new[0])
    ids = np.zeros((len(lengths), _WIDTH), np.int32)
    segments = np.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = batch.input_ids[row, :length]
        ids[row, length : length + count] = new[row]
        segments[row, : length + count] = 1
    positions = np.arange(_WIDTH, dtype=np.int32) * segments
    weights = np.zeros(ids.shape, np.float32)
    longer = Batch(ids, positions, segments, weights, batch.tiles, batch.tile_mask)
    logits = np.asarray((forward or _forward)(*nnx.split(model), longer))
    return [logits[row, n - 1 : n + count] for row, n in enumerate(lengths)]


def run(graph, weights, batch):
    return nnx.merge(graph, weights)(batch)


_forward = jax.jit(run, static_argnums=0)

"""Batches of random samples, for steps whose speed does not depend on what they learn."""

import numpy as np

from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig


def noise(
    model: InternVLConfig,
    *,
    rows: int,
    length: int,
    tiles: int,
    samples: int = 1,
    used: int | None = None,
    passes: int = 1,
) -> Batch:
    """`passes` micro-batches of `rows` rows of `length` tokens, each with so many `samples`.

    A sample's first tokens are its share of the row's `tiles`; a quarter of its tokens, the last,
    are under the loss. Of every sample's place only `used` tokens are there, the rest is padding.
    """
    rng = np.random.default_rng(0)
    each = length // samples
    used = used or each
    image = model.tokens_per_tile * tiles // samples
    assert image + 4 < used <= each, "the image tokens of a sample have to fit it"
    assert length % samples == 0 and tiles % samples == 0
    shape = (passes, rows, samples, each)
    ids = rng.integers(10, min(model.text.vocab_size, model.image_token_id) - 1, shape)
    ids[..., 4 : 4 + image] = model.image_token_id
    place = np.broadcast_to(np.arange(each), shape)
    real = place < used
    number = np.broadcast_to(1 + np.arange(samples)[:, None], shape)
    flat = (passes, rows, length)
    size = model.vision.image_size
    pixels = rng.integers(0, 256, (passes, rows * tiles, size, size, 3), dtype=np.uint8)
    return Batch(
        ids.reshape(flat).astype(np.int32),
        place.reshape(flat).astype(np.int32),
        np.where(real, number, 0).reshape(flat).astype(np.int32),
        (real & (place >= used - used // 4)).reshape(flat).astype(np.float32),
        pixels,
        np.ones((passes, rows * tiles), bool),
    )  # type: ignore[arg-type]

"""Packed rows train as the same samples do alone, and no sample sees another of its row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_step import KEPT, checkpoint, examples, initial, reference, step_of  # noqa: F401

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import Checkpoint
from mis_jax.data.collate import Example, collate
from mis_jax.model.batch import Batch
from mis_jax.model.internvl import InternVL, row_lengths


def batch_of(rows: list[list[Example]], tiles: int, reduction) -> Batch:
    flat = collate(
        rows,
        length=96,
        tiles_per_sequence=tiles,
        image_size=reference().IMAGE_SIZE,
        pad_id=0,
        reduction=reduction,
    )
    return jax.tree.map(lambda field: field[None], flat)


@pytest.fixture(scope="module")
def step(checkpoint):  # noqa: F811
    """One for all cases: what a token weighs is in the batch."""
    return step_of(checkpoint, KEPT)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_those_of_the_samples_alone(
    checkpoint,  # noqa: F811
    step,
    reduction,
    seed,
):
    """Two rows, one of them of three samples with pictures in the first and the last."""
    made = examples(seed)
    alone = batch_of([[one] for one in made], 4, reduction)
    packed = batch_of([[made[0], made[1], made[3]], [made[2]]], 8, reduction)
    states, metrics = zip(
        *(step(initial(checkpoint, KEPT), batch) for batch in (alone, packed)), strict=True
    )
    for name in ("tokens", "loss_tokens"):
        assert int(metrics[0][name]) == int(metrics[1][name]) > 0
    assert abs(float(metrics[0]["loss"]) - float(metrics[1]["loss"])) < 1e-5
    for name, expected in states[0].optimizer.items():
        difference = np.abs(np.asarray(states[1].optimizer[name]) - np.asarray(expected)).max()
        assert difference <= 1e-5 * max(1.0, float(np.abs(expected).max())), name
    assert max(float(np.abs(g).max()) for g in states[0].optimizer.values()) > 1e-2


def test_nothing_of_one_sample_reaches_another(checkpoint: Checkpoint):  # noqa: F811
    """Derivatives of each segment's output by the input of the others are zero to the last bit."""
    made = examples(3)
    batch = jax.tree.map(lambda field: field[0], batch_of([made[:3]], 8, "token"))
    model = nnx_state.build(
        checkpoint.config, {n: jnp.asarray(a) for n, a in checkpoint.arrays.items()}
    )
    segments = np.asarray(batch.segment_ids)[0]

    def output(x, model: InternVL):
        hidden, _, _ = model.text(
            x,
            positions=batch.positions,
            lengths=row_lengths(batch),
            segment_ids=batch.segment_ids,
        )
        return hidden

    x = model.embed(batch)
    gradient_of = jax.jit(jax.grad(lambda x, weights: jnp.sum(output(x, model) * weights)))
    for segment in (1, 2, 3):
        own = jnp.asarray(segments == segment)[None, :, None]
        weights = jax.random.normal(jax.random.key(segment), x.shape)
        gradient = gradient_of(x, weights * own)
        reached = np.abs(np.asarray(gradient)[0]).max(axis=-1) > 0
        assert reached[segments == segment].any()
        assert not reached[segments != segment].any()

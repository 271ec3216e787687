"""Next-token loss on weighted tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mis_jax.model.batch import Batch


def token_losses(
    logits: Float[Array, "batch length vocab"], batch: Batch
) -> Float[Array, "batch length-1"]:
    """Cross-entropy of every next token, float32; entry t is about token t + 1."""
    log_probability = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    targets = batch.input_ids[:, 1:, None]
    return -jnp.take_along_axis(log_probability, targets, axis=-1)[..., 0]


def weighted_loss(
    logits: Float[Array, "batch length vocab"], batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of weighted losses and sum of weights; their ratio is the loss of a batch.

    The two are returned apart so that accumulated and sharded batches are divided once, by the
    weight of all their tokens.
    """
    weights = batch.loss_weights[:, 1:]
    return jnp.sum(token_losses(logits, batch) * weights), jnp.sum(weights)

"""The train step: one jitted function of (state, batch) with a donated state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from mis_jax.config import Part
from mis_jax.model.batch import Batch
from mis_jax.model.internvl import InternVL
from mis_jax.train.loss import weighted_loss

Parameters = dict[str, jax.Array]  # by dotted path
TrainStep = Any  # a jitted (TrainState, Batch) -> (TrainState, metrics)
_PREFIX = {"vision": "vision.", "projector": "projector.", "language": "text."}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes (`frozen` is only carried along)."""

    step: Int[Array, ""]  # optimizer steps taken
    trainable: Parameters
    frozen: Parameters
    optimizer: Any


def split_parameters(
    parameters: Parameters, freeze: tuple[Part, ...]
) -> tuple[Parameters, Parameters]:
    """Trainable and frozen parameters."""
    prefixes = tuple(_PREFIX[part] for part in freeze)
    frozen = {name: value for name, value in parameters.items() if name.startswith(prefixes)}
    return {n: v for n, v in parameters.items() if n not in frozen}, frozen


def make_train_step(
    build: Callable[[Parameters], InternVL],
    transform: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> TrainStep:
    """A step over micro-batches: every field of `batch` has a leading axis of micro-batches.

    Gradients are summed over micro-batches and divided once by the weight of all loss tokens, so a
    step does not depend on how its rows are cut. A step whose loss or gradient is not finite
    leaves the state as it was and says so in `finite`.
    """

    def losses(trainable: Parameters, frozen: Parameters, batch: Batch):
        return weighted_loss(build(trainable | frozen)(batch), batch)

    gradient_of = jax.value_and_grad(losses, has_aux=True)

    def summed(state: TrainState, batch: Batch):
        """Gradient, loss and weight summed over micro-batches, float32."""
        if batch.input_ids.shape[0] == 1:  # no sum: nothing is held twice
            one = jax.tree.map(lambda field: field[0], batch)
            (total, weight), gradient = gradient_of(state.trainable, state.frozen, one)
            return jax.tree.map(lambda g: g.astype(jnp.float32), gradient), total, weight

        def accumulate(carry, micro: Batch):
            gradient, total, weight = carry
            (loss, loss_weight), g = gradient_of(state.trainable, state.frozen, micro)
            gradient = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), gradient, g)
            return (gradient, total + loss, weight + loss_weight), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trainable)
        return jax.lax.scan(accumulate, (zeros, 0.0, 0.0), batch)[0]

    def step(state: TrainState, batch: Batch):
        gradient, total, weight = summed(state, batch)
        weight = jnp.maximum(weight, 1e-8)  # a batch may hold no loss token at all
        loss = total / weight
        gradient = jax.tree.map(lambda g: g / weight, gradient)  # float32, whatever the parameters
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, optimizer = transform.update(gradient, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)  # noqa: E731
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": norm,
            "param_norm": optax.tree.norm(trainable),
            "update_norm": optax.tree.norm(updates),
            "tokens": jnp.sum(batch.segment_ids > 0),
            "loss_tokens": jnp.sum(batch.loss_weights > 0),
            "finite": finite,
        }
        after = TrainState(
            step=state.step + finite.astype(jnp.int32),
            trainable=keep(trainable, state.trainable),
            frozen=state.frozen,
            optimizer=keep(optimizer, state.optimizer),
        )
        return after, metrics

    return jax.jit(step, donate_argnums=0)

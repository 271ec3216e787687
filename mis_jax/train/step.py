"""The train step: one jitted function of (state, batch) with a donated state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mis_jax.config import Part, RunConfig
from mis_jax.model.batch import Batch
from mis_jax.model.internvl import InternVL
from mis_jax.model.lora import DROPOUT_KEY
from mis_jax.model.scan_grad_accum import LayerSums
from mis_jax.train.loss import weighted_loss
from mis_jax.train.optimizer import global_norm, sum_of_squares
from mis_jax.train.stochastic_rounding import (
    apply_updates,
    round_stochastically,
    seed_of,
    stored_like,
)

Parameters = dict[str, jax.Array]  # by dotted path
TrainStep = Any  # a jitted (TrainState, Batch) -> (TrainState, metrics)
_PREFIX = {"vision": "vision.", "projector": "projector.", "language": "text."}


#: Steps after which a gradient's norm may count as a spike: before, there is nothing to compare.
SPIKE_WARMUP = 20
_NORM_DECAY = 0.95  # of the running mean of gradient norms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a step changes (`frozen` is only carried along)."""

    step: Int[Array, ""]  # optimizer steps taken
    trainable: Parameters
    frozen: Parameters
    optimizer: Any
    grad_norm_ema: Float[Array, ""]  # running mean of the gradient's norm


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
    config: RunConfig,
    *,
    shardings: TrainState | None = None,
    device_moments: Any = None,
    sum_in_layers: tuple[str, ...] = (),
    compiler_options: dict[str, Any] | None = None,
) -> TrainStep:
    """A step over micro-batches: every field of `batch` has a leading axis of micro-batches.

    Gradients are summed over micro-batches and divided once by the weight of all loss tokens, so a
    step does not depend on how its sequences are cut. A step whose loss or gradient is not finite,
    or whose gradient is a spike, leaves the state as it was and says so in `finite` and `spike`.

    Args:
        build: the model of parameters by name.
        transform: the optimizer.
        schedule: learning rate by step, for the metrics.
        config: what the run has set; its mesh and data are not looked at.
        shardings: sharding of every leaf of the state; without it the compiler chooses.
        device_moments: sharding, while they are used, of moments that wait in host memory.
        sum_in_layers: beginnings of the names of parameters whose gradients are summed inside the
            backward pass.
        compiler_options: of XLA.
    """
    sum_dtype, max_spike = jnp.dtype(config.dtype.gradients), config.train.spike
    guarded = optax.with_extra_args_support(transform)

    def losses(
        trained: Parameters, sums: Parameters, rest: Parameters, batch: Batch, key: jax.Array, add
    ):
        model = build(trained | rest | {DROPOUT_KEY: key})
        for part, stack in (("text", model.text.layers), ("vision", model.vision.layers)):
            inside = f"{part}.layers.block."
            own = {n.removeprefix(inside): x for n, x in sums.items() if n.startswith(inside)}
            stack.sums = LayerSums(own, add) if own else None
        text = model.text
        return weighted_loss(
            model.hidden(batch, key),
            text.table[...],
            batch,
            vocab=text.config.vocab_size,
            chunk=config.train.loss_chunk,
            constrain=model.execution.constrain,
            place_table=None if shardings is None else _table_sharding(shardings),
        )

    gradients_of = jax.value_and_grad(losses, (0, 1), has_aux=True)

    def placed(gradient: Parameters) -> Parameters:
        """Each device keeps the part of the gradient whose parameters it has."""
        if shardings is None:
            return gradient
        return jax.lax.with_sharding_constraint(
            gradient, {name: shardings.trainable[name] for name in gradient}
        )

    def summed(state: TrainState, batch: Batch):
        """Gradient, loss and weight summed over micro-batches."""
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        count = batch.input_ids.shape[0]
        if count == 1:  # no sum: nothing is held twice
            one = jax.tree.map(lambda field: field[0], batch)
            (total, weight), (gradient, _) = gradients_of(
                state.trainable, {}, state.frozen, one, key, None
            )
            return placed(gradient), total, weight
        in_layers = {n for n in state.trainable if n.startswith(sum_in_layers)}
        outside = {n: x for n, x in state.trainable.items() if n not in in_layers}
        rest = state.frozen | {n: state.trainable[n] for n in in_layers}

        def accumulate(carry, numbered):
            sums, total, weight = carry
            number, micro = numbered
            turn = state.step * count + number

            def add(sum_, gradient, place: int, layer):
                """One layer's gradient, in float32, into a sum that may be narrower."""
                wide = sum_.astype(jnp.float32) + gradient
                if sum_.dtype == jnp.float32:
                    return wide
                return round_stochastically(wide, seed_of(3, turn, place, layer))

            (loss, loss_weight), (gradient, layers) = gradients_of(
                outside,
                {n: sums[n] for n in in_layers},
                rest,
                micro,
                jax.random.fold_in(key, number),
                add,
            )
            before = {n: sums[n] for n in outside}
            wide = jax.tree.map(lambda a, b: a.astype(jnp.float32) + b, before, placed(gradient))
            after = stored_like(wide, before, turn, salt=2) | placed(layers)
            return (after, total + loss, weight + loss_weight), None

        zeros = placed(jax.tree.map(lambda p: jnp.zeros(p.shape, sum_dtype), state.trainable))
        return jax.lax.scan(accumulate, (zeros, 0.0, 0.0), (jnp.arange(count), batch))[0]

    def step(state: TrainState, batch: Batch):
        gradient, total, weight = summed(state, batch)
        weight = jnp.maximum(weight, 1e-8)  # a batch may hold no loss token at all
        loss = total / weight
        # A product, which XLA computes where it is used: a quotient would be a second gradient.
        share = 1 / weight
        length = global_norm(gradient) * share
        gradient = jax.tree.map(lambda g: g.astype(jnp.float32) * share, gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(length)
        spike = jnp.zeros((), bool)
        if max_spike is not None:
            spike = (state.step >= SPIKE_WARMUP) & (length > max_spike * state.grad_norm_ema)
        taken = finite & ~spike
        moments = state.optimizer
        if device_moments is not None:
            moments = jax.device_put(moments, device_moments)
        updates, optimizer = guarded.update(
            gradient, moments, state.trainable, taken=taken, norm=length
        )
        trainable, squares = _updated(state.trainable, updates, state.step, taken)
        decay = jnp.where(state.step == 0, 0.0, _NORM_DECAY)
        grad_norm_ema = decay * state.grad_norm_ema + (1 - decay) * length
        metrics = {
            "loss": loss,
            "learning_rate": schedule(state.step),
            "grad_norm": length,
            "param_norm": jnp.sqrt(squares[0]),
            "update_norm": jnp.sqrt(squares[1]),
            "tokens": jnp.sum(batch.segment_ids > 0),
            "loss_tokens": jnp.sum(batch.loss_weights > 0),
            "tiles": jnp.sum(batch.tile_mask),
            # A sample of n tokens adds 1 + 3 + 5 + ... = n ** 2.
            "squares": jnp.sum(jnp.where(batch.segment_ids > 0, 2.0 * batch.positions + 1, 0.0)),
            "finite": finite,
            "spike": spike,
        }
        after = TrainState(
            step=state.step + taken.astype(jnp.int32),
            trainable=trainable,
            frozen=state.frozen,
            optimizer=optimizer,
            grad_norm_ema=jnp.where(taken, grad_norm_ema, state.grad_norm_ema),
        )
        return after, metrics

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=None if shardings is None else (shardings, None),
        compiler_options=compiler_options,
    )


def _table_sharding(shardings: TrainState) -> Any:
    """Where the gradient of the head lies; of the embedding, where that serves as head."""
    for name in ("text.head", "text.embedding"):
        if name in shardings.trainable:
            return shardings.trainable[name]
        if name in shardings.frozen:
            return None
    return None


def _updated(
    trainable: Parameters, updates: Any, step: jax.Array, taken: jax.Array
) -> tuple[Parameters, list[jax.Array]]:
    """New parameters, and the sums of squares of them and of their updates.

    A parameter's update is measured before it is added, and the sum after: in any other order XLA
    keeps a copy of the parameter, or the updates of all of them until the end.
    """
    before, after, totals = {}, {}, [jnp.zeros(()), jnp.zeros(())]
    for name, value in trainable.items():
        square = sum_of_squares(updates[name])
        before[name], square = jax.lax.optimization_barrier((value, square))
        totals[1] += square
    for name, value in apply_updates(before, updates, step).items():
        kept = jnp.where(taken, value, before[name])
        after[name] = jax.lax.optimization_barrier(kept)
        totals[0] += sum_of_squares(after[name])
    return after, totals

"""AdamW as InternVL's fine-tuning scripts run it, or Adafactor; warm-up and cosine decay."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from mis_jax.config import DtypeConfig, OptimizerConfig
from mis_jax.model import xla_cpu
from mis_jax.train.stochastic_rounding import stored_like


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of steps already taken: 0 at first, the peak after the warm-up.

    The warm-up lasts ceil(ratio * steps); then 0.5 (1 + cos pi p) to 0.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    rise = optax.linear_schedule(0.0, config.learning_rate, warmup)
    if config.schedule == "constant":
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    config: OptimizerConfig, dtype: DtypeConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW (or Adafactor) with decay on every trainable tensor.

    Gradients come in float32 and everything is computed in float32; AdamW's moments are stored in
    `dtype.moments`. Parameters are dicts by dotted path. With `taken=False` the state stays as it
    was, whatever the gradient, and the update is not to be used. `norm` is the gradient's, where
    it is known already.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adafactor":  # Shazeer and Stern 2018, without relative step sizes
        direction = [optax.scale_by_factored_rms(decay_rate=0.8), optax.clip_by_block_rms(1.0)]
    else:
        direction = [_adam(config, jnp.dtype(dtype.moments))]
    inner = optax.chain(
        _clip(config.clip),
        *direction,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
        _scale_parts(config),
    )

    def init(params: Any) -> optax.OptState:
        return inner.init(_wide(params))

    def update(
        updates: Any, state: Any, params: Any = None, *, taken: Any = True, norm: Any = None
    ):
        moved: Any = inner.update(updates, state, _wide(params), taken=taken, norm=norm)
        updates, after = moved
        choose = lambda new, old: jnp.where(taken, new, old)  # noqa: E731
        after = tuple(
            new if isinstance(new, optax.ScaleByAdamState) else jax.tree.map(choose, new, old)
            for new, old in zip(after, state, strict=True)
        )
        return updates, after

    return optax.GradientTransformationExtraArgs(init, update)


def _adam(config: OptimizerConfig, dtype: jnp.dtype) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, as optax' `scale_by_adam` has it, its moments updated in place.

    optax' own leaves the old moments in use until the step that reads the new ones is done, and
    XLA then copies both. It also has no narrow second moment.
    """
    b1, b2 = config.beta1, config.beta2

    def init(params) -> optax.ScaleByAdamState:
        zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)  # noqa: E731
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(), zeros())

    def update(updates, state, params=None, *, taken=True, **_):
        del params
        count = state.count + jnp.asarray(taken, jnp.int32)

        def mean(old, new, decay: float):
            wide = old.astype(jnp.float32)
            return jnp.where(taken, decay * wide + (1 - decay) * new, wide)

        mu = jax.tree.map(lambda m, g: mean(m, g, b1), state.mu, updates)
        nu = jax.tree.map(lambda v, g: mean(v, jnp.square(g), b2), state.nu, updates)
        mu, nu = stored_like(mu, state.mu, count, salt=1), stored_like(nu, state.nu, count, salt=4)
        # What follows reads the new moments: the old ones' memory is theirs.
        pairs = {name: jax.lax.optimization_barrier((mu[name], nu[name])) for name in mu}
        mu, nu = ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))
        correct1, correct2 = (1 - b ** count.astype(jnp.float32) for b in (b1, b2))

        def towards(m, v):
            root = jnp.sqrt(v.astype(jnp.float32) / correct2) + config.eps
            return m.astype(jnp.float32) / correct1 / root

        return jax.tree.map(towards, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(largest: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to a global norm of `largest`.

    As optax's own, by one factor: its quotients are computed once more for all and kept.
    """

    def clipped(updates, state, params=None, *, norm=None, **_):
        del params
        length = global_norm(updates) if norm is None else norm
        factor = jnp.minimum(largest / jnp.maximum(length, 1e-30), 1.0)
        return jax.tree.map(lambda u: u * factor, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clipped)


def _wide(params: Any) -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _scale_parts(config: OptimizerConfig) -> optax.GradientTransformation:
    """The learning rates of parts that have one of their own, relative to the others'."""
    rates = {"vision.": config.vision_learning_rate, "projector.": config.projector_learning_rate}
    factors = {part: rate / config.learning_rate for part, rate in rates.items() if rate}

    def scaled(updates, params=None):
        del params
        result = dict(updates)
        for part, factor in factors.items():
            result |= {n: u * factor for n, u in updates.items() if n.startswith(part)}
        return result

    return optax.stateless(scaled)


def sum_of_squares(x: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Of all numbers of an array, in float32."""
    if x.size < 2**20:
        return _at_once(x)
    return jax.lax.platform_dependent(x, cpu=xla_cpu.sum_of_squares, default=_at_once)


def global_norm(tree: Any) -> Float[Array, ""]:
    """Length of all arrays of a tree as one vector, in float32."""
    return jnp.sqrt(sum(map(sum_of_squares, jax.tree.leaves(tree)), jnp.zeros(())))


def _at_once(x: Array) -> Array:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))

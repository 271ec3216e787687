"""AdamW as InternVL's fine-tuning scripts run it, or Adafactor; warm-up and cosine decay."""

import math

import jax
import jax.numpy as jnp
import optax

from mis_jax.config import DtypeConfig, OptimizerConfig
from mis_jax.train.rounding import narrow_state


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
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (or Adafactor) with decay on every trainable tensor.

    Gradients come in float32 and everything is computed in float32; AdamW's moments are stored in
    `dtype.moments`. Parameters are dicts by dotted path.
    """
    schedule = learning_rate_schedule(config, steps)
    if config.name == "adafactor":  # Shazeer and Stern 2018, without relative step sizes
        moments = optax.scale_by_factored_rms(decay_rate=0.8)
    else:
        moments = narrow_state(
            optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
            jnp.dtype(dtype.moments),
            is_moment=lambda path: len(path) > 1,  # of (count, mu, nu) the trees
        )
    parts = [
        optax.clip_by_global_norm(config.clip),
        moments,
        *([optax.clip_by_block_rms(1.0)] if config.name == "adafactor" else []),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
        _scale_parts(config),
    ]
    inner = optax.chain(*parts)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    def update(updates, state, params=None):
        return inner.update(updates, state, _wide(params))

    return optax.GradientTransformation(init, update)


def _wide(params: optax.Params | None) -> optax.Params | None:
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

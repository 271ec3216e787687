"""AdamW with linear warm-up and cosine decay, as InternVL's fine-tuning scripts run it."""

import math

import jax
import jax.numpy as jnp
import optax

from mis_jax.config import DtypeConfig, OptimizerConfig


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
    """Clipping by global norm, then AdamW with decay on every trainable tensor.

    Gradients come in float32. The second moment is float32 beside bfloat16 parameters too:
    bfloat16 rounds its small changes (1 - beta2) away.
    """
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mu_dtype=jnp.dtype(dtype.moments),
        ),
    )

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(jax.tree.map(lambda p: p.astype(jnp.float32), params))

    return optax.GradientTransformation(init, inner.update)

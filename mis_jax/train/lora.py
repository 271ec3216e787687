"""LoRA in a run: what is trained, its first values, the frozen base, and the adapter as files."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from mis_jax.checkpoint.load import OpenCheckpoint, load
from mis_jax.checkpoint.mapping import Layout
from mis_jax.checkpoint.peft.files import write_adapter
from mis_jax.checkpoint.trained_model import adapter_of
from mis_jax.config import RunConfig
from mis_jax.model.lora import is_adapter, quantise

_KERNEL = ".kernel"


def is_trained(config: RunConfig, name: str) -> bool:
    """Adapters are, and the projector unless it is frozen."""
    return is_adapter(name) or (
        name.startswith("projector.") and "projector" not in config.train.freeze
    )


def stored_dtype(config: RunConfig, name: str, dtype: Any) -> jnp.dtype:
    """Of a parameter that the model has in `dtype`: what is frozen waits in the dtype of compute.

    It is never written again, and kernels are used in that dtype alone.
    """
    if ".kernel." in name:  # quantised
        return jnp.dtype(dtype)
    return jnp.dtype(config.dtype.params if is_trained(config, name) else config.dtype.compute)


def load_parameters(
    opened: OpenCheckpoint, config: RunConfig, shapes: Mapping[str, Any], vocab_rows: int
) -> dict[str, jax.Array]:
    """Every parameter before the first step, in the shardings and dtypes of `shapes`.

    Tables have `vocab_rows` rows.
    One kernel at a time is quantised, so that the whole base is never held twice.
    """
    shardings: dict[str, Sharding] = {}
    for name, shape in shapes.items():
        assert shape.sharding is not None
        shardings[name.replace(".kernel.values", _KERNEL)] = shape.sharding

    def kept(name: str, value: jax.Array) -> dict[str, jax.Array]:
        if name in shapes:
            return {name: value.astype(shapes[name].dtype)}
        values, scale = shapes[f"{name}.values"], shapes[f"{name}.scale"]
        out = values.sharding, scale.sharding
        quantised = _quantiser(config.lora.base, out)(value)
        return {f"{name}.values": quantised[0], f"{name}.scale": quantised[1]}

    dtype = config.dtype.params
    arrays = load(opened, dtype, shardings=shardings, vocab_rows=vocab_rows, then=kept).arrays
    return arrays | first_adapters(config.seed, shapes)


def _quantiser(base: str, out_shardings: tuple[Any, Any]):
    def both(kernel):
        quantised = quantise(kernel, base)
        return quantised.qvalue, quantised.scale

    return jax.jit(both, out_shardings=out_shardings)


def first_adapters(seed: int, shapes: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Values before the first step, by seed and name alone: the model is that of the base.

    `a` is uniform within 1 / sqrt(inputs), which is kaiming-uniform with sqrt(5), and `b` zero.
    """
    adapters = {name: shape for name, shape in shapes.items() if is_adapter(name)}

    def draw() -> dict[str, jax.Array]:
        return {name: _first(seed, name, shape) for name, shape in adapters.items()}

    shardings = {name: shape.sharding for name, shape in adapters.items()}
    return jax.jit(draw, out_shardings=shardings)()


def _first(seed: int, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    if name.endswith(".b"):
        return jnp.zeros(shape.shape, shape.dtype)
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    bound = shape.shape[-2] ** -0.5
    return jax.random.uniform(key, shape.shape, jnp.float32, -bound, bound).astype(shape.dtype)


def export(folder: Path, trained: Mapping[str, Any], config: RunConfig, opened: OpenCheckpoint):
    """Write what was trained as a folder of PEFT's, in the layout that the base was published in.

    `mis-jax convert BASE DST --adapter FOLDER` merges it. Raises OSError when the disk does not
    take it.
    """
    model_type = (opened.published or {}).get("model_type")
    layout: Layout = "internvl" if model_type == "internvl_chat" else "hf"
    dtype = config.final_dtype
    rounded = {name: value.astype(dtype) for name, value in trained.items()}
    adapter = adapter_of(rounded, config.lora)
    write_adapter(folder, adapter, opened.config, layout, base=str(config.model))

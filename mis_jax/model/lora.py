"""LoRA: a low-rank map beside each linear map of the blocks, and frozen kernels in few bits.

An adapter is part of the model, like any other parameter: `text.layers.block.gate.adapter.a`
[layers, in, rank] and `.b` [layers, rank, out] beside `text.layers.block.gate.kernel`. Where
upstream has q, k and v in one map (InternLM2, the vision tower) the three share one `a`, which lies
at `...attention.adapter_a`. Source: peft `tuners/lora/layer.py`.
"""

import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import qwix
from flax import nnx
from jaxtyping import Array, Float, Int8, PRNGKeyArray

from mis_jax.config import LoraConfig
from mis_jax.model.internvl import InternVL
from mis_jax.model.layers import Linear, UncastParam
from mis_jax.model.matmul import matmul_fp32_accum

_TILE = 64  # values along the inputs of a kernel that share a scale of nf4


#: An entry among the parameters that a step builds its model of: the key of what it drops.
DROPOUT_KEY = "dropout_key"


class DropoutKey(nnx.Variable):
    """Keys of the layers of an adapter; no parameter."""


class Adapter(nnx.Module):
    """`scale * (dropout(x) @ a) @ b`, float32; without a key nothing is dropped."""

    def __init__(self, a: nnx.Param, b: nnx.Param, *, scale: float, dropout: float, group: str):
        self.a, self.b = a, b
        self.scale = scale
        self.dropout = dropout
        self.group = group  # adapters of one group drop the same inputs
        self.key: DropoutKey | None = None

    def __call__(self, x: Float[Array, "... in_size"]) -> Float[Array, "... out_size"]:
        a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
        if self.key is None:
            return self._branch(x, a, b, None)
        # What is dropped is drawn again in the backward pass: a mask and a copy of every input
        # would otherwise be most of what a layer with frozen kernels keeps.
        return jax.checkpoint(self._branch)(x, a, b, self.key[...])

    def _branch(self, x, a, b, key: PRNGKeyArray | None):
        if key is not None:
            kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0).astype(x.dtype)
        return matmul_fp32_accum(matmul_fp32_accum(x, a).astype(x.dtype), b) * self.scale


class QuantisedKernel(nnx.Module):
    """A kernel that is never trained: integers of 8 or 4 bits, and their scales."""

    def __init__(self, values: UncastParam, scale: UncastParam, base: str):
        self.values, self.scale = values, scale
        self.base = base

    def __call__(self, dtype: jnp.dtype) -> Float[Array, "*layers in_size out_size"]:
        """The kernel that it stands for."""
        quantised = qwix.QArray(self.values[...], self.scale[...], qtype=self.base)
        return qwix.dequantize(quantised).astype(dtype)

    def parts(self) -> tuple[Int8[Array, "out_size in_size"], Float[Array, " out_size"]]:
        """Integers and scales of a kernel of 8 bits that is stored as [out, in]."""
        assert self.base == "int8"
        return self.values[...], self.scale[...][:, 0]


def attach(model: InternVL, config: LoraConfig) -> None:
    """Give every linear map of the target parts' blocks an adapter, in place.

    The model is an abstract one: shapes in the place of arrays.
    """
    scale = (config.alpha or 2 * config.rank) / config.rank
    for path, linear in _linears(model, config):
        kernel = linear.kernel
        assert isinstance(kernel, nnx.Param)
        shape, axes = kernel.shape, kernel.axes
        holder, _, name = path.rpartition(".")
        shared = name in ("q", "k", "v") and _one_map(model, path)
        a = _param((*shape[:-1], config.rank), (*axes[:-1], None))
        if shared:
            attention = _at(model, holder)
            a = getattr(attention, "adapter_a", a)
            setattr(attention, "adapter_a", a)  # noqa: B010  not one of its declared fields
        b = _param((*shape[:-2], config.rank, shape[-1]), (*axes[:-2], None, axes[-1]))
        group = holder if shared else path
        adapter = Adapter(a, b, scale=scale, dropout=config.dropout, group=group)
        linear.adapter = nnx.data(adapter)
        if config.base != "none":
            linear.kernel = _abstract_quantised(kernel, config.base)


def set_dropout(model: InternVL, key: PRNGKeyArray) -> None:
    """Have the adapters of a model drop inputs, by `key` and their place alone; in place."""
    for _, adapter in nnx.iter_graph(model):
        if isinstance(adapter, Adapter) and adapter.dropout:
            own = jax.random.fold_in(key, zlib.crc32(adapter.group.encode()))
            adapter.key = nnx.data(DropoutKey(jax.random.split(own, adapter.a.shape[0])))


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".adapter" in name


def quantise(kernel: Float[Array, "layers in_size out_size"], base: str) -> qwix.QArray:
    """Integers and float32 scales: one for an output (int8), or for 64 inputs of it (nf4)."""
    tiles = {0: _tile(kernel.shape[1])} if base == "nf4" else None

    def of_layer(layer: Float[Array, "in_size out_size"]) -> qwix.QArray:
        x = layer.astype(jnp.float32)
        return qwix.quantize(x, base, channelwise_axes=(1,), tiled_axes=tiles)

    return jax.lax.map(of_layer, kernel)  # one after the other: nf4 takes much room on the way


def _tile(inputs: int) -> int:
    return next(size for size in range(min(_TILE, inputs), 0, -1) if inputs % size == 0)


def _abstract_quantised(kernel: nnx.Param, base: str) -> QuantisedKernel:
    shapes = jax.eval_shape(lambda x: quantise(x, base), kernel.get_value())
    axes = kernel.axes if base == "nf4" else (*kernel.axes[:-2], None, kernel.axes[-1])
    return QuantisedKernel(
        UncastParam(shapes.qvalue, axes=kernel.axes), UncastParam(shapes.scale, axes=axes), base
    )


def _param(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32), axes=axes)


def _linears(model: InternVL, config: LoraConfig) -> Iterator[tuple[str, Linear]]:
    """Every linear map of the target parts' blocks by its dotted path."""
    for part in config.targets:
        name = {"vision": "vision", "language": "text"}[part]
        block = getattr(model, name).layers.block
        found = [(p, m) for p, m in nnx.iter_modules(block) if isinstance(m, Linear)]
        for path, linear in found:
            yield ".".join([name, "layers", "block", *map(str, path)]), linear


def _one_map(model: InternVL, path: str) -> bool:
    """Whether upstream has q, k and v of these blocks in one linear map."""
    return path.startswith("vision.") or model.config.text.kind == "internlm2"


def _at(model: InternVL, path: str) -> nnx.Module:
    node: nnx.Module = model
    for name in path.split("."):
        node = getattr(node, name)
    return node

"""Linear maps, norms, rotary embedding, and the stack that repeats a block.

Shape suffixes: B batch, T length (queries), N heads, H head dim, D width.
Every parameter carries `axes`, the logical names of its dimensions (a stacked parameter has a
leading "layers"); `mis_jax.parallel.sharding` maps them to mesh axes. Nothing here knows a mesh.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mis_jax.model import xla_cpu
from mis_jax.model.config import Llama3Scaling
from mis_jax.model.execution import Axes, Execution
from mis_jax.model.matmul import matmul_fp32_accum
from mis_jax.model.scan_grad_accum import LayerSums, scan_and_sum

#: Names of what a block computes, for policies that keep it.
BLOCK_INPUT, ATTENTION_OUTPUT, PRODUCT = "block_input", "attention_output", "product"
_REMAT_POLICY = {
    "full": None,
    # Not JAX's own policy of products: that keeps them in float32, before they are rounded.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, ATTENTION_OUTPUT),
    "attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class UncastParam(nnx.Param):
    """A parameter that is used in the dtype in which it is stored."""


class Linear(nnx.Module):
    """`x @ kernel + bias`, accumulated in float32, returned in the dtype of `x`."""

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        axes: Axes,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kernel = jax.random.normal(rngs.params(), (in_size, out_size), dtype) * in_size**-0.5
        self.kernel: nnx.Param | nnx.Module = nnx.Param(kernel, axes=axes)
        self.bias = nnx.Param(jnp.zeros(out_size, dtype), axes=axes[1:]) if bias else None
        self.adapter: nnx.Module | None = None  # `mis_jax.model.lora` may put one here
        self.stored_out_in = False  # `mis_jax.model.unrolled` turns kernels round

    def __call__(self, x: Float[Array, "... in_size"]) -> Float[Array, "... out_size"]:
        if self.stored_out_in:
            y = self._weight_first(x)
        else:
            y = matmul_fp32_accum(x, self.weight(x.dtype))
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        if self.adapter is not None:
            y = y + self.adapter(x)
        return checkpoint_name(y.astype(x.dtype), PRODUCT)

    def _weight_first(self, x):
        if not isinstance(self.kernel, nnx.Module):
            return matmul_weight_first(self.kernel[...].astype(x.dtype), x)
        # The scale of an output comes after the product: integers are converted as they are read.
        codes_OI, scale_O = self.kernel.parts()  # pyright: ignore[reportAttributeAccessIssue]
        return matmul_weight_first(codes_OI.astype(x.dtype), x) * scale_O

    def weight(self, dtype: jnp.dtype) -> Float[Array, "in_size out_size"]:
        """The kernel; `mis_jax.model.lora` may have put a quantised one in its place."""
        if isinstance(self.kernel, nnx.Module):
            return self.kernel(dtype)
        return self.kernel[...].astype(dtype)


def matmul_weight_first(
    table: Float[Array, "out_size in_size"], x: Float[Array, "... in_size"]
) -> Float[Array, "... out_size"]:
    """`x @ table.T`, float32, computed as `table @ x.T`.

    With few rows in `x` it takes as long as reading the table does, which is quicker from the left
    on a CPU (two to three times).
    """
    rows = x.reshape(-1, x.shape[-1])
    on_cpu = partial(xla_cpu.matmul_weight_first, _weight_first)
    y = jax.lax.platform_dependent(table, rows, cpu=on_cpu, default=_weight_first)
    return y.reshape(*x.shape[:-1], table.shape[0])


def _weight_first(table, rows):
    contracted = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(table, rows, contracted, preferred_element_type=jnp.float32).T


def remat(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the inputs of a function for the backward pass, and nothing it computes on the way.

    For maps of single values that lead into a product: they are cheaper to compute again than to
    write and read (a norm would keep its input twice, once in float32, and a gate four arrays of
    its width), and the product itself is not, since no gradient needs its result.
    """
    return jax.checkpoint(function, prevent_cse=False)


class LayerNorm(nnx.Module):
    """LayerNorm with float32 statistics."""

    def __init__(self, size: int, *, eps: float, axes: Axes, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros(size, dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        return remat(self._norm)(x, self.scale[...], self.bias[...])

    def _norm(self, x, scale, bias):
        x32 = x.astype(jnp.float32)
        centred = x32 - x32.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with float32 statistics; the weight is applied in the dtype of `x`, as upstream."""

    def __init__(self, size: int, *, eps: float, axes: Axes, dtype: jnp.dtype):
        self.scale = nnx.Param(jnp.ones(size, dtype), axes=axes)
        self.eps = eps

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        return remat(self._norm)(x, self.scale[...])

    def _norm(self, x, scale):
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * scale.astype(x.dtype)


def rotary_angles(
    positions: Int[Array, "batch length"],
    lengths: Int[Array, " batch"],
    *,
    head_dim: int,
    theta: float,
    dynamic_factor: float | None,
    max_position: int,
    scaling: Llama3Scaling | None = None,
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Cosine and sine of the rotary angles, float32.

    With `dynamic_factor` a row whose real length exceeds `max_position` gets the larger base of
    dynamic NTK scaling; padding never counts (upstream `modeling_internlm2.py`).
    """
    exponent_H = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if dynamic_factor is None:
        inverse_BH = (1.0 / theta**exponent_H)[None]
        if scaling is not None:
            inverse_BH = _slowed(inverse_BH, scaling)
    else:
        excess_B = jnp.maximum(lengths.astype(jnp.float32) / max_position, 1.0)
        stretch_B = dynamic_factor * excess_B - (dynamic_factor - 1)
        base_B = theta * stretch_B ** (head_dim / (head_dim - 2))
        inverse_BH = 1.0 / base_B[:, None] ** exponent_H
    angles_BTH = positions[..., None].astype(jnp.float32) * inverse_BH[:, None]
    return jnp.cos(angles_BTH), jnp.sin(angles_BTH)


def _slowed(inverse_BH: Float[Array, "rows half"], scaling: Llama3Scaling):
    """Angles a token under Llama 3.1's scaling; between its two bounds they are blended."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    rounds_BH = scaling.original_max_position * inverse_BH / (2 * math.pi)
    kept_BH = jnp.clip((rounds_BH - low) / (high - low), 0.0, 1.0)
    return inverse_BH * (kept_BH + (1 - kept_BH) / scaling.factor)


def rotate(
    x_BTNH: Float[Array, "batch length heads head_dim"],
    cos_BTH: Float[Array, "batch length half"],
    sin_BTH: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Apply rotary embedding by halves ("neox" order): (x1, x2) -> (x1 c - x2 s, x2 c + x1 s)."""
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    rotated = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


class Stack(nnx.Module):
    """`num_layers` copies of one block, their parameters stacked on a leading axis."""

    def __init__(
        self, make_block: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs
    ):
        self.num_layers = num_layers
        self.sums: LayerSums | None = None  # where the backward pass adds gradients
        make = nnx.vmap(make_block, in_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
        self.block = make(rngs.split(num_layers))
        for _, parameter in nnx.iter_graph(self.block):
            if isinstance(parameter, nnx.Param):
                parameter.set_metadata(axes=("layers", *parameter.axes))

    def __call__(
        self,
        carry: Any,
        step: Callable[[Any, nnx.Module, Any], tuple[Any, Any]],
        per_layer: Any = None,
        *,
        execution: Execution,
        dtype: jnp.dtype,
    ) -> tuple[Any, Any]:
        """Run `carry, y = step(carry, block, x)` through the layers, as `jax.lax.scan` does.

        Parameters of a layer are gathered inside the body, so that no two layers are whole at once
        and the backward pass gathers them again.
        """
        graph, stacked = nnx.split(self.block)

        def gathered(parameter: nnx.Variable) -> nnx.Variable:
            if not isinstance(parameter, nnx.Param):  # the keys of adapters
                return parameter
            value = parameter.get_value()
            kept = value.dtype if isinstance(parameter, UncastParam) else dtype
            return parameter.replace(execution.gather(value, parameter.axes[1:], kept))

        def body(carry, scanned):
            parameters, x = scanned
            parameters = jax.tree.map(
                gathered, parameters, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
            )
            return step(carry, nnx.merge(graph, parameters), x)

        unroll = self.num_layers if execution.unroll else 1
        if self.sums is not None:
            return scan_and_sum(body, carry, stacked, per_layer, self.sums, unroll=unroll), None
        if execution.remat != "none":
            if execution.remat == "offload":
                carried = body

                def body(carry, scanned):
                    return carried(jax.tree.map(_block_input, carry), scanned)

            policy = _REMAT_POLICY[execution.remat]
            body = jax.checkpoint(body, policy=policy, prevent_cse=execution.unroll)
        return jax.lax.scan(body, carry, (stacked, per_layer), unroll=unroll)


def _block_input(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, BLOCK_INPUT)


class UnrolledStack(nnx.Module):
    """What `Stack` is to a scan, to a loop in Python."""

    def __init__(self, blocks: list[nnx.Module]):
        self.blocks = nnx.List(blocks)

    def __call__(self, carry, step, per_layer=None, *, execution: Execution, dtype):
        outputs = []
        for layer, block in enumerate(self.blocks):
            carry, output = step(carry, block, layer)
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)

"""One decoder for InternLM2/Llama, Qwen2 (qkv bias) and Qwen3 (per-head qk-norm).

Shape suffixes: B batch, T length, N heads, K kv heads, H head dim, D width.
Source: OpenGVLab/InternVL `modeling_internlm2.py`; Qwen2 and Qwen3 as in transformers.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from mis_jax.model import xla_cpu
from mis_jax.model.config import TextConfig
from mis_jax.model.execution import PLAIN, Execution
from mis_jax.model.kv_cache import CacheUpdate
from mis_jax.model.layers import (
    ATTENTION_OUTPUT,
    Linear,
    RMSNorm,
    Stack,
    matmul_weight_first,
    remat,
    rotary_angles,
    rotate,
)


class TextAttention(nnx.Module):
    """Grouped-query attention with rotary embedding."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, head = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_heads * head, config.num_kv_heads * head
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        into = partial(linear, width, bias=config.qkv_bias)
        self.q = into(heads, axes=("embed", "heads"))
        self.k = into(kv_heads, axes=("embed", "kv_heads"))
        self.v = into(kv_heads, axes=("embed", "kv_heads"))
        self.out = linear(heads, width, axes=("heads", "embed"), bias=False)
        norm = partial(RMSNorm, head, eps=config.norm_eps, axes=(None,), dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.head_dim = head

    def __call__(self, qkv, rotary, segment_ids, cache: CacheUpdate | None, layer, execution):
        """`qkv` are the results of the three maps `q`, `k` and `v`."""
        constrain = execution.constrain
        rows = qkv[0].shape[:2]
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(*rows, -1, self.head_dim) for x in qkv)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rotate(q_BTNH, *rotary), rotate(k_BTKH, *rotary)
        if cache is None:
            # Queries stay with their part of the sequence; every part needs all keys and values.
            q_BTNH = constrain(q_BTNH, "rows", "length", "heads", None)
            k_BTKH, v_BTKH = (
                constrain(x, "rows", None, "kv_heads", None) for x in (k_BTKH, v_BTKH)
            )
            out_BTNH = execution.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids)
        else:
            cache, out_BTNH = cache.attend(layer, q_BTNH, k_BTKH, v_BTKH)
        out_BTF = checkpoint_name(out_BTNH.reshape(*rows, -1), ATTENTION_OUTPUT)
        return self.out(out_BTF), cache


class TextBlock(nnx.Module):
    """Pre-norm decoder block: attention, then the gated feed-forward."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, mlp = config.hidden_size, config.mlp_size
        norm = partial(RMSNorm, width, eps=config.norm_eps, axes=("embed",), dtype=dtype)
        linear = partial(Linear, bias=False, dtype=dtype, rngs=rngs)
        self.attention_norm = norm()
        self.attention = TextAttention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = norm()
        self.gate = linear(width, mlp, axes=("embed", "mlp"))
        self.up = linear(width, mlp, axes=("embed", "mlp"))
        self.down = linear(mlp, width, axes=("mlp", "embed"))

    def __call__(
        self, x_BTD, rotary, segment_ids, cache: CacheUpdate | None, layer, execution: Execution
    ):
        attention, constrain = self.attention, execution.constrain

        def into_attention(x_BTD):
            hidden = self.attention_norm(x_BTD)
            return attention.q(hidden), attention.k(hidden), attention.v(hidden)

        def into_mlp(x_BTD):
            hidden = self.mlp_norm(x_BTD)
            gate_BTF, up_BTF = self.gate(hidden), self.up(hidden)
            return tuple(constrain(x, "rows", "length", "mlp") for x in (gate_BTF, up_BTF))

        def out_of_mlp(gate_BTF, up_BTF):
            return self.down(jax.nn.silu(gate_BTF) * up_BTF)

        qkv = remat(into_attention)(x_BTD)
        branch, cache = attention(qkv, rotary, segment_ids, cache, layer, execution)
        x_BTD = constrain(x_BTD + branch, "rows", "length", None)
        branch = remat(out_of_mlp)(*remat(into_mlp)(x_BTD))
        return constrain(x_BTD + branch, "rows", "length", None), cache


@jax.custom_vjp
def lookup(
    table_VD: Float[Array, "rows width"], ids_BT: Int[Array, "batch length"]
) -> Float[Array, "batch length width"]:
    """Rows of a table; its gradient is summed in float32, however narrow the table is."""
    on_cpu = partial(xla_cpu.gather_rows, _gather)
    return jax.lax.platform_dependent(table_VD, ids_BT, cpu=on_cpu, default=_gather)


def _gather(table_VD, ids_BT):
    return table_VD.at[ids_BT].get(mode="clip")


def _lookup_forward(table_VD, ids_BT):
    # An empty array carries the dtype of the table.
    return lookup(table_VD, ids_BT), (ids_BT, table_VD.shape[0], table_VD[:0, :0])


def _lookup_backward(residuals, gradient_BTD):
    ids_BT, rows, like = residuals
    zeros_VD = jnp.zeros((rows, gradient_BTD.shape[-1]), jnp.float32)
    summed_VD = zeros_VD.at[ids_BT].add(gradient_BTD.astype(jnp.float32), mode="drop")
    return summed_VD.astype(like.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


class TextDecoder(nnx.Module):
    """Token embedding, decoder blocks, final norm and head.

    `vocab_rows` may exceed the vocabulary, so that tables divide over devices: no token has the
    further rows, and `logits` does not show them.
    """

    def __init__(
        self,
        config: TextConfig,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        vocab_rows: int | None = None,
    ):
        table = (vocab_rows or config.vocab_size, config.hidden_size)
        normal = jax.nn.initializers.normal(0.02)
        self.embedding = nnx.Param(normal(rngs.params(), table, dtype), axes=("vocab", "embed"))
        self.layers = Stack(  # or `UnrolledStack`, for generation
            lambda r: TextBlock(config, dtype=dtype, rngs=r), config.num_layers, rngs
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, axes=("embed",), dtype=dtype)
        if config.tie_embeddings:
            self.head = None
        else:
            self.head = nnx.Param(normal(rngs.params(), table, dtype), axes=("vocab", "embed"))
        self.config = config

    def embed(
        self,
        input_ids: Int[Array, "batch length"],
        dtype: jnp.dtype,
        execution: Execution = PLAIN,
    ) -> Float[Array, "batch length width"]:
        # Each device looks all rows up in its columns of the table, which are then exchanged for
        # all columns of its rows: far fewer bytes than the table has.
        x_BTD = lookup(self.embedding[...], input_ids).astype(dtype)
        x_BTD = execution.constrain(x_BTD, "copies", "length", "shards")
        return execution.constrain(x_BTD, "rows", "length", None)

    def __call__(
        self,
        x_BTD: Float[Array, "batch length width"],
        *,
        positions: Int[Array, "batch length"],
        lengths: Int[Array, " batch"],
        segment_ids: Int[Array, "batch length"] | None = None,
        cache: CacheUpdate | None = None,
        execution: Execution = PLAIN,
        all_layers: bool = False,
    ) -> tuple[Float[Array, "batch length width"], CacheUpdate | None, Array | None]:
        """Hidden states after the final norm, the cache with the new tokens, and layer outputs.

        `lengths` is the real length of every row (dynamic NTK looks at it). A token looks at the
        earlier ones of its segment; with a cache, which then says who sees whom, at those in it
        too. `all_layers` returns the embeddings and the output of every block before the final
        norm as a stacked array.
        """
        config = self.config
        rotary = rotary_angles(
            positions,
            lengths,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            dynamic_factor=config.rope_dynamic_factor,
            max_position=config.max_position,
            scaling=config.rope_scaling,
        )

        def step(carry, block, layer):
            x, cache = carry
            x, cache = block(x, rotary, segment_ids, cache, layer, execution)
            return (x, cache), (x if all_layers else None)

        (h_BTD, cache), outputs = self.layers(
            (x_BTD, cache),
            step,
            jnp.arange(config.num_layers),
            execution=execution,
            dtype=x_BTD.dtype,
        )
        if all_layers:
            outputs = jnp.concatenate([x_BTD[None], outputs])
        return self.norm(h_BTD), cache, outputs

    @property
    def table(self) -> nnx.Param:
        """The head, or the embedding where it serves as one."""
        return self.embedding if self.head is None else self.head

    def logits(self, h_BTD: Float[Array, "... width"]) -> Float[Array, "... vocab"]:
        """Next-token logits, float32."""
        table_VD = self.table[...].astype(h_BTD.dtype)
        logits = jnp.einsum("...d,vd->...v", h_BTD, table_VD, preferred_element_type=jnp.float32)
        return logits[..., : self.config.vocab_size]

    def next_logits(self, h_BD: Float[Array, "batch width"]) -> Float[Array, "batch vocab"]:
        """`logits` of a few tokens; the table is the left side of the product."""
        logits_BV = matmul_weight_first(self.table[...].astype(h_BD.dtype), h_BD)
        return logits_BV[:, : self.config.vocab_size]

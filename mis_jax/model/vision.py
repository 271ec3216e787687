"""InternViT: 300M (LayerNorm, qkv bias) and 6B (RMSNorm, qk-norm over the full width, no bias).

Shape suffixes: I tiles, S patches + 1, D width, N heads, H head dim.
Source: OpenGVLab/InternVL `modeling_intern_vit.py`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key, UInt8

from mis_jax.model.config import VisionConfig
from mis_jax.model.execution import PLAIN, Execution
from mis_jax.model.layers import ATTENTION_OUTPUT, LayerNorm, Linear, RMSNorm, Stack, remat

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LAYER_SCALE_INIT = 0.1


class VisionAttention(nnx.Module):
    """Multi-head attention over all patches of one tile."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        linear = partial(Linear, width, width, dtype=dtype, rngs=rngs)
        into = partial(linear, axes=("vision_embed", "vision_heads"), bias=config.qkv_bias)
        self.q, self.k, self.v = into(), into(), into()
        norm = partial(RMSNorm, width, eps=config.norm_eps, axes=("vision_heads",), dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None
        self.out = linear(axes=("vision_heads", "vision_embed"), bias=True)
        self.num_heads = config.num_heads

    def __call__(
        self, qkv: tuple[Float[Array, "tiles tokens width"], ...], execution: Execution
    ) -> Float[Array, "tiles tokens width"]:
        """`qkv` are the results of the three maps `q`, `k` and `v`."""
        q_ISD, k_ISD, v_ISD = qkv
        if self.q_norm is not None and self.k_norm is not None:
            q_ISD, k_ISD = self.q_norm(q_ISD), self.k_norm(k_ISD)
        split = (*q_ISD.shape[:2], self.num_heads, -1)
        q_ISNH, k_ISNH, v_ISNH = (
            execution.constrain(x.reshape(split), "tiles", None, "heads", None)
            for x in (q_ISD, k_ISD, v_ISD)
        )
        out_ISNH = execution.attend_tiles(q_ISNH, k_ISNH, v_ISNH, None)
        out_ISD = checkpoint_name(out_ISNH.reshape(q_ISD.shape), ATTENTION_OUTPUT)
        return self.out(out_ISD)


class VisionBlock(nnx.Module):
    """Pre-norm block; each branch is scaled per channel before it is added."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, mlp = config.hidden_size, config.mlp_size
        norm = partial(
            LayerNorm if config.norm == "layer_norm" else RMSNorm,
            width,
            eps=config.norm_eps,
            axes=("vision_embed",),
            dtype=dtype,
        )
        linear = partial(Linear, bias=True, dtype=dtype, rngs=rngs)
        self.attention_norm = norm()
        self.attention = VisionAttention(config, dtype=dtype, rngs=rngs)
        self.attention_scale = nnx.Param(
            jnp.full(width, _LAYER_SCALE_INIT, dtype), axes=("vision_embed",)
        )
        self.mlp_norm = norm()
        self.up = linear(width, mlp, axes=("vision_embed", "vision_mlp"))
        self.down = linear(mlp, width, axes=("vision_mlp", "vision_embed"))
        self.mlp_scale = nnx.Param(
            jnp.full(width, _LAYER_SCALE_INIT, dtype), axes=("vision_embed",)
        )

    def __call__(
        self,
        x_ISD: Float[Array, "tiles tokens width"],
        execution: Execution = PLAIN,
        keep_2I: Float[Array, "branches tiles"] | None = None,
    ) -> Float[Array, "tiles tokens width"]:
        """`keep` is the factor of each tile's two branches: 0 where drop path leaves one out."""
        attention, constrain = self.attention, execution.constrain

        def into_attention(x_ISD):
            hidden = self.attention_norm(x_ISD)
            return attention.q(hidden), attention.k(hidden), attention.v(hidden)

        def out_of_mlp(hidden):
            return self.down(jax.nn.gelu(hidden, approximate=False))

        branch = attention(remat(into_attention)(x_ISD), execution)
        branch = branch * self.attention_scale[...].astype(x_ISD.dtype)
        x_ISD = constrain(x_ISD + _kept(branch, keep_2I, 0), "tiles", None, None)
        hidden = remat(lambda x_ISD: self.up(self.mlp_norm(x_ISD)))(x_ISD)
        branch = remat(out_of_mlp)(constrain(hidden, "tiles", None, "mlp"))
        branch = branch * self.mlp_scale[...].astype(x_ISD.dtype)
        return constrain(x_ISD + _kept(branch, keep_2I, 1), "tiles", None, None)


def _kept(branch_ISD: jax.Array, keep_2I: jax.Array | None, which: int) -> jax.Array:
    if keep_2I is None:
        return branch_ISD
    return branch_ISD * keep_2I[which, :, None, None].astype(branch_ISD.dtype)


def drop_path_factors(
    key: Key[Array, ""], largest: float, layers: int, tiles: int
) -> Float[Array, "layers branches tiles"]:
    """Factor of every branch: 0 with a chance that rises linearly over layers to `largest`, else
    one over the chance to stay (stochastic depth by tile, upstream `modeling_intern_vit.py`)."""
    stay_L11 = 1 - jnp.linspace(0.0, largest, layers)[:, None, None]
    return jax.random.bernoulli(key, stay_L11, (layers, 2, tiles)) / stay_L11


class VisionTower(nnx.Module):
    """Tiles in, patch features out; no final norm, the class token is dropped."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, patch_values = config.hidden_size, 3 * config.patch_size**2
        self.patch_embed = Linear(
            patch_values, width, axes=(None, "vision_embed"), bias=True, dtype=dtype, rngs=rngs
        )
        normal = jax.nn.initializers.normal(0.02)
        self.class_embed = nnx.Param(normal(rngs.params(), (width,), dtype), axes=("vision_embed",))
        self.position_embed = nnx.Param(
            normal(rngs.params(), (config.grid**2 + 1, width), dtype), axes=(None, "vision_embed")
        )
        self.layers = Stack(
            lambda r: VisionBlock(config, dtype=dtype, rngs=r), config.num_layers, rngs
        )
        self.config = config

    def __call__(
        self,
        tiles: UInt8[Array, "tiles size size 3"] | Float[Array, "tiles size size 3"],
        *,
        dtype: jnp.dtype,
        select_layer: int = -1,
        execution: Execution = PLAIN,
        all_layers: bool = False,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "tiles patches width"] | Float[Array, "layers tiles tokens width"]:
        """Features of the patches, row by row, after block `select_layer`.

        `tiles` are uint8 pixels, or float values already normalised. `all_layers` returns instead
        the embeddings and the output of every block, class token included. With a `key` branches
        are dropped as `execution.drop_path` says.
        """
        x_ISD = execution.constrain(self.embed(tiles, dtype), "tiles", None, None)
        embedded = x_ISD
        keep_layers = all_layers or select_layer != -1
        keep_L2I = None
        if key is not None and execution.drop_path:
            count, layers = tiles.shape[0], self.config.num_layers
            keep_L2I = drop_path_factors(key, execution.drop_path, layers, count)

        def step(x, block, keep_2I):
            x = block(x, execution, None if keep_L2I is None else keep_2I)
            return x, (x if keep_layers else None)

        x_ISD, outputs = self.layers(x_ISD, step, keep_L2I, execution=execution, dtype=dtype)
        if keep_layers:
            outputs = jnp.concatenate([embedded[None], outputs])
            if all_layers:
                return outputs
            x_ISD = outputs[select_layer]
        return x_ISD[:, 1:]

    def embed(self, tiles, dtype: jnp.dtype) -> Float[Array, "tiles tokens width"]:
        """Normalise pixels, project patches, prepend the class token, add positions."""
        grid, patch = self.config.grid, self.config.patch_size
        count = tiles.shape[0]
        pixels = normalise(tiles).astype(dtype)
        patches = pixels.reshape(count, grid, patch, grid, patch, 3).swapaxes(2, 3)
        x_ISD = self.patch_embed(patches.reshape(count, grid**2, patch * patch * 3))
        first = jnp.broadcast_to(self.class_embed[...], (count, 1, x_ISD.shape[-1]))
        x_ISD = jnp.concatenate([first.astype(dtype), x_ISD], axis=1)
        return x_ISD + self.position_embed[...].astype(dtype)


def normalise(tiles):
    """uint8 RGB -> float32 with ImageNet mean and deviation; float input passes unchanged."""
    if not jnp.issubdtype(tiles.dtype, jnp.integer):
        return tiles
    pixels = tiles.astype(jnp.float32) / 255
    return (pixels - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STD)

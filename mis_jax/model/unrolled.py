"""The decoder's layers one by one, each with arrays of its own, for generation.

A stack that is scanned reads its parameters through a slice, which some compilers copy: a step of
decoding would move every weight twice more. Here nothing is sliced, and kernels are stored as
[out, in] (see `layers.matmul_weight_first`).
"""

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

from mis_jax.model.internvl import InternVL
from mis_jax.model.layers import Linear, Stack, UncastParam, UnrolledStack
from mis_jax.model.lora import QuantisedKernel


def unrolled(model: InternVL, *, consume: bool = False, int8: bool = False) -> InternVL:
    """The same model with its layers written out; `model` itself stays as it is.

    With `int8` the kernels of the decoder's layers are kept as integers with a scale for each
    output; products are those of the compute dtype, so that no activation is rounded. The tables
    of the vocabulary and the vision tower stay as they are.

    With `consume` the arrays of its stacked layers are deleted as they are read, so that no more
    than one of them is there twice; `model` is of no use after that.
    """
    if not isinstance(model.text.layers, Stack):
        assert not int8, "the layers are written out already"
        return model
    whole, state = nnx.split(model)
    copy = nnx.merge(whole, state)
    copy.vision.layers = UnrolledStack(_blocks(model.vision.layers, consume))  # pyright: ignore[reportAttributeAccessIssue]
    blocks = _blocks(model.text.layers, consume)
    for block in blocks:
        for _, module in nnx.iter_modules(block):
            if isinstance(module, Linear) and isinstance(module.kernel, nnx.Param):
                _turn_round(module.kernel)
                module.stored_out_in = True
                if int8:
                    module.kernel = _as_int8(module.kernel)
    copy.text.layers = UnrolledStack(blocks)  # pyright: ignore[reportAttributeAccessIssue]
    return copy


def _blocks(stack: Stack, consume: bool) -> list[nnx.Module]:
    graph, stacked = nnx.split(stack.block)
    leaves, tree = jax.tree.flatten(stacked)
    layers: list[list[jax.Array]] = [[] for _ in range(stack.num_layers)]
    for leaf in leaves:
        for layer, kept in enumerate(layers):
            kept.append(_layer(leaf, np.int32(layer)))
        if consume:
            jax.block_until_ready([kept[-1] for kept in layers])
            leaf.delete()
    blocks = [nnx.merge(graph, jax.tree.unflatten(tree, kept)) for kept in layers]
    for block in blocks:
        for _, parameter in nnx.iter_graph(block):
            if isinstance(parameter, nnx.Param) and parameter.axes[:1] == ("layers",):
                parameter.set_metadata(axes=parameter.axes[1:])
    return blocks


@jax.jit
def _layer(stacked, layer):
    return stacked[layer]


@jax.jit
def _transposed(kernel):
    return kernel.T


@jax.jit
def _quantised(kernel):
    made = qwix.quantize(kernel.astype(jnp.float32), "int8", channelwise_axes=(0,))
    return made.qvalue, made.scale


def _as_int8(kernel: nnx.Param) -> QuantisedKernel:
    values, scale = _quantised(kernel.get_value())
    kept = UncastParam(scale, axes=(kernel.axes[0], None))
    return QuantisedKernel(UncastParam(values, axes=kernel.axes), kept, "int8")


def _turn_round(kernel: nnx.Param) -> None:
    kernel.set_value(_transposed(kernel.get_value()))
    kernel.set_metadata(axes=kernel.axes[::-1])

"""Model <-> flat parameters by dotted path, without allocating anything on the way."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mis_jax.config import LoraConfig
from mis_jax.model.config import InternVLConfig
from mis_jax.model.internvl import InternVL
from mis_jax.model.lora import DROPOUT_KEY, attach, set_dropout

#: One row for each token of the vocabulary; may have further ones.
TABLES = ("text.embedding", "text.head")


def abstract_model(
    config: InternVLConfig, *, lora: LoraConfig | None = None, **options: Any
) -> InternVL:
    """The module tree with shapes in the place of arrays, with adapters where `lora` asks."""
    model = nnx.eval_shape(lambda: InternVL(config, rngs=nnx.Rngs(0), **options))
    if lora is not None and lora.rank:
        attach(model, lora)
    return model


def shapes(config: InternVLConfig, **options: Any) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by dotted path."""
    return dict(_shapes(config, **options))


@functools.lru_cache(maxsize=64)  # traced in 25 to 70 ms, asked for several times by every verb
def _shapes(config: InternVLConfig, **options: Any) -> Mapping[str, tuple[int, ...]]:
    model = abstract_model(config, **options)
    return {name: tuple(value.shape) for name, value in flat(model).items()}


def flat(model: InternVL) -> dict[str, jax.Array]:
    """Parameters of a model by dotted path, such as 'text.layers.block.gate.kernel'."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): variable.get_value() for path, variable in state}


def nested(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to a nested dict (the form on disk)."""
    tree: dict[str, Any] = {}
    for name, value in parameters.items():
        *folders, leaf = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of `nested`."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            result |= flattened(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def build(config: InternVLConfig, parameters: Mapping[str, Any], **options: Any) -> InternVL:
    """A model that holds exactly these parameters; may be called under jit.

    `options` are those of `abstract_model`. An entry `DROPOUT_KEY` has its adapters drop inputs.
    """
    graph, state = _skeleton(config, **options)
    filled = []
    for path, variable in state:
        value = jnp.asarray(parameters[".".join(map(str, path))])
        assert value.shape == variable.shape, (path, value.shape, variable.shape)
        filled.append((path, variable.replace(value)))
    model = nnx.merge(graph, nnx.from_flat_state(filled))
    if DROPOUT_KEY in parameters:
        set_dropout(model, parameters[DROPOUT_KEY])
    return model


@functools.lru_cache(maxsize=16)
def _skeleton(config: InternVLConfig, **options: Any):
    graph, state = nnx.split(abstract_model(config, **options))
    return graph, tuple(nnx.to_flat_state(state))


def count(config: InternVLConfig) -> dict[str, int]:
    """Number of parameters of each part: vision, projector, text."""
    totals = {"vision": 0, "projector": 0, "text": 0}
    for name, shape in shapes(config).items():
        size = 1
        for side in shape:
            size *= side
        totals[name.split(".")[0]] += size
    return totals

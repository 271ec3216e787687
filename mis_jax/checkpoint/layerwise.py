"""The forward pass of a checkpoint with one layer in memory at a time, its states told as it goes.

For comparing models that do not fit: memory is a layer, a table of embeddings and the activations.
The modules are the model's own, each run with the values of one layer.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.dtype_cast import packed
from mis_jax.checkpoint.load import OpenCheckpoint
from mis_jax.checkpoint.parameter_source import is_stacked
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.internvl import InternVL, merge, pixel_shuffle, row_lengths

States = list[np.ndarray]  # of each batch, real tiles or tokens first: [count, width]
_Stage = Callable[[InternVL, Batch, Any], jax.Array]


def stages(
    opened: OpenCheckpoint, batches: Sequence[Batch], dtype: str | None
) -> Iterator[tuple[str, States]]:
    """Name and outputs of every stage, from the tower's embeddings to the logits, computed float32.

    `dtype` rounds the parameters first, None leaves them as they are.
    """
    config = opened.config
    single = _single_layer(config)
    pictured = [batch for batch in batches if batch.tiles.shape[0]]

    def run(stage: _Stage, values: dict[str, Any], on: Sequence[Batch], xs: Sequence[Any]):
        return [_run(stage, single, values, batch, x) for batch, x in zip(on, xs, strict=True)]

    def read(part: str, layer: int | None = None) -> dict[str, Any]:
        return _values(opened, part, layer, dtype or opened.dtype)

    def tiles(xs: Sequence[Any]) -> States:
        masks = (np.asarray(batch.tile_mask) for batch in pictured)
        return [_rows(np.asarray(x)[mask]) for x, mask in zip(xs, masks, strict=True)]

    def tokens(xs: Sequence[Any]) -> States:
        masks = (np.asarray(batch.segment_ids) > 0 for batch in batches)
        return [_rows(np.asarray(x)[mask]) for x, mask in zip(xs, masks, strict=True)]

    xs = run(_embed_tiles, read("vision."), pictured, pictured)
    yield "vision embeddings", tiles(xs)
    selected = range(config.vision.num_layers + 1)[config.select_layer]  # 0: the embeddings
    for layer in range(selected):
        xs = run(_vision_layer, read("vision.", layer), pictured, xs)
        yield f"vision layer {layer}", tiles(xs)
    xs = run(_project, read("projector."), pictured, xs)
    yield "projector", tiles(xs)
    features = iter(xs)
    merged = [next(features) if batch.tiles.shape[0] else None for batch in batches]
    xs = run(_embed_text, read("text.embedding"), batches, merged)
    yield "text embeddings", tokens(xs)
    norm = read("text.norm")
    for layer in range(config.text.num_layers):
        xs = run(_text_layer, read("text.", layer) | norm, batches, xs)
        yield f"text layer {layer}", tokens(xs)
    head = read("text.embedding") if config.text.tie_embeddings else read("text.head")
    xs = run(_logits, head | norm, batches, xs)
    yield "logits", tokens(xs)


def count_stages(config: InternVLConfig) -> int:
    """How many `stages` a model has."""
    towers = range(config.vision.num_layers + 1)[config.select_layer] + config.text.num_layers
    return towers + len(("vision embeddings", "projector", "text embeddings", "logits"))


def _embed_tiles(model: InternVL, batch: Batch, _: Any) -> jax.Array:
    return model.vision.embed(batch.tiles, model.compute_dtype)


def _vision_layer(model: InternVL, batch: Batch, x: jax.Array) -> jax.Array:
    step = lambda x, block, _: (block(x), None)  # noqa: E731
    return model.vision.layers(x, step, execution=model.execution, dtype=x.dtype)[0]


def _project(model: InternVL, batch: Batch, x: jax.Array) -> jax.Array:
    config = model.config
    return model.projector(pixel_shuffle(x[:, 1:], config.shuffle_factor, config.pixel_shuffle))


def _embed_text(model: InternVL, batch: Batch, features: jax.Array | None) -> jax.Array:
    x = model.text.embed(batch.input_ids, model.compute_dtype)
    if features is None:
        return x
    return merge(x, features, batch.input_ids == model.config.image_token_id)


def _text_layer(model: InternVL, batch: Batch, x: jax.Array) -> jax.Array:
    _, _, outputs = model.text(
        x,
        positions=batch.positions,
        lengths=row_lengths(batch),
        segment_ids=batch.segment_ids,
        all_layers=True,
    )
    assert outputs is not None
    return outputs[1]  # before the final norm


def _logits(model: InternVL, batch: Batch, x: jax.Array) -> jax.Array:
    return model.text.logits(model.text.norm(x))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(stage: _Stage, config: InternVLConfig, values: dict[str, Any], batch: Batch, x: Any):
    return stage(_partial_model(config, values), batch, x)


def _partial_model(config: InternVLConfig, values: Mapping[str, Any]) -> InternVL:
    """A model that holds these parameters; the others are shapes that nothing may look at."""
    graph, state = nnx.split(nnx_state.abstract_model(config, compute_dtype=jnp.float32))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        value = values.get(".".join(map(str, path)))
        filled.append((path, variable if value is None else variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _single_layer(config: InternVLConfig) -> InternVLConfig:
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, num_layers=1),
        text=dataclasses.replace(config.text, num_layers=1),
    )


def _values(opened: OpenCheckpoint, part: str, layer: int | None, dtype: str) -> dict[str, Any]:
    """Parameters whose names start with `part`: those of one layer, or those outside of layers."""
    found = {}
    for name in nnx_state.shapes(opened.config):
        if name.startswith(part) and is_stacked(name) == (layer is not None):
            key = opened.weights.key(name, layer)
            value = packed(opened.weights.read(name, layer), dtype, key)
            if dtype != "float32":
                value = packed(value, "float32", key)
            found[name] = value if layer is None else value[None]
    return found


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])

"""Language models alone, from the Hugging Face folder of a `...ForCausalLM`: guards, for instance.

The folder holds config.json and safetensors, in one file or in shards with their index. The network
is the decoder of InternVL, so its table of tensors serves here too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from mis_jax.checkpoint.dtype_cast import check_dtype
from mis_jax.checkpoint.hf.config import text_config
from mis_jax.checkpoint.hf.unsupported import check_model_folder
from mis_jax.checkpoint.load import read_parameters
from mis_jax.checkpoint.mapping import LINEAR, Rule, Shape, decoder_rules
from mis_jax.checkpoint.parameter_source import Progress
from mis_jax.checkpoint.safetensors_reader import (
    Shards,
    differences,
    misfit,
    our_shapes_of_layer,
    tensors,
)
from mis_jax.model.config import TextConfig
from mis_jax.model.text import TextDecoder
from mis_jax.parallel.sharding import FSDP_TENSOR, parameter_shardings
from mis_jax.storage.json_files import Fields, read_json

_PREFIX = "text."
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_REMEDY = "weights and config.json must come from the same checkpoint"


def load_decoder(
    folder: Path,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
    progress: Progress | None = None,
) -> TextDecoder:
    """A Llama, Qwen2 or Qwen3 decoder; `dtype`, `mesh` and `progress` are those of `mis_jax.load`.

    Raises ValueError that names the file and the field of whatever does not fit; tensors that are
    missing, misshapen or not part of the network are reported together.
    """
    folder = Path(folder)
    wanted = None if dtype is None else jnp.dtype(dtype).name
    if wanted is not None:
        check_dtype(wanted)
    config = read_decoder_config(folder)
    shards = Shards(folder, "internvl")  # whose keys are those of the files
    if config.tie_embeddings:
        _drop_copied_head(shards)
    abstract = nnx.eval_shape(lambda: TextDecoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    shapes = {name: tuple(variable.shape) for name, (_, variable) in variables.items()}
    table = decoder_rules(config)
    if found := _problems(shards, table, shapes):
        raise misfit(folder, found, _REMEDY)
    if mesh is None:
        places = dict.fromkeys(shapes, SingleDeviceSharding(jax.devices()[0]))
    else:
        split = parameter_shardings(abstract, mesh, FSDP_TENSOR)
        places = {_PREFIX + name: place for name, place in split.items()}
    source = _Source(shards, table)
    kept = wanted or shards.dtype
    arrays = read_parameters(source, shapes, kept, config.vocab_size, progress, places)
    filled = [(path, v.replace(arrays[name])) for name, (path, v) in variables.items()]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    """Dotted path, as the same parameter has it inside InternVL."""
    return _PREFIX + ".".join(map(str, path))


def read_decoder_config(folder: Path) -> TextConfig:
    """The network that config.json describes; ValueError for one that is not supported."""
    path = folder / "config.json"
    check_model_folder(folder)
    fields = Fields(path, read_json(path))
    try:
        config = text_config(fields, tied=fields.flag("tie_word_embeddings", False))
    except ValueError as error:  # sizes that do not go together
        named = str(error).startswith(str(folder))
        raise error if named else ValueError(f"{path}: {error}") from None
    if config.kind == "internlm2":
        fields.refuse("model_type", "llama, qwen2 or qwen3, for a language model by itself")
    return config


class _Source:
    """Our parameters as the files have them; a `ParameterSource`."""

    def __init__(self, shards: Shards, table: Sequence[Rule]):
        self._shards = shards
        self._rules = {rule.ours[0]: rule for rule in table}

    def read(self, name: str, layer: int | None = None, rows: slice = slice(None)) -> np.ndarray:
        rule = self._rules[name]
        key = rule.theirs.format(i=layer)
        if rule.codec is LINEAR:
            return self._shards.read(key).T[rows]
        return self._shards.read(key, rows)

    def key(self, name: str, layer: int | None = None) -> str:
        rule = self._rules[name]
        if rule.per_layer and layer is None:  # all of them
            return rule.theirs
        return self._shards.key(rule.theirs.format(i=layer))


def _problems(shards: Shards, table: Sequence[Rule], shapes: Mapping[str, Shape]) -> list[str]:
    expected: dict[str, Shape] = {}
    for rule in table:
        (shape,) = our_shapes_of_layer(rule, shapes)
        theirs = shape[::-1] if rule.codec is LINEAR else shape
        expected |= {key: theirs for key, _ in tensors(rule, shapes)}
    # Adapters that nobody merged are no part of the network.
    factors = [f"unexpected tensor '{key}'" for _, key in shards.factors.values()]
    return differences(shards, expected, str) + factors


def _drop_copied_head(shards: Shards) -> None:
    """Leave out a stored head that repeats the embedding, as exports of tied models may have it."""
    if _HEAD not in shards.shapes or _EMBEDDING not in shards.shapes:
        return
    if not np.array_equal(shards.read(_HEAD), shards.read(_EMBEDDING)):
        raise ValueError(
            f"{shards.folder / 'config.json'}: field 'tie_word_embeddings' is true, but the tensor "
            f"'{_HEAD}' is not '{_EMBEDDING}'; {_REMEDY}"
        )
    shards.drop(_HEAD)

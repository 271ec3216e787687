"""Published checkpoint folders, written: safetensors shards filled piece by piece, an index."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mis_jax.checkpoint.dtype_cast import NUMPY_DTYPES, all_finite, packed
from mis_jax.checkpoint.mapping import COPY, Layout, Rule, disk_key, head_key, rules
from mis_jax.checkpoint.parameter_source import PIECE, Job, ParameterSource
from mis_jax.checkpoint.safetensors_reader import (
    INDEX,
    Shape,
    TensorFile,
    our_shapes_of_layer,
    tensors,
)
from mis_jax.model.config import InternVLConfig
from mis_jax.storage.files import Region, reserve_file, write_file
from mis_jax.storage.json_files import write_json

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True)
class _Tensor:
    """One of their tensors, as it will lie in its file."""

    key: str  # on disk
    layer: int | None
    rule: Rule
    shape: Shape
    size: int  # bytes


def published_jobs(
    folder: Path,
    layout: Layout,
    config: InternVLConfig,
    source: ParameterSource,
    shapes: Mapping[str, Shape],
    dtype: str,
    shard_bytes: int,
) -> list[Job]:
    """Lay out shards of at most `shard_bytes` (a larger tensor has its own) and the index.

    The jobs fill them, in any order. Raises OSError when the disk has no room.
    """
    if shard_bytes <= 0:
        raise ValueError(f"shard size is {shard_bytes} bytes; give one above zero, such as 5GB")
    plan = _plan(layout, config, shapes, NUMPY_DTYPES[dtype].itemsize)
    shards = _split(plan, shard_bytes)
    jobs, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        offset = _lay_out(folder / name, shard, dtype)
        length = offset + sum(tensor.size for tensor in shard)
        for tensor in shard:
            jobs += _tensor_jobs(folder / name, offset, length, tensor, config, source, dtype)
            offset += tensor.size
        weight_map |= {tensor.key: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.size for t in plan)}, "weight_map": weight_map}
        write_json(folder / INDEX, index)
    return jobs


def finish_published(folder: Path) -> None:
    """Look at every shard as a reader would."""
    for path in sorted(folder.glob("*.safetensors")):
        TensorFile(path)


def _plan(
    layout: Layout, config: InternVLConfig, shapes: Mapping[str, Shape], itemsize: int
) -> list[_Tensor]:
    """Their tensors in the order of the network."""
    plan = []
    for rule in rules(layout, config):
        shape = tuple(rule.codec.their_shape(our_shapes_of_layer(rule, shapes), config))
        size = itemsize * math.prod(shape)
        for key, layer in tensors(rule, shapes):
            plan.append(_Tensor(disk_key(layout, key), layer, rule, shape, size))
    parts = ("vision", "projector", "text")
    plan.sort(
        key=lambda t: (
            parts.index(t.rule.ours[0].split(".")[0]),
            -1 if t.layer is None else t.layer,
        )
    )
    if layout == "internvl" and config.text.tie_embeddings:
        # Upstream's code never ties and would start from a random head, were there none.
        embedding = next(t for t in plan if t.rule.ours == ("text.embedding",))
        head = disk_key(layout, head_key(layout, config.text))
        plan.append(_Tensor(head, None, embedding.rule, embedding.shape, embedding.size))
    return plan


def _split(plan: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    """The plan in runs of at most `shard_bytes`."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in plan:
        if shards[-1] and filled + tensor.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _lay_out(path: Path, shard: list[_Tensor], dtype: str) -> int:
    """Write a shard's header and reserve its room; the byte where its first tensor starts."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        header[tensor.key] = {
            "dtype": _NAMES[dtype],
            "shape": tensor.shape,
            "data_offsets": [end, end + tensor.size],
        }
        end += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that values are aligned
    begin = 8 + len(text)
    reserve_file(path, begin + end)  # a full disk is told now, not in an hour
    write_file(path, len(text).to_bytes(8, "little") + text)
    return begin


def _tensor_jobs(
    path: Path,
    offset: int,
    length: int,
    tensor: _Tensor,
    config: InternVLConfig,
    source: ParameterSource,
    dtype: str,
) -> list[Job]:
    """One job, or one for each run of rows of a large tensor that is stored as we have it."""
    rows, row = tensor.shape[0], tensor.size // tensor.shape[0]
    # A reader knows his tensor by the name that it has where it comes from.
    named = ", ".join(dict.fromkeys(source.key(name, tensor.layer) for name in tensor.rule.ours))
    step = max(1, PIECE // row) if tensor.rule.codec is COPY else rows
    jobs = []
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        size = row * (part.stop - start)
        place = offset + row * start
        jobs.append(
            Job(
                f"{tensor.key} {start}",
                named,
                size,
                _fill(path, place, tensor, part, config, source, dtype, named),
                (Region(path, place, size, length),),
            )
        )
    return jobs


def _fill(
    path: Path,
    offset: int,
    tensor: _Tensor,
    rows: slice,
    config: InternVLConfig,
    source: ParameterSource,
    dtype: str,
    named: str,
) -> Callable[[], bool]:
    def run() -> bool:
        if tensor.rule.codec is COPY:
            values = source.read(tensor.rule.ours[0], tensor.layer, rows)
        else:
            ours = [source.read(name, tensor.layer) for name in tensor.rule.ours]
            values = tensor.rule.codec.to_theirs(ours, config)
        values = packed(values, dtype, named)
        write_file(path, values.reshape(-1).view(np.uint8).data, offset=offset)
        return all_finite(values)

    return run

"""Logical axes of parameters -> axes of the device mesh.

Layers name their dimensions ("embed", "heads", ...); a `Rules` says which mesh axis splits which
name. A dimension that its mesh axis does not divide stays whole (vocabularies of 92,553 rows).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mis_jax.config import MeshConfig
from mis_jax.model.batch import Batch

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")  # rows are split over both


@dataclass(frozen=True)
class Rules:
    """Mesh axis of every logical axis; a name that is absent is not split."""

    axes: Mapping[str, str] = field(default_factory=dict)

    def spec(
        self, logical: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh
    ) -> PartitionSpec:
        """PartitionSpec of one array. Two dimensions on one mesh axis are refused."""
        names = [self.axes.get(name) if name else None for name in logical]
        used = [name for name in names if name]
        if len(used) != len(set(used)):
            raise ValueError(f"sharding rules put two of the dimensions {logical} on one mesh axis")
        splits = [
            name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape, strict=True)
        ]
        # In the form that jit gives the specs of its outputs, or a step would be compiled twice.
        while splits and splits[-1] is None:
            splits.pop()
        return PartitionSpec(*splits)


_FSDP = {"embed": "fsdp", "vision_embed": "fsdp", "projector": "tensor"}
_TENSOR = {
    "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
    "vision_heads": "tensor", "vision_mlp": "tensor",
}  # fmt: skip

REPLICATED = Rules()
FSDP = Rules({name: axis for name, axis in _FSDP.items() if axis == "fsdp"})
FSDP_TENSOR = Rules(_FSDP | _TENSOR)


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over the devices; an axis of -1 takes what the others leave."""
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh {dict(zip(AXES, sizes, strict=True))}: at most one axis may be -1")
    known = int(np.prod([size for size in sizes if size != -1]))
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(
            f"mesh {dict(zip(AXES, sizes, strict=True))} does not fit {len(devices)} device(s)"
        )
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_shardings(model: nnx.Module, mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a (possibly abstract) model by dotted path."""
    return {
        ".".join(map(str, path)): NamedSharding(
            mesh, rules.spec(variable.axes, tuple(variable.shape), mesh)
        )
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def batch_sharding(mesh: Mesh, *, accumulated: bool = False) -> NamedSharding:
    """Rows and tiles split over data and fsdp; `accumulated` has a leading micro-batch axis."""
    return NamedSharding(mesh, PartitionSpec(*([None] if accumulated else []), BATCH_AXES))


def held_rows(mesh: Mesh, rows: int, micro_batch: int | None = None) -> Int[np.ndarray, " held"]:
    """Which rows of a step of `rows` this process has devices for, in order.

    Where a tensor axis reaches over several processes, each of them holds the same rows.
    """
    each = micro_batch or rows
    held = np.zeros(each, bool)
    for index in batch_sharding(mesh).addressable_devices_indices_map((each,)).values():
        held[index or slice(None)] = True
    return (np.arange(0, rows, each)[:, None] + np.flatnonzero(held)).reshape(-1)


def put_batch(batch: Batch, mesh: Mesh, *, accumulated: bool = False) -> Batch:
    """Place a batch from host memory on the mesh; every field is split along its rows.

    With several processes each gives the rows of `held_rows`.
    """
    sharding = batch_sharding(mesh, accumulated=accumulated)
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(
        lambda field: jax.make_array_from_process_local_data(sharding, field), batch
    )

"""Logical axes of parameters and activations -> axes of the device mesh.

Layers name their dimensions ("embed", "heads", ...); a `Rules` says which mesh axis splits which
name. A dimension that its mesh axis does not divide stays whole.

The mesh axes: `data` (copies of the model, over slices first), `fsdp` (rows are split, and so is
every parameter, which is gathered layer by layer where it is used), `tensor` (heads and
feed-forward columns), `context` (the sequence).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from mis_jax.config import MeshConfig
from mis_jax.model.batch import Batch
from mis_jax.model.execution import Axes, Constrain, Gather

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")  # rows are split over both
#: Tables of a vocabulary get rows up to a multiple of this, so that every usual mesh divides them.
VOCAB_MULTIPLE = 256
_SMALL = 1 << 18  # elements of a parameter that may stay whole: 1 MB of float32


@dataclass(frozen=True)
class Rules:
    """Mesh axis of every logical axis; a name that is absent is not split.

    A large parameter whose dimension for `everywhere` does not divide is split along another one.
    """

    axes: Mapping[str, str] = field(default_factory=dict)
    everywhere: str | None = None

    def spec(self, logical: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
        """PartitionSpec of one array. Two dimensions on one mesh axis are refused."""
        names = [self.axes.get(name) if name else None for name in logical]
        used = [name for name in names if name]
        if len(used) != len(set(used)):
            raise ValueError(f"sharding rules put two of the dimensions {logical} on one mesh axis")
        splits = [
            name if name and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None
            for name, size in zip(names, shape, strict=True)
        ]
        axis = self.everywhere
        if axis and mesh.shape[axis] > 1 and axis not in splits and math.prod(shape) > _SMALL:
            for place in sorted(range(len(shape)), key=lambda i: -shape[i]):
                free = splits[place] is None and logical[place] != "layers"
                if free and shape[place] % mesh.shape[axis] == 0:
                    splits[place] = axis
                    break
        # In the form that jit gives the specs of its outputs, or a step would be compiled twice.
        while splits and splits[-1] is None:
            splits.pop()
        return PartitionSpec(*splits)

    def without(self, axis: str) -> "Rules":
        """The rules that leave one mesh axis out."""
        return Rules({name: a for name, a in self.axes.items() if a != axis})


_FSDP = {"embed": "fsdp", "vision_embed": "fsdp", "projector": "tensor"}
_TENSOR = {
    "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
    "vision_heads": "tensor", "vision_mlp": "tensor",
}  # fmt: skip

REPLICATED = Rules()
FSDP = Rules({name: axis for name, axis in _FSDP.items() if axis == "fsdp"}, everywhere="fsdp")
FSDP_TENSOR = Rules(_FSDP | _TENSOR, everywhere="fsdp")

#: Mesh axes of what activations are made of. Tiles are work for every device of a row; `copies` and
#: `shards` are rows and columns of an embedding that is looked up in shards.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "rows": ("data", "fsdp"),
    "row_tiles": ("data", "fsdp"),
    "tiles": ("data", "fsdp", "context"),
    "length": ("context",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "copies": ("data",),
    "shards": ("fsdp",),
}


def make_mesh(config: MeshConfig, devices: list[Any] | None = None) -> Mesh:
    """A mesh over the devices; an axis of -1 takes what the others leave.

    With several slices `data` is outermost over slices, so that nothing but the sum of gradients
    crosses the network between them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    wanted = dict(zip(AXES, sizes, strict=True)) | (
        {"slices": config.slices} if config.slices > 1 else {}
    )
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh {wanted}: at most one axis may be -1")
    known = math.prod(size for size in sizes if size != -1) * config.slices
    if len(devices) % known or (-1 not in sizes and known != len(devices)):
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} device(s)")
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if config.slices == 1:
        types = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    return _sliced_mesh(sizes, config.slices, devices)


def _sliced_mesh(sizes: list[int], slices: int, devices: list[Any]) -> Mesh:
    found = {getattr(device, "slice_index", None) for device in devices}
    if len(found) > 1:  # real slices tell their number
        if len(found) != slices:
            raise ValueError(f"mesh.slices is {slices}, but the devices are {len(found)} slices")
        grid = mesh_utils.create_hybrid_device_mesh(
            sizes, (slices, *(1 for _ in sizes[1:])), devices=devices
        )
    else:  # devices in order, as on a rehearsal with CPU devices
        grid = np.asarray(devices).reshape(slices * sizes[0], *sizes[1:])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def padded_vocab(size: int) -> int:
    """Rows of the tables of a vocabulary: the same on every mesh, as runs may change theirs."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def parameter_shardings(model: nnx.Module, mesh: Mesh, rules: Rules) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a (possibly abstract) model by dotted path."""
    return {
        ".".join(map(str, path)): NamedSharding(
            mesh, rules.spec(variable.axes, tuple(variable.shape), mesh)
        )
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }


def constrain_on(mesh: Mesh) -> Constrain:
    """Puts activations where their logical axes say; an axis that does not divide stays whole."""

    def constrain(x: jax.Array, *names: str | None) -> jax.Array:
        assert x.ndim == len(names), (x.shape, names)
        splits = []
        for size, name in zip(x.shape, names, strict=True):
            axes = tuple(a for a in _ACTIVATIONS.get(name or "", ()) if mesh.shape[a] > 1)
            while axes and size % math.prod(mesh.shape[a] for a in axes):
                axes = axes[:-1]
            splits.append(axes or None)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*splits)))

    return constrain


def gather_on(mesh: Mesh, rules: Rules) -> Gather:
    """Brings a layer's parameter together over `fsdp`, in the dtype of the computation.

    It is cast first, so that half the bytes travel; its gradient goes straight back into shards.
    """
    whole = rules.without("fsdp")

    def gather(parameter: jax.Array, axes: Axes, dtype: jnp.dtype) -> jax.Array:
        if parameter.ndim < 2:  # norms and biases are small and stay in their dtype
            return parameter
        stored = NamedSharding(mesh, rules.spec(axes, parameter.shape, mesh))
        used = NamedSharding(mesh, whole.spec(axes, parameter.shape, mesh))

        @jax.custom_vjp
        def moved(x):
            return jax.lax.with_sharding_constraint(x.astype(dtype), used)

        def backward(_, gradient):
            gradient = jax.lax.with_sharding_constraint(gradient, stored)
            return (gradient.astype(parameter.dtype),)

        moved.defvjp(lambda x: (moved(x), None), backward)
        return moved(parameter)

    return gather


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

"""What a run compiles: the state on a mesh and the step over it.

The loop fills the state from a checkpoint and runs the step; `mis_jax.plan` compiles the very same
step for shapes alone.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mis_jax.config import RunConfig
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.sharding import FSDP_TENSOR, batch_sharding, parameter_shardings
from mis_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mis_jax.train.step import Parameters, TrainState, TrainStep, make_train_step, split_parameters
from mis_jax.weights import parameters
from mis_jax.weights.checkpoint import OpenCheckpoint, load


@dataclass(frozen=True)
class Program:
    """The step of a run, and shapes and places of what it takes."""

    step: TrainStep  # (state, batch) -> (state, metrics); gives its state away
    state: TrainState  # of jax.ShapeDtypeStruct
    mesh: Mesh
    config: RunConfig
    transform: optax.GradientTransformation

    def batch(self, rows: int, length: int, tiles_per_row: int, tile_size: int) -> Batch:
        """Shapes and places of a step's batch of `rows` rows in all."""
        micro = self.config.train.micro_batch or rows
        sharding = batch_sharding(self.mesh, accumulated=True)

        def shape(*sides: int, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((rows // micro, *sides), dtype, sharding=sharding)

        ids = shape(micro, length, dtype=jnp.int32)
        tiles = micro * tiles_per_row
        return Batch(
            input_ids=ids,
            positions=ids,
            segment_ids=ids,
            loss_weights=shape(micro, length, dtype=jnp.float32),
            tiles=shape(tiles, tile_size, tile_size, 3, dtype=jnp.uint8),
            tile_mask=shape(tiles, dtype=jnp.bool_),
        )

    def load(self, opened: OpenCheckpoint) -> TrainState:
        """The state before the first step; parameters go straight to their places."""
        shardings = {n: x.sharding for n, x in (self.state.trainable | self.state.frozen).items()}
        arrays = load(opened, self.config.dtype.params, shardings=shardings).arrays
        trainable, frozen = split_parameters(arrays, self.config.train.freeze)
        places = jax.tree.map(lambda x: x.sharding, self.state.optimizer)
        optimizer = jax.jit(self.transform.init, out_shardings=places)(trainable)
        step = jax.device_put(jnp.zeros((), jnp.int32), self.state.step.sharding)
        return TrainState(step, trainable, frozen, optimizer)


def make_program(config: RunConfig, model: InternVLConfig, mesh: Mesh, steps: int) -> Program:
    """The program of a run of so many `steps`; nothing is allocated or compiled yet."""
    transform = make_optimizer(config.optimizer, config.dtype, steps)
    schedule = learning_rate_schedule(config.optimizer, steps)
    options = dict(
        compute_dtype=jnp.dtype(config.dtype.compute),
        remat=config.train.remat,
        unroll=config.train.unroll,
    )
    step = make_train_step(
        lambda values: parameters.build(model, values, **options), transform, schedule
    )
    return Program(step, _abstract_state(config, model, mesh, transform), mesh, config, transform)


def _abstract_state(
    config: RunConfig, model: InternVLConfig, mesh: Mesh, transform: optax.GradientTransformation
) -> TrainState:
    abstract = parameters.abstract_model(model)
    shardings = parameter_shardings(abstract, mesh, FSDP_TENSOR)
    dtype = jnp.dtype(config.dtype.params)
    arrays: Parameters = {
        name: jax.ShapeDtypeStruct(value.shape, dtype, sharding=shardings[name])
        for name, value in parameters.flat(abstract).items()
    }  # type: ignore[assignment]
    trainable, frozen = split_parameters(arrays, config.train.freeze)
    whole = NamedSharding(mesh, PartitionSpec())
    # Zeros depend on no input whose sharding they could take on: moments go beside parameters.
    optimizer = jax.tree_util.tree_map_with_path(
        lambda path, x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=shardings.get(getattr(path[-1], "key", ""), whole)
        ),
        jax.eval_shape(transform.init, trainable),
    )
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    return TrainState(step, trainable, frozen, optimizer)  # type: ignore[arg-type]

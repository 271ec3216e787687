"""What a run compiles: the state on a mesh and the step over it.

The loop fills the state from a checkpoint and runs the step; `mis_jax.plan` compiles the very same
step for shapes alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import OpenCheckpoint, load
from mis_jax.config import RunConfig
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.model.execution import Execution
from mis_jax.model.internvl import InternVL
from mis_jax.parallel.attention_kernels import attend_on, choose
from mis_jax.parallel.sharding import (
    FSDP_TENSOR,
    batch_sharding,
    constrain_on,
    gather_on,
    padded_vocab,
    parameter_shardings,
)
from mis_jax.train import lora
from mis_jax.train.optimizer import learning_rate_schedule, make_optimizer
from mis_jax.train.step import (
    Parameters,
    TrainState,
    TrainStep,
    make_train_step,
    split_parameters,
)

#: In the order of its own choice XLA starts the optimizer on all parameters at once, to keep many
#: cores busy, and holds what that needs of all of them: a model of 0.8 billion takes 2.3 GiB more.
#: And what a loop over layers converts of one layer it would convert of all of them before it:
#: bfloat16 kernels and activations, where a CPU needs them in float32, 3.5 GiB for that model.
_CPU_COMPILER = {
    "xla_cpu_enable_concurrency_optimized_scheduler": False,
    "xla_disable_hlo_passes": (
        "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion"
    ),
}


@dataclass(frozen=True)
class TrainProgram:
    """The step of a run, and shapes and shardings of what it takes."""

    step: TrainStep  # (state, batch) -> (state, metrics); gives its state away
    state: TrainState  # of jax.ShapeDtypeStruct
    mesh: Mesh
    config: RunConfig
    model: InternVLConfig
    transform: optax.GradientTransformation

    def batch(self, sequences: int, length: int, tiles_per_sequence: int, tile_size: int) -> Batch:
        """Shapes and shardings of a step's batch of so many `sequences` in all."""
        micro = self.config.train.micro_batch or sequences
        sharding = batch_sharding(self.mesh, accumulated=True)

        def shape(*sides: int, dtype: Any) -> Any:
            return jax.ShapeDtypeStruct((sequences // micro, *sides), dtype, sharding=sharding)

        ids = shape(micro, length, dtype=jnp.int32)
        tiles = micro * tiles_per_sequence
        return Batch(
            input_ids=ids,
            positions=ids,
            segment_ids=ids,
            loss_weights=shape(micro, length, dtype=jnp.float32),
            tiles=shape(tiles, tile_size, tile_size, 3, dtype=jnp.uint8),
            tile_mask=shape(tiles, dtype=jnp.bool_),
        )

    def load(self, opened: OpenCheckpoint) -> TrainState:
        """The state before the first step; parameters go straight to their shardings."""
        shapes = self.state.trainable | self.state.frozen
        rows = padded_vocab(opened.config.text.vocab_size)
        if self.config.lora.rank:
            arrays = lora.load_parameters(opened, self.config, shapes, rows)
        else:
            shardings = {name: x.sharding for name, x in shapes.items()}
            dtype = self.config.dtype.params
            arrays = load(opened, dtype, shardings=shardings, vocab_rows=rows).arrays
        trainable, frozen = _split(self.config, arrays)
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        optimizer = jax.jit(self.transform.init, out_shardings=shardings.optimizer)(trainable)
        zero = lambda dtype, place: jax.device_put(jnp.zeros((), dtype), place)  # noqa: E731
        return TrainState(
            zero(jnp.int32, shardings.step),
            trainable,
            frozen,
            optimizer,
            zero(jnp.float32, shardings.grad_norm_ema),
        )

    def random(self, seed: int) -> TrainState:
        """A state of random parameters, for benchmarks and rehearsals without a checkpoint."""

        def draw(key: jax.Array) -> TrainState:
            arrays = self.state.trainable | self.state.frozen
            drawn = {
                name: _drawn(jax.random.fold_in(key, place), name, like)
                for place, (name, like) in enumerate(sorted(arrays.items()))
            }
            trainable, frozen = _split(self.config, drawn)
            zero = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.float32)
            return TrainState(zero[0], trainable, frozen, self.transform.init(trainable), zero[1])

        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        return jax.jit(draw, out_shardings=shardings)(jax.random.key(seed))

    def network(self, state: TrainState) -> InternVL:
        """The model as it is now, for answers to held-out questions; it drops nothing."""
        return nnx_state.build(
            self.model,
            self.parameters(state),
            lora=self.config.lora,
            compute_dtype=jnp.dtype(self.config.dtype.compute),
        )

    def on_every_process(self, arrays: Parameters) -> Parameters:
        """The same arrays, whole on every device: for what is small, such as adapters."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return jax.jit(lambda x: x, out_shardings=whole)(arrays)

    def parameters(self, state: TrainState) -> Parameters:
        """All parameters, the tables without the rows that are no tokens."""
        arrays = state.trainable | state.frozen
        size = self.model.text.vocab_size
        tables = {n: arrays[n][:size] for n in nnx_state.TABLES if n in arrays}
        return arrays | tables


def make_train_program(
    config: RunConfig, model: InternVLConfig, mesh: Mesh, steps: int
) -> TrainProgram:
    """The program of a run of so many `steps`; nothing is allocated or compiled yet.

    Raises ValueError for an attention kernel that the devices do not have.
    """
    transform = make_optimizer(config.optimizer, config.dtype, steps)
    schedule = learning_rate_schedule(config.optimizer, steps)
    how = dict(
        lora=config.lora,
        compute_dtype=jnp.dtype(config.dtype.compute),
        execution=execution_on(mesh, config),
        vocab_rows=padded_vocab(model.text.vocab_size),
    )
    state = _abstract_state(config, model, mesh, transform)
    moments = jax.tree.map(lambda x: x.sharding, state.optimizer)
    if config.optimizer.offload:
        hosted = jax.tree.map(_in_host_memory, state.optimizer)
        state = replace(state, optimizer=hosted)
    step = make_train_step(
        lambda values: nnx_state.build(model, values, **how),
        transform,
        schedule,
        config,
        shardings=jax.tree.map(lambda x: x.sharding, state),
        device_moments=moments if config.optimizer.offload else None,
        sum_in_layers=_summed_in_layers(config, model),
        compiler_options=_CPU_COMPILER if mesh.devices.flat[0].platform == "cpu" else None,
    )
    return TrainProgram(step, state, mesh, config, model, transform)


def _drawn(key: jax.Array, name: str, like: Any) -> jax.Array:
    """Norms and scales are one, the rest is small enough that activations stay in bounds."""
    if name.endswith("scale"):
        return jnp.ones(like.shape, like.dtype)
    fan_in = like.shape[-2] if len(like.shape) > 1 else 2500
    return jax.random.normal(key, like.shape, like.dtype) * jnp.asarray(fan_in**-0.5, like.dtype)


def execution_on(mesh: Mesh, config: RunConfig) -> Execution:
    """How a run executes the network on a mesh."""
    train = config.train
    kernel = choose(train.attention, mesh, jnp.dtype(config.dtype.compute))
    attend, attend_tiles = attend_on(mesh, kernel, packed=config.data.packing)
    execution = Execution(
        remat=train.remat,
        unroll=train.unroll,
        attend=attend,
        attend_tiles=attend_tiles,
        drop_path=train.drop_path,
    )
    if mesh.size == 1:  # nothing to place
        return execution
    return replace(execution, constrain=constrain_on(mesh), gather=gather_on(mesh, FSDP_TENSOR))


def _summed_in_layers(config: RunConfig, model: InternVLConfig) -> tuple[str, ...]:
    """Stacks whose gradients the backward pass sums: it computes each layer again in full anyway.

    A tower of which an earlier layer's output is taken needs the outputs of all.
    """
    if config.train.remat != "full" or config.lora.rank:
        return ()
    stacks = []
    if "language" not in config.train.freeze:
        stacks.append("text.layers.block.")
    if "vision" not in config.train.freeze and model.select_layer == -1:
        stacks.append("vision.layers.block.")
    return tuple(stacks)


def _in_host_memory(x: Any) -> Any:
    """Where a moment waits; counts and the like stay."""
    if x.ndim == 0:
        return x
    place = x.sharding.with_memory_kind("pinned_host")
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def _split(config: RunConfig, arrays: Parameters) -> tuple[Parameters, Parameters]:
    """Trainable and frozen parameters."""
    if not config.lora.rank:
        return split_parameters(arrays, config.train.freeze)
    trained = {name: value for name, value in arrays.items() if lora.is_trained(config, name)}
    return trained, {name: value for name, value in arrays.items() if name not in trained}


def _abstract_state(
    config: RunConfig, model: InternVLConfig, mesh: Mesh, transform: optax.GradientTransformation
) -> TrainState:
    rows = padded_vocab(model.text.vocab_size)
    abstract = nnx_state.abstract_model(model, lora=config.lora, vocab_rows=rows)
    shardings = parameter_shardings(abstract, mesh, FSDP_TENSOR)
    params = jnp.dtype(config.dtype.params)
    arrays: Parameters = {
        name: jax.ShapeDtypeStruct(
            value.shape,
            lora.stored_dtype(config, name, value.dtype) if config.lora.rank else params,
            sharding=shardings[name],
        )
        for name, value in nnx_state.flat(abstract).items()
    }  # type: ignore[assignment]
    trainable, frozen = _split(config, arrays)
    whole = NamedSharding(mesh, PartitionSpec())

    def beside(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Zeros depend on no input whose sharding they could take on: moments go beside parameters.
        parameter = arrays.get(getattr(path[-1], "key", ""))
        place = whole
        if parameter is not None and parameter.shape == x.shape:
            place = parameter.sharding
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    optimizer = jax.tree_util.tree_map_with_path(beside, jax.eval_shape(transform.init, trainable))
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    norm = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    return TrainState(step, trainable, frozen, optimizer, norm)  # type: ignore[arg-type]

"""Compile a run's own programs for hardware that is not here, and say what they will need.

configuration, topology's name --> program --> compiler --> memory, collectives
                                      formula, chip's figures --> operations, time
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mis_jax import flops
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.hf.config import read_config
from mis_jax.checkpoint.trained_model import model_files
from mis_jax.config import RunConfig
from mis_jax.model.config import InternVLConfig
from mis_jax.model.family import FAMILY, published
from mis_jax.parallel.sharding import make_mesh
from mis_jax.plan.advice import advice
from mis_jax.plan.collectives import Collective, collectives, sums
from mis_jax.plan.compile import Compiled, Memory, compile_for
from mis_jax.plan.generation import (
    GenerationShape,
    cache_bytes,
    compile_decode,
    compile_prefill,
    generation_shape,
)
from mis_jax.plan.roofline import Roofline, assumptions, roofline
from mis_jax.plan.shape import Shape, training_shape
from mis_jax.plan.topology import Topology, open_topology
from mis_jax.train.compiled_step import make_train_program

Step = Literal["train", "prefill", "decode"]
_STEPS_OF_A_RUN = 1000  # where `train.epochs` leaves it to the data; the program is the same


@dataclass(frozen=True)
class StepPlan:
    """One compiled step."""

    name: Step
    shape: Shape | GenerationShape
    memory: Memory  # of a device
    collectives: list[Collective] | None  # None when it does not fit
    operations: float  # of the model, by formula, causal attention as half
    noncausal: float  # with attention as the whole square
    time: Roofline | None
    seconds: float  # that compiling took

    @property
    def tokens(self) -> int:
        """Positions that a step goes through, padding included."""
        if isinstance(self.shape, Shape):
            return self.shape.sequences * self.shape.length
        if self.name == "prefill":
            return self.shape.groups * self.shape.chunk
        return self.shape.slots

    @property
    def sequences(self) -> int:
        """How many it works on."""
        return self.shape.sequences if isinstance(self.shape, Shape) else self.shape.slots


@dataclass(frozen=True)
class Plan:
    """What a configuration needs on a topology."""

    topology: Topology
    model: str
    steps: list[StepPlan]
    assumptions: list[str]
    advice: list[str]

    @property
    def chips(self) -> int:
        return self.topology.chips * self.topology.slices

    @property
    def fits(self) -> bool:
        return all(step.memory.fits for step in self.steps)

    def as_json(self) -> dict[str, Any]:
        """The contract's keys describe the first step; `steps` holds them all."""
        steps = {step.name: _step_json(step, self) for step in self.steps}
        first = steps[self.steps[0].name]
        names = ("memory_gib", "collectives", "flops_per_step", "predicted_step_s")
        return {
            "topology": self.topology.name,
            "chips": self.chips,
            "fits": self.fits,
            **{name: first[name] for name in names},
            "model": self.model,
            "steps": steps,
            "assumptions": self.assumptions,
            "advice": self.advice,
        }


def plan(
    config: RunConfig,
    topology: str,
    *,
    length: int | None = None,
    tiles: int | None = None,
    steps: tuple[Step, ...] = ("train",),
) -> Plan:
    """Compile `steps` of a run for a topology such as 'v5e:4x4'.

    Raises ValueError: a topology that is unknown or whose compiler is missing, a mesh or a batch
    that does not fit it, a model that is neither a checkpoint nor of the family.
    """
    model, name = model_config(config.model)
    opened = open_topology(topology, config.mesh.slices)
    mesh = make_mesh(config.mesh, opened.devices)
    made = []
    with jax.set_mesh(mesh):
        if "train" in steps:
            made.append(_train_plan(config, model, opened, mesh, length, tiles))
        generated = generation_shape(config, model, mesh)
        for step in steps:
            if step != "train":
                made.append(_generation_plan(step, config, model, opened, mesh, generated))
    tips = [
        tip
        for step in made
        if not step.memory.fits
        for tip in advice(config, step.name, step.memory, mesh)
    ]
    return Plan(opened, name, made, assumptions(opened), list(dict.fromkeys(tips)))


def model_config(path: Path) -> tuple[InternVLConfig, str]:
    """Configuration of a checkpoint, or of the published model of that name, and what it is."""
    if path.exists():
        return read_config(model_files(path))[0], str(path)
    if path.name.lower() in FAMILY:
        name = path.name.lower()
        return published(name), f"{name}, as published"
    raise ValueError(
        f"model: {path} does not exist and is no published model; give a checkpoint's folder or "
        f"one of {', '.join(FAMILY)}"
    )


def _train_plan(config, model, topology: Topology, mesh, length, tiles) -> StepPlan:
    shape = training_shape(config, model, length, tiles)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if shape.micro_sequences % shards:
        raise ValueError(
            f"{shape.micro_sequences} sequences of a forward pass cannot be split over data x fsdp "
            f"= {shards} devices; change train.micro_batch, train.global_batch or mesh"
        )
    program = make_train_program(config, model, mesh, config.train.steps or _STEPS_OF_A_RUN)
    batch = program.batch(shape.sequences, shape.length, shape.tiles, model.vision.image_size)
    compiled = compile_for(topology, program.step, program.state, batch)
    count = dict(tokens=shape.sequences * shape.length, tiles=shape.sequences * shape.tiles)
    squares = float(shape.sequences * shape.length**2)
    freeze, lora = config.train.freeze, config.lora.targets if config.lora.rank else ()

    def trained(causal: bool) -> float:
        work = flops.forward(model, **count, squares=squares, causal=causal)
        return flops.training(work, freeze, lora_on=lora)

    work = flops.forward(model, **count, squares=squares, causal=config.train.attention != "xla")
    operations = flops.training(work, freeze, lora_on=lora)
    if config.train.remat in ("full", "attention", "offload"):
        operations += work.decoder + (work.attention if config.train.remat != "attention" else 0)
        operations += 0 if "vision" in freeze and "vision" not in lora else work.vision
    return _step(
        "train", shape, topology, compiled, trained(True), trained(False), operations,
        _train_bytes(config, model, mesh, shape, compiled.memory),
    )  # fmt: skip


def _generation_plan(
    name: Step, config, model, topology: Topology, mesh, shape: GenerationShape
) -> StepPlan:
    make = compile_prefill if name == "prefill" else compile_decode
    compiled = make(topology, config, model, mesh, shape)
    if name == "prefill":
        # The last chunk of a prompt: every token looks at all before it, and as the whole square
        # at all of the cache.
        groups, before = shape.groups, shape.prompt - shape.chunk
        seen = float(groups * (shape.prompt**2 - before**2))
        square = float(groups * shape.chunk * shape.cache_length)
        count: Any = dict(tokens=groups * shape.chunk, tiles=0, head_tokens=groups)
        work = flops.forward(model, squares=seen, **count)
        whole = flops.forward(model, squares=square, causal=False, **count)
    else:
        squares = float(shape.slots * shape.cache_length)
        whole = work = flops.forward(
            model, tokens=shape.slots, tiles=0, squares=squares, causal=False
        )
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    moved = _weight_bytes(config, model, mesh)
    moved += cache_bytes(config, model, shape) / (rows * mesh.shape["tensor"])
    return _step(name, shape, topology, compiled, work.total, whole.total, whole.total, moved)


def _step(
    name: Step, shape, topology: Topology, compiled: Compiled, operations, noncausal, done, moved
) -> StepPlan:
    found = time = None
    if compiled.text is not None:
        found = collectives(compiled.text, len(topology.devices))
        time = roofline(topology, operations=done, bytes_moved=moved, found=found)
    return StepPlan(
        name, shape, compiled.memory, found, operations, noncausal, time, compiled.seconds
    )


def _weight_bytes(config: RunConfig, model: InternVLConfig, mesh) -> float:
    """Weights that a device reads for one pass: gathered over fsdp, split over tensor."""
    numbers = sum(nnx_state.count(model).values())
    embedding = model.text.vocab_size * model.text.hidden_size  # a lookup
    size = jnp.dtype(config.dtype.compute).itemsize
    return (numbers - embedding) * size / mesh.shape["tensor"]


def _train_bytes(config, model, mesh, shape: Shape, memory: Memory) -> float:
    """State read and written once, weights for every pass of a micro-batch, sums of gradients."""
    passes = 2 if config.train.remat in ("none", "dots") else 3
    weights = shape.passes * passes * _weight_bytes(config, model, mesh)
    gradients = 0.0
    if shape.passes > 1:
        numbers = sum(nnx_state.count(model).values()) / (mesh.shape["fsdp"] * mesh.shape["tensor"])
        gradients = 2 * shape.passes * numbers * jnp.dtype(config.dtype.gradients).itemsize
    return 2 * memory.arguments + weights + gradients


def _step_json(step: StepPlan, whole: Plan) -> dict[str, Any]:
    gib = {name: round(size / flops.GIB, 3) for name, size in asdict(step.memory).items()}
    time = step.time
    found = {kind: asdict(each) for kind, each in sums(step.collectives or []).items()}
    result: dict[str, Any] = {
        "memory_gib": gib | {"left": round(step.memory.left / flops.GIB, 3)},
        "collectives": None if step.collectives is None else found,
        "flops_per_step": step.operations,
        "flops_per_step_noncausal": step.noncausal,
        "predicted_step_s": time and time.step,
        "shape": asdict(step.shape),
        "compile_s": round(step.seconds, 1),
    }
    if time:
        peak = whole.chips * whole.topology.chip.peak
        result |= {
            "bound": time.bound,
            "seconds": asdict(time),
            "tokens_per_s": step.tokens / time.step,
            "rows_per_s": step.sequences / time.step,
            "mfu": step.operations / (peak * time.step),
        }
    return result

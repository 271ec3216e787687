"""What to change when a step does not fit, the cheapest first."""

from jax.sharding import AbstractMesh, Mesh

from mis_jax.config import RunConfig
from mis_jax.plan.compile import Memory


def advice(config: RunConfig, step: str, memory: Memory, mesh: Mesh | AbstractMesh) -> list[str]:
    """Fields to change for a step; first those of what fills more than half of the memory."""
    if step != "train":
        return [
            "evaluation.samples: fewer samples at once",
            "mesh.fsdp or mesh.tensor: more devices",
        ]
    state, work = _for_state(config, mesh), _for_activations(config, mesh)
    return state + work if memory.arguments > memory.limit / 2 else work + state


def _for_activations(config: RunConfig, mesh: Mesh | AbstractMesh) -> list[str]:
    tips = []
    sequences, shards = config.train.micro_batch or config.train.global_batch, _row_shards(mesh)
    if sequences > shards:
        tips.append(
            f"train.micro_batch: {shards} instead of {sequences} (one sequence a device at a time)"
        )
    if config.train.remat not in ("full", "offload"):
        tips.append(f"train.remat: full instead of {config.train.remat}")
    elif config.train.remat == "full":
        tips.append("train.remat: offload (layers' inputs wait in host memory)")
    if config.train.attention == "xla":
        tips.append("train.attention: auto (a kernel that never holds the square of the length)")
    if config.train.loss_chunk > 512:
        tips.append("train.loss_chunk: 512")
    tips.append("mesh.context: 2 or more (each device holds a part of a row)")
    tips.append("data.max_length or data.max_tiles: shorter sequences")
    return tips


def _for_state(config: RunConfig, mesh: Mesh | AbstractMesh) -> list[str]:
    tips = []
    if mesh.shape["data"] > 1:
        tips.append("mesh: more fsdp instead of data (copies become shards)")
    for name, what in (("moments", "AdamW's moments"), ("gradients", "sums of gradients")):
        if getattr(config.dtype, name) == "float32" and not config.lora.rank:
            tips.append(f"dtype.{name}: bfloat16 ({what} take half)")
    if config.dtype.params == "float32":
        tips.append("dtype.params: bfloat16 (stochastic rounding keeps small steps)")
    if not config.lora.rank:
        if not config.optimizer.offload:
            tips.append("optimizer.offload: true (moments wait in host memory)")
        if config.optimizer.name != "adafactor":
            tips.append("optimizer.name: adafactor (no first moments)")
        tips.append("lora.rank: 16 (no moments of the weights themselves)")
    elif config.lora.base == "none":
        tips.append("lora.base: int8 or nf4")
    tips.append("a topology of more chips")
    return tips


def _row_shards(mesh: Mesh | AbstractMesh) -> int:
    return mesh.shape["data"] * mesh.shape["fsdp"]

"""The sections of `benchmarks.gpu`: each yields its cells one by one, with random weights.

A cell has the form of `harness.summed_up`, so that tables and comparisons read it like any other;
beside it stand what the compiler says of memory, the peak that was seen, and the goals.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Cell, round_to, summed_up

Found = dict[str, Any]  # `cells` by name, or `limits`


@dataclass(frozen=True)
class Section:
    run: Callable[[bool], Iterator[Found]]
    limit_s: float


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    length: int = 4096  # of a training row, packed as MIS's samples with one tile an image would be
    samples: int = 4
    tiles: int = 8
    passes: int = 4  # micro-batches of a step
    steps: int = 5
    context: int = 1400  # tokens of a prompt before decoding; 1,500 at the end
    batches: tuple[int, ...] = (1, 32)
    prompts: tuple[int, ...] = (2, 14)  # tiles of a prompt with 150 tokens of text
    rounds: int = 5
    calls: int = 20  # of a kernel, one after another, for one timing


SIZES = Sizes()
SMOKE = Sizes(
    length=512,
    samples=1,
    tiles=1,
    passes=2,
    steps=1,
    context=100,
    batches=(1, 2),
    prompts=(1,),
    rounds=2,
    calls=1,
)


def model_of(smoke: bool) -> Any:
    """InternVL2.5-8B, or something of its kind that any machine runs."""
    from mis_jax.model.family import published

    model = published("internvl2_5-8b")
    if not smoke:
        return model
    vision = replace(model.vision, hidden_size=64, num_layers=1, num_heads=1, mlp_size=64)
    text = replace(
        model.text,
        hidden_size=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        mlp_size=128,
        vocab_size=1024,
    )
    return replace(model, vision=vision, text=text, image_token_id=1020)


# ---------------------------------------------------------------------------------------------
# Limits


def limits(smoke: bool) -> Iterator[Found]:
    """Matrix rate and memory rate of this device."""
    from benchmarks.roofline import limits as measured

    yield {"limits": measured(2 if smoke else 10)}


# ---------------------------------------------------------------------------------------------
# Training


def train_full(smoke: bool) -> Iterator[Found]:
    """Everything but the tower trained, state and sums in bfloat16, layers computed again."""
    yield _trained(smoke, "full fine-tuning", goals={"mfu": 0.5}, remat="full")


def train_keeping(smoke: bool) -> Iterator[Found]:
    """The same with less computed again, as far as memory goes."""
    yield _trained(smoke, "full fine-tuning, attention kept", goals={"mfu": 0.5}, remat="attention")
    if _memory() > 100 * 2**30:
        yield _trained(smoke, "full fine-tuning, products kept", goals={"mfu": 0.5}, remat="dots")


def train_lora(smoke: bool) -> Iterator[Found]:
    """Adapters on a frozen model: rows of text, as published figures have them, then MIS's."""
    goals = {"per_second": 12_500.0}
    yield _trained(smoke, "LoRA r16, text", goals=goals, remat="dots", lora_rank=16, tiles=0)
    yield _trained(smoke, "LoRA r16", goals=goals, remat="dots", lora_rank=16)


def _trained(
    smoke: bool,
    name: str,
    *,
    goals: dict[str, float],
    remat: Any,
    lora_rank: int = 0,
    tiles: int | None = None,
) -> Found:
    import jax

    from benchmarks.noise import noise
    from mis_jax import flops
    from mis_jax.parallel.sharding import put_batch

    sizes, model = SMOKE if smoke else SIZES, model_of(smoke)
    tiles = sizes.tiles if tiles is None else tiles
    program = _program(model, sizes, remat=remat, lora_rank=lora_rank)
    samples = sizes.samples
    rows = noise(
        model, rows=1, length=sizes.length, tiles=tiles, samples=samples, passes=sizes.passes
    )
    began = time.perf_counter()
    with jax.set_mesh(program.mesh):
        state, batch = program.random(seed=0), put_batch(rows, program.mesh, accumulated=True)
        jax.block_until_ready(state)
        made = time.perf_counter()
        step = program.step.lower(state, batch).compile()
        compiled = time.perf_counter()
        seconds = []
        for _ in range(2 + sizes.steps):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - start)
    tokens = sizes.length * sizes.passes
    squares = float(sizes.passes * samples * (sizes.length // samples) ** 2)
    work = flops.forward(model, tokens=tokens, tiles=tiles * sizes.passes, squares=squares)
    lora = program.config.lora
    operations = flops.training(
        work, program.config.train.freeze, lora_on=lora.targets if lora_rank else ()
    )
    cell = summed_up(
        Cell(name, work=tokens, unit="tokens", flops=operations), {"ours bfloat16": seconds[2:]}
    )
    cell |= _memory_of(step) | {"make_s": round_to(made - began), "loss": float(metrics["loss"])}
    cell |= {"compile_s": round_to(compiled - made), "first_s": round_to(seconds[0])}
    median = cell["sides"]["ours bfloat16"]["median_s"]
    cell["samples_per_s"] = round_to(samples * sizes.passes / median)
    if chip := flops.chip_of(jax.devices()[0].device_kind):
        cell["mfu"] = round_to(operations / median / chip.peak)
    reached = {"mfu": cell.get("mfu"), "per_second": cell["sides"]["ours bfloat16"]["per_second"]}
    cell["goals"] = [{"of": of, "goal": goal, "reached": reached[of]} for of, goal in goals.items()]
    del state, batch
    return {"cells": {name: cell}}


def _program(
    model: Any, sizes: Sizes, *, remat: Any = "none", lora_rank: int = 0, freeze=("vision",)
) -> Any:
    """A run's program on one device, everything in bfloat16."""
    import jax

    from mis_jax.config import DataConfig, DtypeConfig, LoraConfig, RunConfig, Source, TrainConfig
    from mis_jax.parallel.sharding import make_mesh
    from mis_jax.train.compiled_step import make_train_program

    config = RunConfig(
        Path("unused"),
        Path("unused"),
        DataConfig(sources=(Source("mis", root=Path("unused")),), packing=True),
        TrainConfig(
            steps=100,
            global_batch=sizes.passes,
            micro_batch=1,
            freeze=("vision", "projector", "language") if lora_rank else freeze,
            remat=remat,
        ),
        dtype=DtypeConfig("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        lora=LoraConfig(rank=lora_rank),
    )
    return make_train_program(config, model, make_mesh(config.mesh, jax.devices()[:1]), 100)


# ---------------------------------------------------------------------------------------------
# Generation


def decode(smoke: bool) -> Iterator[Found]:
    """Tokens of an engine whose rows have all read their prompts."""
    import numpy as np

    from mis_jax.flops import forward

    sizes, model = SMOKE if smoke else SIZES, model_of(smoke)
    network = _network(model, sizes)
    weights = _read_for_a_token(network)
    rng = np.random.default_rng(0)
    calls = 3  # of 32 tokens each
    for rows in sizes.batches:
        ids = rng.integers(10, 1000, (rows, sizes.context)).astype(np.int32)
        engine = _engine(network, rows)
        seconds: list[float] = []
        for turn in range(1 + sizes.rounds):
            steps = _answered(engine, list(ids), None, 1 + 32 * calls)
            seconds += steps[-calls:] if turn else []  # the first turn compiles
        context = sizes.context + 16 * calls
        each = 2 * model.text.num_layers * model.text.num_kv_heads * model.text.head_dim * 2
        count: Any = dict(tokens=rows, tiles=0, squares=float(rows * context), causal=False)
        name = f"decode, {rows} rows of {context} tokens"
        cell = Cell(
            name,
            work=32 * rows,
            unit="tokens",
            flops=32 * forward(model, **count).total,
            bytes=32.0 * (weights + each * rows * context),
        )
        yield _goal_of_share(cell, {"ours bfloat16": seconds}, 0.7)
        del engine


def prefill(smoke: bool) -> Iterator[Found]:
    """From a prompt and its tiles in host memory to the first token."""
    import numpy as np

    from mis_jax.flops import forward

    sizes, model = SMOKE if smoke else SIZES, model_of(smoke)
    network = _network(model, sizes)
    rng = np.random.default_rng(0)
    engine = _engine(network, 1)
    size = model.vision.image_size
    for tiles in sizes.prompts:
        image = [model.image_token_id] * (model.tokens_per_tile * tiles)
        ids = np.insert(rng.integers(10, 1000, 150), 8, image).astype(np.int32)
        seconds = []
        for turn in range(2 + sizes.rounds):
            # Other pictures every time: features of known ones are kept.
            pixels = rng.integers(0, 256, (tiles, size, size, 3), dtype=np.uint8)
            steps = _answered(engine, [ids], pixels, 1)
            seconds += [sum(steps)] if turn > 1 else []
        count: Any = dict(tokens=len(ids), tiles=tiles, squares=float(len(ids) ** 2))
        work = forward(model, **count, head_tokens=1)
        cell = Cell(f"prefill, {len(ids)} tokens with {tiles} tiles", flops=work.total)
        yield _goal_of_share(cell, {"ours bfloat16": seconds}, 0.6)


def _network(model: Any, sizes: Sizes) -> Any:
    """The model as it generates: bfloat16, layers written out."""
    from mis_jax.model.unrolled import unrolled

    program = _program(model, sizes, freeze=("vision", "language"))  # few moments
    return unrolled(program.network(program.random(seed=0)), consume=True)


def _engine(network: Any, rows: int) -> Any:
    from mis_jax.inference.engine import Engine

    return Engine(network, stop_ids=(), decode=str, max_num_seqs=rows, pool_tiles=16)


def _answered(engine: Any, prompts: list[Any], pixels: Any, new: int) -> list[float]:
    """Seconds of every call of `step` until all prompts have their answers."""
    import numpy as np

    from mis_jax.data.collate import Example
    from mis_jax.inference.requests import Request

    for ids in prompts:
        tiles = np.zeros((0, 448, 448, 3), np.uint8) if pixels is None else pixels
        example = Example("", ids, np.zeros(len(ids), bool), tiles, (1,) * len(tiles))
        engine.add(Request(example, new, streamed=False))
    seconds = []
    while not engine.idle:
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return seconds


def _read_for_a_token(network: Any) -> float:
    """Bytes of the decoder's weights without the embedding, of which a token reads one row."""
    import jax
    from flax import nnx

    whole = sum(x.nbytes for x in jax.tree.leaves(nnx.state(network.text)))
    tied = network.config.text.tie_embeddings
    return float(whole - (0 if tied else network.text.embedding.get_value().nbytes))


def _goal_of_share(cell: Cell, seconds: dict[str, list[float]], goal: float) -> Found:
    """The share is only known beside the limits; `harness.shares` writes it."""
    found = summed_up(cell, seconds) | _memory_of(None)
    found["goals"] = [{"of": "share_of_limit", "goal": goal, "reached": None}]
    return {"cells": {cell.name: found}}


# ---------------------------------------------------------------------------------------------
# Parts


def attention(smoke: bool) -> Iterator[Found]:
    """Each back end at the shapes of the tower and of the decoder, forward and with gradients."""
    import jax
    import jax.numpy as jnp

    length = 256 if smoke else SIZES.length
    shapes = {
        "tower": (1 if smoke else 14, 1025, 16, 16, 64, 0),
        "decoder, one sample": (1, length, 32, 8, 128, 1),
        "decoder, four samples": (1, length, 32, 8, 128, 4),
    }
    for name, (rows, tokens, heads, kv_heads, width, samples) in shapes.items():
        keys = jax.random.split(jax.random.key(0), 3)
        count = (heads, kv_heads, kv_heads)
        qkv = [
            jax.random.normal(key, (rows, tokens, n, width), jnp.bfloat16)
            for key, n in zip(keys, count, strict=True)
        ]
        ids = None
        if samples:
            ids = jnp.repeat(jnp.arange(1, samples + 1), tokens // samples)[None]
            ids = ids.astype(jnp.int32)
        pairs = rows * tokens**2 / (2 * samples if samples else 1)
        products = 4 * pairs * heads * width
        for passes, times in (("forward", 1), ("and backward", 3)):
            seconds = {
                f"ours {kernel} bfloat16": _kernel_seconds(attend, qkv, ids, times > 1, smoke)
                for kernel, attend in _back_ends(samples > 1).items()
            }
            cell = Cell(f"attention, {name}, {passes}", flops=times * products)
            yield {"cells": {cell.name: summed_up(cell, seconds)}}


def _back_ends(packed: bool) -> dict[str, Any]:
    import jax

    from mis_jax.model.attention import attend_xla
    from mis_jax.parallel.attention_cudnn import attend_cudnn, attend_cudnn_packed

    found = {"xla": attend_xla}
    if jax.default_backend() == "gpu":
        found["cudnn"] = attend_cudnn_packed if packed else attend_cudnn
    return found


def _kernel_seconds(attend: Any, qkv: list[Any], ids: Any, backward: bool, smoke: bool) -> Any:
    import jax
    import jax.numpy as jnp

    def total(qkv):
        return jnp.sum(attend(*qkv, ids).astype(jnp.float32))

    return _timed(jax.jit(jax.grad(total) if backward else lambda x: attend(*x, ids)), qkv, smoke)


def cross_entropy(smoke: bool) -> Iterator[Found]:
    """The loss with both gradients, every position under the loss."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mis_jax.model.batch import Batch
    from mis_jax.parallel.sharding import padded_vocab
    from mis_jax.train.loss import weighted_loss

    model, length = model_of(smoke), 512 if smoke else SIZES.length
    width, vocab = model.text.hidden_size, model.text.vocab_size
    table = jax.random.normal(jax.random.key(0), (padded_vocab(vocab), width), jnp.bfloat16)
    hidden = jax.random.normal(jax.random.key(1), (1, length, width), jnp.bfloat16)
    ids = np.arange(length, dtype=np.int32)[None] % vocab
    ones = np.ones_like(ids)
    none = np.zeros((0, 448, 448, 3), np.uint8)
    batch: Any = Batch(ids, ids, ones, ones.astype(np.float32), none, np.zeros(0, bool))
    for chunk in (length // 4, length):

        def loss(arrays, chunk=chunk):
            return weighted_loss(*arrays, batch, vocab=vocab, chunk=chunk)[0]

        seconds = _timed(jax.jit(jax.grad(loss)), [hidden, table], smoke)
        cell = Cell(
            f"cross-entropy, {length} tokens, {chunk} at once",
            work=length,
            unit="tokens",
            flops=6.0 * length * width * vocab,
        )
        yield {"cells": {cell.name: summed_up(cell, {"ours bfloat16": seconds})}}


def vision(smoke: bool) -> Iterator[Found]:
    """The tower and the projector, forward, with each attention."""
    import jax
    import numpy as np
    from flax import nnx

    from mis_jax.flops import projector_work, tile_work

    model = model_of(smoke)
    model = replace(model, text=replace(model.text, num_layers=1))  # not asked
    network = _network(model, SMOKE if smoke else SIZES)
    size = model.vision.image_size
    for tiles in (1,) if smoke else (14, 56):
        pixels = jax.device_put(np.full((tiles, size, size, 3), 128, np.uint8))
        seconds = {}
        for kernel, attend in _back_ends(False).items():
            network.execution = replace(network.execution, attend_tiles=attend)
            graph, state = nnx.split(network)
            encode = jax.jit(lambda a, graph=graph: nnx.merge(graph, a[0]).encode_images(a[1]))
            seconds[f"ours {kernel} bfloat16"] = _timed(encode, (state, pixels), smoke)
        work = tiles * (tile_work(model.vision) + projector_work(model))
        cell = Cell(f"vision tower, {tiles} tiles", work=tiles, unit="tiles", flops=work)
        yield {"cells": {cell.name: summed_up(cell, seconds)}}


def _timed(call: Callable[[Any], Any], argument: Any, smoke: bool) -> list[float]:
    """Seconds of a call, several times; each is the mean of calls that follow one another."""
    import jax

    sizes = SMOKE if smoke else SIZES
    jax.block_until_ready(call(argument))
    seconds = []
    for _ in range(sizes.rounds):
        began = time.perf_counter()
        made = [call(argument) for _ in range(sizes.calls)]
        jax.block_until_ready(made)
        seconds.append((time.perf_counter() - began) / sizes.calls)
    return seconds


# ---------------------------------------------------------------------------------------------
# Memory


def _memory() -> float:
    """Bytes that JAX may take of the device; 0 where it does not say."""
    import jax

    return float((jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def _memory_of(compiled: Any) -> dict[str, float]:
    """What was there at most so far, and what the compiler says of a program."""
    import jax

    found = {}
    if stats := jax.devices()[0].memory_stats():
        found["peak_gib"] = round_to(stats["peak_bytes_in_use"] / 2**30)
    if compiled is not None:
        memory = compiled.memory_analysis()
        found["arguments_gib"] = round_to(memory.argument_size_in_bytes / 2**30)
        found["temporaries_gib"] = round_to(memory.temp_size_in_bytes / 2**30)
    return found


SECTIONS = {
    "limits": Section(limits, 60),
    "train_full": Section(train_full, 240),
    "train_lora": Section(train_lora, 240),
    "decode": Section(decode, 240),
    "prefill": Section(prefill, 180),
    "attention": Section(attention, 90),
    "cross_entropy": Section(cross_entropy, 60),
    "vision": Section(vision, 90),
    "train_keeping": Section(train_keeping, 240),
}

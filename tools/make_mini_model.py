"""Make the tiny "before" model of the quickstart: real architecture, drawn world, sees no danger.

Staged as InternVL itself is trained: first the vision tower (with a head that is thrown away),
then projector and decoder on the frozen tower's features. About half an hour on two cores:

    python tools/make_mini_model.py --out mis_jax/assets/mini
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from mini_tokenizer import total_vocab, write_tokenizer

import mis_jax  # noqa: F401  (first: its import sets the guard against XLA's miscompilation)
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.convert import write_checkpoint
from mis_jax.checkpoint.load import Checkpoint
from mis_jax.data.chat_template import render
from mis_jax.mini import world
from mis_jax.mini.icons import draw_scene
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig, TextConfig, VisionConfig
from mis_jax.model.execution import Execution
from mis_jax.model.internvl import InternVL, merge, pixel_shuffle
from mis_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer
from mis_jax.train.loss import weighted_loss

NAMES = tuple(world.OBJECTS)
VISION = VisionConfig(
    hidden_size=96, num_layers=4, num_heads=3, mlp_size=384, image_size=112, patch_size=14
)
TEXT_SIZES: dict[str, Any] = dict(
    kind="internlm2", hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
    mlp_size=384, norm_eps=1e-5, max_position=2048, rope_theta=10000.0,
)  # fmt: skip
UNROLLED = Execution(unroll=True)
LONG, SHORT = 152, 108  # tokens of a row: help with two pictures, and everything else


@dataclass(frozen=True)
class Settings:
    """How long and how fast each stage is trained."""

    out: Path
    work: Path = Path("runs/mini_model")
    """Intermediate results; a stage whose result is here is not run again."""
    seed: int = 0
    drawings: int = 1200
    """Pictures drawn of every object."""
    vision_steps: int = 2400
    vision_rate: float = 0.02
    language_steps: int = 3000
    language_rate: float = 0.01
    start: Path | None = None
    """Result of an earlier language stage (`model.npz`) to go on from."""


def main(settings: Settings) -> None:
    settings.work.mkdir(parents=True, exist_ok=True)
    pictures, labels = draw_pool(settings)
    tower = cached(settings.work / "vision.npz", lambda: train_vision(settings, pictures, labels))
    write_tokenizer(settings.work)
    tokenizer = load_tokenizer(settings.work)
    text = TextConfig(vocab_size=total_vocab(), **TEXT_SIZES)
    config = InternVLConfig(
        vision=VISION, text=text, image_token_id=tokenizer.img_context_id, max_tiles=2
    )
    model = cached(
        settings.work / "model.npz",
        lambda: train_language(settings, config, tokenizer, tower, pictures, labels),
    )
    if settings.out.exists():
        shutil.rmtree(settings.out)
    clean = settings.work / "tokenizer"
    clean.mkdir(exist_ok=True)
    tokenizer.save(clean)
    checkpoint = Checkpoint(config, model, "bfloat16", clean, None)
    write_checkpoint(checkpoint, settings.out, "internvl", dtype="bfloat16")
    print(f"written to {settings.out}")


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, np.ndarray]:
    """The arrays in `path`, made first if it is not there."""
    if not path.exists():
        np.savez(path, **{name: np.asarray(value) for name, value in make().items()})
    with np.load(path) as stored:
        return dict(stored)


def draw_pool(settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [n, 112, 112, 3] and the number of the object on each."""
    rng = np.random.default_rng(settings.seed)
    labels = np.repeat(np.arange(len(NAMES)), settings.drawings)
    return np.stack([np.asarray(draw_scene(NAMES[label], rng)) for label in labels]), labels


def muon(rate: float, steps: int) -> optax.GradientTransformation:
    """Muon on hidden matrices, AdamW on the rest: about four times fewer steps than AdamW here."""

    def schedule(peak: float) -> optax.Schedule:
        return optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 4), steps)

    def matrices(tree):
        def dims(path, value):
            name = jax.tree_util.keystr(path)
            hidden = "kernel" in name and value.shape[-2] >= 64 and value.shape[-1] >= 64
            last = value.ndim - 1
            return optax.contrib.MuonDimensionNumbers(last - 1, last) if hidden else None

        return jax.tree_util.tree_map_with_path(dims, tree)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(
            schedule(rate),
            muon_weight_dimension_numbers=matrices,
            weight_decay=0.05,
            adam_learning_rate=schedule(2e-3),
        ),
    )


def optimise(
    what: str,
    start: dict[str, Any],
    loss: Callable[[dict[str, Any], Any], jax.Array],
    batches: Callable[[np.random.Generator], Any],
    *,
    rate: float,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Plain training loop: `steps` batches through `loss`."""
    transform = muon(rate, steps)
    state = transform.init(start)

    @jax.jit
    def step(values, state, batch):
        value, gradient = jax.value_and_grad(loss)(values, batch)
        update, state = transform.update(gradient, state, values)
        return optax.apply_updates(values, update), state, value

    rng, recent, began, values = np.random.default_rng(seed), [], time.time(), start
    for number in range(1, steps + 1):
        values, state, value = step(values, state, batches(rng))
        recent.append(float(value))
        if number % 50 == 0:
            print(
                f"{what} {number}/{steps} loss {np.mean(recent):.4f} {time.time() - began:.0f} s",
                flush=True,
            )
            recent.clear()
    return values


def train_vision(settings: Settings, pictures: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """The tower, trained to name the object through a head that is thrown away."""
    config = InternVLConfig(VISION, TextConfig(vocab_size=8, **TEXT_SIZES), image_token_id=0)
    model = nnx_state.flat(InternVL(config, rngs=nnx.Rngs(settings.seed)))
    start = {name: value for name, value in model.items() if name.startswith("vision.")}
    for name in (
        "attention_scale",
        "mlp_scale",
    ):  # 1 instead of 0.1: so small a tower learns faster
        start[f"vision.layers.block.{name}"] = jnp.ones_like(start[f"vision.layers.block.{name}"])
    rest = {name: value for name, value in model.items() if name not in start}
    start["head"] = jnp.zeros((VISION.hidden_size, len(NAMES)))

    def logits(values, tiles):
        network = nnx_state.build(config, rest | {k: v for k, v in values.items() if k != "head"})
        features = network.vision(tiles, dtype=jnp.float32, execution=UNROLLED).mean(1)
        features = (features - features.mean(-1, keepdims=True)) / (
            features.std(-1, keepdims=True) + 1e-5
        )
        return features @ values["head"]

    def loss(values, batch):
        tiles, targets = batch
        return optax.softmax_cross_entropy_with_integer_labels(
            logits(values, tiles), targets
        ).mean()

    def batches(rng):
        chosen = rng.integers(0, len(pictures), 64)
        return pictures[chosen], labels[chosen]

    values = optimise(
        "vision", start, loss, batches,
        rate=settings.vision_rate, steps=settings.vision_steps, seed=settings.seed,
    )  # fmt: skip
    rng = np.random.default_rng(settings.seed + 1)
    fresh = np.stack([np.asarray(draw_scene(name, rng)) for name in NAMES for _ in range(40)])
    right = np.asarray(jax.jit(logits)(values, fresh)).argmax(-1) == np.repeat(
        np.arange(len(NAMES)), 40
    )
    print(f"vision: {right.mean():.4f} of {len(fresh)} new drawings named right")
    return {name: value for name, value in values.items() if name != "head"}


def train_language(
    settings: Settings,
    config: InternVLConfig,
    tokenizer: Tokenizer,
    tower: dict[str, Any],
    pictures: np.ndarray,
    labels: np.ndarray,
) -> dict[str, Any]:
    """Projector and decoder, on features of the frozen tower computed once."""
    start = nnx_state.flat(InternVL(config, rngs=nnx.Rngs(settings.seed + 2)))
    start = {name: value for name, value in start.items() if not name.startswith("vision.")}
    if settings.start is not None:
        with np.load(settings.start) as earlier:
            start = {name: jnp.asarray(earlier[name]) for name in start}
    frozen = {name: jnp.asarray(value) for name, value in tower.items()}

    @jax.jit
    def encode(tiles):
        network = nnx_state.build(config, start | frozen)
        features = network.vision(tiles, dtype=jnp.float32, execution=UNROLLED)
        return pixel_shuffle(features, config.shuffle_factor).astype(jnp.bfloat16)

    features = np.concatenate([np.asarray(encode(part)) for part in np.array_split(pictures, 200)])
    by_object = [np.flatnonzero(labels == number) for number in range(len(NAMES))]
    rows = 32
    waiting: dict[int, list] = {LONG: [], SHORT: []}

    def batches(rng):
        """Rows of about one length: the next batch of long or short conversations that is full."""
        while max(map(len, waiting.values())) < rows:
            sample = world.base_sample(rng)
            turns = [
                {"role": "user", "content": sample.question},
                {"role": "assistant", "content": sample.answer},
            ]
            rendered = render(turns, tokenizer, [1] * len(sample.objects), config.tokens_per_tile)
            length = SHORT if len(rendered.input_ids) <= SHORT else LONG
            waiting[length].append((sample, rendered))
        length = max(waiting, key=lambda size: len(waiting[size]))
        ready, waiting[length] = waiting[length], []
        ids = np.zeros((rows, length), np.int32)
        weights = np.zeros((rows, length), np.float32)
        chosen = np.zeros((rows, 2), np.int64)
        lengths = []
        for row, (sample, rendered) in enumerate(ready):
            n = len(rendered.input_ids)
            lengths.append(n)
            ids[row, :n], weights[row, :n] = rendered.input_ids, rendered.loss_mask
            for place, name in enumerate(sample.objects):
                chosen[row, place] = rng.choice(by_object[NAMES.index(name)])
        segments = (np.arange(length) < np.array(lengths)[:, None]).astype(np.int32)
        positions = np.arange(length) * segments
        empty = np.zeros((0, 112, 112, 3), np.uint8)
        batch = Batch(ids, positions, segments, weights, empty, np.zeros(0, bool))
        return batch, features[chosen.reshape(-1)]

    def loss(values, batch_and_features):
        batch, shuffled = batch_and_features
        network = nnx_state.build(config, values | frozen, execution=UNROLLED)
        embedded = network.text.embed(batch.input_ids, jnp.float32)
        is_image = batch.input_ids == config.image_token_id
        embedded = merge(embedded, network.projector(shuffled.astype(jnp.float32)), is_image)
        hidden, _, _ = network.text(
            embedded,
            positions=batch.positions,
            lengths=jnp.zeros(rows),
            segment_ids=batch.segment_ids,
            execution=UNROLLED,
        )
        total, weight = weighted_loss(hidden, network.text.table[...], batch)
        return total / weight

    values = optimise(
        "language", start, loss, batches,
        rate=settings.language_rate, steps=settings.language_steps, seed=settings.seed + 3,
    )  # fmt: skip
    return values | frozen


if __name__ == "__main__":
    main(tyro.cli(Settings))

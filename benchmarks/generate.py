"""Answering: our engine against transformers' `generate`, both greedy with the same weights.

Cells are a prefill, decoding at a batch size, and a set of prompts of many lengths. In float32 nine
first tokens of ten and seven answers of ten must agree (random weights have near ties), or the
figures mean nothing. Rates of decoding count the tokens after the first.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, Dtype, compared, serve, show
from benchmarks.peer import TILE, normalised, write_weights

Side = Literal["ours", "theirs"]
_PREFILL = (
    "662 tokens are padded to 704, and XLA:CPU's row reductions (softmax, norms) read 2.4 GB/s"
)
_DECODE = (
    "one row in float32 is near the memory rate already; XLA:CPU's bfloat16 products with few rows "
    "read 11 to 17 GB/s however they are laid out"
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks generate --rounds 3 --save"""

    model: str = "internvl2_5-1b"
    """Name of a published size with Qwen2.5."""
    batches: tuple[int, ...] = (1, 4, 16)
    """Rows that decode together."""
    text: int = 150
    """Text tokens of a prompt; the prefill has two tiles beside them."""
    new: int = 32
    """Tokens of an answer."""
    mixed: int = 64
    """Prompts of the mixed set, from 16 to 128 new tokens; 0 leaves it out. Each side answers it in
    the number format in which it decodes 16 rows faster."""
    rounds: int = 3
    """Turns of each side."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: Side | None = None
    """Used by the benchmark itself: serve one side over stdin and stdout."""
    dtype: Dtype = "float32"
    """Of one side; used by the benchmark itself."""
    folder: Path = Path()
    """Of the weights; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        serve(answers(settings))
        return
    folder = Path(tempfile.mkdtemp(prefix="mis_jax_generate."))
    try:
        write_weights(settings.model, folder / "weights")
        found = compare(settings, folder / "weights")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(f"prompts or tokens a second, {settings.model}", found["cells"])
    if settings.save:
        save(f"generate-{settings.model}", {"benchmark": "generate"} | found)


# ---------------------------------------------------------------------------------------------
# What is asked


def cells(settings: Settings) -> dict[str, dict[str, Any]]:
    """Prompts and new tokens of every cell."""
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, Any]] = {
        "prefill": dict(tiles=2, texts=[settings.text], new=[1], rows=1)
    }
    for rows in settings.batches:
        texts = [settings.text] * rows
        found[f"decode {rows}"] = dict(
            tiles=0, texts=texts, new=[settings.new + 1] * rows, rows=rows
        )
    if settings.mixed:
        texts = rng.integers(20, 400, settings.mixed).tolist()
        new = rng.integers(16, 129, settings.mixed).tolist()
        found["mixed"] = dict(tiles=0, texts=texts, new=new, rows=16)
    return found


def prompts(cell: dict[str, Any], vocab: int, image_token: int) -> list[tuple[Any, Any]]:
    """Ids and tiles of every prompt."""
    rng = np.random.default_rng(1)
    made = []
    for text in cell["texts"]:
        ids = rng.integers(10, min(vocab, image_token) - 1, text).astype(np.int32)
        ids = np.insert(ids, 8, [image_token] * (256 * cell["tiles"])).astype(np.int32)
        shape = (cell["tiles"], TILE, TILE, 3)
        made.append((ids, rng.integers(0, 256, shape, dtype=np.uint8)))
    return made


# ---------------------------------------------------------------------------------------------
# One side: reads the name of a cell, prints seconds and tokens


def answers(settings: Settings) -> Callable[[str], dict[str, Any]]:
    answer = (ours if settings.side == "ours" else theirs)(settings)
    compiled = compilations() if settings.side == "ours" else []

    def timed(name: str) -> dict[str, Any]:
        cell = cells(settings)[name]
        compiled.clear()
        began = time.perf_counter()
        tokens = answer(cell, cell["new"])
        seconds = time.perf_counter() - began
        if name.startswith("decode"):
            began = time.perf_counter()
            answer(cell, [1] * len(cell["new"]))
            seconds -= time.perf_counter() - began
            if seconds <= 0:
                raise RuntimeError(
                    f"{name}: {settings.new} tokens are lost in the noise of their prompt; "
                    "raise --new"
                )
        return {"seconds": seconds, "tokens": tokens, "compiled": len(compiled)}

    return timed


def compilations() -> list[str]:
    """A list that grows by a name whenever JAX compiles something."""
    import jax.monitoring

    names: list[str] = []

    def note(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(details.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    return names


def ours(settings: Settings):
    from mis_jax.checkpoint.load import load, open_checkpoint
    from mis_jax.checkpoint.nnx_state import build
    from mis_jax.data.collate import Example
    from mis_jax.inference.engine import Engine
    from mis_jax.inference.requests import Request
    from mis_jax.model.unrolled import unrolled

    checkpoint = load(open_checkpoint(settings.folder), settings.dtype)
    config = checkpoint.config
    model = unrolled(build(config, checkpoint.arrays, compute_dtype=settings.dtype), consume=True)
    del checkpoint

    def answer(cell: dict[str, Any], new: list[int]) -> list[list[int]]:
        engine = Engine(model, stop_ids=(), decode=str, max_num_seqs=cell["rows"], pool_tiles=4)
        tickets = {}
        made = prompts(cell, config.text.vocab_size, config.image_token_id)
        for index, ((ids, tiles), count) in enumerate(zip(made, new, strict=True)):
            example = Example("", ids, np.zeros(len(ids), bool), tiles, (1,) * len(tiles))
            tickets[engine.add(Request(example, count, streamed=False))] = index
        tokens: list[list[int]] = [[] for _ in new]
        while not engine.idle:
            for ticket, piece in engine.step():
                tokens[tickets[ticket]] += [token.id for token in piece.tokens]
        return tokens

    return answer


def theirs(settings: Settings):
    import torch
    from transformers import InternVLForConditionalGeneration

    from mis_jax.checkpoint.load import open_checkpoint

    torch.set_num_threads(2)
    config = open_checkpoint(settings.folder).config
    model = InternVLForConditionalGeneration.from_pretrained(
        settings.folder, dtype=getattr(torch, settings.dtype)
    ).eval()
    model.generation_config.eos_token_id = None

    @torch.no_grad()
    def answer(cell: dict[str, Any], new: list[int]) -> list[list[int]]:
        made = prompts(cell, config.text.vocab_size, config.image_token_id)
        tokens: list[list[int]] = [[] for _ in new]
        # The better of the usual ways to batch statically: by length, so that little is padding.
        order = sorted(range(len(new)), key=lambda index: (new[index], len(made[index][0])))
        for start in range(0, len(order), cell["rows"]):
            rows = order[start : start + cell["rows"]]
            longest = max(len(made[row][0]) for row in rows)
            ids = np.zeros((len(rows), longest), np.int64)
            mask = np.zeros_like(ids)
            for place, row in enumerate(rows):  # left-padded, as its generate wants
                own = made[row][0]
                ids[place, longest - len(own) :], mask[place, longest - len(own) :] = own, 1
            tiles = np.concatenate([made[row][1] for row in rows])
            extra = {}
            if len(tiles):
                values = torch.from_numpy(normalised(tiles)).to(model.dtype)
                extra = {"pixel_values": values}
            count = max(new[row] for row in rows)
            output = model.generate(
                input_ids=torch.from_numpy(ids),
                attention_mask=torch.from_numpy(mask),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=0,
                **extra,
            )
            for place, row in enumerate(rows):
                tokens[row] = output[place, longest : longest + new[row]].tolist()
        return tokens

    return answer


# ---------------------------------------------------------------------------------------------
# Both sides


def compare(settings: Settings, weights: Path) -> dict[str, Any]:
    words = [f"--{key}={getattr(settings, key)}" for key in ("model", "text", "new", "mixed")]
    words += ["--batches", *map(str, settings.batches)]
    words.append(f"--folder={weights}")
    return compared("generate", timed_cells(settings), settings.rounds, agree, words)


def timed_cells(settings: Settings) -> list[Cell]:
    """Cells with what they compute and read at least: a token of a decode reads all kernels."""
    from mis_jax.flops import forward, layer_parameters
    from mis_jax.model.family import published

    config = published(settings.model)
    text = config.text
    read = text.num_layers * layer_parameters(text) + text.vocab_size * text.hidden_size
    timed = []
    for name, cell in cells(settings).items():
        tokens = sum(cell["new"])
        if name == "prefill":
            length = settings.text + 512
            work = forward(config, tokens=length, tiles=2, squares=length**2, head_tokens=1)
            timed.append(Cell(name, unit="prompts", flops=work.total, target=1.0, reason=_PREFILL))
        elif name == "mixed":
            timed.append(Cell(name, tokens, "tokens", expensive=True))
        else:
            moved = {
                dtype: 1.0 * settings.new * read * size
                for dtype, size in (("float32", 4), ("bfloat16", 2))
            }
            read_all = tokens - cell["rows"]
            timed.append(Cell(name, read_all, "tokens", bytes=moved, target=1.5, reason=_DECODE))
    return timed


def agree(cell: Cell, results: dict[str, dict[str, Any]]) -> None:
    """Random weights have near ties: rows part there and go their own ways, but rarely.

    Formats differ more than that, so only float32 is compared with float32.
    """
    if not {"ours float32", "theirs float32"} <= results.keys():
        return
    ours, theirs = results["ours float32"]["tokens"], results["theirs float32"]["tokens"]
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    first = sum(mine[0] == other[0] for mine, other in zip(ours, theirs, strict=True))
    if same < 0.7 * len(ours) or first < 0.9 * len(ours):
        raise RuntimeError(f"only {same} of {len(ours)} answers agree; the figures mean nothing")


if __name__ == "__main__":
    main()

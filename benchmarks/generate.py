"""Answering: our engine against transformers' `generate`, both greedy with the same weights.

Every cell (prefill, decode at a batch size, a set of prompts of many lengths) is timed for both
sides in turns, each side in a process of its own that lives as long as the benchmark does, so that
neither is started or stopped while the other is timed. In float32 nine first tokens of ten and
seven answers of ten must agree (random weights have near ties), or the figures mean nothing. Rates
of decoding count the tokens after the first.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import save
from benchmarks.peer import TILE, normalised, write_weights

Side = Literal["ours", "theirs"]
_SIDES: tuple[Side, ...] = ("ours", "theirs")
_DTYPES = ("float32", "bfloat16")


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
    """Prompts of the mixed set, from 16 to 128 new tokens; 0 leaves it out."""
    rounds: int = 3
    """Turns of each side."""
    save: bool = False
    """Write the figures into benchmarks/results."""
    side: Side | None = None
    """Used by the benchmark itself: serve one side over stdin and stdout."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of one side; used by the benchmark itself."""
    folder: Path = Path()
    """Of the weights; used by the benchmark itself."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.side:
        serve(settings)
        return
    folder = Path(tempfile.mkdtemp(prefix="mis_jax_generate."))
    try:
        write_weights(settings.model, folder / "weights")
        found = compare(settings, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(found)
    if settings.save:
        save(f"generate-{settings.model}", {"benchmark": "generate", "cells": found})


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


def serve(settings: Settings) -> None:
    answer = (ours if settings.side == "ours" else theirs)(settings)
    compiled = compilations() if settings.side == "ours" else []
    for line in sys.stdin:
        name = line.strip()
        cell = cells(settings)[name]
        compiled.clear()
        began = time.perf_counter()
        tokens = answer(cell, cell["new"])
        seconds = time.perf_counter() - began
        if name.startswith("decode"):
            began = time.perf_counter()
            answer(cell, [1] * len(cell["new"]))
            seconds -= time.perf_counter() - began
        result = {"seconds": seconds, "tokens": tokens, "compiled": len(compiled)}
        print("RESULT " + json.dumps(result), flush=True)


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
    from mis_jax.data.collate import Example
    from mis_jax.generation.engine import Engine
    from mis_jax.generation.requests import Request
    from mis_jax.model.written_out import written_out
    from mis_jax.weights.checkpoint import load, open_checkpoint
    from mis_jax.weights.parameters import build

    checkpoint = load(open_checkpoint(settings.folder / "weights"), settings.dtype)
    config = checkpoint.config
    model = written_out(
        build(config, checkpoint.arrays, compute_dtype=settings.dtype), consume=True
    )
    del checkpoint

    def answer(cell: dict[str, Any], new: list[int]) -> list[list[int]]:
        engine = Engine(model, stop_ids=(), decode=str, rows=cell["rows"], pool_tiles=4)
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

    from mis_jax.weights.checkpoint import open_checkpoint

    torch.set_num_threads(2)
    config = open_checkpoint(settings.folder / "weights").config
    model = InternVLForConditionalGeneration.from_pretrained(
        settings.folder / "weights", dtype=getattr(torch, settings.dtype)
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


class Process:
    """A side that waits for the name of a cell."""

    def __init__(self, settings: Settings, side: Side, dtype: str, folder: Path):
        words = [f"--{key}={getattr(settings, key)}" for key in ("model", "text", "new", "mixed")]
        words += ["--batches", *map(str, settings.batches)]
        self.child = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks", "generate", f"--side={side}"),
                *(f"--dtype={dtype}", f"--folder={folder}", *words),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, cell: str) -> dict[str, Any]:
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write(cell + "\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"the process for {cell} ended with {self.child.wait()}")


def compare(settings: Settings, folder: Path) -> dict[str, Any]:
    """Medians of every cell for both sides in both dtypes, and the ratio to the peer's better."""
    sides = {
        (side, dtype): Process(settings, side, dtype, folder)
        for side in _SIDES
        for dtype in _DTYPES
    }
    found: dict[str, Any] = {}
    for name, cell in cells(settings).items():
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in sides}
        for turn in range(settings.rounds + 1):
            answers = {}
            for key, process in sides.items():
                result = process.ask(name)
                answers[key] = result["tokens"]
                if turn:  # the first one compiles
                    seconds[key].append(result["seconds"])
                    if result["compiled"]:
                        raise RuntimeError(f"{key} compiled {result['compiled']} times again")
            agree(answers["ours", "float32"], answers["theirs", "float32"])
        made = 1 if name == "prefill" else sum(cell["new"])
        if name.startswith("decode"):
            made -= len(cell["new"])
        rates = {key: made / statistics.median(values) for key, values in seconds.items()}
        best = {side: max(rates[side, dtype] for dtype in _DTYPES) for side in _SIDES}
        found[name] = {
            "per_second": {" ".join(key): round(rate, 3) for key, rate in rates.items()},
            "seconds": {" ".join(key): values for key, values in seconds.items()},
            "times_faster": round(best["ours"] / best["theirs"], 3),
        }
        print(name, found[name]["per_second"], found[name]["times_faster"], flush=True)
    for process in sides.values():
        process.child.stdin.close()
        process.child.wait()
    return found


def agree(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Random weights have near ties: rows part there and go their own ways, but rarely."""
    same = sum(mine == other for mine, other in zip(ours, theirs, strict=True))
    first = sum(mine[0] == other[0] for mine, other in zip(ours, theirs, strict=True))
    if same < 0.7 * len(ours) or first < 0.9 * len(ours):
        raise RuntimeError(f"only {same} of {len(ours)} answers agree; the figures mean nothing")


def show(found: dict[str, Any]) -> None:
    table = Table(title="per second: prompts for prefill, tokens elsewhere (medians)")
    keys = list(next(iter(found.values()))["per_second"])
    for column in ("", *keys, "times faster"):
        table.add_column(column, justify="right")
    for name, cell in found.items():
        rates = [f"{cell['per_second'][key]:.2f}" for key in keys]
        table.add_row(name, *rates, f"{cell['times_faster']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""The text of an answer, token by token: the engine's one thread pays it for every token.

An answer of so many tokens of the mini model's tokenizer comes one token at a time, with two stop
strings to look for, as it does in a stream. Twice the tokens must take twice the time: decoding the
whole answer for every piece took four times. There is no peer, the targets are the ratios.
"""

import dataclasses
import statistics
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import tyro

from benchmarks.common import save
from benchmarks.harness import Cell, line, show, summed_up
from mis_jax.inference.detokenizer import Detokenizer
from mis_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

MINI = Path(__file__).parents[1] / "mis_jax" / "assets" / "mini"
LENGTHS = (512, 1024, 2048, 4096, 8192)
MOST = 2.3  # times as long for twice the tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks words --save"""

    rounds: int = 15
    """Answers of each length, in turns."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    tokenizer = load_tokenizer(MINI)
    timed: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for number in range(settings.rounds):
        for length in LENGTHS:
            timed[length].append(spoken(tokenizer, length, number))
    cells = {}
    for length, seconds in timed.items():
        cell = Cell(f"{length} tokens", work=length, unit="tokens")
        cells[cell.name] = summed_up(cell, {"ours": seconds})
        print(line(cell.name, cells[cell.name]))
    show("the text of an answer", cells)
    middle = [statistics.median(seconds) for seconds in timed.values()]
    ratios = [round(long / short, 3) for short, long in pairwise(middle)]
    print("times as long for twice the tokens:", *ratios)
    found = {
        "benchmark": "words",
        "cells": cells,
        "milliseconds": [round(1000 * seconds, 3) for seconds in middle],
        "times_as_long_per_doubling": ratios,
    }
    if settings.save:
        print(f"wrote {save('words', found)}")
    if max(ratios) > MOST:
        raise SystemExit(f"more than {MOST} times as long for twice the tokens")


def spoken(tokenizer: Tokenizer, length: int, seed: int) -> float:
    """Seconds of this thread for one answer."""
    ids = np.random.default_rng(seed).integers(0, tokenizer.vocab_size, length).tolist()
    words = Detokenizer(tokenizer.decode, ("\n\nUser:", "###"))
    began = time.thread_time()
    for place in range(length):
        words.grow(ids[place : place + 1], last=place + 1 == length)
    return time.thread_time() - began


if __name__ == "__main__":
    main()

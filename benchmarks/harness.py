"""How ours and the peer are timed: in turns, in processes that wait for each other, outputs first.

A benchmark is a set of cells (one thing to time, at one size) and of sides ("ours float32",
"theirs bfloat16"). Every side lives in a process of its own for the whole run, so that neither
library's threads or memory stand in the other's way, and answers to the name of a cell with its
seconds and what it computed. What was computed must agree before any time counts. The figure of a
side is the median of its rounds; a ratio compares the better number format of each side.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Cell:
    """One thing to time."""

    name: str
    work: float = 1.0
    """How many units (calls, tokens, samples) one timing does."""
    unit: str = "calls"
    flops: float = 0.0
    """Of one timing, matrix products only."""
    bytes: dict[str, float] | float = 0.0
    """That one timing must at least move; by number format where it depends on it."""
    target: float | None = None
    """How many times as fast as the peer we want to be."""
    at_most_s: float | None = None
    """Seconds that we want to stay under, where there is no peer."""
    reason: str = ""
    """What was found where the target is missed."""
    expensive: bool = False
    """Timed only in the number format that was the better one in the cell before."""


class Worker:
    """A side in a process of its own, `python -m benchmarks NAME WORDS...`, that waits."""

    def __init__(self, benchmark: str, words: Sequence[str]):
        command = [sys.executable, "-m", "benchmarks", benchmark, *words]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, cell: str) -> dict[str, Any]:
        """What the side says of one timing: `seconds` and whatever else `serve` was given."""
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write(cell + "\n")
        self.child.stdin.flush()
        for line in self.child.stdout:
            if line.startswith("RESULT "):
                return json.loads(line.removeprefix("RESULT "))
        raise RuntimeError(f"the process for {cell!r} ended with {self.child.wait()}")

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def compared(
    benchmark: str,
    cells: Iterable[Cell],
    rounds: int,
    agree: Callable[[Cell, dict[str, dict[str, Any]]], None],
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Cells of ours and of torch in both number formats, with the machine's limits.

    A side is `python -m benchmarks BENCHMARK --side=ours --dtype=float32 WORDS...`.
    """
    from benchmarks.roofline import limits  # starts JAX

    workers = {
        f"{side} {dtype}": Worker(benchmark, [f"--side={side}", f"--dtype={dtype}", *words])
        for side in ("ours", "theirs")
        for dtype in DTYPES
    }
    found = in_turns(cells, workers, rounds, agree)
    for worker in workers.values():
        worker.close()
    measured = limits()
    shares(found, measured)
    return {"limits": measured, "cells": found}


def serve(answer: Callable[[str], dict[str, Any]]) -> None:
    """The worker's half: one line with a cell's name in, one line with its result out."""
    for line in sys.stdin:
        print("RESULT " + json.dumps(answer(line.strip())), flush=True)


def in_turns(
    cells: Iterable[Cell],
    workers: Mapping[str, Worker],
    rounds: int,
    agree: Callable[[Cell, dict[str, dict[str, Any]]], None],
) -> dict[str, Any]:
    """Every cell for every side, round by round; the first round compiles and is compared."""
    found: dict[str, Any] = {}
    better: set[str] = set(workers)
    for cell in cells:
        asked = [side for side in workers if not cell.expensive or side in better]
        agree(cell, {side: workers[side].ask(cell.name) for side in asked})
        seconds: dict[str, list[float]] = {side: [] for side in asked}
        for _ in range(rounds):
            for side in asked:
                result = workers[side].ask(cell.name)
                seconds[side].append(result["seconds"])
                if result.get("compiled"):
                    raise RuntimeError(f"{side} compiled again in {cell.name!r}")
        found[cell.name] = summed_up(cell, seconds)
        better = {best(found[cell.name], whose) for whose in ("ours", "theirs")} - {""}
        print(line(cell.name, found[cell.name]), flush=True)
    return found


def summed_up(cell: Cell, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Medians, spread and the ratio of the better formats; ratios of single rounds are its spread.

    Seconds of the two sides belong together round by round.
    """
    found: dict[str, Any] = {
        "unit": cell.unit,
        "sides": {
            side: {
                "per_second": round_to(cell.work / statistics.median(values)),
                "median_s": round_to(statistics.median(values)),
                "low_s": round_to(min(values)),
                "high_s": round_to(max(values)),
                "rounds": len(values),
            }
            for side, values in seconds.items()
        },
    }
    mine, peer = best(found, "ours"), best(found, "theirs")
    if mine and peer:
        ratios = [b / a for a, b in zip(seconds[mine], seconds[peer], strict=True)]
        whole = statistics.median(seconds[peer]) / statistics.median(seconds[mine])
        found["times_faster"] = round_to(whole)
        found["times_faster_rounds"] = [round_to(min(ratios)), round_to(max(ratios))]
    if cell.target is not None:
        found["target"] = cell.target
    if cell.at_most_s is not None:
        found["at_most_s"] = cell.at_most_s
    if cell.reason:
        found["reason"] = cell.reason
    if cell.flops:
        found["flops"] = cell.flops
    if cell.bytes:
        found["bytes"] = cell.bytes
    return found


def best(found: Mapping[str, Any], whose: str) -> str:
    """The name of a party's faster side; empty where it was not timed."""
    sides = {name: of for name, of in found["sides"].items() if name.split()[0] == whose}
    return min(sides, key=lambda name: sides[name]["median_s"], default="")


def met(found: Mapping[str, Any]) -> bool | None:
    """Whether a cell reaches its target; None where it has none, or no peer was timed."""
    if "at_most_s" in found:
        return found["sides"][best(found, "ours")]["median_s"] <= found["at_most_s"]
    if "target" in found and "times_faster" in found:
        return found["times_faster"] >= found["target"]
    return None


def shares(cells: Mapping[str, Any], limits: Mapping[str, float]) -> None:
    """Write beside every cell what part of the measured limits our better side reached.

    `limits` comes from `benchmarks.roofline`: `float32_flops`, `bfloat16_flops`, `bytes`, each a
    second.
    """
    for found in cells.values():
        side = best(found, "ours")
        if not side:
            continue
        dtype = side.split()[-1] if side.split()[-1] in DTYPES else "float32"
        seconds = found["sides"][side]["median_s"]
        moved = found.get("bytes", 0.0)
        moved = moved.get(dtype, 0.0) if isinstance(moved, dict) else moved
        compute = found.get("flops", 0.0) / limits[f"{dtype}_flops"]
        memory = moved / limits["bytes"]
        if compute or memory:
            found["bound_by"] = "matrix rate" if compute >= memory else "memory rate"
            found["share_of_limit"] = round_to(max(compute, memory) / seconds)


def line(name: str, found: Mapping[str, Any]) -> str:
    rates = ", ".join(f"{side} {of['per_second']:g}" for side, of in found["sides"].items())
    ratio = f"; {found['times_faster']:.2f} times" if "times_faster" in found else ""
    return f"{name}: {rates} {found['unit']}/s{ratio}"


def show(title: str, cells: Mapping[str, Any]) -> None:
    """A table of a run: rates with their spread, ratio, target, share of the limit."""
    table = Table(title=title)
    for column in ("", "side", "per second", "median s", "spread s", "times", "target", "limit"):
        table.add_column(column, justify="left" if column in ("", "side") else "right")
    for name, found in cells.items():
        mine = best(found, "ours")
        for index, (side, of) in enumerate(found["sides"].items()):
            last = [""] * 3
            if side == mine:
                ratio, share = found.get("times_faster"), found.get("share_of_limit")
                wanted, most = found.get("target"), found.get("at_most_s")
                last = [
                    "" if ratio is None else f"{ratio:.2f}",
                    f"{most:g} s" if most else "" if wanted is None else f"{wanted:g}",
                    "" if share is None else f"{share:.0%} of {found['bound_by']}",
                ]
            rate = f"{of['per_second']:.4g} {found['unit']}"
            spread = f"{of['low_s']:.3g} to {of['high_s']:.3g}"
            table.add_row("" if index else name, side, rate, f"{of['median_s']:.4g}", spread, *last)
    Console().print(table)


def round_to(value: float, digits: int = 4) -> float:
    """A figure with its significant digits."""
    if not value or not math.isfinite(value):
        return value
    return round(value, digits - 1 - math.floor(math.log10(abs(value))))


def relative_error(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of two lists of numbers that stand for outputs: root mean square over that of theirs."""
    difference = math.sqrt(sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)))
    return difference / math.sqrt(sum(b * b for b in theirs))


def expect_close(
    cell: Cell, results: Mapping[str, dict[str, Any]], *, float32: float, bfloat16: float
) -> None:
    """RuntimeError where `sample`, the numbers that stand for an output, differ from torch's.

    The float32 of the peer is the reference where it was run.
    """
    reference = next(
        (results[side] for side in ("theirs float32", "theirs bfloat16") if side in results), None
    )
    if reference is None:
        return
    for side, result in results.items():
        allowed = bfloat16 if "bfloat16" in side or "theirs float32" not in results else float32
        error = relative_error(result["sample"], reference["sample"])
        if not error <= allowed:
            raise RuntimeError(
                f"{cell.name}: {side} differs by {error:.2g} of the reference, over {allowed:g}; "
                "its time means nothing"
            )

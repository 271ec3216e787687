"""Conversion at full size: time against a plain copy of the bytes, peak memory, and every bit.

A random checkpoint goes from the original layout to native, and from there to both published
layouts. The peer is a plain copy: the source's bytes read once, and as many bytes written once as
the conversion writes, on the same disk, brought to it before the clock stops. Copy and conversion
take turns; the files about to be read are dropped from the page cache before each of the two. We
want to take at most 1.5 times as long as the copy, that is to be at least 0.67 times as fast. Every
bit of the first conversion is compared.
"""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from benchmarks.common import Ran, run, save
from benchmarks.disk import drop_cached, plain_read, plain_write, tree_bytes
from benchmarks.harness import Cell, Dtype, show, summed_up
from mis_jax.checkpoint import nnx_state
from mis_jax.checkpoint.load import open_checkpoint
from mis_jax.checkpoint.parameter_source import PIECE, layers_of
from mis_jax.checkpoint.safetensors_reader import TensorFile

PEAK_GIB = 3.0  # what no conversion may exceed
SLOWEST = 1.5  # times a plain copy
_ROOT = Path(__file__).parents[1]
Layout = Literal["native", "hf", "internvl"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Exit code 1 when a bit differs or memory goes beyond the bound; time is only reported.

    Example: python -m benchmarks convert internvl2_5-8b --work /data/scratch"""

    model: Annotated[str, tyro.conf.Positional] = "internvl2_5-1b"
    """A name of the family."""
    work: Path | None = None
    """Folder with room for three copies of the checkpoint; a temporary one without it."""
    dtype: Dtype = "bfloat16"
    """Of the native checkpoint and of what is made from it."""
    layers: int | None = None
    """Layers of the language model, to cut a large one."""
    vision_layers: int | None = None
    """Layers of the vision tower."""
    rounds: int = 3
    """Turns of copy and conversion."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    work = Path(tempfile.mkdtemp(prefix="mis_jax_convert.", dir=settings.work))
    try:
        results = measure(settings, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    tell(results)
    if settings.save:
        cut = f"-{settings.layers}layers" if settings.layers else ""
        print(f"wrote {save(f'convert-{settings.model}{cut}-{settings.dtype}', results)}")
    if not results["bits_identical"] or results["peak_gib"] > PEAK_GIB:
        sys.exit(1)


def measure(settings: Settings, work: Path) -> dict[str, Any]:
    """All conversions of one model, and whether every bit arrived."""
    source = work / "source"
    make = [sys.executable, str(_ROOT / "tools" / "make_random_checkpoint.py"), settings.model]
    make += [str(source), "--format", "internvl", "--dtype", "bfloat16"]
    for option, value in (("layers", settings.layers), ("vision-layers", settings.vision_layers)):
        make += [f"--{option}", str(value)] if value else []
    run(make)
    wrong: list[str] = []
    figures: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    steps: tuple[tuple[Path, Layout], ...] = (
        (source, "native"),
        (work / "native", "hf"),
        (work / "native", "internvl"),
    )
    for read, layout in steps:
        name = f"{'native' if read != source else 'internvl'} -> {layout}"
        made = work / layout
        ran = [convert(read, made, layout, settings.dtype)]
        written = tree_bytes(made)
        wrong += differences(source, made, settings.dtype)
        if layout == "internvl" and settings.dtype == "bfloat16":
            wrong += key_differences(source, made)
        copies = []
        for number in range(settings.rounds):
            copies.append(plain_copy(read, work / "plain", written))
            if number:
                shutil.rmtree(made)
                ran.append(convert(read, made, layout, settings.dtype))
        if layout != "native":
            shutil.rmtree(made)
        cell = Cell(name, work=round(written / 1e9, 3), unit="GB", target=round(1 / SLOWEST, 3))
        seconds = {"ours": [one.seconds for one in ran], "theirs plain copy": copies}
        cells[name] = summed_up(cell, seconds)
        figures[name] = {
            "cpu_seconds": round(max(one.cpu_seconds for one in ran), 2),
            "peak_gib": round(max(one.peak_gib for one in ran), 2),
            "written_gb": cell.work,
        }
    return {
        "benchmark": "convert",
        "model": settings.model,
        "layers": settings.layers,
        "vision_layers": settings.vision_layers,
        "dtype": settings.dtype,
        "source_gb": round(tree_bytes(source) / 1e9, 3),
        "cells": cells,
        "steps": figures,
        "peak_gib": max(step["peak_gib"] for step in figures.values()),
        "bits_identical": not wrong,
        "different": wrong[:20],
    }


def plain_copy(source: Path, destination: Path, size: int) -> float:
    """Seconds to read a folder's bytes and to write `size` bytes, nothing else."""
    drop_cached(source)
    return plain_read(source) + plain_write(source, destination, size)


def convert(source: Path, destination: Path, layout: Layout, dtype: Dtype) -> Ran:
    """One conversion by the command line."""
    drop_cached(source)
    command = [str(Path(sys.executable).parent / "mis-jax"), "convert"]
    command += [str(source), str(destination), "--format", layout, "--dtype", dtype]
    return run(command)


def differences(source: Path, other: Path, dtype: Dtype) -> list[str]:
    """Parameters whose bits differ; a wider dtype must hold the same values."""
    a, b = open_checkpoint(source), open_checkpoint(other)
    wrong = []
    for name, shape in nnx_state.shapes(a.config).items():
        for layer in layers_of(name, shape):
            rows = shape[0] if layer is None else shape[1]
            step = max(1, PIECE // (4 * int(np.prod(shape[1 if layer is None else 2 :]))))
            for start in range(0, rows, step):
                cut = slice(start, min(start + step, rows))
                x, y = a.weights.read(name, layer, cut), b.weights.read(name, layer, cut)
                if x.dtype != y.dtype:
                    x = x.astype(np.float32)
                if not np.array_equal(x.view(f"u{x.itemsize}"), y.view(f"u{y.itemsize}")):
                    wrong.append(f"{other.name}: {name}, layer {layer}")
    return wrong


def key_differences(source: Path, other: Path) -> list[str]:
    """Tensors of the same layout whose bytes on disk differ, without any of our tables."""

    def tensors(folder: Path) -> dict[str, tuple[TensorFile, str]]:
        files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
        return {key: (file, key) for file in files for key in file.entries}

    a, b = tensors(source), tensors(other)
    wrong = [f"{other.name}: {key} in one of the two" for key in a.keys() ^ b.keys()]
    for key in a.keys() & b.keys():
        x, y = (file.tensor(name) for file, name in (a[key], b[key]))
        if x.shape != y.shape or not np.array_equal(x.view(np.uint16), y.view(np.uint16)):
            wrong.append(f"{other.name}: {key}")
    return wrong


def tell(results: dict[str, Any]) -> None:
    """The figures as a table, memory and bits below."""
    show(f"{results['model']}, {results['source_gb']} GB, {results['dtype']}", results["cells"])
    for name, step in results["steps"].items():
        print(f"{name}: {step['cpu_seconds']} s of processors, peak {step['peak_gib']} GiB")
    verdict = "every bit identical" if results["bits_identical"] else "BITS DIFFER"
    print(f"{verdict}, peak {results['peak_gib']} GiB (at most {PEAK_GIB})")
    print(*results["different"], sep="\n", end="", flush=True)


if __name__ == "__main__":
    main()

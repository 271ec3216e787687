"""Conversion at full size: time against a plain copy of the bytes, peak memory, and every bit.

A random checkpoint goes from the original layout to native, and from there to both published
layouts. Before each conversion the same bytes are read once and written once, plainly, on the same
disk; the files about to be read are dropped from the page cache before each of the two.
"""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import Ran, run, save
from benchmarks.disk import drop_cached, plain_read, plain_write, tree_bytes
from mis_jax.weights import parameters
from mis_jax.weights.checkpoint import open_checkpoint
from mis_jax.weights.stream import PIECE, layers_of
from mis_jax.weights.tensor_file import TensorFile

PEAK_GIB = 3.0  # what no conversion may exceed
_ROOT = Path(__file__).parents[1]
Dtype = Literal["bfloat16", "float32"]


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
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    work = Path(tempfile.mkdtemp(prefix="mis_jax_convert.", dir=settings.work))
    try:
        results = measure(settings, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    show(results)
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
    steps = {"internvl -> native": convert(source, work / "native", "native", settings.dtype)}
    wrong = differences(source, work / "native", settings.dtype)
    for layout in ("hf", "internvl"):
        name = f"native -> {layout}"
        steps[name] = convert(work / "native", work / layout, layout, settings.dtype)
        wrong += differences(source, work / layout, settings.dtype)
        if layout == "internvl" and settings.dtype == "bfloat16":
            wrong += key_differences(source, work / layout)
        shutil.rmtree(work / layout)
    return {
        "benchmark": "convert",
        "model": settings.model,
        "layers": settings.layers,
        "vision_layers": settings.vision_layers,
        "dtype": settings.dtype,
        "source_gb": round(tree_bytes(source) / 1e9, 3),
        "steps": steps,
        "peak_gib": max(step["peak_gib"] for step in steps.values()),
        "largest_ratio": max(step["ratio"] for step in steps.values()),
        "bits_identical": not wrong,
        "different": wrong[:20],
    }


def convert(source: Path, destination: Path, layout: str, dtype: Dtype) -> dict[str, Any]:
    """One conversion by the command line, after the plain read and the plain write."""
    drop_cached(source)
    read = plain_read(source)
    scale = 2 if dtype == "float32" and tree_dtype(source) == "bfloat16" else 1
    written_bytes = scale * tree_bytes(source)
    write = plain_write(source, destination.with_suffix(".plain"), written_bytes)
    drop_cached(source)
    command = [
        str(Path(sys.executable).parent / "mis-jax"),
        "convert",
        str(source),
        str(destination),
    ]
    command += ["--format", layout, "--dtype", dtype]
    ran: Ran = run(command)
    return {
        "seconds": round(ran.seconds, 2),
        "cpu_seconds": round(ran.cpu_seconds, 2),
        "plain_read_seconds": round(read, 2),
        "plain_write_seconds": round(write, 2),
        "ratio": round(ran.seconds / (read + write), 3),
        "peak_gib": round(ran.peak_gib, 2),
        "written_gb": round(tree_bytes(destination) / 1e9, 3),
    }


def tree_dtype(folder: Path) -> str:
    """Dtype of a checkpoint's values."""
    return open_checkpoint(folder).dtype


def differences(source: Path, other: Path, dtype: Dtype) -> list[str]:
    """Parameters whose bits differ; a wider dtype must hold the same values."""
    a, b = open_checkpoint(source), open_checkpoint(other)
    wrong = []
    for name, shape in parameters.shapes(a.config).items():
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


def show(results: dict[str, Any]) -> None:
    """The figures as a table."""
    title = f"{results['model']}, {results['source_gb']} GB, {results['dtype']}"
    table = Table("conversion", "seconds", "plain read + write", "ratio", "peak GiB", title=title)
    for name, step in results["steps"].items():
        plain = f"{step['plain_read_seconds']} + {step['plain_write_seconds']}"
        row = (step["seconds"], plain, step["ratio"], step["peak_gib"])
        table.add_row(name, *map(str, row))
    console = Console()
    console.print(table)
    verdict = "every bit identical" if results["bits_identical"] else "BITS DIFFER"
    console.print(f"{verdict}, peak {results['peak_gib']} GiB (at most {PEAK_GIB})")
    for line in results["different"]:
        console.print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()

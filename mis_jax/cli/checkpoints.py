"""Verbs over checkpoint folders: convert, inspect, verify."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from mis_jax.cli.common import AutoDtype, Failed, console, err_console, print_json
from mis_jax.terminal import bytes_bar, steps_bar

Format = Literal["native", "hf", "internvl"]


def convert(
    src: Annotated[Positional[Path], arg(metavar="SRC")],
    dst: Annotated[Positional[Path], arg(metavar="DST")],
    *,
    format: Format,
    dtype: AutoDtype = None,
    shard_size: str = "5GB",
    adapter: Path | None = None,
    allow_nan: bool = False,
    check_digests: bool = True,
) -> None:
    """Convert a checkpoint to another layout. Run the same command again to resume.

    Example: mis-jax convert InternVL2_5-8B internvl-8b --format native --dtype bfloat16

    The folder is named DST.incomplete until the conversion is complete.

    Args:
        src: Checkpoint folder (any of the three layouts), or OUT/checkpoints/STEP of a run.
        dst: Output folder; it must not exist yet.
        format: Output layout: native (mis_jax), hf (transformers) or internvl (internvl_chat).
        dtype: Data type of the output weights; auto: the source's.
        shard_size: Maximum size of each safetensors file, such as 5GB or 500MB.
        adapter: Folder of a LoRA adapter in PEFT format to merge into the weights.
        allow_nan: Convert tensors that contain NaN or infinity instead of failing.
        check_digests: Verify the weights against their stored SHA-256 digests, if present.
    """
    from mis_jax.checkpoint import convert
    from mis_jax.checkpoint.load import open_checkpoint

    shard_bytes = _bytes(shard_size)
    opened = open_checkpoint(src, adapter, check_digests=check_digests)
    with bytes_bar(err_console) as bar:
        convert.convert(
            opened,
            dst,
            format,
            dtype=dtype,
            shard_bytes=shard_bytes,
            allow_nonfinite=allow_nan,
            progress=bar.task("converting"),
        )
    console.print(f"wrote {dst} ({format}, {dtype or opened.dtype})")


def inspect(
    src: Annotated[Positional[Path], arg(metavar="SRC")],
    *,
    check_digests: bool = True,
    json: bool = False,
) -> None:
    """Show what a checkpoint contains and list its problems. Exit code 1 if there are any.

    Example: mis-jax inspect InternVL2_5-8B

    Native checkpoints, and those of a run such as OUT/checkpoints/200, are verified against the
    digests of their files.

    Args:
        src: Checkpoint folder (any of the three layouts), or OUT/checkpoints/STEP of a run.
        check_digests: Verify every file that has a digest; otherwise only headers are read.
        json: Print the result as JSON.
    """
    from mis_jax.checkpoint.inspect import inspect_checkpoint

    found = inspect_checkpoint(src, check_digests=check_digests)
    if json:
        print_json(found)
    else:
        for key, value in found.items():
            if key != "problems":
                console.print(f"{key:>20}  {value}", highlight=False)
        for problem in found["problems"]:
            console.print(f"[red]problem[/]  {problem}", highlight=False)
    if found["problems"]:
        raise Failed(f"{src}: {len(found['problems'])} problem(s)")


def verify(
    a: Annotated[Positional[Path], arg(metavar="A")],
    b: Annotated[Positional[Path], arg(metavar="B")],
    *,
    dtype: AutoDtype = None,
    layers: bool = False,
    min_overlap: float = 0.99,
    max_kl: float = 1e-3,
    max_difference: float | None = None,
    max_relative: float = 1e-2,
    json: bool = False,
) -> None:
    """Compare the logits of two checkpoints on fixed prompts. Exit code 1 past a threshold.

    Example: mis-jax verify InternVL2_5-8B internvl-8b

    Runs in float32 with one layer of each model in memory, so that any size can be compared.

    Args:
        a: Reference checkpoint.
        b: Checkpoint to compare with the reference.
        dtype: Cast the weights of both to this data type first; auto: as stored.
        layers: Show the difference after every layer and name the first that differs.
        min_overlap: Minimum overlap of the five most likely tokens of both models.
        max_kl: Maximum mean KL divergence of the next-token distributions, in nats.
        max_difference: Maximum absolute difference of two logits; if unset, not checked.
        max_relative: A layer differs when the norm of the difference exceeds this share of the
            layer's norm.
        json: Print the result as JSON.
    """
    from mis_jax.checkpoint.hf.config import read_config
    from mis_jax.checkpoint.trained_model import model_files
    from mis_jax.checkpoint.verify import Thresholds, verify_checkpoints
    from mis_jax.data.processor import Processor
    from mis_jax.probe_prompts import probe_batches

    files = model_files(a)
    processor = Processor.from_folder(files, read_config(files)[0])
    thresholds = Thresholds(min_overlap, max_kl, max_difference)
    with steps_bar(err_console) as bar:
        result = verify_checkpoints(
            a, b, probe_batches(processor), thresholds, dtype=dtype, progress=bar.task("layers")
        )
    first = result.first_beyond(max_relative)
    if json:
        print_json(dataclasses.asdict(result) | {"first_layer_that_differs": first and first.name})
    else:
        found = result.comparison
        if layers:
            console.print(_layer_table(result.layers, first))
            console.print(f"first that differs: {first.name if first else 'none'}")
        console.print(f"top-k overlap {found.top_k_overlap:.4f}, mean KL {found.kl:.2e} nats,")
        console.print(
            f"largest difference {found.max_difference:.2e} over {found.positions} positions"
        )
    if not result.passed:
        where = f"; the first layer that differs is {first.name}" if first else ""
        raise Failed(f"{b} does not compute what {a} computes: {'; '.join(result.reasons)}{where}")
    if not json:
        console.print(f"the same within the thresholds: {b} computes what {a} computes")


def _layer_table(layers: Sequence[Any], first: Any) -> Table:
    table = Table("after", "largest difference", "relative")
    for layer in layers:
        row = (layer.name, f"{layer.max_difference:.2e}", f"{layer.relative:.2e}")
        table.add_row(*row, style="red" if layer is first else None)
    return table


def _bytes(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMG]i?B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(
            f"--shard-size {text!r}: write a number with KB, MB, GB, KiB, MiB or GiB, such as 5GB"
        )
    return int(float(match[1]) * units[match[2].upper()])

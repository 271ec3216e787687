"""The verb that plans: what a run needs on hardware that is not here."""

from pathlib import Path
from typing import Annotated, Any, get_args

from rich.table import Table
from tyro.conf import Positional, Suppress, arg

from mis_jax.cli.common import Failed, console, err_console, print_json
from mis_jax.cli.options import run_config
from mis_jax.terminal import steps_bar


def plan(
    config: Annotated[Positional[Path], arg(metavar="CONFIG")],
    *,
    topology: str,
    steps: str = "train",
    length: int | None = None,
    tiles: int | None = None,
    json: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Estimate a run's memory, communication and step time on hardware you don't have.

    Example: mis-jax plan configs/hardware/mirage_8b_v5e_16.yaml --topology v5e:4x4

    Compiles the run's own steps ahead of time for the given TPU or GPU topology. Exit code 1 when
    a step does not fit. Options of `mis-jax train`, such as --mesh.fsdp 8, override CONFIG.

    Args:
        config: YAML configuration file of a run; its model may be a published name, such as
            internvl2_5-8b.
        topology: Hardware to compile for: chip and size, such as v5e:4x4, v5p:2x2x4 or h100:8, or
            an accelerator type, such as v5litepod-16.
        steps: Comma-separated list of the kinds of step to compile: train, prefill, decode. The
            number of optimizer steps is --train.steps.
        length: Number of tokens per sequence; if unset, data.max_length.
        tiles: Number of image tiles per sequence; if unset, the maximum the data settings allow.
        json: Print the result as JSON.
    """
    from mis_jax.plan import Step
    from mis_jax.plan import plan as run

    names: Any = tuple(dict.fromkeys(name.strip() for name in steps.split(",")))
    if wrong := [name for name in names if name not in get_args(Step)]:
        raise ValueError(f"--steps: '{wrong[0]}' is not a step; give train, prefill or decode")
    for option, number in (("--length", length), ("--tiles", tiles)):
        if number is not None and number < 1:
            raise ValueError(f"{option} is {number}; give at least 1")
    planned = run_config(config, overrides, "plan")
    with steps_bar(err_console) as bar:
        bar.task(f"compiling for {topology}")
        made = run(planned, topology, length=length, tiles=tiles, steps=names)
    if json:
        print_json(made.as_json())
    else:
        _show(made)
    if not made.fits:
        raise Failed(_too_large(made))


def _show(made: Any) -> None:
    console.print(f"{made.model} on {made.topology.name}: {made.chips} chip(s)", highlight=False)
    for step in made.steps:
        _show_step(made, step)
    if made.fits:
        console.print("assumed: " + "; ".join(made.assumptions), highlight=False)
    else:
        console.print("to make it fit:", highlight=False)
        for tip in made.advice:
            console.print(f"  {tip}", highlight=False, markup=False)


def _show_step(made: Any, step: Any) -> None:
    from mis_jax.flops import GIB
    from mis_jax.plan.collectives import sums

    table = Table(title=f"{step.name}: {_shape_words(step)}", title_justify="left", box=None)
    for name in ("what", "figure", ""):
        table.add_column(name, justify="right" if name == "figure" else "left", header_style="dim")
    memory = step.memory
    kinds = ("arguments", "temporaries", "output", "code", "total", "limit", "left")
    for kind in kinds:
        size = getattr(memory, kind)
        colour = "red" if kind == "left" and size < 0 else ""
        figure = f"{size / GIB:.2f}"
        table.add_row(
            f"memory, {kind}", f"[{colour}]{figure}[/]" if colour else figure, "GiB a device"
        )
    if memory.host:
        table.add_row("memory of the host", f"{memory.host / GIB:.2f}", "GiB a device")
    for kind, total in sums(step.collectives or []).items():
        table.add_row(kind, f"{total.bytes / 1e9:.2f}", f"GB in {total.count} a step")
    table.add_row(
        "model FLOPs", f"{step.operations / 1e12:.4g}",
        f"TFLOP by formula, every position with logits ({step.noncausal / 1e12:.4g} non-causal)",
    )  # fmt: skip
    if step.time:
        time = step.time
        table.add_row(
            "step", f"{time.step:.3g}",
            f"s at best, bound by {time.bound} (products {time.compute:.3g}, memory "
            f"{time.memory:.3g}, collectives {time.collectives:.3g})",
        )  # fmt: skip
        table.add_row("tokens", f"{step.tokens / time.step:,.0f}", "a second, padding included")
        table.add_row("sequences", f"{step.sequences / time.step:.2f}", "a second")
    table.add_row("compiling", f"{step.seconds:.0f}", "s")
    console.print(table)


def _shape_words(step: Any) -> str:
    shape = step.shape
    if step.name == "train":
        return (
            f"{shape.sequences} sequences of {shape.length} tokens and {shape.tiles} tiles, "
            f"{shape.micro_sequences} at a time ({shape.why})"
        )
    read = f"read {shape.groups} x {shape.chunk} at a time"
    return (
        f"{shape.slots} sequences, prompts of {shape.prompt} tokens {read}, "
        f"{shape.cache_length} tokens of cache each"
    )


def _too_large(made: Any) -> str:
    from mis_jax.flops import GIB

    step = next(step for step in made.steps if not step.memory.fits)
    memory = step.memory
    return (
        f"the {step.name} step does not fit {made.topology.name}: it needs "
        f"{memory.total / GIB:.2f} GiB a device ({memory.arguments / GIB:.2f} of arguments, "
        f"{memory.temporaries / GIB:.2f} of temporaries), {memory.limit / GIB:.2f} are there; try "
        f"{made.advice[0]}"
    )

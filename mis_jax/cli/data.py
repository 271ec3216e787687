"""Verbs over training data: data show, data build."""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from tyro.conf import Positional, Suppress, arg

from mis_jax.cli.common import Failed, console, err_console, print_json
from mis_jax.cli.options import run_config


def data_show(
    config: Annotated[Positional[Path], arg(metavar="CONFIG")],
    *,
    index: int = 0,
    picture: Path | None = None,
    stats: bool = False,
    json: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Show a training sample as the model sees it: prompt, loss mask (green), tiles.

    Example: mis-jax data show configs/mirage_8b.yaml --index 3 --picture tiles.png

    Options of `mis-jax train`, such as --data.max-tiles 4, override CONFIG.

    Args:
        config: YAML configuration file of a run.
        index: Index of the sample, before shuffling.
        picture: Write the tiles to this PNG file, one row per image.
        stats: Show statistics of the whole dataset instead: sizes, how full the batches are, and
            every bad sample.
        json: Print JSON: id, text, input_ids, loss_mask and tiles, or the statistics.
    """
    from mis_jax.checkpoint.hf.config import read_config
    from mis_jax.checkpoint.trained_model import model_files
    from mis_jax.data.preview import show_sample, statistics
    from mis_jax.data.processor import Processor
    from mis_jax.terminal import steps_bar

    run = run_config(config, overrides, "data show")
    files = model_files(run.model)
    processor = Processor.from_folder(files, read_config(files)[0])
    if stats:
        with steps_bar(err_console) as bar:
            found = statistics(run, processor, bar.task("looking at samples"))
        print_json(found) if json else _print_statistics(found, run.data.on_bad_sample)
        return
    shown = show_sample(run, processor, index)
    if json:
        print_json(shown.as_json())
    else:
        example = shown.example
        console.print(shown.as_text())
        console.print(
            f"[dim]id {example.id}; {len(example.input_ids)} tokens, {example.loss_mask.sum()} "
            f"under the loss; tiles per image {list(example.tiles_per_image)}[/]"
        )
    if picture is not None:
        shown.contact_sheet().save(picture)


def _print_statistics(found: dict[str, Any], on_bad_sample: str) -> None:
    table = Table("", "mean", "5 %", "median", "95 %", "largest", "in all")
    for name in ("tokens", "answer_tokens", "tiles"):
        spread = found[name]
        keys = ("mean", "p5", "median", "p95", "max", "total")
        table.add_row(name.replace("_", " "), *(f"{spread[key]:,}" for key in keys))
    console.print(table)
    for source in found["sources"]:
        console.print(
            f"{source['used']:>8,} of {source['available']:,} samples from {source['file']}",
            highlight=False,
        )
    cut, fill = found["truncated"], found["fill"]
    console.print(f"{found['steps']:,} steps of {found['rows']:,} rows in all, ", end="")
    console.print(f"{found['samples_per_row']} samples a row, ", end="")
    console.print(
        "filled: " + ", ".join(f"{100 * v:.1f} % of {k}" for k, v in fill.items() if v is not None)
    )
    for shape in found["shapes"]:
        console.print(
            "{steps:>8,} steps of rows of {tokens:,} tokens, {tiles} tiles".format(**shape)
        )
    console.print(f"{cut['samples']:,} samples are cut, by {cut['tokens']:,} tokens")
    for problem in found["bad_samples"]:
        console.print(f"[red]bad sample[/]  {problem}", highlight=False)
    if bad := len(found["bad_samples"]):
        done = "leaves them out" if on_bad_sample == "skip" else "stops at them"
        console.print(
            f"{bad:,} of {found['samples']:,} samples are bad, and not counted above; "
            f"`mis-jax train` {done} (data.on_bad_sample: {on_bad_sample})"
        )


def data_build(
    *,
    mis_root: Path,
    out: Path,
    on_bad_sample: Literal["stop", "skip"] = "stop",
    workers: int | None = None,
    json: bool = False,
) -> None:
    """Check the published MIS files and build a TensorFlow Datasets dataset from them.

    Example: mis-jax data build --mis-root data/mis --out data/mis-built

    Every image is decoded first; the output folder appears complete or not at all.

    Args:
        mis_root: Folder with mis_train.json, mis_easy.json and so on, and their images.
        out: Output folder; it must not exist yet.
        on_bad_sample: stop fails and lists bad samples in OUT.bad_samples.jsonl; skip leaves them
            out.
        workers: Number of processes that decode images; if unset, one per CPU.
        json: Print the report as JSON.
    """
    import dataclasses

    from mis_jax.data.mis.annotations import VERSION
    from mis_jax.data.mis.dataset import BAD_SAMPLES, NAME, build
    from mis_jax.data.mis.verify_images import WorkersDied
    from mis_jax.terminal import steps_bar

    with steps_bar(err_console) as bar:
        try:
            report = build(
                mis_root,
                out,
                on_bad_sample=on_bad_sample,
                workers=workers,
                progress=bar.task("check and store"),
            )
        except WorkersDied as error:
            raise Failed(str(error)) from error
    if json:
        print_json(dataclasses.asdict(report) | {"out": str(report.out)})
        return
    lines = [f"{count:>8,} samples of {split}" for split, count in report.splits.items()]
    if report.missing:
        lines.append(f"not there: {', '.join(f'mis_{split}.json' for split in report.missing)}")
    lines += [f"note: {note}" for note in report.size_notes]
    if report.bad:
        listed = report.out / NAME / VERSION / BAD_SAMPLES
        lines.append(f"left out {len(report.bad)} bad sample(s), listed in {listed}")
    for line in [*lines, f"wrote {report.out}"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

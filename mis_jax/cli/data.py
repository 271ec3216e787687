"""Verbs over training data: data show."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from mis_jax.cli.common import console, print_json


def data_show(
    config: Annotated[Positional[Path], arg(metavar="CONFIG")],
    *,
    index: int = 0,
    picture: Path | None = None,
    json: bool = False,
) -> None:
    """What the model sees of a training sample: prompt, loss mask (green), tiles.

    Example: mis-jax data show configs/mirage.yaml --index 3 --picture tiles.png

    Args:
        config: YAML file of a run.
        index: Number of the sample, before shuffling.
        picture: Write the tiles to this PNG file, an image a line.
        json: Print id, text, input_ids, loss_mask and tiles as JSON.
    """
    from mis_jax.config import load_config
    from mis_jax.data.processor import Processor
    from mis_jax.data.show import show_sample
    from mis_jax.weights.config_json import read_config

    run = load_config(config)
    processor = Processor.from_folder(run.model, read_config(run.model)[0])
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

"""The batch that a plan is made for: the largest one that the configuration allows."""

from dataclasses import dataclass

from mis_jax.config import DataConfig, RunConfig
from mis_jax.data.collate import tiles_bucket
from mis_jax.data.tiling import tiles_for_images
from mis_jax.model.config import InternVLConfig

IMAGES = 2  # of a sample, as in MIS
QUESTION_TOKENS = 150  # with its template, beside the image tokens
TEXT_TOKENS = 600  # of a training sample: question, template and a label like MIRage's


@dataclass(frozen=True)
class Shape:
    """Sequences of a step, and what each holds; `why` says where the sizes come from."""

    sequences: int
    length: int
    tiles: int
    micro_sequences: int  # of one forward pass
    why: str

    @property
    def passes(self) -> int:
        return self.sequences // self.micro_sequences


def training_shape(
    config: RunConfig, model: InternVLConfig, length: int | None, tiles: int | None
) -> Shape:
    """Sequences of `data.max_length`, or of `length`, with the tiles that they may hold."""
    data = config.data
    given = length or data.max_length
    if tiles is not None:
        why = f"{tiles} tiles a sequence as asked"
    elif data.pack_tiles:
        tiles, why = data.pack_tiles, "packed sequences with data.pack_tiles"
    elif data.packing:
        sample = sample_tiles(data, model)
        tokens = sample * model.tokens_per_tile + TEXT_TOKENS
        tiles = max(given * sample // tokens, sample)
        why = f"packed sequences full of samples of {sample} tiles and {TEXT_TOKENS} tokens of text"
    else:
        sample = sample_tiles(data, model)
        tiles = tiles_bucket(sample)
        why = f"the largest batch: {IMAGES} images share {data.max_tiles} tiles, {sample} in all"
    sequences = config.train.global_batch
    return Shape(sequences, given, tiles, config.train.micro_batch or sequences, why)


def sample_tiles(data: DataConfig, model: InternVLConfig) -> int:
    """Most tiles of a sample of two images, thumbnails included."""
    budgets = {source.max_tiles or data.max_tiles for source in data.sources}
    each = max(tiles_for_images(IMAGES, budget) for budget in budgets)
    return IMAGES * (each + int(model.use_thumbnail and each > 1))

"""Conversations and images -> `Batch`: what a user calls before the model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mis_jax.data.chat_template import Rendered, insert_image_markers, render
from mis_jax.data.collate import Example, LossReduction, collate
from mis_jax.data.images import ImageSource, open_image
from mis_jax.data.tiling import count_tiles, tile_image, tiles_for_images
from mis_jax.model.batch import Batch
from mis_jax.model.config import InternVLConfig
from mis_jax.tokenizer.tokenizer import Tokenizer, load_tokenizer

Message = dict[str, Any]
ImageLike = Image.Image | str | Path


class Processor:
    """Tokenizer, template and tiling of one checkpoint.

    Keywords of a call: `system` is "default" (the checkpoint's own), "none" or a text;
    `max_tiles` is the budget of a conversation, divided over its images as upstream does;
    `max_tiles_per_image` gives every image that many instead; `train` fills loss weights.
    """

    def __init__(self, config: InternVLConfig, tokenizer: Tokenizer):
        if config.template != "internvl2_5":
            raise ValueError(
                f"config.json: field 'template' is {config.template!r}; supported: 'internvl2_5'"
            )
        self.config = config
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, folder: Path, config: InternVLConfig) -> "Processor":
        tokenizer = load_tokenizer(folder)
        if tokenizer.img_context_id != config.image_token_id:
            raise ValueError(
                f"{folder}: <IMG_CONTEXT> is {tokenizer.img_context_id} in the tokenizer and "
                f"{config.image_token_id} in config.json; they are of different checkpoints"
            )
        tokenizer.check_fits(config.text.vocab_size)
        return cls(config, tokenizer)

    def __call__(
        self,
        conversations: Sequence[Sequence[Message]],
        images: Sequence[Sequence[ImageLike]] | None = None,
        *,
        system: str = "default",
        max_tiles: int | None = None,
        max_tiles_per_image: int | None = None,
        add_generation_prompt: bool = True,
        train: bool = False,
        reduction: LossReduction = "token",
        pad_to: int = 16,
    ) -> Batch:
        """One row a conversation, right-padded to a multiple of `pad_to` tokens."""
        if not conversations:
            raise ValueError("no conversation given; a batch has at least one row")
        if images is None:
            images = [()] * len(conversations)
        if len(images) != len(conversations):
            raise ValueError(
                f"{len(conversations)} conversations but {len(images)} lists of images; give one "
                "list for each conversation, an empty one where it has no image"
            )
        examples = [
            self.example(
                conversation,
                pictures,
                id=str(row),
                system=system,
                max_tiles=max_tiles,
                max_tiles_per_image=max_tiles_per_image,
                add_generation_prompt=add_generation_prompt and not train,
            )
            for row, (conversation, pictures) in enumerate(zip(conversations, images, strict=True))
        ]
        longest = max(len(example.input_ids) for example in examples)
        batch = self.collate(
            [[example] for example in examples],
            length=-(-longest // pad_to) * pad_to,
            tiles_per_sequence=max(len(example.tiles) for example in examples),
            reduction=reduction,
        )
        return batch if train else _without_loss(batch)

    def example(
        self,
        conversation: Sequence[Message],
        images: Sequence[ImageLike] = (),
        *,
        id: str = "0",
        system: str = "default",
        max_tiles: int | None = None,
        max_tiles_per_image: int | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Example:
        """Tokens, loss mask and tiles of one conversation."""
        budget = self.budget(len(images), max_tiles, max_tiles_per_image)
        tiles = [self.tiles(image, budget) for image in images]
        rendered = self.render(
            conversation,
            [len(t) for t in tiles],
            system=system,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        return self.joined(id, rendered, tiles)

    def budget(
        self, images: int, max_tiles: int | None = None, max_tiles_per_image: int | None = None
    ) -> int:
        """Largest grid of each image of a conversation, in tiles; a thumbnail comes on top."""
        for name, value in (("max_tiles", max_tiles), ("max_tiles_per_image", max_tiles_per_image)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give at least 1 or leave it out")
        if not self.config.dynamic_tiles or not images:
            return 1
        return max_tiles_per_image or tiles_for_images(images, max_tiles or self.config.max_tiles)

    def tiles(self, image: ImageSource, budget: int) -> UInt8[np.ndarray, "tiles size size 3"]:
        """An image's tiles; ValueError when it cannot be opened."""
        return tile_image(open_image(image), **self._grid(budget))

    def tile_count(self, size: tuple[int, int], budget: int) -> int:
        """How many tiles an image of this width and height has."""
        return count_tiles(*size, **self._grid(budget))

    def _grid(self, budget: int) -> dict[str, Any]:
        """How tiles are cut; one tile where the budget is below `min_tiles`, as upstream."""
        config = self.config
        least, most = (config.min_tiles, budget) if config.min_tiles <= budget else (1, 1)
        return dict(
            min_tiles=least,
            max_tiles=most,
            image_size=config.vision.image_size,
            use_thumbnail=config.use_thumbnail,
        )

    def render(
        self,
        conversation: Sequence[Message],
        tiles_per_image: Sequence[int],
        *,
        system: str = "default",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> Rendered:
        """Tokens and loss mask of a conversation whose images have so many tiles."""
        if system == "default" and self.config.system_message:
            system = self.config.system_message
        return render(
            insert_image_markers(conversation, len(tiles_per_image)),
            self.tokenizer,
            tiles_per_image,
            self.config.tokens_per_tile,
            system=system,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )

    def joined(self, id: str, rendered: Rendered, tiles: Sequence[np.ndarray]) -> Example:
        """Tokens and the tiles of each image as one example."""
        size = self.config.vision.image_size
        return Example(
            id=id,
            input_ids=rendered.input_ids,
            loss_mask=rendered.loss_mask,
            tiles=np.concatenate(tiles) if tiles else np.zeros((0, size, size, 3), np.uint8),
            tiles_per_image=tuple(len(t) for t in tiles),
        )

    def collate(
        self,
        rows: Sequence[Sequence[Example]],
        *,
        length: int,
        tiles_per_sequence: int,
        reduction: LossReduction = "token",
        shares: np.ndarray | None = None,
    ) -> Batch:
        """`mis_jax.data.collate.collate` with this checkpoint's tile size and padding."""
        return collate(
            rows,
            length=length,
            tiles_per_sequence=tiles_per_sequence,
            image_size=self.config.vision.image_size,
            pad_id=self.tokenizer.pad_id,
            reduction=reduction,
            shares=shares,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out and surrounding space stripped."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _without_loss(batch: Batch) -> Batch:
    return dataclasses.replace(batch, loss_weights=np.zeros_like(batch.loss_weights))

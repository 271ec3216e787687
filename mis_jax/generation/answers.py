"""Conversations and images in, answers out: the engine in batches, with the processor around it."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mis_jax.data.collate import Example
from mis_jax.data.processor import ImageLike, Message, Processor
from mis_jax.generation.engine import FinishReason, generate_tokens
from mis_jax.generation.sampling import Sampling
from mis_jax.model.internvl import InternVL

# So many batches are sorted by length together; the tiles of two windows are in memory at once.
WINDOW_BATCHES = 2


@dataclass(frozen=True)
class Completion:
    """One answer. `finish_reason` is "stop" or, where the answer was cut, "length"."""

    text: str
    prompt_tokens: int  # image tokens included
    completion_tokens: int  # generated tokens, the stop token included
    finish_reason: FinishReason
    token_ids: tuple[int, ...]  # without the stop token


def answer(
    model: InternVL,
    processor: Processor,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[ImageLike]] | None = None,
    *,
    max_new_tokens: int = 1024,
    sampling: Sampling | None = None,
    system: str = "default",
    max_tiles: int | None = None,
    max_tiles_per_image: int | None = None,
    batch_size: int = 32,
    row_ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Completion]:
    """One completion a conversation, in their order; greedy unless `sampling` says otherwise.

    A sampled answer depends on the seed and the conversation's `row_ids` entry (by default its
    index), not on `batch_size`: calls that ask parts of one set give each part its own ids.
    `progress(done, total)` is called after every batch.
    """
    images = [()] * len(conversations) if images is None else images
    if len(images) != len(conversations):
        raise ValueError(
            f"{len(conversations)} conversations but {len(images)} lists of images; give one list "
            "for each conversation, an empty one where it has no image"
        )
    row_ids = range(len(conversations)) if row_ids is None else row_ids
    if len(row_ids) != len(conversations):
        raise ValueError(f"{len(row_ids)} row_ids for {len(conversations)} conversations")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")

    def example(index: int) -> Example:
        return processor.example(
            conversations[index],
            images[index],
            id=str(index),
            system=system,
            max_tiles=max_tiles,
            max_tiles_per_image=max_tiles_per_image,
        )

    completions: dict[int, Completion] = {}
    for window in _windows(example, len(conversations), batch_size * WINDOW_BATCHES):
        by_length = sorted(window, key=lambda index: -len(window[index].input_ids))
        for first in range(0, len(by_length), batch_size):
            rows = by_length[first : first + batch_size]
            made = _answer_batch(
                model,
                processor,
                [window.pop(index) for index in rows],
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                row_ids=[row_ids[index] for index in rows],
                min_rows=min(batch_size, len(conversations)),
            )
            completions |= zip(rows, made, strict=True)
            if progress is not None:
                progress(len(completions), len(conversations))
    return [completions[index] for index in range(len(conversations))]


def _windows(
    example: Callable[[int], Example], count: int, size: int
) -> Iterator[dict[int, Example]]:
    """Examples by index, `size` at a time; the next window is made while this one is answered.

    One thread makes them: a picture that several conversations share is not safe to open in two.
    """
    pool = ThreadPoolExecutor(1)

    def begin(start: int):
        return {i: pool.submit(example, i) for i in range(start, min(start + size, count))}

    try:
        following = begin(0)
        for start in range(size, count + size, size):
            current, following = following, begin(start)
            yield {index: future.result() for index, future in current.items()}
    finally:
        pool.shutdown(cancel_futures=True)


def _answer_batch(
    model: InternVL,
    processor: Processor,
    examples: list[Example],
    **how: Any,
) -> list[Completion]:
    batch = processor.collate(
        [[example] for example in examples],
        length=max(len(example.input_ids) for example in examples),
        tiles_per_row=max(len(example.tiles) for example in examples),
    )
    made = generate_tokens(
        model,
        batch,
        stop_ids=processor.tokenizer.stop_ids,
        **how,
    )
    return [
        Completion(
            text=processor.decode(tokens),
            prompt_tokens=prompt_tokens,
            completion_tokens=len(tokens) + (reason == "stop"),
            finish_reason=reason,
            token_ids=tuple(tokens),
        )
        for tokens, reason, prompt_tokens in zip(
            made.tokens, made.finish_reason, made.prompt_tokens, strict=True
        )
    ]

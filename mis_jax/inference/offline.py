"""Conversations and images in, answers out: the engine, with the processor around it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax

from mis_jax.data.collate import Example
from mis_jax.data.processor import ImageLike, Message, Processor
from mis_jax.inference import model_runner
from mis_jax.inference.engine import Engine
from mis_jax.inference.requests import FinishReason, Request, RequestOutput, check_stop
from mis_jax.inference.sampling import Sampling
from mis_jax.model.internvl import InternVL
from mis_jax.model.unrolled import unrolled

# So many batches are sorted by length together; the tiles of two windows are in memory at once.
WINDOW_BATCHES = 2
#: A model of at most this width is read several prompts at a time: one prompt is too little work.
SMALL_WIDTH, SMALL_GROUPS = 512, 8


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
    stop: Sequence[str] = (),
    int8_cache: bool = False,
    each: Callable[[int, Completion], None] | None = None,
    failed: Callable[[int, str], None] | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """One completion a conversation, in their order; greedy unless `sampling` says otherwise.

    A conversation that ends with an assistant's message has that message continued; the completion
    is what comes after it.

    A sampled answer depends on the seed and the conversation's `row_ids` entry (by default its
    index), not on `batch_size`: calls that ask parts of one set give each part its own ids.
    `each(index, completion)` is called for every answer as soon as it and all before it are there;
    `progress(done, total, tokens)` after every one. A conversation that cannot be asked (an image
    that is none, a prompt longer than the context) raises ValueError; with `failed(index, why)` it
    is told there and left out of the result, and the others go on.
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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; give at least 1")
    check_stop(stop)  # what is wrong with all is not of one
    processor.budget(1, max_tiles, max_tiles_per_image)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; give at least 1")

    def continued(index: int) -> bool:
        last = conversations[index][-1] if conversations[index] else None
        return isinstance(last, Mapping) and last.get("role") == "assistant"

    def example(index: int) -> Example | ValueError:
        try:
            return processor.example(
                conversations[index],
                images[index],
                id=str(index),
                system=system,
                max_tiles=max_tiles,
                max_tiles_per_image=max_tiles_per_image,
                continue_final_message=continued(index),
            )
        except ValueError as error:
            return error

    rows = min(batch_size, len(conversations))
    engine = batch_engine(model, processor, max_num_seqs=rows, int8_cache=int8_cache)
    completions: dict[int, Completion | None] = {}  # None where it failed
    asked: dict[int, int] = {}  # ticket -> index
    prompts: dict[int, int] = {}
    pieces: dict[int, list[RequestOutput]] = {}
    told, tokens = 0, 0

    def end(index: int, completion: Completion | None) -> None:
        nonlocal told
        completions[index] = completion
        while told in completions:
            if each is not None and (whole := completions[told]) is not None:
                each(told, whole)
            told += 1
        if progress is not None:
            progress(len(completions), len(conversations), tokens)

    def fail(index: int, error: ValueError) -> None:
        if failed is None:
            raise error
        failed(index, str(error))
        end(index, None)

    def work() -> None:
        nonlocal tokens
        for ticket, piece in engine.step():
            pieces.setdefault(ticket, []).append(piece)
            if piece.finish_reason is None:
                continue
            index = asked.pop(ticket)
            tokens += piece.generated
            end(index, _completion(prompts.pop(index), pieces.pop(ticket)))

    for window in _windows(example, len(conversations), batch_size * WINDOW_BATCHES):
        ready = {i: made for i, made in window.items() if isinstance(made, Example)}
        for index, error in window.items():
            if isinstance(error, ValueError):
                fail(index, error)
        window.clear()
        for index in sorted(ready, key=lambda index: -len(ready[index].input_ids)):
            made = ready.pop(index)
            prompts[index] = len(made.input_ids)
            request = Request(
                made,
                max_new_tokens,
                sampling or Sampling(),
                stream=row_ids[index],
                stop=tuple(stop),
                streamed=False,
                continued=continued(index),
            )
            try:
                asked[engine.add(request)] = index
            except ValueError as error:
                fail(index, error)
        while engine.waiting:  # the last of this window go on beside the first of the next
            work()
    while not engine.idle:
        work()
    ended = (completions[index] for index in range(len(conversations)))
    return [completion for completion in ended if completion is not None]


def batch_engine(
    model: InternVL, processor: Processor, *, max_num_seqs: int, int8_cache: bool = False
) -> Engine:
    """An engine for many answers: all rows are filled before the next tokens are made."""
    if jax.default_backend() == "cpu":
        model = unrolled(model)
    small = model.config.text.hidden_size <= SMALL_WIDTH
    return Engine(
        model,
        stop_ids=processor.tokenizer.stop_ids,
        decode=processor.tokenizer.decode,
        max_num_seqs=model_runner.power_of_two(max(max_num_seqs, 1)),
        groups=min(SMALL_GROUPS, model_runner.power_of_two(max(max_num_seqs, 2))) if small else 1,
        int8_cache=int8_cache,
    )


def _completion(prompt_tokens: int, pieces: list[RequestOutput]) -> Completion:
    last = pieces[-1]
    assert last.finish_reason is not None
    return Completion(
        text="".join(piece.text for piece in pieces),
        prompt_tokens=prompt_tokens,
        completion_tokens=last.generated,
        finish_reason=last.finish_reason,
        token_ids=tuple(token.id for piece in pieces for token in piece.tokens),
    )


def _windows(
    example: Callable[[int], Example | ValueError], count: int, size: int
) -> Iterator[dict[int, Example | ValueError]]:
    """Examples, or why there is none, by index, `size` at a time.

    The next window is made while this one is answered. One thread makes them: a picture that
    several conversations share is not safe to open in two.
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

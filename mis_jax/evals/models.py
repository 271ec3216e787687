"""A loaded model as the `answer_fn` of the runner."""

from collections.abc import Sequence

from mis_jax.data.processor import Processor
from mis_jax.evals.pictures import shown_images
from mis_jax.evals.runner import AnswerFn
from mis_jax.evals.types import Answer, Benchmark, Sample
from mis_jax.inference.offline import answer
from mis_jax.model.internvl import InternVL


def answers_of(
    model: InternVL,
    processor: Processor,
    benchmark: Benchmark,
    *,
    rows: int = 32,
    max_new_tokens: int | None = None,
    int8_cache: bool = False,
) -> AnswerFn:
    """Greedy answers under the benchmark's protocol, `rows` at a time.

    `max_new_tokens` is that of the benchmark without it.
    """

    def ask(samples: Sequence[Sample]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        for tiles, indices in _by_tiles(benchmark, samples).items():
            completions = answer(
                model,
                processor,
                [samples[i].conversation for i in indices],
                [shown_images(samples[i]) for i in indices],
                max_new_tokens=max_new_tokens or benchmark.max_new_tokens,
                system=benchmark.system,
                max_tiles_per_image=tiles,
                batch_size=rows,
                int8_cache=int8_cache,
            )
            for i, c in zip(indices, completions, strict=True):
                answers[i] = Answer(c.text, c.prompt_tokens, c.completion_tokens, c.finish_reason)
        return [answers[i] for i in range(len(samples))]

    return ask


def _by_tiles(benchmark: Benchmark, samples: Sequence[Sample]) -> dict[int | None, list[int]]:
    """Indices of samples by their limit of tiles, since the engine takes one limit a call."""
    groups: dict[int | None, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(benchmark.tiles_for(sample), []).append(index)
    return groups

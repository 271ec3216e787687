"""A loaded model as the `answer_fn` of the runner."""

from collections.abc import Sequence

from mis_jax.data.processor import Processor
from mis_jax.evals.runner import AnswerFn
from mis_jax.evals.types import Answer, Benchmark, Sample
from mis_jax.generation.answers import answer
from mis_jax.model.internvl import InternVL


def answers_of(
    model: InternVL,
    processor: Processor,
    benchmark: Benchmark,
    *,
    rows: int = 32,
    max_new_tokens: int | None = None,
) -> AnswerFn:
    """Greedy answers under the benchmark's protocol, `rows` at a time.

    `max_new_tokens` is that of the benchmark without it.
    """

    def ask(samples: Sequence[Sample]) -> list[Answer]:
        completions = answer(
            model,
            processor,
            [sample.conversation for sample in samples],
            [sample.images for sample in samples],
            max_new_tokens=max_new_tokens or benchmark.max_new_tokens,
            system=benchmark.system,
            max_tiles_per_image=benchmark.max_tiles_per_image,
            batch_size=rows,
        )
        return [
            Answer(c.text, c.prompt_tokens, c.completion_tokens, c.finish_reason)
            for c in completions
        ]

    return ask

"""A loaded model as the `answer_fn` of the runner."""

from collections.abc import Callable, Sequence

from mis_jax.config import EvaluationConfig
from mis_jax.data.processor import Processor
from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.images import shown_images
from mis_jax.evals.judges import get_judge
from mis_jax.evals.outcomes import verdict_outcomes
from mis_jax.evals.run_dir import facts_of
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


def held_out(config: EvaluationConfig) -> Callable[[InternVL, Processor], dict[str, float]]:
    """A function of a model that gives the benchmark's metrics on its first samples.

    Of each metric there is the share and, as `<metric>_n`, how many samples it is a share of;
    `unjudged` counts those without a verdict. Raises ValueError for an unknown benchmark or judge
    and for files that are missing, before anything is trained.
    """
    benchmark, judge = get_benchmark(config.benchmark), get_judge(config.judge)
    samples = benchmark.load(config.data_root)[: config.samples]

    def evaluate(model: InternVL, processor: Processor) -> dict[str, float]:
        ask = answers_of(model, processor, benchmark, max_new_tokens=config.max_new_tokens)
        answers = ask(samples)
        pairs = [(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)]
        verdicts = judge.judge(pairs)
        outcomes = [
            verdict_outcomes(
                benchmark,
                judge.id,
                verdict.state,
                verdict.labels if verdict.state == "ok" else None,
                facts_of(sample),
            )
            for sample, verdict in zip(samples, verdicts, strict=True)
        ]
        unjudged = sum(verdict.state != "ok" for verdict in verdicts)
        figures: dict[str, float] = {"unjudged": unjudged}
        for metric in benchmark.metrics:
            votes = [outcome[metric] for outcome in outcomes if outcome and metric in outcome]
            if votes:
                figures |= {metric: sum(votes) / len(votes), f"{metric}_n": len(votes)}
        return figures

    return evaluate

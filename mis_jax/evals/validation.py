"""Answers to held-out samples while a model is trained, and how often its guard fails."""

from collections.abc import Callable

from mis_jax.config import EvaluationConfig
from mis_jax.data.processor import Processor
from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.judges import get_judge
from mis_jax.evals.manifest import facts_of
from mis_jax.evals.metrics import counted
from mis_jax.evals.models import answers_of
from mis_jax.model.internvl import InternVL


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
            counted(benchmark, verdict.labels, facts_of(sample))
            for sample, verdict in zip(samples, verdicts, strict=True)
            if verdict.state == "ok"
        ]
        figures: dict[str, float] = {"unjudged": len(verdicts) - len(outcomes)}
        for metric in benchmark.metrics:
            votes = [outcome[metric] for outcome in outcomes if metric in outcome]
            if votes:
                figures |= {metric: sum(votes) / len(votes), f"{metric}_n": len(votes)}
        return figures

    return evaluate

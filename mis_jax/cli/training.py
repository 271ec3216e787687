"""Verbs that train: train, quickstart."""

from pathlib import Path
from typing import Any

from mis_jax.cli.common import Failed, console, err_console


def train(config: Any) -> None:
    """Fine-tune. An interrupted run goes on from its output folder when called again."""
    from mis_jax.terminal import steps_bar
    from mis_jax.train.loop import train as run

    with steps_bar(err_console) as bar:
        looking = bar.task("looking at samples")
        trained = run(config, bar.training("training"), looking)
    console.print(f"trained {trained.steps} steps in {trained.seconds:.0f} s: {trained.model}")


def quickstart(
    *, out: Path = Path("runs/quickstart"), controls: bool = False, seed: int = 0
) -> None:
    """The whole loop on the drawn mini world: a tiny model becomes safe, with the figures.

    Example: mis-jax quickstart --controls

    Args:
        out: Folder for data, models, evaluations and report.
        controls: Fine-tune with the two control label sets too (uniform refusal, text only).
        seed: Of the drawings and the training.
    """
    from mis_jax.quickstart import quickstart as run
    from mis_jax.quickstart import results_table

    outcome = run(out, controls=controls, seed=seed, console=console)
    console.print(results_table(outcome.results))
    console.print(
        f"fine-tuning took {outcome.training_seconds:.0f} s; the report: {outcome.report}"
    )
    if outcome.missing:
        raise Failed(f"{outcome.missing} sample(s) ended without a verdict")

"""Verbs that train: train, quickstart."""

import logging
from pathlib import Path
from typing import Any

from mis_jax.cli.common import Failed, console, described, err_console


def train(config: Any) -> None:
    """Fine-tune a model. Run the same command again to resume an interrupted run.

    Exit code 75 means that the same command resumes the run: after SIGTERM, SIGHUP or Ctrl-C, or
    when another process of the run is lost.
    """
    from mis_jax import signals
    from mis_jax.parallel import processes

    try:
        processes.start(config.distributed, Path(config.output))  # before JAX looks for devices
        signals.watch()
        _train(config)
    except KeyboardInterrupt as error:  # perhaps in the middle of an import: import nothing
        processes.abandon(*described(error))
        raise
    except Exception as error:
        from mis_jax.train.outcome import Interrupted, SavedFailure

        if isinstance(error, Interrupted | SavedFailure):  # all of them, together
            processes.finish()
        else:
            logging.getLogger(__name__).debug("", exc_info=error)
            processes.abandon(*described(error))
        raise
    processes.finish()


def _train(config: Any) -> None:
    from mis_jax.parallel import processes
    from mis_jax.terminal import steps_bar
    from mis_jax.train.trainer import train as run

    evaluate = None
    if config.evaluation.every:
        from mis_jax.evals.models import held_out

        evaluate = held_out(config.evaluation)
    first = processes.is_first()
    with steps_bar(err_console) as bar:
        progress = bar.training("training") if first else None
        looking = bar.task("looking at samples") if first else None
        trained = run(config, progress, looking, evaluate)
    if first:
        console.print(
            f"trained {trained.steps} steps in {trained.seconds:.0f} s: {trained.model} "
            f"({trained.dtype})"
        )


def quickstart(
    *, out: Path = Path("runs/quickstart"), controls: bool = False, seed: int = 0
) -> None:
    """Run the whole loop on the mini world: evaluate, fine-tune, export, evaluate, report.

    Example: mis-jax quickstart --controls

    Args:
        out: Output folder for data, models, evaluations and the report.
        controls: Also fine-tune on the two control label sets (uniform refusal, text only).
        seed: Random seed for the drawn data and for training.
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

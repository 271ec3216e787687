"""Predictions exchanged with VLMEvalKit, for the general sets that are read from its TSV files.

    python tools/vlmevalkit_predictions.py write runs/eval --benchmark mmstar --out mine_MMStar.tsv
    python tools/vlmevalkit_predictions.py read InternVL_MMStar.tsv --benchmark mmstar \
        --data-root data --run runs/theirs

`write` gives VLMEvalKit a run's answers (`run.py --mode eval` there). `read` makes a run of another
kit's answers, to be judged and reported here as any other.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, arg

from mis_jax.evals.benchmarks import get_benchmark
from mis_jax.evals.run_dir import open_run
from mis_jax.evals.vlmevalkit.predictions import export_predictions, import_predictions
from mis_jax.storage.hashing import file_digest


def write(
    run: Annotated[Positional[Path], arg(metavar="RUN")], *, benchmark: str, out: Path
) -> None:
    """Write a run's answers to a benchmark into the file OUT, for VLMEvalKit MODEL_DATASET.tsv."""
    count = export_predictions(run, benchmark, out)
    print(f"{count} answers to {benchmark} in {out}")


def read(
    file: Annotated[Positional[Path], arg(metavar="FILE")],
    *,
    benchmark: str,
    data_root: Path,
    run: Path,
) -> None:
    """Make a run of the predictions in FILE.

    Args:
        file: A prediction file of VLMEvalKit, as TSV (PRED_FORMAT=tsv there).
        benchmark: Which set its questions are from.
        data_root: Folder with the published files.
        run: Folder of the evaluation run.
    """
    chosen = get_benchmark(benchmark)
    open_run(run, model=file.stem, fingerprint=file_digest(file), data_root=data_root)
    done = import_predictions(file, chosen, run)
    print(f"{done.answered} answers, {done.failed} failed; next: mis-jax judge {run}")


if __name__ == "__main__":
    try:
        tyro.extras.subcommand_cli_from_dict({"write": write, "read": read}, description=__doc__)
    except (ValueError, OSError) as error:
        sys.exit(f"vlmevalkit_predictions: error: {error}")

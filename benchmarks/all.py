"""Every benchmark, one after the other: the whole table, or with `--smoke` a quick look at some.

The smoke run is what continuous integration does: it shows that they work and that outputs agree.
Its times mean nothing.
"""

import dataclasses
import subprocess
import sys
import time

import tyro

#: Detokenizer behind `python -m benchmarks`; each gets `--save`.
WHOLE = (
    "preprocessing",
    "data_pipeline --samples 200",
    "convert internvl2_5-1b",
    "startup",
    "server",
    "words",
    "evaluation",
    "attention",
    "cross_entropy",
    "vision_tower",
    "generate",
    "train_step",
    "train_step --lora-rank 16 --dtypes bfloat16 --rounds 2",
    "int8",
)
#: The first tells peak memory and every bit of a real size. What tests start anyway (the server, a
#: first training step) and what takes minutes (the models) is left out.
SMOKE = (
    "convert internvl2_5-1b --rounds 1",
    "preprocessing --pictures 1 --rounds 1",
    "data_pipeline --workload mis --samples 4 --workers 0 --rounds 1",
    "evaluation --samples 8 --verdicts 200 --rounds 1",
    "table --check",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks all --smoke"""

    smoke: bool = False
    """Only see that each works, at the smallest size; nothing is saved."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    failed = []
    for words in SMOKE if settings.smoke else WHOLE:
        command = [*words.split(), *([] if settings.smoke else ["--save"])]
        print(f"== {' '.join(command)}", flush=True)
        began = time.perf_counter()
        ran = subprocess.run([sys.executable, "-m", "benchmarks", *command])
        print(f"== {time.perf_counter() - began:.0f} s", flush=True)
        if ran.returncode:
            failed.append(words)
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()

"""From nothing: the command's help, the import, and the first training step, each a new process.

A start is timed from the call of the program to its end; the training step from the call of
`mis-jax train` with the mini configuration to the line of the first step in its log, with no cache
of compiled programs. The files have been read before, so that the disk plays no part. There is no
peer: the targets are seconds. `import mis_jax` is quick because it brings in nothing before it is
used; `from mis_jax import load` is what a program pays that goes on to a model.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro
import yaml

from benchmarks.common import save
from benchmarks.harness import Cell, line, show, summed_up

_ROOT = Path(__file__).parents[1]
_COMMAND = str(Path(sys.executable).parent / "mis-jax")
_GIVE_UP = 300.0  # seconds


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks startup --save"""

    rounds: int = 5
    """Starts of each."""
    save: bool = False
    """Write the figures into benchmarks/results."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="mis_jax_startup.") as folder:
        config = prepared(Path(folder))
        starts: dict[Cell, Callable[[int], float]] = {
            Cell("mis-jax --help", at_most_s=0.5): lambda _: ran(_COMMAND, "--help"),
            Cell("import mis_jax", at_most_s=1.5): lambda _: ran(
                sys.executable, "-c", "import mis_jax"
            ),
            Cell("from mis_jax import load"): lambda _: ran(
                sys.executable, "-c", "from mis_jax import load"
            ),
            Cell("first step of configs/mini.yaml", at_most_s=20): lambda number: first_step(
                config, Path(folder) / f"run-{number}"
            ),
        }
        seconds: dict[Cell, list[float]] = {cell: [] for cell in starts}
        for number in range(settings.rounds + 1):
            for cell, start in starts.items():
                once = start(number)
                if number:  # the first round reads the files into memory
                    seconds[cell].append(once)
    cells = {cell.name: summed_up(cell, {"ours": values}) for cell, values in seconds.items()}
    for name, found in cells.items():
        print(line(name, found))
    show("seconds from a cold start", cells)
    if settings.save:
        print(f"wrote {save('startup', {'benchmark': 'startup', 'cells': cells})}")


def prepared(folder: Path) -> Path:
    """The mini world, and the mini configuration with its paths."""
    program = (
        "import sys; from pathlib import Path; from mis_jax.mini.files import write_mini; "
        "write_mini(Path(sys.argv[1]), 0)"
    )
    data = folder / "data"
    subprocess.run([sys.executable, "-c", program, str(data)], check=True)
    text = (_ROOT / "configs" / "mini.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text.replace("runs/quickstart/data", str(data)))
    config["model"] = str(_ROOT / config["model"])
    path = folder / "mini.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def ran(*command: str) -> float:
    """Seconds of a program from its call to its end."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def first_step(config: Path, output: Path) -> float:
    """Seconds from the call of the command to its first step; the run is ended there."""
    log = output / "metrics.jsonl"
    told = output.with_suffix(".txt")
    plain = {key: value for key, value in os.environ.items() if "COMPILATION_CACHE" not in key}
    with told.open("w") as file:
        began = time.perf_counter()
        child = subprocess.Popen(
            [_COMMAND, "train", str(config), "--output", str(output)],
            env=plain, stdout=file, stderr=file,
        )  # fmt: skip
        try:
            while not (log.exists() and "\n" in log.read_text()):
                if child.poll() is not None or time.perf_counter() - began > _GIVE_UP:
                    raise RuntimeError(f"training made no step: {told.read_text()[-2000:]}")
                time.sleep(0.01)
            return time.perf_counter() - began
        finally:
            child.kill()
            child.wait()


if __name__ == "__main__":
    main()

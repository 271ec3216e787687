"""What a train step costs against model size, tokens, tiles, packing and the number of chips.

Every point is the real step compiled ahead of time by `mis_jax.plan` for chips that are not here:
memory and collectives are the compiler's, operations a formula's, time a roofline's. With `--timed`
the small points run on this machine instead. Each point has a process of its own and is written as
soon as it is there; a run goes on with the points that are missing.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.common import RESULTS, save
from benchmarks.scaling_figures import draw_mesh, draw_step, draw_timed

Curve = Literal["mesh", "size", "tokens", "tiles", "packing"]
MODEL_8B = "internvl2_5-8b"


@dataclass(frozen=True)
class Point:
    """One train step: what of which model, on what."""

    curve: Curve
    topology: str
    model: str = MODEL_8B
    layers: int = 0  # of the decoder and of the tower each; 0 leaves them all
    rows: int = 1
    tokens: int = 4096
    tiles: int = 12
    packed: bool = False
    lora_rank: int = 0

    @property
    def name(self) -> str:
        how = "packed" if self.packed else "alone"
        words = [self.curve, self.topology, self.model, f"{self.rows}x{self.tokens}"]
        words += [f"{self.tiles}t", how]
        return " ".join(words) + (f" lora{self.lora_rank}" if self.lora_rank else "")


def mesh_points() -> list[Point]:
    """The whole 8B, a packed row of 4,096 tokens and 12 tiles for every chip."""
    names = {
        "v5e:4x4": 16, "v5e:8x8": 64, "v5e:16x16": 256, "v6e:2x4": 8, "v6e:8x8": 64,
        "v5p:2x2x2": 8, "v5p:2x2x4": 16, "v5p:2x4x4": 32, "v6e:4x4": 16, "v5e:2x4": 8,
    }  # fmt: skip
    full = [Point("mesh", name, rows=chips, packed=True) for name, chips in names.items()]
    return [*full, Point("mesh", "v5e:2x2", rows=4, packed=True, lora_rank=16)]


def step_points(topology: str, layers: int, *, small: bool = False) -> list[Point]:
    """Cut models on one chip; `small` is what a CPU does in seconds."""
    part = 4 if small else 1
    cut = dict(topology=topology, layers=layers)
    sizes = [f"internvl2_5-{size}" for size in ("1b", "2b", "4b", "8b")]
    tokens = (512, 1024, 2048, 4096) if small else (1024, 2048, 4096, 8192, 16384)
    tiles = (1, 2, 4, 7) if small else (1, 2, 4, 7, 14, 28)
    model = sizes[0] if small else MODEL_8B
    points = [Point("size", model=size, tokens=4096 // part, tiles=1, **cut) for size in sizes]
    points += [Point("tokens", model=model, tokens=length, tiles=1, **cut) for length in tokens]
    long = 2048 if small else 8192  # room for the image tokens of all tiles
    points += [Point("tiles", model=model, tokens=long, tiles=count, **cut) for count in tiles]
    # Four samples of 1,024 tokens with two tiles, in three ways to lay them out.
    points += [
        Point("packing", model=model, rows=1, tokens=4096, tiles=8, packed=True, **cut),
        Point("packing", model=model, rows=4, tokens=1024, tiles=2, **cut),
        Point("packing", model=model, rows=4, tokens=4096, tiles=2, **cut),
    ]
    return points


PLANNED = [*mesh_points(), *step_points("v5p:1x1x1", 4)]
TIMED = step_points("cpu", 2, small=True)


@dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks scaling"""

    timed: bool = False
    """Run the small points on this machine, in seconds, in the place of planning for chips."""
    curves: tuple[Curve, ...] = ("mesh", "size", "tokens", "tiles", "packing")
    """Which curves."""
    again: bool = False
    """Points that are there already are made again."""
    draw: bool = True
    """Draw the figures of docs/assets from all points that are there."""
    steps: int = 3
    """Timed steps of a point; the median counts."""
    point: str = ""
    """Used by the benchmark itself: make one point and print it."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    points = TIMED if settings.timed else PLANNED
    if settings.point:
        point = next(point for point in points if point.name == settings.point)
        made = timed(point, settings.steps) if settings.timed else planned(point)
        print("RESULT " + json.dumps(made))
        return
    name = "scaling-timed" if settings.timed else "scaling"
    found = _present(name)
    for point in points:
        if point.curve not in settings.curves:
            continue
        if point.name in found and not settings.again:
            continue
        began = time.monotonic()
        made = _in_a_process(point, settings)
        if made is None:
            continue
        # Another run may have written other curves meanwhile.
        found = _present(name) | {point.name: dataclasses.asdict(point) | made}
        save(name, {"benchmark": name, "points": found})
        print(f"{point.name}: {time.monotonic() - began:.0f} s", flush=True)
    if settings.draw:
        draw(name, list(found.values()))


def draw(name: str, points: list[dict[str, Any]]) -> None:
    """The figures of what is there."""
    if name == "scaling":
        draw_mesh([point for point in points if point["curve"] == "mesh"])
        draw_step([point for point in points if point["curve"] != "mesh"])
    else:
        draw_timed(points)


def _present(name: str) -> dict[str, Any]:
    """Points of an earlier run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["points"] if path.exists() else {}


def _in_a_process(point: Point, settings: Settings) -> dict[str, Any] | None:
    """A point's figures; None, and a word of it, where its process failed."""
    words = [f"--point={point.name}", f"--steps={settings.steps}"]
    words.append("--timed" if settings.timed else "--no-timed")
    command = [sys.executable, "-m", "benchmarks", "scaling", *words]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    for line in child.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    print(f"{point.name}: failed with {child.returncode}", file=sys.stderr, flush=True)
    return None


# ---------------------------------------------------------------------------------------------
# One point


def planned(point: Point) -> dict[str, Any]:
    """What the compiler, the formulas and the roofline say of a step."""
    from mis_jax.checkpoint.hf.config_writer import native_json
    from mis_jax.plan import plan

    with tempfile.TemporaryDirectory(prefix="mis_jax_scaling.") as folder:
        config = json.dumps(native_json(model_of(point), None))
        Path(folder, "config.json").write_text(config, encoding="utf-8")
        made = plan(
            run_of(point, Path(folder)), point.topology, length=point.tokens, tiles=point.tiles
        )
    step = made.steps[0]
    received = None if step.collectives is None else sum(one.traffic for one in step.collectives)
    return {"received_bytes": received} | {"chips": made.chips, **made.as_json()["steps"]["train"]}


def timed(point: Point, steps: int) -> dict[str, Any]:
    """Seconds of a step on this machine, with random parameters and samples; compiling apart."""
    import jax

    from mis_jax.parallel.sharding import make_mesh
    from mis_jax.train.compiled_step import make_train_program

    config, model = run_of(point, Path("unused")), model_of(point)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    program = make_train_program(config, model, mesh, 100)
    state, batch = program.random(seed=0), batch_of(point, model)
    seconds = []
    with jax.set_mesh(mesh):
        for _ in range(1 + steps):
            began = time.perf_counter()
            state, metrics = program.step(state, batch)
            jax.block_until_ready((state, metrics))
            seconds.append(time.perf_counter() - began)
    return {
        "first_s": round(seconds[0], 3),
        "median_s": round(statistics.median(seconds[1:]), 4),
        "seconds": [round(value, 4) for value in seconds[1:]],
        "loss": float(metrics["loss"]),
    }


def model_of(point: Point) -> Any:
    """The published model, cut where the point asks."""
    from mis_jax.model.family import published

    model = published(point.model)
    if not point.layers:
        return model
    return dataclasses.replace(
        model,
        vision=dataclasses.replace(model.vision, num_layers=point.layers),
        text=dataclasses.replace(model.text, num_layers=point.layers),
    )


def run_of(point: Point, model: Path) -> Any:
    """A run as the shipped configurations of the 8B are: everything but the tower is trained."""
    from mis_jax.config import DataConfig, DtypeConfig, LoraConfig, RunConfig, Source, TrainConfig

    narrow = DtypeConfig(params="bfloat16", moments="bfloat16", gradients="bfloat16")
    return RunConfig(
        model=model,
        output=Path("unused"),
        data=DataConfig(
            sources=(Source("mis", root=Path("unused")),),
            max_length=point.tokens,
            packing=point.packed,
        ),
        train=TrainConfig(
            steps=100,
            global_batch=point.rows,
            freeze=("vision", "projector", "language") if point.lora_rank else ("vision",),
            remat="full",
        ),
        dtype=narrow if point.topology == "cpu" else DtypeConfig(),
        lora=LoraConfig(rank=point.lora_rank),
    )


def batch_of(point: Point, model: Any) -> Any:
    """Rows full of samples; a padded row of `packing` holds one of 1,024 tokens."""
    from benchmarks.noise import noise

    padded = point.curve == "packing" and not point.packed
    return noise(
        model,
        rows=point.rows,
        length=point.tokens,
        tiles=point.tiles,
        samples=4 if point.packed else 1,
        used=1024 if padded else None,
    )


if __name__ == "__main__":
    main()

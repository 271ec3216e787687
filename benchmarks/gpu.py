"""Everything that an NVIDIA GPU is asked, in one run of at most 20 minutes.

Weights are random and made on the device; nothing is downloaded and no peer is needed: ours stands
beside what the same card was measured to do at most. Every section has a process and a time limit
of its own, so that one which runs out of memory or time loses nothing of the others, and what it
found is written before the next one begins.
"""

import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import RESULTS, save
from benchmarks.gpu_sections import SECTIONS
from benchmarks.harness import shares, show

_FLAGS = "--xla_dump_hlo_as_text --xla_dump_hlo_module_re=jit_(step|decode|prefill)"
_KEPT = ("after_optimizations.txt", "memory-usage-report.txt")  # of what XLA dumps
#: What JAX takes of the card: all but what kernels' own libraries need.
_SHARE = "0.93"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks gpu --save --dump out/hlo"""

    save: bool = False
    """Write the figures into benchmarks/results after every section."""
    only: tuple[str, ...] = tuple(SECTIONS)
    """Sections to run; what an earlier run has saved of the others stays."""
    dump: Path | None = None
    """Folder for the optimised programs and their memory."""
    minutes: float = 20.0
    """For everything; a section that would begin later is left out."""
    smoke: bool = False
    """A tiny model and few repeats: whether the script itself works, on any device."""
    name: str = "gpu"
    """Of the file in benchmarks/results; the card's name is put after it."""
    section: str = ""
    """Used by the benchmark itself: run one section and print what it found."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    if settings.section:
        serve(settings)
        return
    for name in settings.only:
        if name not in SECTIONS:
            sys.exit(f"--only takes {', '.join(SECTIONS)}, not {name}")
    run = measure(settings)
    title = f"{run['device']}: shares of what it was measured to do"
    show(title, run["cells"])
    for line in goals(run["cells"]):
        print(line)
    for name, problem in run["problems"].items():
        print(f"{name}: {problem}")


def measure(settings: Settings) -> dict[str, Any]:
    """All sections that were asked for, one after another."""
    end = time.monotonic() + 60 * settings.minutes
    run: dict[str, Any] = {"benchmark": "gpu", "device": "", "limits": {}, "cells": {}}
    run |= {"problems": {}, "section_seconds": {}}
    for name in settings.only:
        left = end - time.monotonic()
        if left < 20:
            run["problems"][name] = f"not begun: the {settings.minutes:g} minutes are over"
            continue
        began = time.monotonic()
        limit = left if settings.smoke else min(left, SECTIONS[name].limit_s)
        found, problem = _in_a_process(name, settings, limit)
        if problem:
            run["problems"][name] = problem
        if not run["device"] and found:
            run["device"] = found["device"]
            run = _earlier(settings, run) | {"problems": run["problems"]}
        run["section_seconds"][name] = round(time.monotonic() - began, 1)
        run["cells"] |= found.get("cells", {})
        run["limits"] |= found.get("limits", {})
        if run["limits"]:
            shares(run["cells"], run["limits"])
        if settings.save and run["device"]:
            save(_file(settings, run["device"]), run)
        print(f"{name}: {run['section_seconds'][name]} s {problem}", flush=True)
    return run


def _earlier(settings: Settings, run: dict[str, Any]) -> dict[str, Any]:
    """What is saved of this card, without what would be measured again."""
    path = RESULTS / f"{_file(settings, run['device'])}.json"
    if not settings.save or not path.exists() or set(settings.only) == set(SECTIONS):
        return run
    old = json.loads(path.read_text(encoding="utf-8"))
    kept = {n: c for n, c in old["cells"].items() if c["section"] not in settings.only}
    return run | {"limits": old["limits"], "cells": kept, "section_seconds": old["section_seconds"]}


def _file(settings: Settings, device: str) -> str:
    return f"{settings.name}-{'-'.join(device.lower().split())}"


def goals(cells: dict[str, Any]) -> list[str]:
    """Every cell with a goal, in words."""
    lines = []
    for name, cell in cells.items():
        for goal in cell.get("goals", ()):
            reached = goal["reached"] if goal["reached"] is not None else cell.get(goal["of"])
            if reached is None:
                end = "unknown"
            else:
                end = f"{reached:.3g}, {'met' if reached >= goal['goal'] else 'missed'}"
            lines.append(f"{name}: {goal['of']}, goal {goal['goal']:g}: {end}")
    return lines


def _in_a_process(name: str, settings: Settings, limit: float) -> tuple[dict[str, Any], str]:
    """What a section printed, also one that was cut off, and what was wrong with it."""
    words = [f"--section={name}", "--smoke" if settings.smoke else "--no-smoke"]
    words += [f"--dump={settings.dump}"] if settings.dump else []
    command = [sys.executable, "-m", "benchmarks", "gpu", *words]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    problem = ""
    try:
        out, errors = child.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        out, errors = child.communicate()
        problem = f"cut off after {limit:.0f} s"
    if child.returncode and not problem:
        last = [line for line in errors.splitlines() if line.strip()][-1:]
        problem = f"ended with {child.returncode}: {' '.join(last)[:300]}"
        sys.stderr.write(errors)
    found: dict[str, Any] = {}
    for line in out.splitlines():
        if line.startswith("RESULT "):  # one for every cell, so that a late failure loses none
            part = json.loads(line.removeprefix("RESULT "))
            for key in ("cells", "limits"):
                part[key] = found.get(key, {}) | part.get(key, {})
            found |= part
    return found, problem


def serve(settings: Settings) -> None:
    """The process of a section."""
    import os

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _SHARE)
    if settings.dump:
        folder = settings.dump / settings.section
        folder.mkdir(parents=True, exist_ok=True)
        dump = f"--xla_dump_to={folder} {_FLAGS}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}".strip()
    import jax

    device = jax.devices()[0].device_kind
    section = SECTIONS[settings.section]
    try:
        for found in section.run(settings.smoke):
            for cell in found.get("cells", {}).values():
                cell["section"] = settings.section
            print("RESULT " + json.dumps({"device": device} | found), flush=True)
    finally:
        if settings.dump:
            _keep_what_matters(settings.dump / settings.section)


def _keep_what_matters(folder: Path) -> None:
    """XLA writes many states of every program; the last one and its memory stay."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.endswith(_KEPT):
            path.unlink()


if __name__ == "__main__":
    main()

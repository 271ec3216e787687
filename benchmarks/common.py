"""What every benchmark shares: the machine's description, result files, child processes."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tensorstore",
    "safetensors",
    "torch",
    "transformers",
)


def environment() -> dict[str, Any]:
    """Date, processor, memory and versions, to stand beside every figure."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"CPU, {os.cpu_count()} cores, {platform.machine()}{vectors()}",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),  # processes that wanted a core, over a minute
        "flags": os.environ.get("XLA_FLAGS", ""),
        "python": platform.python_version(),
        "versions": versions,
    }


def vectors(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The best vector instructions, where Linux tells: whether bfloat16 is fast hangs on them."""
    try:
        flags = cpuinfo.read_text().split()
    except OSError:
        return ""
    known = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
    return next((f", {name}" for name in known if name in flags), "")


@dataclasses.dataclass(frozen=True)
class Ran:
    """A finished child process."""

    seconds: float
    cpu_seconds: float
    peak_gib: float  # resident, mapped files included


def run(command: Sequence[str]) -> Ran:
    """Run a child to its end; RuntimeError when it fails."""
    began, peak, finished = time.perf_counter(), 0.0, 0
    child = subprocess.Popen(command)
    while not finished:
        peak = max(peak, resident_peak(child.pid))
        time.sleep(0.005)
        finished, status, usage = os.wait4(child.pid, os.WNOHANG)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
    cpu = usage.ru_utime + usage.ru_stime
    return Ran(time.perf_counter() - began, cpu, peak or usage.ru_maxrss / 2**20)


def resident_peak(process: int) -> float:
    """GiB that a process held at most so far, 0 where Linux does not tell.

    `ru_maxrss` of a child would not do: it begins with what its parent holds.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) / 2**20 if lines else 0.0


def save(name: str, results: dict[str, Any]) -> Path:
    """Write one run's figures into `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(environment() | results, indent=2) + "\n", encoding="utf-8")
    return path

"""Two result files of one benchmark side by side: what became faster or slower beyond noise.

A cell's figure is the time of our better side for one unit. A change is marked when it is over 3 %
and the spreads of the two runs do not overlap. The peer's own change stands beside it: where the
peer moved as well, it was the machine.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.harness import best

NOISE = 0.03  # a smaller change is none
#: What has to be the same in both files for a comparison to be one of the code.
_SAME = ("device", "memory_gib", "flags", "python", "versions", "model", "dtype", "settings")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks compare before.json after.json --fail-on-slower"""

    old: Annotated[Path, tyro.conf.Positional]
    """Result file."""
    new: Annotated[Path, tyro.conf.Positional]
    """Result file of the same benchmark."""
    fail_on_slower: bool = False
    """Exit code 1 when a cell became slower beyond noise."""


@dataclasses.dataclass(frozen=True)
class Change:
    """Of one cell; times are for one unit, so that runs over more samples compare."""

    cell: str
    unit: str
    old: float
    new: float
    apart: bool
    """The spreads do not overlap."""
    peer: float | None
    """The peer's change."""

    @property
    def part(self) -> float:
        """0.1 takes a tenth longer."""
        return self.new / self.old - 1

    @property
    def verdict(self) -> str:
        if not self.apart or abs(self.part) <= NOISE:
            return ""
        return "slower" if self.part > 0 else "faster"


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    console = Console()
    try:
        old, new = read(settings.old), read(settings.new)
        check(settings, old, new)
    except ValueError as error:
        console.print(f"compare: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    for warning in differences(old, new):
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)
    changes = compare(old["cells"], new["cells"])
    show(old, new, changes, console)
    for name in sorted(old["cells"].keys() ^ new["cells"].keys()):
        console.print(f"only in {settings.old if name in old['cells'] else settings.new}: {name}")
    if settings.fail_on_slower and any(change.verdict == "slower" for change in changes):
        sys.exit(1)


def read(path: Path) -> dict[str, Any]:
    """A result file; ValueError where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; give a file of benchmarks/results") from None
    if not isinstance(found, dict) or not {"benchmark", "cells"} <= found.keys():
        raise ValueError(
            f"{path}: it has no 'benchmark' and 'cells'; run the benchmark again with --save"
        )
    return found


def check(settings: Settings, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(
            f"{settings.old} is of {old['benchmark']} and {settings.new} of {new['benchmark']}; "
            "give two files of one benchmark"
        )
    if not old["cells"].keys() & new["cells"].keys():
        raise ValueError(f"{settings.old} and {settings.new} have no cell in common")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What else than the code may have changed the times."""
    for name in _SAME:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted(a.keys() | b.keys()):
                if a.get(key) != b.get(key):
                    yield f"{name}: {key} was {a.get(key)} and is {b.get(key)}"
        elif a != b:
            yield f"{name} was {a!r} and is {b!r}"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Of the cells that both have, in the order of the new file."""
    changes = []
    for name, after in new.items():
        before = old.get(name)
        if before is None or not (best(before, "ours") and best(after, "ours")):
            continue
        (old_low, old_time, old_high), (new_low, new_time, new_high) = (
            times(found, "ours") for found in (before, after)
        )
        peers = [times(found, "theirs")[1] for found in (before, after) if best(found, "theirs")]
        changes.append(
            Change(
                cell=name,
                unit=after["unit"],
                old=old_time,
                new=new_time,
                apart=new_low > old_high or new_high < old_low,
                peer=peers[1] / peers[0] - 1 if len(peers) == 2 else None,
            )
        )
    return changes


def times(found: Mapping[str, Any], whose: str) -> tuple[float, float, float]:
    """Fastest, median and slowest seconds for a unit, of a party's better side."""
    side = found["sides"][best(found, whose)]
    work = side["per_second"] * side["median_s"]
    return side["low_s"] / work, side["median_s"] / work, side["high_s"] / work


def show(
    old: Mapping[str, Any], new: Mapping[str, Any], changes: list[Change], console: Console
) -> None:
    table = Table(title=f"{new['benchmark']}: time for one unit of work")
    for column in ("", old["date"], new["date"], "change", "", "peer's change"):
        table.add_column(column, justify="right" if column else "left")
    for change in changes:
        table.add_row(
            f"{change.cell} ({change.unit})",
            f"{change.old:.4g} s",
            f"{change.new:.4g} s",
            f"{change.part:+.1%}",
            change.verdict,
            "" if change.peer is None else f"{change.peer:+.1%}",
        )
    console.print(table)


if __name__ == "__main__":
    main()

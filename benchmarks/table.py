"""The table of `benchmarks/README.md`, made from the result files.

Without `--check` it is written between its two marks; with it nothing is written, and the exit code
is 1 when the page does not say what the results say.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.common import RESULTS
from benchmarks.harness import DTYPES, best, met

BEGIN, END = "<!-- table: python -m benchmarks table -->", "<!-- end of table -->"
_PAGE = Path(__file__).with_name("README.md")
_HEAD = ("cell", "ours", "peer", "times as fast", "target", "", "share of the limit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Example: python -m benchmarks table --check"""

    check: bool = False
    """Only say whether the page is up to date."""
    results: Path = RESULTS
    """Folder of result files."""
    page: Path = _PAGE
    """File with the two marks."""


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    try:
        old = settings.page.read_text(encoding="utf-8")
        new = written_into(old, as_markdown(read_all(settings.results)))
    except (OSError, ValueError) as error:
        sys.exit(f"table: {settings.page}: {error}")
    if new == old:
        print(f"{settings.page} is up to date")
    elif settings.check:
        sys.exit(f"{settings.page} is not what the results say; run python -m benchmarks table")
    else:
        settings.page.write_text(new, encoding="utf-8")
        print(f"wrote {settings.page}")


def read_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Result files by name, without the ending."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }


def written_into(page: str, table: str) -> str:
    """The page with another table between the marks; ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"it lacks a line {BEGIN!r} or, behind it, {END!r}; put them back")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def as_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A table for each file with cells; the others are named."""
    blocks = [block(name, found) for name, found in results.items() if "cells" in found]
    others = [f"`{name}.json`" for name, found in results.items() if "cells" not in found]
    if others:
        blocks.append(f"Figures of another kind are in {', '.join(others)}.\n")
    return "\n".join(blocks)


def block(name: str, found: Mapping[str, Any]) -> str:
    load = f", load {found['load']:g}" if "load" in found else ""
    lines = [f"**{name}**: {found['date']}, {found['device']}{load}", ""]
    lines += [in_a_row(_HEAD), in_a_row(["---"] * len(_HEAD))]
    for cell, of in found["cells"].items():
        lines.append(in_a_row(row(cell, of)))
        if "memory_ratio" in of:
            lines.append(in_a_row(memory_row(cell, of)))
    return "\n".join(lines) + "\n"


def in_a_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def row(cell: str, found: Mapping[str, Any]) -> list[str]:
    share = found.get("share_of_limit")
    return [
        cell,
        figure(found, "ours"),
        figure(found, "theirs"),
        ratio(found),
        target(found),
        outcome(found),
        "" if share is None else f"{share:.0%} of the {found['bound_by']}",
    ]


def memory_row(cell: str, found: Mapping[str, Any]) -> list[str]:
    """What a process held at most; less is better here."""
    peaks = {side.split()[0]: gib for side, gib in found["peak_gib"].items()}
    reached = found["memory_ratio"] <= found["memory_target"]
    return [
        f"{cell}, memory",
        f"{peaks['ours']:.3g} GiB",
        f"{peaks['theirs']:.3g} GiB",
        f"{found['memory_ratio']:.2f} of the peer's",
        f"at most {found['memory_target']:g}",
        "met" if reached else f"missed: {found.get('memory_reason') or 'reason not known yet'}",
        "",
    ]


def figure(found: Mapping[str, Any], whose: str) -> str:
    """Of a party's better side: seconds of a call, or units a second; and which side it is."""
    side = best(found, whose)
    if not side:
        return ""
    of = found["sides"][side]
    if found["unit"] == "calls":
        told = f"{of['median_s']:.3g} s ({of['low_s']:.3g} to {of['high_s']:.3g})"
    else:
        told = f"{of['per_second']:.4g} {found['unit']}/s"
    kind = side.partition(" ")[2]
    if not kind:
        return told
    return f"{told}, {kind}" if kind in DTYPES else f"{kind}: {told}"


def ratio(found: Mapping[str, Any]) -> str:
    if "times_faster" not in found:
        return ""
    low, high = found["times_faster_rounds"]
    return f"{found['times_faster']:.2f} ({low:.2f} to {high:.2f})"


def target(found: Mapping[str, Any]) -> str:
    if "at_most_s" in found:
        return f"at most {found['at_most_s']:g} s"
    return f"{found['target']:g}" if "target" in found else ""


def outcome(found: Mapping[str, Any]) -> str:
    reached = met(found)
    if reached is None:
        return ""
    return "met" if reached else f"missed: {found.get('reason') or 'reason not known yet'}"


if __name__ == "__main__":
    main()

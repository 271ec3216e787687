"""Collectives of a compiled program with their bytes, read from its HLO text.

A computation counts as often as it is called: the body of a loop times the loop's trip count,
which GPUs' text states and TPUs' leaves to the loop's condition (`i < constant`). A loop whose end
depends on data counts once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0}
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPCODE = re.compile(r" = (.+?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CONSTANT = re.compile(r"%([\w.\-]+) = [su](?:32|64)\[\]\S* constant\((\d+)\)")
_COUNTED = re.compile(r"^  ROOT .* compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT")


@dataclass(frozen=True)
class Collective:
    """One collective of the text: what each device takes part in, each of `times` times."""

    kind: str
    bytes: float  # of the whole result; of the whole operand for reduce-scatter
    group: int  # devices that take part together
    times: int

    @property
    def traffic(self) -> float:
        """Bytes that each device has to receive (and send), all times together."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.times * self.bytes * factor


@dataclass(frozen=True)
class Sum:
    """All collectives of one kind in a step."""

    count: int
    bytes: float


def sums(found: list[Collective]) -> dict[str, Sum]:
    """Number and bytes by kind, kinds that do not occur left out."""
    counts: dict[str, int] = defaultdict(int)
    sizes: dict[str, float] = defaultdict(float)
    for one in found:
        counts[one.kind] += one.times
        sizes[one.kind] += one.times * one.bytes
    return {kind: Sum(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


def collectives(text: str, devices: int) -> list[Collective]:
    """Every collective of a compiled module (`compiled.as_text()`) among more than one device."""
    bodies, entry = _computations(text)
    found: dict[tuple[str, int], int] = defaultdict(int)

    def visit(name: str, times: int) -> None:
        for number, line in enumerate(bodies.get(name, ())):
            if (opcode := _opcode(line)) is None or _ends_async(line):
                continue
            if _kind(opcode) and name.startswith("async_collective_fusion"):
                continue
            if _kind(opcode):
                found[name, number] += times
            elif not opcode.endswith(("-done", "-update")):
                trips = _trip_count(line, bodies) if opcode == "while" else 1
                for called in _called(line):
                    visit(called, times * trips)

    visit(entry, 1)
    made = [
        _collective(bodies[name][line], times, devices, scattered="all-reduce-scatter" in name)
        for (name, line), times in found.items()
    ]
    return [one for one in made if one.group > 1]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", []
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            current = bodies[header[2]] = []
            entry = header[2] if header[1] else entry
        elif line.startswith(" "):
            current.append(line)
    assert entry, "the text of a compiled module has an ENTRY"
    return bodies, entry


def _opcode(line: str) -> str | None:
    found = _OPCODE.search(line)
    return found[2] if found else None


def _kind(opcode: str) -> str | None:
    base = opcode.removesuffix("-start").removeprefix("ragged-")
    return base if base in KINDS else None


def _ends_async(line: str) -> bool:
    """Whether a fusion ends a TPU's asynchronous collective.

    Such a collective stands in the text three times: in the fusion that starts it, in the one that
    computes something else meanwhile, and in the one that ends it.
    """
    return line.lstrip().removeprefix("ROOT ").startswith("%async-collective-done")


def _called(line: str) -> Iterator[str]:
    yield from _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        yield from (name.strip().lstrip("%") for name in branches.split(","))


def _trip_count(line: str, bodies: dict[str, list[str]]) -> int:
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    for comparison in filter(None, map(_COUNTED.search, lines)):
        for constant in filter(None, map(_CONSTANT.search, lines)):
            counter = re.compile(rf"%{re.escape(comparison[1])} = \S+ get-tuple-element\(")
            if constant[1] == comparison[2] and any(map(counter.search, lines)):
                return int(constant[2])
    return 1  # such as the chunks of the loss, of which MIS's answers need one


def _collective(line: str, times: int, devices: int, *, scattered: bool) -> Collective:
    """`scattered`: inside TPUs' fusion of an all-reduce with the slice that follows it."""
    match = _OPCODE.search(line)
    assert match
    shape, opcode = match[1], match[2]
    kind = _kind(opcode)
    assert kind
    group = _group(line, devices) if kind != "collective-permute" else devices
    size = _bytes(shape)
    if opcode in ("collective-permute-start", "all-to-all-start"):  # (operand, result, counters)
        size /= 2
    elif opcode in ("all-gather-start", "reduce-scatter-start"):  # (operand, result)
        size *= group / (group + 1)
    elif opcode == "reduce-scatter":
        size *= group
    if scattered and kind == "all-reduce":
        kind = "reduce-scatter"
    return Collective(kind, size, group, times)


def _bytes(shape: str) -> float:
    """Bytes of an array, or of a tuple's arrays together."""
    return sum(
        _width(kind) * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in _ARRAY.findall(shape)
    )


def _width(kind: str) -> float:
    if kind in _WIDTHS:
        return _WIDTHS[kind]
    bits = re.match(r"[a-z]+(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0


def _group(line: str, devices: int) -> int:
    """Devices of one group: `{{0,1},{2,3}}`, `[2,2]<=[4]` or `mesh['x'=2,'y'=2] {'y'}`."""
    if lists := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(lists[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']+)'", mesh[2]))
    return devices

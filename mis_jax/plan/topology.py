"""Devices of hardware that is not here, by a name such as 'v5e:4x4' or 'h100:8'."""

import importlib.util
import os
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.experimental import topologies

from mis_jax.flops import CHIPS, Chip
from mis_jax.plan.gpu import open_gpus

_NAME = re.compile(r"(?P<chip>[a-z]+\d+[a-z]*):(?P<sides>\d+(?:x\d+)*)")
_EXAMPLES = "v5e:4x4, v6e:2x4, v5p:2x2x4, h100:8"
# Accelerator types as Google's cloud has them: v5litepod-16 and v6e-16 count chips, v5p-32 and
# v4-32 the two cores of a chip. Source: cloud.google.com/tpu/docs, the page of each version.
_ACCELERATOR = re.compile(r"(?P<chip>v5litepod|v5e|v6e|v5p|v4)-(?P<number>\d+)")
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
# Without them libtpu looks for a cloud machine's description, in vain and aloud. Any value does.
_NOWHERE = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no device is used, so none is shared
}  # fmt: skip


@dataclass(frozen=True)
class Topology:
    """Devices to compile for, and what is known of them."""

    name: str
    chip: Chip
    chips: int  # of one slice
    slices: int
    sides: tuple[int, ...]  # chips along each dimension of a slice's torus
    devices: list[Any]

    @property
    def is_tpu(self) -> bool:
        return self.chip.name not in ("h100", "h200")

    def bandwidth(self, group: int) -> float:
        """Bytes a second that a device of a group of so many takes in from the others.

        TPUs: over the links of as many dimensions of the torus as the group needs, the longest
        first; both ways round where the dimension is closed to a ring.
        """
        if not self.is_tpu:
            return self.chip.link
        links, covered = 0, 1
        for side in sorted((side for side in self.sides if side > 1), reverse=True):
            if covered >= group:
                break
            links += 2 if self._is_ring(side) else 1
            covered *= side
        return max(links, 1) * self.chip.link

    def _is_ring(self, side: int) -> bool:
        if self.chip.name in ("v5e", "v6e"):  # two dimensions, closed where a whole pod is used
            return side == 16
        return len(self.sides) == 3 and all(side % 4 == 0 for side in self.sides)


def open_topology(name: str, slices: int = 1) -> Topology:
    """The topology of this name; ValueError in one line when it is unknown or cannot be opened."""
    match = _NAME.fullmatch(_by_shape(name.strip().lower()))
    if not match or match["chip"] not in CHIPS:
        raise ValueError(
            f"topology '{name}' is not known; give CHIP:SIZE with a chip of {', '.join(CHIPS)}, "
            f"such as {_EXAMPLES}"
        )
    chip = CHIPS[match["chip"]]
    sides = tuple(int(side) for side in match["sides"].split("x"))
    if chip.name in ("h100", "h200"):
        if len(sides) != 1:
            raise ValueError(f"topology '{name}': give the number of GPUs, such as {chip.name}:8")
        return Topology(name, chip, sides[0], 1, sides, open_gpus(chip.name, sides[0]))
    devices = _open_tpus(name, chip.name, sides, slices)
    return Topology(name, chip, prod(sides), slices, sides, devices)


def _by_shape(name: str) -> str:
    """An accelerator type by its chip and its shape; any other name as it is."""
    match = _ACCELERATOR.fullmatch(name)
    if match is None:
        return name
    chip, number = match["chip"].replace("litepod", "e"), int(match["number"])
    shape = _DEEP.get(number // 2) if chip in ("v5p", "v4") else _FLAT.get(number)
    return f"{chip}:{shape}" if shape else name


def _open_tpus(name: str, chip: str, sides: tuple[int, ...], slices: int) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology '{name}' needs TPUs' compiler, libtpu: pip install 'mis-jax[tpu]' "
            "(no TPU is needed)"
        )
    if jax.default_backend() != "tpu":
        for variable, value in _NOWHERE.items():
            os.environ.setdefault(variable, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if prod(sides) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        layout = f"{chip}:{'x'.join(map(str, sides))}"
        return list(topologies.get_topology_desc(layout, platform="tpu", **options).devices)
    except Exception as error:  # JaxRuntimeError, NotImplementedError: whatever libtpu has to say
        reason = " ".join(str(error).split()).removeprefix("INVALID_ARGUMENT: ")
        raise ValueError(
            f"topology '{name}' cannot be opened ({reason:.160}); give one that exists, such as "
            f"{_EXAMPLES}"
        ) from None

"""How long a step takes at best: the slowest of products, memory and links hides the others."""

from dataclasses import dataclass

from mis_jax.plan.collectives import Collective
from mis_jax.plan.topology import Topology

EFFICIENCY = 0.7  # of the peak that large products reach
BANDWIDTH = 0.8  # of nominal memory bandwidth


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step that each resource would take alone."""

    compute: float
    memory: float
    collectives: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.collectives)

    @property
    def bound(self) -> str:
        """What is slowest."""
        times = {
            "products": self.compute, "memory": self.memory, "collectives": self.collectives
        }  # fmt: skip
        return max(times, key=lambda name: times[name])


def roofline(
    topology: Topology, *, operations: float, bytes_moved: float, found: list[Collective]
) -> Roofline:
    """Times of a step of so many `operations` on all devices and `bytes_moved` on each of them."""
    chip = topology.chip
    devices = len(topology.devices)
    return Roofline(
        compute=operations / (devices * chip.device_peak * EFFICIENCY),
        memory=bytes_moved / (chip.device_bandwidth * BANDWIDTH),
        collectives=sum(one.traffic / topology.bandwidth(one.group) for one in found),
    )


def assumptions(topology: Topology) -> list[str]:
    """What the times rest on, in words."""
    chip = topology.chip
    link = (
        f"{chip.link / 1e9:.0f} GB/s one way over each link of the torus's dimensions that a "
        "collective spans, both ways round where they are rings"
        if topology.is_tpu
        else f"{chip.link / 1e9:.0f} GB/s one way from each GPU"
    )
    lines = [
        f"products at {EFFICIENCY:.0%} of {chip.peak / 1e12:.0f} TFLOP/s a chip",
        f"memory at {BANDWIDTH:.0%} of {chip.bandwidth / 1e9:.0f} GB/s a chip; activations are not "
        "counted in its bytes",
        link,
        "the slowest of the three hides the other two; data is there in time",
    ]
    if topology.slices > 1:
        lines.append("the network between slices is taken for a link like the others")
    if not topology.is_tpu:
        lines.append(
            "buffers are those of the CUDA plugin's compiler for this card; kernels are not checked"
        )
    return lines

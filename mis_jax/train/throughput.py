"""How fast a run is, from the counts and the seconds of its steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from mis_jax import flops
from mis_jax.config import RunConfig
from mis_jax.model.config import InternVLConfig


@dataclass(frozen=True)
class ThroughputMeter:
    """Rates of a run. `peak` is what all its devices can compute a second; None if not known."""

    config: RunConfig
    model: InternVLConfig
    peak: float | None

    @classmethod
    def of(cls, config: RunConfig, model: InternVLConfig, devices: list[Any]) -> "ThroughputMeter":
        chip = flops.chip_of(devices[0].device_kind)
        return cls(config, model, None if chip is None else chip.device_peak * len(devices))

    def rates(
        self, counts: Mapping[str, float], samples: int, positions: int, seconds: float
    ) -> dict[str, float]:
        """What is logged of a step beside its own numbers.

        `counts` has `tokens`, `tiles` and `squares` (of the samples' lengths, summed); `positions`
        is how many tokens its rows could hold. MFU counts the vision tower, causal attention as
        half, and the backward pass of what is trained alone; nothing that is computed again.
        """
        lora = self.config.lora
        work = flops.forward(
            self.model,
            tokens=counts["tokens"],
            tiles=counts["tiles"],
            squares=counts["squares"],
        )
        operations = flops.training(
            work, self.config.train.freeze, lora_on=lora.targets if lora.rank else ()
        )
        rates = {
            "tokens_per_second": counts["tokens"] / seconds,
            "samples_per_second": samples / seconds,
            "useful_tokens": counts["tokens"] / positions,
            "tflops_per_second": operations / seconds / 1e12,
        }
        if self.peak is not None:
            rates["mfu"] = operations / seconds / self.peak
        if memory := jax.local_devices()[0].memory_stats():  # None on a CPU
            rates["memory_gib"] = memory["peak_bytes_in_use"] / flops.GIB
        return rates
